"""One trial: a training run in a folder of its own, stopped early if it is hopeless."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from tightrope.api import find_device, make_network, run_recipe
from tightrope.data import as_source, load
from tightrope.errors import DivergedError, FileError, InputError, TightropeError
from tightrope.files import check_line, locked, read_json, read_lines, to_json, write_atomically
from tightrope.recipes import parse_recipe
from tightrope.train import Interrupted, Method
from tightrope.train.schedules import settles
from tightrope.tune.ranges import Value

CHECKS = (0.5, 0.6, 0.7, 0.8, 0.9)
"""Shares of a run at which it is compared with the finished trials."""

MARGIN = 0.05
"""By how much another trial must be better, in both accuracies, for a trial to be stopped."""

PATIENCE = 60.0  # seconds

State = Literal["finished", "pruned", "failed"]


class Point(BaseModel):
    """Accuracies, in [0, 1], on held-out training examples.

    Args:
        clean: share of examples that are classified correctly.
        certified: share of examples that are proved at the recipe's test eps, by the method's own bounds.
    """

    model_config = ConfigDict(frozen=True)

    clean: float
    certified: float

    def beats(self, other: Point) -> bool:
        """Whether it is no worse in either accuracy, and better in one."""
        no_worse = self.clean >= other.clean and self.certified >= other.certified
        return no_worse and self != other


class Trial(BaseModel):
    """What came of a trial: the file `trial.json` in its run folder.

    Args:
        format: of this file.
        number: of the trial, from 0.
        values: what was tried, by the recipe's dotted keys.
        state: "finished", "pruned" (stopped early by the rule) or "failed".
        reason: why it was pruned or failed.
        point: accuracies after its last epoch, if it had one.
        epochs: how many epochs it was trained for.
        seconds: time spent in training steps.
        along: accuracies at those `CHECKS` that lie behind its ramps.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["tightrope-trial/1"] = "tightrope-trial/1"
    number: int
    values: dict[str, Value]
    state: State
    reason: str = ""
    point: Point | None = None
    epochs: int = 0
    seconds: float = 0.0
    along: dict[float, Point] = {}


@dataclass(frozen=True)
class Task:
    """A trial that is to be run.

    Args:
        search: the folder of the search.
        number: of the trial.
        values: what is tried.
        content: the recipe with these values.
        margin: by how much another trial must be better for this one to be stopped.
        device: where it is trained.
    """

    search: Path
    number: int
    values: Mapping[str, Value]
    content: Mapping[str, Any]
    margin: float = MARGIN
    device: str = "auto"

    @property
    def folder(self) -> Path:
        """Its run folder."""
        return self.search / "trials" / f"{self.number:04d}"


def run(task: Task) -> None:
    """Train as the task says, going on from where an earlier attempt was stopped, and write `trial.json`.

    What the training prints is written to `train.log` in the run folder.

    Raises:
        Interrupted: on Ctrl-C or SIGTERM, after saving.
        TightropeError: if the disk is full, or another process trains in the run folder.
        FileError: if one of its files cannot be read or written, is damaged, or belongs to another run.
        DataError: if the data are missing or damaged.
    """
    task.folder.mkdir(parents=True, exist_ok=True)
    _wait_for(task.folder)
    state: State = "finished"
    reason = ""
    method: Method | None = None
    epochs = 0

    def watch(record: Mapping[str, Any]) -> bool:
        nonlocal state, reason
        assert method is not None
        check = due(record["epoch"], epochs, settled(method))
        if check is None:
            return False
        rival = hopeless(_point(record), check, read_trials(task.search), task.margin)
        if rival is not None:
            state, reason = "pruned", f"trial {rival} was better in both at {check:.0%} of its run"
        return rival is not None

    with (task.folder / "train.log").open("a", encoding="utf-8") as log, contextlib.redirect_stderr(log):
        dataset = load(task.content["data"])  # all trials need it: where it is gone, none of them has failed
        source = as_source(dataset.train, find_device(task.device))
        try:
            recipe = parse_recipe(task.content, f"trial {task.number}")
            method, epochs = recipe.build_method(), recipe.training.epochs
            network = make_network(recipe, dataset)
            seen = _metrics(task.folder)
            if not (seen and watch(seen[-1])):  # may have been killed after a check that was to stop it
                run_recipe(recipe, method, network, source, out=task.folder, resume=True, watch=watch)
        except Interrupted:
            if state != "pruned":
                raise
        except FileError:
            raise  # its values are not to blame: the search stops, and the trial can go on
        except (DivergedError, InputError, torch.OutOfMemoryError, MemoryError) as error:
            state, reason = "failed", str(error) or "out of memory"
    records = _metrics(task.folder)
    trial = Trial(
        number=task.number,
        values=dict(task.values),
        state=state,
        reason=reason,
        point=_point(records[-1]) if records else None,
        epochs=records[-1]["epoch"] if records else 0,
        seconds=records[-1]["seconds"] if records else 0.0,
        along=_along(records, epochs, method),
    )
    write_atomically(task.folder / "trial.json", trial.model_dump_json(indent=2) + "\n")


def _wait_for(folder: Path) -> None:
    """Wait while a worker of a search that was killed saves its state here, which takes it a step."""
    taken = TightropeError(f"another process is training in {folder}; wait for it, then go on with --resume")
    with locked(folder / ".lock", taken, timeout=PATIENCE):
        pass


def settled(method: Method) -> float:
    """Share of a run after which neither eps nor a weight, or the share of a relaxation, moves any more.

    Infinite for layer by layer.

    Before it, accuracies say little of how a run ends: certified accuracy rises with the ramp, clean accuracy
    falls. Stages of a run that goes layer by layer cannot be compared at all.
    """
    if method.layerwise is not None:
        return math.inf
    numbers = [method.eps, *(loss.weight for loss in method.losses)]
    if method.relaxation is not None:
        numbers.append(method.relaxation.presence)
    return max(map(settles, numbers))


def due(epoch: int, epochs: int, after: float) -> float | None:
    """The check that follows this epoch of so many, or None; none follows the last epoch.

    Args:
        epoch: how many epochs are done.
        epochs: of how many.
        after: share of the run before which nothing is checked.
    """
    if epoch >= epochs:
        return None
    passed = [check for check in CHECKS if check >= after and epoch - 1 < _at(check, epochs) <= epoch]
    return max(passed, default=None)


def hopeless(point: Point, check: float, trials: Iterable[Trial], margin: float) -> int | None:
    """Number of a finished trial that was better by the margin in both accuracies at this check, if any.

    Args:
        point: accuracies now.
        check: share of the run that is done, one of `CHECKS`.
        trials: the trials so far.
        margin: how much better, in [0, 1].
    """
    for trial in trials:
        rival = trial.along.get(check)
        if trial.state != "finished" or rival is None:
            continue
        # Shares of a few hundred examples: a difference of exactly the margin counts, whatever its last bit.
        if min(rival.clean - point.clean, rival.certified - point.certified) >= margin - 1e-9:
            return trial.number
    return None


def front(trials: Iterable[Trial]) -> list[Trial]:
    """The finished trials that no other finished trial beats, by rising clean accuracy."""
    finished = [(trial, trial.point) for trial in trials if trial.state == "finished" and trial.point]
    best = [
        (point.clean, -point.certified, trial.number, trial)
        for trial, point in finished
        if not any(other.beats(point) for _, other in finished)
    ]
    return [trial for *_, trial in sorted(best, key=lambda entry: entry[:3])]


def read_trials(search: Path) -> list[Trial]:
    """The trials of a search that have come to an end, by number.

    Raises:
        FileError: if a file is broken.
    """
    return [read_trial(path) for path in sorted(search.glob("trials/*/trial.json"))]


def read_trial(path: Path) -> Trial:
    """What `run` wrote.

    Raises:
        FileError: if the file is missing or broken.
    """
    content = read_json(path)
    try:
        return Trial.model_validate_json(to_json(content))
    except ValidationError as error:
        first = error.errors()[0]
        raise FileError(
            f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}; delete the file: with --resume the "
            "trial goes on"
        ) from None


def _at(check: float, epochs: int) -> int:
    """The first epoch that ends at this share of the run or beyond."""
    return math.ceil(check * epochs - 1e-9)


def _point(record: Mapping[str, Any]) -> Point:
    return Point.model_validate(record["held_out"])


def _along(records: Sequence[Mapping[str, Any]], epochs: int, method: Method | None) -> dict[float, Point]:
    if method is None:
        return {}
    after, by_epoch = settled(method), {record["epoch"]: record for record in records}
    checks = [check for check in CHECKS if check >= after and _at(check, epochs) in by_epoch]
    return {check: _point(by_epoch[_at(check, epochs)]) for check in checks}


_RECORD: TypeAdapter[dict[str, Any]] = TypeAdapter(dict[str, Any])


def _metrics(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    return [check_line(_RECORD, line, path, number) for number, line in enumerate(read_lines(path), start=1)]

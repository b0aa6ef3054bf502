"""The search: Optuna proposes what to try next, trials are run, and everything is kept on the way."""

from __future__ import annotations

import itertools
import os
import statistics
import time
import tomllib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
from filelock import FileLock

from tightrope import parallel
from tightrope.api import device_for, flatten, make_network, prepare, resolve
from tightrope.data import as_source, load
from tightrope.errors import FileError, InputError
from tightrope.extras import require
from tightrope.files import locked, to_json, write_atomically
from tightrope.identity import check_identity
from tightrope.progress import Progress
from tightrope.provenance import environment
from tightrope.recipes import parse_recipe
from tightrope.train.checkpoint import derive_seed
from tightrope.tune.found import FORMAT, Found, read_about, read_search
from tightrope.tune.ranges import Between, OneOf, Range, Value, read_ranges, size, with_values
from tightrope.tune.trial import MARGIN, Task, Trial, front, read_trial, read_trials
from tightrope.tune.workers import Workers

TRIALS = 20


@dataclass(frozen=True)
class Space:
    """What is searched.

    Args:
        base: the resolved recipe.
        ranges: what varies, by dotted key.
        seed: of the recipe, and of the search.
    """

    base: Mapping[str, Any]
    ranges: Mapping[str, Range]
    seed: int


def search(
    content: Mapping[str, Any],
    source: str,
    out: Path,
    *,
    trials: int = TRIALS,
    jobs: int = 1,
    budget: float | None = None,
    margin: float = MARGIN,
    device: str = "auto",
    resume: bool = False,
) -> Found:
    """Search a recipe's declared ranges for good pairs of clean and certified accuracy.

    Both are measured on the held-out training examples, after the last epoch; the test set is not touched.
    Every trial is a run folder `out/trials/NNNN`.

    Args:
        content: a recipe with a section `tune`.
        source: how errors call it.
        out: folder of the search.
        trials: how many trials, with those of a search that is resumed.
        jobs: how many at once, each in a process of one thread.
        budget: seconds; no trial is begun that would not be done in that time.
        margin: a trial is stopped early once another was better by this much in both accuracies.
        device: where trials are trained.
        resume: go on with the search in `out`.

    Raises:
        InputError: if something given cannot be used, or Optuna is not installed.
        IdentityError: if `out` holds another search.
        Interrupted: on Ctrl-C or SIGTERM; everything is kept.

    Source: Ozaki et al. 2022 (multi-objective TPE), as Optuna has it.
    """
    optuna = require("optuna", "tune", "a search over ranges")
    began = time.monotonic()
    space, about = _prepare(content, source, jobs, margin, device)
    with _only_search_in(out):
        _begin(out, space, content, about, resume)
        study = _open(optuna, out)
        waiting = deque(_unfinished(optuna, study, out))
        done = len(read_trials(out))
        running: dict[int, float] = {}
        took: list[float] = []

        def next_values() -> tuple[int, Mapping[str, Value]] | None:
            if waiting:
                return waiting.popleft()
            # A trial that would take as long as the others did must fit into what is left.
            end = time.monotonic() - began + (statistics.mean(took) if took else 0.0)
            if budget is not None and end > budget:
                return None
            tried = [trial.user_attrs["values"] for trial in _begun(study)]
            return None if len(tried) >= trials else _propose(optuna, study, space, tried)

        with Workers(jobs) as workers, Progress("tune", max(trials, done), done, "trial") as progress:
            while True:
                while workers.free and (proposed := next_values()) is not None:
                    number, values = proposed
                    running[number] = time.monotonic()
                    whole = with_values(space.base, values)
                    workers.start(Task(out, number, values, whole, margin, device))
                if not workers.busy:
                    break
                for task in workers.done():
                    trial = read_trial(task.folder / "trial.json")
                    _tell(optuna, study, trial)
                    if trial.state == "finished":
                        took.append(time.monotonic() - running[trial.number])
                    progress.note(_line(trial, read_trials(out)))
                    progress.advance()
    return read_search(out)


def _prepare(
    content: Mapping[str, Any], source: str, jobs: int, margin: float, device: str
) -> tuple[Space, dict[str, Any]]:
    """What is searched, and what is known of it; every problem there is with it is found here."""
    recipe = parse_recipe(content, source)
    for key in ("data", "model"):
        if getattr(recipe, key) is None:
            raise InputError(f"{source} says no {key}")
    assert recipe.data is not None
    where = device_for(parallel.Workers(jobs), device)
    dataset = load(recipe.data)
    examples = as_source(dataset.train, where)
    method = recipe.build_method()
    recipe = resolve(recipe, method, examples)
    base = tomllib.loads(recipe.to_toml())
    ranges = read_ranges(content.get("tune"), base, source)
    prepare(recipe, method, make_network(recipe, dataset), examples)
    settings = recipe.model_dump(mode="json", exclude={"training": {"checkpoint_seconds"}})
    words = {key: str(one) for key, one in ranges.items()}
    identity = {
        **flatten(settings),
        **{f"tune.{key}": one.identity() for key, one in ranges.items()},
        "prune margin": margin,
        "data identity": examples.identity(),
    }
    shared = {"data": recipe.data, "test_eps": recipe.test_eps, "held_out": recipe.held_out}
    about: dict[str, Any] = {"format": FORMAT, **shared, "seed": recipe.seed, "model": recipe.model}
    about |= {"method": base["method"]["name"], "margin": margin, "ranges": words}
    about |= {"environment": environment(where, recipe.seed), "identity": identity}
    return Space(base, ranges, recipe.seed), about


def _begin(
    out: Path, space: Space, content: Mapping[str, Any], about: Mapping[str, Any], resume: bool
) -> None:
    """Write down what is searched, or check that the folder's search is the same."""
    path = out / "tune.json"
    if path.exists():
        if not resume:
            raise InputError(
                f"{out} already holds a search: resume it (--resume), or choose another folder (--out)"
            )
        check_identity(read_about(out)["identity"], about["identity"], str(path))
        return
    if resume:
        raise InputError(f"{out} holds no search to resume: there is no {path}")
    write_atomically(out / "recipe.toml", tomli_w.dumps({**space.base, "tune": content["tune"]}))
    write_atomically(path, to_json(about, indent=2) + "\n")


@contextmanager
def _only_search_in(out: Path) -> Iterator[None]:
    taken = InputError(f"another search is going on in {out}; wait for it, or choose another --out")
    with locked(out / ".lock", taken):
        yield


def _open(optuna: Any, out: Path) -> Any:
    """The study in the folder: a file of JSON lines, to which only this process appends."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path = out / "study.journal"
    if path.exists():  # a line that a crash cut off would spoil the next one
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    # A lock of the system's, unlike Optuna's own, is gone when its process is.
    backend = optuna.storages.journal.JournalFileBackend(str(path), lock_obj=FileLock(f"{path}.lock"))
    try:
        return optuna.create_study(
            storage=optuna.storages.JournalStorage(backend),
            study_name="tightrope",
            directions=["maximize", "maximize"],
            load_if_exists=True,
        )
    except (ValueError, LookupError, TypeError, AttributeError, AssertionError) as error:  # all Optuna's
        raise FileError(
            f"{path} is damaged ({type(error).__name__}: {error}): restore it, or search in another folder"
        ) from None


def _unfinished(optuna: Any, study: Any, out: Path) -> Iterator[tuple[int, Mapping[str, Value]]]:
    """What an earlier part of the search has begun and not ended; ends that Optuna missed are told to it."""
    states = optuna.trial.TrialState
    ended = {trial.number: trial for trial in read_trials(out)}
    for number, trial in enumerate(_begun(study)):
        if trial.state == states.RUNNING and number in ended:
            _tell(optuna, study, ended[number])
        elif trial.state == states.RUNNING:
            yield number, trial.user_attrs["values"]
    for trial in study.get_trials(deepcopy=False, states=(states.RUNNING,)):
        if "values" not in trial.user_attrs:  # killed while it was asked for
            study.tell(trial.number, state=states.FAIL)


def _begun(study: Any) -> list[Any]:
    """Optuna's trials that became trials of the search, by the search's number.

    Optuna also counts what it proposed twice, or was killed over: by its own numbers a search that was
    stopped would go on with other seeds.
    """
    return [trial for trial in study.get_trials(deepcopy=False) if "values" in trial.user_attrs]


def _propose(
    optuna: Any, study: Any, space: Space, tried: list[Mapping[str, Value]]
) -> tuple[int, Mapping[str, Value]] | None:
    """A trial to run, with values that were not tried before; None if there are no others.

    The sampler's seed is a function of the trial's number, so a search that was stopped goes on as if it
    had not been.
    """
    if len(tried) >= size(space.ranges):
        return None
    distributions = {key: _distribution(optuna, one) for key, one in space.ranges.items()}
    seed = derive_seed(space.seed, "trial", len(tried)) % 2**32
    study.sampler = optuna.samplers.TPESampler(seed=seed)
    trial = study.ask(distributions)
    if trial.params in tried:  # only where everything is finite
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
        all_values = itertools.product(*(one.values() for one in space.ranges.values()))
        combinations = (dict(zip(space.ranges, values, strict=True)) for values in all_values)
        study.enqueue_trial(next(values for values in combinations if values not in tried))
        trial = study.ask(distributions)
    trial.set_user_attr("values", trial.params)
    return len(tried), trial.params


def _distribution(optuna: Any, one: Range) -> Any:
    if isinstance(one, OneOf):
        return optuna.distributions.CategoricalDistribution(one.choices)
    assert isinstance(one, Between)
    if one.whole:
        return optuna.distributions.IntDistribution(int(one.low), int(one.high), log=one.log)
    return optuna.distributions.FloatDistribution(one.low, one.high, log=one.log)


def _tell(optuna: Any, study: Any, trial: Trial) -> None:
    """Tell Optuna how a trial ended; a failed one counts as pruned, else it would learn nothing of it."""
    number = _begun(study)[trial.number].number
    if trial.state == "finished" and trial.point is not None:
        study.tell(number, [trial.point.clean, trial.point.certified])
    else:
        study.tell(number, state=optuna.trial.TrialState.PRUNED)


def _line(trial: Trial, trials: Iterable[Trial]) -> str:
    words = f"trial {trial.number} {trial.state}"
    if trial.point is not None:
        words += f": clean {trial.point.clean:.2%}, certified {trial.point.certified:.2%}"
    if trial.reason:
        words += f" ({trial.reason.splitlines()[0].split('. ')[0]})"
    return f"{words}; {len(front(trials))} on the front"

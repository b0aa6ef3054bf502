"""What a search has found: its folder, read back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict  # pydantic refuses typing.TypedDict before Python 3.12

from tightrope.errors import FileError, InputError
from tightrope.files import read_json
from tightrope.tune.trial import Trial, front, read_trials

FORMAT = "tightrope-tune/1"


@with_config(ConfigDict(extra="allow"))
class _About(TypedDict):
    data: str
    model: str
    method: str
    test_eps: float | None
    held_out: int
    seed: int
    ranges: dict[str, str]
    identity: dict[str, Any]
    environment: dict[str, Any]


@dataclass(frozen=True)
class Found:
    """A search and its trials so far.

    Args:
        folder: of the search.
        about: what `tune.json` says.
        trials: those that have come to an end, by number.
    """

    folder: Path
    about: dict[str, Any]
    trials: list[Trial]

    @property
    def front(self) -> list[Trial]:
        """The finished trials that no other one beats, by rising clean accuracy."""
        return front(self.trials)

    @property
    def ranges(self) -> dict[str, str]:
        """What was searched, in words, by the recipe's dotted keys."""
        found: dict[str, str] = self.about["ranges"]
        return found

    def count(self, state: str) -> int:
        """How many trials ended like this."""
        return sum(trial.state == state for trial in self.trials)

    def summary(self) -> dict[str, Any]:
        """The front and the counts, as plain JSON values; accuracies are shares in [0, 1]."""
        best = {trial.number for trial in self.front}
        return {
            "format": "tightrope-front/1",
            **{name: self.about[name] for name in ("data", "test_eps", "held_out", "seed")},
            "finished": self.count("finished"),
            "pruned": self.count("pruned"),
            "failed": self.count("failed"),
            "front": [self._line(trial) for trial in self.front],
            "others": [
                {**self._line(trial), "state": trial.state, "reason": trial.reason}
                for trial in self.trials
                if trial.number not in best
            ],
        }

    def _line(self, trial: Trial) -> dict[str, Any]:
        return {
            "trial": trial.number,
            "clean": None if trial.point is None else trial.point.clean,
            "certified": None if trial.point is None else trial.point.certified,
            "values": trial.values,
            "epochs": trial.epochs,
            "seconds": trial.seconds,
            "run": f"trials/{trial.number:04d}",
        }


def read_search(folder: Path) -> Found:
    """Read the folder of a search.

    Raises:
        InputError: if it holds none, or one of its files is broken.
    """
    return Found(folder, read_about(folder), read_trials(folder))


def read_about(folder: Path) -> dict[str, Any]:
    """What `tune.json` in the folder of a search says.

    Raises:
        InputError: if it is missing or damaged.
    """
    path = folder / "tune.json"
    about = read_json(path)
    if about.get("format") != FORMAT:
        raise InputError(f"{path} has format {about.get('format')!r}; this reads {FORMAT!r}")
    try:
        TypeAdapter(_About).validate_python(about)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise FileError(f"{path}: {where}: {first['msg']}; restore the file") from None
    return about

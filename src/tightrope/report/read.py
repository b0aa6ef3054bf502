"""Read the files of a run folder; a broken one is an error that names the file and the line."""

from __future__ import annotations

import base64
import binascii
import json
import math
import tomllib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict  # pydantic refuses typing.TypedDict before Python 3.12

from tightrope.errors import InputError
from tightrope.files import read_json

STATUSES = ("robust", "undecided", "falsified", "misclassified")
T = TypeVar("T")
_extensible = with_config(ConfigDict(extra="allow", strict=True))


@_extensible
class HeldOut(TypedDict):
    """Accuracies (in [0, 1]) on held-out training examples after one epoch."""

    clean: float
    certified: NotRequired[float | None]
    examples: NotRequired[int]
    eps: NotRequired[float]


@_extensible
class Layer(TypedDict):
    """Shares of neurons (in [0, 1]) and mean bound width of one activation after one epoch."""

    name: str
    dead: float
    unstable: float
    width: float


@_extensible
class Epoch(TypedDict):
    """One line of metrics.jsonl."""

    epoch: int
    seconds: NotRequired[float]  # of training since the first epoch
    eps: NotRequired[float | None]
    lr: NotRequired[float | None]
    losses: NotRequired[dict[str, float]]
    weights: NotRequired[dict[str, float]]
    held_out: NotRequired[HeldOut | None]
    layers: NotRequired[list[Layer]]


class Witness(TypedDict):
    """A counterexample: its shape and its float64 values, little endian, in base64."""

    shape: list[Annotated[int, Field(ge=0)]]
    float64: str


@_extensible
class VerdictRow(TypedDict):
    """One example's line of certify-*.jsonl."""

    index: Annotated[int, Field(ge=0)]
    label: int
    predicted: int
    status: Literal["robust", "undecided", "falsified", "misclassified"]
    stage: str
    margin: float | None
    seconds: float
    witness: NotRequired[Witness | None]


@_extensible
class Identity(TypedDict):
    """What a certify file's verdicts were made from."""

    eps: float
    verifier: str
    norm: NotRequired[str | int]
    attack: NotRequired[Any]


@_extensible
class Header(TypedDict):
    """The first line of certify-*.jsonl."""

    format: Literal["tightrope-certify/1"]
    identity: Identity
    data: str


class Counts(TypedDict):
    """Verdicts counted (examples) and as shares of all examples (in [0, 1])."""

    examples: int
    clean_correct: int
    robust: int
    falsified: int
    undecided: int
    clean_accuracy: float | None
    attacked_accuracy: float | None
    certified_accuracy: float | None


_EPOCH, _HEADER, _ROW = TypeAdapter(Epoch), TypeAdapter(Header), TypeAdapter(VerdictRow)


def read_metrics(path: Path) -> list[Epoch]:
    """Read metrics.jsonl: one record per epoch, in file order.

    A last line that was cut off while it was written is ignored.

    Raises:
        InputError: the file cannot be read, or another line is broken; the message names file and line.
    """
    return [_parse(_EPOCH, line, path, number) for number, line in _lines(path)]


def read_verdicts(path: Path) -> tuple[Header, list[VerdictRow]]:
    """Read a certify-*.jsonl file: its header and one record per example, in file order.

    A last line that was cut off while it was written is ignored.

    Raises:
        InputError: the file cannot be read, has no header, holds an example twice, or another line is
            broken; the message names file and line.
    """
    lines = _lines(path)
    if not lines:
        raise InputError(f"{path}, line 1: the header is missing; run `tightrope certify` again to make it")
    header = _parse(_HEADER, lines[0][1], path, 1)
    rows: list[VerdictRow] = []
    seen: dict[int, int] = {}
    for number, line in lines[1:]:
        row = _parse(_ROW, line, path, number)
        first = seen.setdefault(row["index"], number)
        if first != number:
            raise InputError(
                f"{path}, line {number}: example {row['index']} already stands on line {first}; "
                "remove one of the two, or certify again"
            )
        rows.append(row)
    return header, rows


def counts(verdicts: Iterable[VerdictRow], attacked: bool) -> Counts:
    """Count verdicts; accuracies are shares of all examples, None where they are not known.

    An example survives the attack unless it is misclassified or falsified.

    Args:
        verdicts: the records of one certify file.
        attacked: whether an attack was run; without one there is no attacked accuracy.
    """
    found = Counter(row["status"] for row in verdicts)
    total, robust, undecided = found.total(), found["robust"], found["undecided"]
    correct = total - found["misclassified"]
    return Counts(
        examples=total,
        clean_correct=correct,
        robust=robust,
        falsified=found["falsified"],
        undecided=undecided,
        clean_accuracy=correct / total if total else None,
        attacked_accuracy=(robust + undecided) / total if total and attacked else None,
        certified_accuracy=robust / total if total else None,
    )


def witness_values(witness: Witness) -> NDArray[np.float64]:
    """Decode a witness to an array of its shape.

    Raises:
        InputError: the text is not base64, or does not hold as many numbers as the shape says.
    """
    try:
        raw = base64.b64decode(witness["float64"], validate=True)
    except binascii.Error as error:
        raise InputError(f"the witness is not base64 ({error}); certify again") from None
    expected = 8 * math.prod(witness["shape"])
    if len(raw) != expected:
        raise InputError(
            f"the witness of shape {witness['shape']} needs {expected} bytes, got {len(raw)}; certify again"
        )
    return np.frombuffer(raw, dtype="<f8").reshape(witness["shape"]).astype(np.float64)


@dataclass(frozen=True)
class Certificate:
    """One certify file."""

    path: Path
    header: Header
    verdicts: list[VerdictRow]

    @property
    def attacked(self) -> bool:
        """Whether the header says that an attack was run."""
        return bool(self.header["identity"].get("attack"))

    @property
    def counts(self) -> Counts:
        """The verdicts, counted."""
        return counts(self.verdicts, self.attacked)


@dataclass(frozen=True)
class Run:
    """Everything that a run or results folder says; `missing` holds a sentence for each absent piece."""

    path: Path
    recipe: dict[str, Any]
    recipe_text: str
    environment: dict[str, Any]
    result: dict[str, Any]
    epochs: list[Epoch]
    certificates: list[Certificate]
    missing: list[str]


def read_run(folder: Path) -> Run:
    """Read a run or results folder.

    Raises:
        InputError: the folder does not exist, holds nothing to report, or one of its files is broken.
    """
    if not folder.is_dir():
        raise InputError(f"no run folder at {folder}; give the folder that `tightrope train --out` made")
    files = {
        name: folder / name for name in ("recipe.toml", "environment.json", "metrics.jsonl", "result.json")
    }
    certify = sorted(folder.glob("certify-*.jsonl"))
    if not certify and not any(path.is_file() for path in files.values()):
        raise InputError(
            f"{folder} is not a run folder: it holds none of {', '.join(files)}, certify-*.jsonl; "
            "give the folder that `tightrope train --out` made"
        )
    recipe, recipe_text = _toml(files["recipe.toml"])
    environment, result = (
        read_json(files[name]) if files[name].is_file() else {}
        for name in ("environment.json", "result.json")
    )
    epochs = read_metrics(files["metrics.jsonl"]) if files["metrics.jsonl"].is_file() else []
    certificates = [Certificate(path, *read_verdicts(path)) for path in certify]

    missing = []
    if not recipe:
        missing.append("recipe.toml is missing, so what was trained, and how, is known only in part.")
    if not environment and not result:
        missing.append("environment.json is missing, so commit, machine and date are not known.")
    if not epochs and not files["metrics.jsonl"].is_file():
        missing.append("metrics.jsonl is missing, so there are no training curves.")
    elif not epochs:
        missing.append("metrics.jsonl holds no finished epoch yet, so there are no training curves.")
    if not certificates:
        missing.append(
            "There is no certify-*.jsonl file, so nothing has been proved yet: run `tightrope certify` on it."
        )
    missing += [
        f"{certificate.path.name} holds no verdict yet, so it is left out."
        for certificate in certificates
        if not certificate.verdicts
    ]
    finished = [certificate for certificate in certificates if certificate.verdicts]
    return Run(folder, recipe, recipe_text, environment, result, epochs, finished, missing)


def _lines(path: Path) -> list[tuple[int, bytes]]:
    """Numbered lines, from 1; an unfinished last line that is not JSON is dropped."""
    try:
        *lines, tail = path.read_bytes().split(b"\n")
    except OSError as error:
        raise InputError(
            f"cannot read {path}: {error.strerror}; check the path and its permissions"
        ) from None
    if tail:
        try:
            json.loads(tail)
        except ValueError:
            pass
        else:
            lines.append(tail)
    return list(enumerate(lines, start=1))


def _parse(adapter: TypeAdapter[T], line: bytes, path: Path, number: int) -> T:
    try:
        return adapter.validate_json(line)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(
            f"{path}, line {number}: {f'{where}: ' if where else ''}{first['msg']}; "
            "restore the file, or make it again"
        ) from None


def _toml(path: Path) -> tuple[dict[str, Any], str]:
    if not path.is_file():
        return {}, ""
    try:
        text = path.read_text(encoding="utf-8")
        return tomllib.loads(text), text
    except ValueError as error:  # TOMLDecodeError, UnicodeDecodeError
        raise InputError(f"{path} is not TOML ({error}); restore the file") from None

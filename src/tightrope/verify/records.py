"""Files of records: a header that says what they rest on, then one record a line (JSON lines)."""

from __future__ import annotations

import base64
import binascii
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, NotRequired, Protocol, TypeVar, runtime_checkable

import numpy as np
from pydantic import ConfigDict, Field, TypeAdapter, with_config
from torch import from_numpy
from typing_extensions import TypedDict  # pydantic refuses typing.TypedDict before Python 3.12

from tightrope.errors import InputError
from tightrope.files import check_line, read_lines
from tightrope.verify.verdict import Certificate, Status, Verdict, Witness

FORMAT = "tightrope-certify/1"

Count = Annotated[int, Field(ge=0)]
Length = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Finite = Annotated[float, Field(allow_inf_nan=False)]


@runtime_checkable
class Numbered(Protocol):
    """Something about one example."""

    @property
    def index(self) -> int:
        """Number of the example in its data set."""
        ...


R = TypeVar("R", bound=Numbered)


@dataclass(frozen=True)
class Kind(Generic[R]):
    """A kind of file.

    Args:
        header: what its first line must be, as a TypedDict.
        line: what every other line must be, likewise.
        load: makes a record of a line; a ValueError if the line does not add up.
        dump: makes JSON values of a record.
    """

    header: type
    line: type
    load: Callable[[dict[str, Any]], R]
    dump: Callable[[R], dict[str, Any]]


@with_config(ConfigDict(extra="allow", strict=True))
class _Identity(TypedDict):
    eps: Length
    norm: str
    verifier: str
    attack: dict[str, Any] | None


@with_config(ConfigDict(extra="allow", strict=True))
class _Header(TypedDict):
    format: Literal["tightrope-certify/1"]
    identity: _Identity
    data: NotRequired[str | None]
    examples: NotRequired[Count]


@with_config(ConfigDict(strict=True))
class _Witness(TypedDict):
    shape: list[Count]
    float64: str
    predicted: Count


@with_config(ConfigDict(strict=True))
class _Certificate(TypedDict):
    file: str
    sha256: str
    proof: str | None


@with_config(ConfigDict(strict=True))
class _Verdict(TypedDict):
    index: Count
    label: Count
    predicted: Count
    status: Status
    stage: str
    margin: _Finite
    seconds: Length
    witness: _Witness | None
    certificate: NotRequired[_Certificate]


def to_record(verdict: Verdict) -> dict[str, Any]:
    """A verdict as JSON values; a witness bit for bit, little endian."""
    witness = None
    if verdict.witness is not None:
        values = verdict.witness.point.numpy().astype("<f8")
        witness = {
            "shape": list(values.shape),
            "float64": base64.b64encode(values.tobytes()).decode(),
            "predicted": verdict.witness.predicted,
        }
    record = {**vars(verdict), "witness": witness}
    del record["certificate"]
    return record if verdict.certificate is None else {**record, "certificate": vars(verdict.certificate)}


def read_records(path: Path, kind: Kind[R]) -> tuple[dict[str, Any], list[R]]:
    """Header and records of a file, by index; a last line that was cut off is left out.

    Raises:
        InputError: if the file cannot be read, has no header or one of another format, holds an
            example twice, or a line that is no such record; the message names file and line.
    """
    lines = read_lines(path)
    if not lines:
        raise InputError(f"{path}, line 1: the header is missing; delete the file and start afresh")
    header = check_line(TypeAdapter[dict[str, Any]](kind.header), lines[0], path, 1)
    line_type = TypeAdapter[dict[str, Any]](kind.line)
    records: list[R] = []
    first_line: dict[int, int] = {}
    for number, line in enumerate(lines[1:], start=2):
        found = check_line(line_type, line, path, number)
        try:
            record = kind.load(found)
        except ValueError as error:
            raise InputError(f"{path}, line {number}: {error}; restore the file, or start afresh") from None
        first = first_line.setdefault(record.index, number)
        if first != number:
            raise InputError(
                f"{path}, line {number}: example {record.index} already stands on line {first}; "
                "remove one of the two, or start afresh"
            )
        records.append(record)
    return header, sorted(records, key=lambda record: record.index)


def read_inputs(path: Path) -> dict[int, str]:
    """What the examples of a file were, by index (see `resumable.Inputs`); older files do not say."""
    records = [json.loads(line) for line in read_lines(path)[1:]]
    return {record["index"]: record["input"] for record in records if "input" in record}


def read_verdicts(path: Path) -> tuple[dict[str, Any], list[Verdict]]:
    """`read_records` of a file of verdicts."""
    return read_records(path, VERDICTS)


def _from_record(record: dict[str, Any]) -> Verdict:
    """The verdict that `to_record` made this of; a ValueError if its witness does not add up."""
    if "certificate" in record:
        record = {**record, "certificate": Certificate(**record["certificate"])}
    found = record["witness"]
    if found is None:
        return Verdict(**record)
    try:
        content = base64.b64decode(found["float64"], validate=True)
    except binascii.Error as error:
        raise ValueError(f"the witness is not base64 ({error})") from None
    needed = 8 * math.prod(found["shape"])
    if len(content) != needed:
        raise ValueError(f"a witness of shape {found['shape']} needs {needed} bytes, got {len(content)}")
    values = np.frombuffer(content, "<f8").astype("f8").reshape(found["shape"])
    return Verdict(**{**record, "witness": Witness(from_numpy(values), found["predicted"])})


VERDICTS = Kind(_Header, _Verdict, _from_record, to_record)

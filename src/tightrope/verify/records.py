"""Files of verdicts: a header that says what they rest on, then one verdict a line (JSON lines)."""

from __future__ import annotations

import base64
import binascii
import math
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

import numpy as np
from pydantic import ConfigDict, Field, TypeAdapter, with_config
from torch import from_numpy
from typing_extensions import TypedDict  # pydantic refuses typing.TypedDict before Python 3.12

from tightrope.errors import InputError
from tightrope.files import check_line, read_lines
from tightrope.verify.verdict import Status, Verdict, Witness

FORMAT = "tightrope-certify/1"

_Count = Annotated[int, Field(ge=0)]
_Finite = Annotated[float, Field(allow_inf_nan=False)]


@with_config(ConfigDict(extra="allow", strict=True))
class _Identity(TypedDict):
    eps: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    norm: str
    verifier: str
    attack: dict[str, Any] | None


@with_config(ConfigDict(extra="allow", strict=True))
class _Header(TypedDict):
    format: Literal["tightrope-certify/1"]
    identity: _Identity
    data: NotRequired[str | None]


@with_config(ConfigDict(strict=True))
class _Witness(TypedDict):
    shape: list[_Count]
    float64: str
    predicted: _Count


@with_config(ConfigDict(strict=True))
class _Verdict(TypedDict):
    index: _Count
    label: _Count
    predicted: _Count
    status: Status
    stage: str
    margin: _Finite
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    witness: _Witness | None


_HEADER: TypeAdapter[Any] = TypeAdapter(_Header)
_VERDICT: TypeAdapter[Any] = TypeAdapter(_Verdict)


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
    return {**vars(verdict), "witness": witness}


def read_verdicts(path: Path) -> tuple[dict[str, Any], list[Verdict]]:
    """Header and verdicts of a file, in file order; a last line that was cut off is left out.

    Raises:
        InputError: if the file cannot be read, has no header or one of another format, holds an
            example twice, or a line that is no verdict; the message names file and line.
    """
    lines = read_lines(path)
    if not lines:
        raise InputError(f"{path}, line 1: the header is missing; delete the file and start afresh")
    header = check_line(_HEADER, lines[0], path, 1)
    verdicts: list[Verdict] = []
    first_line: dict[int, int] = {}
    for number, line in enumerate(lines[1:], start=2):
        record = check_line(_VERDICT, line, path, number)
        try:
            verdict = _from_record(record)
        except ValueError as error:
            raise InputError(f"{path}, line {number}: {error}; restore the file, or start afresh") from None
        first = first_line.setdefault(verdict.index, number)
        if first != number:
            raise InputError(
                f"{path}, line {number}: example {verdict.index} already stands on line {first}; "
                "remove one of the two, or start afresh"
            )
        verdicts.append(verdict)
    return header, verdicts


def _from_record(record: dict[str, Any]) -> Verdict:
    """The verdict that `to_record` made this of; a ValueError if its witness does not add up."""
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

"""Properties as VNN-LIB files, as the verification competitions exchange them.

A file describes counter-examples: inputs `X_0 ...` in boxes, and outputs `Y_0 ...` that obey linear
inequalities, joined by `and` and `or`. A property holds where there is none ("unsat"). Version 1.0 is read
and written; of version 2.0 what says the same: one network with one input and one output, `X[0,3]`.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from tightrope.errors import InputError
from tightrope.files import write_atomically

MOST_CASES = 100_000
MOST_ENTRIES = 10_000_000
_DEEPEST = 100  # brackets within brackets
_NUMBER = re.compile(r"[+-]?(\d{1,400}\.?\d{0,400}|\.\d{1,400})([eE][+-]?\d{1,3})?")

Atom = tuple[dict[str, Fraction], Fraction, bool]
"""`sum of coefficient times variable <= limit`, exactly; whether it is strict (`<`)."""

Names = Mapping[str, str]
"""What a file calls a variable, and `X_3` or `Y_3` for it."""


@dataclass(frozen=True, eq=False)
class Case:
    """Outputs that a counter-example may have: `rows y <= limits`, all of them at once.

    Args:
        rows: one row per inequality; none at all, if every output is one of a counter-example.
        limits: what it may not exceed.
        strict: which rows may not reach it either. A proof need not look: it excludes equality too.
        written: the inequalities as a file has them, which float64 may round; None if it is not from one.
    """

    rows: Float64[Tensor, "rows outputs"]
    limits: Float64[Tensor, "rows"]
    strict: Bool[Tensor, "rows"]
    written: tuple[Atom, ...] | None = None

    def holds(self, y: Float64[Tensor, "outputs"]) -> bool:
        """Whether these outputs are such; of what a file has written without any rounding."""
        if self.written is None or not bool(y.isfinite().all()):
            values = self.rows @ y
            return bool(torch.where(self.strict, values < self.limits, values <= self.limits).all())
        outputs = [Fraction(value) for value in y.tolist()]
        over = (
            (sum(factor * outputs[int(name[2:])] for name, factor in factors.items()) - limit, strict)
            for factors, limit, strict in self.written
        )
        return all(value < 0 or (value == 0 and not strict) for value, strict in over)


@dataclass(frozen=True, eq=False)
class Query:
    """A box of inputs, and the outputs that none of them may have.

    Args:
        lower: lower corner, inputs in order.
        upper: upper corner.
        cases: an input is a counter-example if one of them holds of its outputs.
        inside: corners of the numbers that lie in the box, if its own were rounded outwards; where none lies
            between an input's bounds, the one nearest to them.
    """

    lower: Float64[Tensor, "inputs"]
    upper: Float64[Tensor, "inputs"]
    cases: tuple[Case, ...]
    inside: tuple[Float64[Tensor, "inputs"], Float64[Tensor, "inputs"]] | None = None


def read_vnnlib(path: Path, inputs: int, outputs: int) -> tuple[Query, ...]:
    """The boxes and cases of a property, for a network of this size.

    Bounds of inputs are rounded outwards where float64 does not have them.

    Raises:
        InputError: if the file is missing or not VNN-LIB, belongs to a network of another size, leaves
            an input unbounded, or says what is no disjunction of boxes and linear inequalities.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    try:
        return _queries(text, inputs, outputs)
    except _Malformed as error:
        raise InputError(f"{path} cannot be used: {error}") from None
    except OverflowError:
        raise InputError(f"{path} cannot be used: a number in it is beyond float64") from None


def write_robustness(
    path: Path,
    lower: Float64[Tensor, "*shape"],
    upper: Float64[Tensor, "*shape"],
    label: int,
    classes: int,
    about: str,
) -> None:
    """Write the property that no input of a box is given another class than its label; a tie is one.

    Args:
        path: the file.
        lower: lower corner.
        upper: upper corner.
        label: the class.
        classes: how many there are.
        about: a comment, one line.
    """
    corners = list(zip(lower.flatten().tolist(), upper.flatten().tolist(), strict=True))
    lines = [f"; {about}"]
    lines += [f"(declare-const X_{i} Real)" for i in range(len(corners))]
    lines += [f"(declare-const Y_{i} Real)" for i in range(classes)]
    for i, (low, high) in enumerate(corners):
        lines += [f"(assert (>= X_{i} {_decimal(low)}))", f"(assert (<= X_{i} {_decimal(high)}))"]
    others = (f"  (and (>= Y_{other} Y_{label}))" for other in range(classes) if other != label)
    lines += ["(assert (or", *others, "))"]
    write_atomically(path, "\n".join(lines) + "\n")


def _decimal(value: float) -> str:
    """The shortest decimal that is read as this number, without an exponent, which VNN-LIB lacks."""
    return np.format_float_positional(value, trim="0")


class _Malformed(Exception):
    """What is wrong with a file."""


def _queries(text: str, inputs: int, outputs: int) -> tuple[Query, ...]:
    names: dict[str, str] = {}
    asserted: list[Any] = []
    for command in _expressions(text):
        head = command[0] if isinstance(command, list) and command else command
        if head in ("declare-const", "declare-fun") and len(command) in (3, 4) and command[-1] == "Real":
            names[str(command[1])] = str(command[1])
        elif head == "declare-network" and not names:
            names = _network(command)
        elif head == "assert" and len(command) == 2:
            asserted.append(command[1])
        elif head != "vnnlib-version":
            raise _Malformed(f"{_shown(command)} is neither a declaration of a Real nor an assertion")
    found = {kind: sum(name.startswith(f"{kind}_") for name in names.values()) for kind in "XY"}
    wanted = {f"X_{i}" for i in range(inputs)} | {f"Y_{i}" for i in range(outputs)}
    if set(names.values()) != wanted:
        raise _Malformed(
            f"it is for a network with {found['X']} inputs (X_0 ...) and {found['Y']} outputs (Y_0 ...), "
            f"this one has {inputs} and {outputs}"
        )
    boxes: dict[tuple[tuple[Fraction, Fraction], ...], list[Case]] = {}
    for conjunction in _alternatives(["and", *asserted], names):
        box = _box(conjunction, inputs)
        if box is not None:
            boxes.setdefault(box, []).append(_case(conjunction, outputs))
    return tuple(_query(box, cases) for box, cases in boxes.items())


def _query(box: Sequence[tuple[Fraction, Fraction]], cases: Sequence[Case]) -> Query:
    def numbers(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)

    outside = numbers([_below(low) for low, _ in box]), numbers([-_below(-high) for _, high in box])
    first, last = [-_below(-low) for low, _ in box], [_below(high) for _, high in box]
    for i, (low, high) in enumerate(box):
        if first[i] > last[i]:
            first[i] = last[i] = float((low + high) / 2)
    return Query(*outside, tuple(cases), (numbers(first), numbers(last)))


def _network(command: Sequence[Any]) -> dict[str, str]:
    """The variables of a network as version 2 declares it: entries of tensors, in order."""
    names: dict[str, str] = {}
    for kind, part, word in zip("XY", command[2:], ("declare-input", "declare-output"), strict=False):
        plain = isinstance(part, list) and len(part) == 4 and all(isinstance(p, str) for p in part)
        shape = re.fullmatch(r"\[(\d+(?:,\d+)*)\]", part[-1]) if plain else None
        if shape is None or part[0] != word or len(command) != 4:
            raise _Malformed(f"{_shown(part)}: only a network of one input and one output can be read")
        sizes = [int(size) for size in shape[1].split(",")]
        if math.prod(sizes) > MOST_ENTRIES:
            raise _Malformed(f"{_shown(part)} has more than {MOST_ENTRIES:,} entries")
        for i, place in enumerate(itertools.product(*map(range, sizes))):
            names[f"{part[1]}[{','.join(map(str, place))}]"] = f"{kind}_{i}"
    return names


def _expressions(text: str) -> Iterator[Any]:
    """The bracketed expressions of a text, as nested lists of words."""
    stack: list[list[Any]] = [[]]
    text = re.sub(r";[^\n]*", "", text)
    text = re.sub(r"\s*\[[^\]]*\]", lambda shape: _packed(shape[0]), text)
    for word in re.findall(r"[()]|[^\s()]+", text):
        if word == "(":
            stack.append([])
            if len(stack) > _DEEPEST:
                raise _Malformed(f"its brackets are more than {_DEEPEST} deep")
        elif word != ")":
            stack[-1].append(word)
        elif len(stack) == 1:
            raise _Malformed("a bracket is closed that was not opened")
        else:
            closed = stack.pop()
            stack[-1].append(closed)
    if len(stack) > 1:
        raise _Malformed("a bracket is not closed")
    yield from stack[0]


def _packed(shape: str) -> str:
    """`[1, 2]` without its spaces; those before it stay, which tell a shape from an index."""
    return (" " if shape[0].isspace() else "") + re.sub(r"\s", "", shape)


def _shown(expression: Any) -> str:
    text = f"({' '.join(map(_shown, expression))})" if isinstance(expression, list) else str(expression)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _alternatives(formula: Any, names: Names) -> list[list[Atom]]:
    """The formula as a disjunction of conjunctions."""
    head = formula[0] if isinstance(formula, list) and formula else None
    if head == "and":
        parts = [_alternatives(part, names) for part in formula[1:]]
        common = [atom for part in parts if len(part) == 1 for atom in part[0]]
        several = [part for part in parts if len(part) != 1]
        if math.prod(map(len, several)) > MOST_CASES:
            raise _Malformed(f"it has more than {MOST_CASES:,} cases")
        return [[*common, *itertools.chain(*chosen)] for chosen in itertools.product(*several)]
    if head == "or":
        return [conjunction for part in formula[1:] for conjunction in _alternatives(part, names)]
    if head in ("<=", "<", ">=", ">", "=", "==") and len(formula) == 3:
        sides = [_linear(part, names) for part in formula[1:]]
        ordered = {"<": [sides], ">": [sides[::-1]], "=": [sides, sides[::-1]]}[head[0]]
        atoms = [_atom(small, large, head in ("<", ">")) for small, large in ordered]
        if any(not factors and (limit < 0 or (strict and limit == 0)) for factors, limit, strict in atoms):
            return []  # never true
        return [[atom for atom in atoms if atom[0]]]
    raise _Malformed(f"{_shown(formula)} is no inequality (<=, <, >=, >, =), and, or")


def _atom(small: dict[str, Fraction], large: dict[str, Fraction], strict: bool) -> Atom:
    """`small <= large`, with the variables on one side."""
    difference = {
        name: small.get(name, Fraction(0)) - large.get(name, Fraction(0)) for name in {*small, *large}
    }
    limit = -difference.pop("", Fraction(0))
    return {name: factor for name, factor in difference.items() if factor}, limit, strict


def _linear(expression: Any, names: Names) -> dict[str, Fraction]:
    """Coefficients by variable; the constant under the empty name."""
    if isinstance(expression, str):
        if expression in names:
            return {names[expression]: Fraction(1)}
        if not _NUMBER.fullmatch(expression):
            raise _Malformed(f"{_shown(expression)!r} is neither a number nor a declared variable")
        return {"": Fraction(expression)}
    head, parts = (expression or [None])[0], [_linear(part, names) for part in expression[1:]]
    if head == "*" and len(parts) == 2:
        for factor, value in (parts, parts[::-1]):
            if set(factor) <= {""}:
                return {name: factor.get("", Fraction(0)) * c for name, c in value.items()}
    if head not in ("+", "-") or not parts:
        raise _Malformed(f"{_shown(expression)} is not linear")
    signs = [1] + [1 if head == "+" else -1] * (len(parts) - 1)
    if head == "-" and len(parts) == 1:
        signs = [-1]
    total: dict[str, Fraction] = {}
    for sign, part in zip(signs, parts, strict=True):
        for name, c in part.items():
            total[name] = total.get(name, Fraction(0)) + sign * c
    return total


def _box(conjunction: Sequence[Atom], inputs: int) -> tuple[tuple[Fraction, Fraction], ...] | None:
    """The box that a conjunction lays down, as the ends of each input, or None if it is empty."""
    lower: list[Fraction | None] = [None] * inputs
    upper: list[Fraction | None] = [None] * inputs
    for factors, limit, strict in conjunction:
        of_inputs = [name for name in factors if name.startswith("X_")]
        if not of_inputs:
            continue
        if len(factors) != 1:
            names = ", ".join(sorted(factors)[:4])
            raise _Malformed(f"an inequality over {names}: inputs may only have bounds of their own")
        if strict:
            raise _Malformed(f"the bound of {of_inputs[0]} is strict: write <= or >=")
        ((name, factor),) = factors.items()
        i, bound = int(name[2:]), limit / factor
        low, high = lower[i], upper[i]
        if factor > 0:
            upper[i] = bound if high is None else min(high, bound)
        else:
            lower[i] = bound if low is None else max(low, bound)
    ends: list[tuple[Fraction, Fraction]] = []
    for i, (low, high) in enumerate(zip(lower, upper, strict=True)):
        if low is None or high is None:
            raise _Malformed(f"the input X_{i} has no {'lower' if low is None else 'upper'} bound")
        if low > high:
            return None
        ends.append((low, high))
    return tuple(ends)


def _below(value: Fraction) -> float:
    """The largest number of float64 that is not larger."""
    nearest = float(value)
    return nearest if Fraction(nearest) <= value else math.nextafter(nearest, -math.inf)


def _case(conjunction: Sequence[Atom], outputs: int) -> Case:
    mine = [atom for atom in conjunction if any(name.startswith("Y_") for name in atom[0])]
    rows = torch.zeros(len(mine), outputs, dtype=torch.float64)
    limits = torch.zeros(len(mine), dtype=torch.float64)
    for i, (factors, limit, _) in enumerate(mine):
        top = max(factors.values(), key=abs)
        # A power of two, which rounds nothing, brings the largest one near 1: a proof asks for a margin above
        # an absolute slack.
        scale = Fraction(2) ** (top.denominator.bit_length() - abs(top.numerator).bit_length())
        for name, factor in factors.items():
            rows[i, int(name[2:])] = float(factor * scale)
        limits[i] = float(limit * scale)
    return Case(rows, limits, torch.tensor([strict for *_, strict in mine], dtype=torch.bool), tuple(mine))

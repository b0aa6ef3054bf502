"""The `[tune]` section of a recipe: which of its keys a search varies, and over which values."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from tightrope.errors import InputError, RecipeError
from tightrope.recipes import Recipe, assign, parse_recipe
from tightrope.train.schedules import Real

Value = bool | int | float | str

# What all trials share: else their accuracies would not measure the same thing.
_SHARED = {
    "data": "all trials learn from the same examples",
    "seed": "it decides which examples are held out, and those are the same for all trials",
    "held_out": "accuracies are compared on the same held-out examples",
    "test_eps": "certified accuracies are compared at the same radius",
    "norm": "certified accuracies are compared in the same norm",
    "method.name": "each method certifies by bounds of its own: search one method at a time",
}


class Between(BaseModel):
    """Numbers from `low` to `high`, both included.

    Args:
        low: smallest value.
        high: largest value.
        log: whether to look at orders of magnitude rather than at differences.
        whole: whether only whole numbers will do; found out from the recipe's key.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    low: Real
    high: Real
    log: bool = False
    whole: bool = False

    def __len__(self) -> int:
        """How many whole numbers there are."""
        return int(self.high) - int(self.low) + 1

    def values(self) -> Iterator[int]:
        """The whole numbers, rising."""
        return iter(range(int(self.low), int(self.high) + 1))

    @property
    def finite(self) -> bool:
        """Whether it has finitely many values."""
        return self.whole

    def identity(self) -> dict[str, Any]:
        """What it is, as plain JSON values."""
        return self.model_dump(mode="json")

    def __str__(self) -> str:
        return (
            f"{self.low:g} to {self.high:g}"
            + (", whole" if self.whole else "")
            + (", log" if self.log else "")
        )


@dataclass(frozen=True)
class OneOf:
    """A few values to choose from.

    Args:
        choices: the values; numbers, words or booleans.
    """

    choices: tuple[Value, ...]

    def __len__(self) -> int:
        """How many there are."""
        return len(self.choices)

    def values(self) -> Iterator[Value]:
        """The values, as they were written."""
        return iter(self.choices)

    @property
    def finite(self) -> bool:
        """Whether it has finitely many values."""
        return True

    def identity(self) -> list[Value]:
        """What it is, as plain JSON values."""
        return list(self.choices)

    def __str__(self) -> str:
        return ", ".join(map(str, self.choices))


Range = Between | OneOf


def read_ranges(section: Any, base: Mapping[str, Any], source: str) -> dict[str, Range]:
    """The ranges that a recipe declares, each end and each choice tried in the recipe.

    Args:
        section: the content of `[tune]`: for each dotted key `{ low, high, log }` or a list of values.
        base: the resolved recipe that the values are put into.
        source: how errors call it.

    Raises:
        RecipeError: naming every key that the recipe does not have, with the nearest that it has, and every
            range that is empty or holds a value that the recipe cannot take.
    """
    if not isinstance(section, Mapping) or not section:
        raise RecipeError(
            f"{source} declares nothing to search: add a section such as [tune] with "
            '"method.eps" = { low = 0.3, high = 0.4 } or "method.kappa" = [0.0, 0.5]'
        )
    ranges: dict[str, Range] = {}
    problems = []
    for key, declared in sorted(_flat(section)):  # in an order that a stored recipe keeps
        try:
            ranges[key] = _range(key, declared, base)
        except InputError as error:
            problems.append(f"  {key}: {error}")
    if problems:
        raise RecipeError(f"[tune] of {source} cannot be used:\n" + "\n".join(problems))
    return ranges


def size(ranges: Mapping[str, Range]) -> float:
    """How many different trials there can be; infinite if a number may take any value between two ends."""
    return math.prod(len(one) if one.finite else math.inf for one in ranges.values())


def with_values(base: Mapping[str, Any], values: Mapping[str, Value]) -> dict[str, Any]:
    """The content of a recipe with some of its keys set.

    Raises:
        RecipeError: if a key leads through something that is no table.
    """
    content = copy.deepcopy(dict(base))
    for key, value in values.items():
        assign(content, key, value)
    return content


def _flat(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each dotted key with what it declares; `"method.eps"` and `method.eps` (TOML nests it) are the same."""
    for key, declared in section.items():
        if isinstance(declared, Mapping) and declared and not declared.keys() & Between.model_fields.keys():
            yield from _flat(declared, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", declared


def _range(key: str, declared: Any, base: Mapping[str, Any]) -> Range:
    if key in _SHARED:
        raise RecipeError(f"cannot be searched: {_SHARED[key]}")
    if isinstance(declared, list):
        return _choices(key, declared, base)
    if not isinstance(declared, Mapping):
        raise RecipeError(f"expected a range {{ low, high }} or a list of values, got {declared!r}")
    if "whole" in declared:
        raise RecipeError("unknown key whole: the recipe's key decides whether numbers are whole")
    try:
        between = Between.model_validate(declared)
    except ValidationError as error:
        first = error.errors()[0]
        raise RecipeError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}, got {declared!r}") from None
    if between.low > between.high:
        raise RecipeError(f"the range is empty: low {between.low:g} is above high {between.high:g}")
    if between.log and between.low <= 0:
        raise RecipeError(f"a logarithmic range lies above 0, got low {between.low:g}")
    for end in (between.low, between.high):
        _take(key, end, base)
    if between.low.is_integer() and between.high.is_integer():
        try:  # is a number between two whole ones refused, the key takes whole numbers only
            _take(key, between.low + 0.5, base)
        except RecipeError:
            return between.model_copy(update={"whole": True})
    return between


def _choices(key: str, declared: list[Any], base: Mapping[str, Any]) -> OneOf:
    if not declared:
        raise RecipeError("there is nothing to choose from: the list is empty")
    for value in declared:
        if not isinstance(value, Value):
            raise RecipeError(f"choices are numbers, words or booleans, got {value!r}")
        _take(key, value, base)
    if len(set(declared)) < len(declared):
        raise RecipeError(f"a value is listed twice in {declared}")
    return OneOf(tuple(declared))


def _take(key: str, value: Value, base: Mapping[str, Any]) -> Recipe:
    """The recipe with this value, all else as it is.

    Raises:
        RecipeError: if it cannot take the value, or has no such key.
    """
    try:
        return parse_recipe(with_values(base, {key: value}), "the recipe")
    except RecipeError as error:
        first, *rest = str(error).splitlines()
        raise RecipeError(f"at {value!r}: {'; '.join(line.strip() for line in rest) or first}") from None

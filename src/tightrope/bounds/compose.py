"""Engines made of engines."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tightrope.bounds.base import Bounds, Engine, Problem, sound
from tightrope.errors import InputError


@dataclass(frozen=True)
class Intersect:
    """The better of two engines' bounds, row by row: no engine is tighter than another everywhere.

    The boxes are those of the first engine.
    """

    first: Engine
    second: Engine

    def __call__(self, problem: Problem) -> Bounds:
        """See `Engine`."""
        one, two = _both(problem, self.first, self.second)
        return Bounds(
            torch.maximum(one.lower, two.lower),
            torch.minimum(one.upper, two.upper),
            boxes=one.boxes,
        )


@dataclass(frozen=True)
class Mix:
    """`share` times the first engine's bounds plus the rest of the second's: sound where both are.

    Source: Zhang et al. 2020 (CROWN-IBP), eq. 10: `m = beta m_CROWN-IBP + (1 - beta) m_IBP`. A share
    of 0 or 1 computes one engine only. The boxes are those of the first engine that is computed.

    Args:
        first: an engine.
        second: another one.
        share: weight of the first, from 0 to 1.

    Raises:
        InputError: if the share lies outside `[0, 1]`, where the mixture would not be sound.
    """

    first: Engine
    second: Engine
    share: float

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise InputError(f"a mixture of bounds needs a share in [0, 1], got {self.share}")

    def __call__(self, problem: Problem) -> Bounds:
        """See `Engine`."""
        if self.share in (0, 1):
            return problem.bounds(self.first if self.share else self.second)
        one, two = _both(problem, self.first, self.second)
        return Bounds(
            torch.lerp(two.lower, one.lower, self.share),
            torch.lerp(two.upper, one.upper, self.share),
            boxes=one.boxes,
        )


def _both(problem: Problem, first: Engine, second: Engine) -> tuple[Bounds, Bounds]:
    """The bounds of two engines; an InputError if one of them only estimates."""
    one, two = (sound(problem.bounds(engine), repr(engine)) for engine in (first, second))
    return one, two

"""Linear relaxations of activations: one record per activation, which every linear engine reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from tightrope.errors import InputError
from tightrope.graph.ops import Activation, LeakyReLU, MaxPool, ReLU, Sigmoid, Tanh

LowerSlope = Literal["parallel", "adaptive", "zero", "one"]
"""Which line bounds an unstable ReLU from below; all of them are sound."""


@runtime_checkable
class Relaxation(Protocol):
    """Linear bounds of an activation's output by its input, over a box of inputs."""

    def pull(
        self, rows: Float[Tensor, "batch rows *out"]
    ) -> tuple[Float[Tensor, "batch rows *in"], Float[Tensor, "batch rows"]]:
        """`(rows', offset)` with `<rows, f(z)> >= <rows', z> + offset` for every z in the box."""
        ...


@dataclass(frozen=True)
class Lines:
    """`lower_slope z + lower_offset <= f(z) <= upper_slope z + upper_offset`, element by element."""

    lower_slope: Float[Tensor, "batch *shape"]
    lower_offset: Float[Tensor, "batch *shape"]
    upper_slope: Float[Tensor, "batch *shape"]
    upper_offset: Float[Tensor, "batch *shape"]

    def pull(
        self, rows: Float[Tensor, "batch rows *shape"]
    ) -> tuple[Float[Tensor, "batch rows *shape"], Float[Tensor, "batch rows"]]:
        """Positive coefficients meet the lower line, negative ones the upper line."""
        positive, negative = rows.clamp(min=0), rows.clamp(max=0)
        pulled = positive * self.lower_slope.unsqueeze(1) + negative * self.upper_slope.unsqueeze(1)
        offset = _dot(positive, self.lower_offset) + _dot(negative, self.upper_offset)
        return pulled, offset


@dataclass(frozen=True)
class Pooled:
    """`z_k <= max z <= max upper`, where k has the largest lower bound of its window.

    Source: Singh et al. 2019 (DeepPoly), section 4.4, without its case of a certain winner.
    """

    op: MaxPool
    lower: Float[Tensor, "batch *in"]
    upper: Float[Tensor, "batch *in"]

    def pull(
        self, rows: Float[Tensor, "batch rows *out"]
    ) -> tuple[Float[Tensor, "batch rows *in"], Float[Tensor, "batch rows"]]:
        """Positive coefficients go to each window's winner, negative ones meet the constant above."""
        positive, negative = rows.clamp(min=0), rows.clamp(max=0)
        winners = self.lower.unsqueeze(1).expand(-1, rows.shape[1], *self.lower.shape[1:]).flatten(0, 1)
        scatter = torch.func.vjp(self.op.apply, winners)[1]
        (pulled,) = scatter(positive.flatten(0, 1))
        return pulled.unflatten(0, rows.shape[:2]), _dot(negative, self.op.apply(self.upper))


def _dot(rows: Tensor, vector: Tensor) -> Tensor:
    return (rows.flatten(2) @ vector.flatten(1).unsqueeze(2)).squeeze(2)


def relax(
    op: Activation,
    lower: Float[Tensor, "batch *shape"],
    upper: Float[Tensor, "batch *shape"],
    slope: LowerSlope,
) -> Relaxation:
    """The relaxation of an activation whose inputs lie in `[lower, upper]`.

    Raises:
        InputError: if there is none for this activation.
    """
    rule = _RULES.get(type(op))
    if rule is None:
        raise InputError(f"there is no linear relaxation of {type(op).__name__}; use the verifier ibp")
    return rule(op, lower, upper, slope)


def _relu(_op: ReLU, lower: Tensor, upper: Tensor, slope: LowerSlope) -> Lines:
    return _kinked(0.0, lower, upper, slope)


def _leaky(op: LeakyReLU, lower: Tensor, upper: Tensor, slope: LowerSlope) -> Lines:
    return _kinked(op.slope, lower, upper, slope)


def _kinked(left: float, lower: Tensor, upper: Tensor, slope: LowerSlope) -> Lines:
    """`max(z, left z)`: the chord above; below, a line through the kink with a slope in [left, 1].

    For ReLU (left = 0): upper line `u (z - l) / (u - l)`; "parallel" is Fast-Lin (Weng et al. 2018,
    and the dual of Wong and Kolter), "adaptive" is CROWN (Zhang et al. 2018): the line that leaves
    the smaller area.
    """
    unstable = (lower < 0) & (upper > 0)
    # Guarded twice: the quotient must be finite, and so must its gradient, where it is not used.
    width = torch.where(unstable, upper - lower, 1.0)
    one, flat = torch.ones_like(lower), torch.full_like(lower, left)
    stable = torch.where(lower >= 0, one, flat)
    chord = torch.where(unstable, (upper - left * lower) / width, stable)
    offset = torch.where(unstable, (left - chord) * lower, 0.0)
    if slope == "parallel":
        below = chord
    else:
        fixed = {"adaptive": torch.where(upper > -lower, one, flat), "zero": flat, "one": one}[slope]
        below = torch.where(unstable, fixed, stable)
    return Lines(below, torch.zeros_like(lower), chord, offset)


def _s_shaped(op: Sigmoid | Tanh, lower: Tensor, upper: Tensor, _slope: LowerSlope) -> Lines:
    """Convex left of 0, concave right of it: the chord where it is a bound, else the flatter end's slope.

    Source: Singh et al. 2019 (DeepPoly), section 4.3. There is no choice of slope.
    """
    low, high = op.apply(lower), op.apply(upper)
    wide = upper - lower > 1e-6
    chord = (high - low) / torch.where(wide, upper - lower, 1.0)
    flat = torch.minimum(_derivative(op, low), _derivative(op, high))
    # On a very narrow box the chord is lost to rounding: constants bound an increasing function too.
    lower_slope = torch.where(wide, torch.where(lower >= 0, chord, flat), 0.0)
    upper_slope = torch.where(wide, torch.where(upper <= 0, chord, flat), 0.0)
    return Lines(lower_slope, low - lower_slope * lower, upper_slope, high - upper_slope * upper)


def _max_pool(op: MaxPool, lower: Tensor, upper: Tensor, _slope: LowerSlope) -> Pooled:
    return Pooled(op, lower, upper)


def _derivative(op: Sigmoid | Tanh, value: Tensor) -> Tensor:
    return value * (1 - value) if isinstance(op, Sigmoid) else 1 - value.square()


_RULES: dict[type[Activation], Callable[[Any, Tensor, Tensor, LowerSlope], Relaxation]] = {
    ReLU: _relu,
    LeakyReLU: _leaky,
    Sigmoid: _s_shaped,
    Tanh: _s_shaped,
    MaxPool: _max_pool,
}

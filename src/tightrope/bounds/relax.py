"""Linear relaxations of activations: one record per activation, which every linear engine reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, Literal, ParamSpec, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from tightrope.errors import InputError
from tightrope.graph.ops import Activation, Kinked, LeakyReLU, MaxPool, ReLU, Sigmoid, Tanh
from tightrope.region import dot

LowerSlope = Literal["parallel", "adaptive", "zero", "one"]
"""Which line bounds an unstable ReLU from below; all of them are sound."""

Slope = LowerSlope | Float[Tensor, "batch *shape"]
"""A rule for that line, or its slope for every neuron, cut to `[0, 1]`: sound whatever it says."""


P = ParamSpec("P")
R = TypeVar("R")


def once_differentiable(backward: Callable[P, R]) -> Callable[P, R]:
    """Refuse second derivatives, some of which torch's decorator of this name leaves wrong in silence."""

    @wraps(backward)
    def once(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.is_grad_enabled():  # as in a backward pass with create_graph=True
            raise InputError(
                "linear bounds can be differentiated only once: leave out create_graph=True, or take "
                "tightrope.engines.interval(), which has all derivatives"
            )
        return backward(*args, **kwargs)

    return once


@runtime_checkable
class Step(Protocol):
    """An activation between linear bounds, counted from a point: what a backward pass does there."""

    def pull(
        self, rows: Float[Tensor, "batch rows *out"]
    ) -> tuple[Float[Tensor, "batch rows *in"], Float[Tensor, "batch rows"]]:
        """`(rows', offset)` with `<rows, f(z)> >= <rows', z> + offset` for every z in the box."""
        ...

    def map(self, change: Callable[[Tensor], Tensor]) -> Step:
        """The same with every tensor changed in the same way: some of the examples, another layout."""
        ...


@runtime_checkable
class Relaxation(Protocol):
    """Linear bounds of an activation's output by its input, over a box of inputs."""

    def seen_from(self, z: Float[Tensor, "batch *in"]) -> tuple[Float[Tensor, "batch *out"], Step]:
        """The upper bound's value at a point, and the bounds with inputs and outputs counted from there.

        A backward pass that is counted from one path through the network meets no biases and no upper
        offsets: only how far the lower bounds lie below the path.
        """
        ...


@dataclass(frozen=True)
class Slopes:
    """`low z - gap <= f(z) <= high z`, element by element."""

    low: Float[Tensor, "batch *shape"]
    high: Float[Tensor, "batch *shape"]
    gap: Float[Tensor, "batch *shape"]

    @property
    def parallel(self) -> bool:
        """Whether both slopes are one, as Fast-Lin has them."""
        return self.low is self.high

    def map(self, change: Callable[[Tensor], Tensor]) -> Slopes:
        """See `Step`."""
        low = change(self.low)
        return Slopes(low, low if self.parallel else change(self.high), change(self.gap))

    def pull(
        self, rows: Float[Tensor, "batch rows *shape"]
    ) -> tuple[Float[Tensor, "batch rows *shape"], Float[Tensor, "batch rows"]]:
        """Positive coefficients meet the lower line, negative ones the upper line."""
        if channels_lie_innermost(rows):  # they are read as they lie, not copied
            pulled, offset = self.map(lambda value: value.movedim(1, -1)).pull(rows.movedim(2, -1))
            return pulled.movedim(-1, 2), offset
        parts = (self.low.flatten(1), self.high.flatten(1), self.gap.flatten(1))
        pulled, offset = _Pull.apply(rows.flatten(2), *parts)
        return pulled.view(rows.shape), offset

    def pull_mirrored(
        self, rows: Float[Tensor, "batch rows *shape"]
    ) -> tuple[Float[Tensor, "batch rows *shape"], Float[Tensor, "batch twice"]]:
        """As `pull`, between parallel lines, with the offsets of the rows and then of the rows negated.

        The negated rows' coefficients are the rows' negated.
        """
        pulled, offset = self.pull(rows)
        return pulled, torch.cat([offset, offset + dot(rows.flatten(2), self.gap.flatten(1))], 1)


def channels_lie_innermost(rows: Float[Tensor, "batch rows *shape"]) -> bool:
    """Whether they are images as convolutions leave them in memory."""
    return rows.ndim == 5 and not rows.is_contiguous() and rows.movedim(2, -1).is_contiguous()


class _Pull(torch.autograd.Function):
    """`rows+ low + rows- high` and `-<rows+, gap>`, with what autograd would compute in fewer operations."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, low: Tensor, high: Tensor, gap: Tensor) -> tuple[Tensor, Tensor]:
        positive, bend = rows.clamp(min=0), low - high
        constant = dot(positive, gap).neg_()
        ctx.save_for_backward(rows if ctx.needs_input_grad[2] else None, positive, bend, high, gap)
        # Memory that was not touched before costs more than the arithmetic: if it can, take what is there.
        scaled = positive.mul if any(ctx.needs_input_grad) else positive.mul_
        return scaled(bend.unsqueeze(1)).addcmul_(rows, high.unsqueeze(1)), constant

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, pulled: Tensor, constant: Tensor) -> tuple[Tensor | None, ...]:
        rows, positive, bend, high, gap = ctx.saved_tensors
        pulled = pulled.contiguous()  # laid out as the rows are: three operations read both
        for_rows = for_low = for_high = for_gap = None
        if ctx.needs_input_grad[0]:
            for_positive = pulled * bend.unsqueeze(1)
            for_positive.addcmul_(constant.unsqueeze(2), gap.unsqueeze(1), value=-1)
            for_rows = torch.ops.aten.threshold_backward(for_positive, positive, 0)
            for_rows.addcmul_(pulled, high.unsqueeze(1))
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            for_low = _over_rows(pulled * positive)
            if ctx.needs_input_grad[2]:
                for_high = _over_rows(pulled * rows).sub_(for_low)
        if ctx.needs_input_grad[3]:
            for_gap = (constant.neg().unsqueeze(1) @ positive).squeeze(1)
        return for_rows, for_low, for_high, for_gap


def _over_rows(values: Float[Tensor, "batch rows size"]) -> Float[Tensor, "batch size"]:
    return values.sum(1) if values.shape[1] > 1 else values.squeeze(1)  # a sum of one row is a copy


@dataclass(frozen=True)
class Lines:
    """`lower_slope z + lower_offset <= f(z) <= upper_slope z + upper_offset`, element by element.

    A lower offset of None is zero, as every line through a kink at 0 has it.
    """

    lower_slope: Float[Tensor, "batch *shape"]
    lower_offset: Float[Tensor, "batch *shape"] | None
    upper_slope: Float[Tensor, "batch *shape"]
    upper_offset: Float[Tensor, "batch *shape"]

    def seen_from(self, z: Float[Tensor, "batch *shape"]) -> tuple[Float[Tensor, "batch *shape"], Slopes]:
        """See `Relaxation`."""
        value = self.upper_slope * z + self.upper_offset
        gap = value - self.lower_slope * z
        gap = gap if self.lower_offset is None else gap - self.lower_offset
        return value, Slopes(self.lower_slope, self.upper_slope, gap)


@dataclass(frozen=True)
class Winners:
    """`z_k - gap <= max z <= 0`, where k has the largest lower bound of its window."""

    op: MaxPool
    lower: Float[Tensor, "batch *in"]
    gap: Float[Tensor, "batch *out"]

    def map(self, change: Callable[[Tensor], Tensor]) -> Winners:
        """See `Step`."""
        return Winners(self.op, change(self.lower), change(self.gap))

    def pull(
        self, rows: Float[Tensor, "batch rows *out"]
    ) -> tuple[Float[Tensor, "batch rows *in"], Float[Tensor, "batch rows"]]:
        """Positive coefficients go to each window's winner, negative ones meet the constant above."""
        positive = rows.clamp(min=0)
        winners = self.lower.unsqueeze(1).expand(-1, rows.shape[1], *self.lower.shape[1:]).flatten(0, 1)
        (pulled,) = torch.func.vjp(self.op.apply, winners)[1](positive.flatten(0, 1))
        return pulled.unflatten(0, rows.shape[:2]), -dot(positive.flatten(2), self.gap.flatten(1))


@dataclass(frozen=True)
class Pooled:
    """`z_k <= max z <= max upper`, where k has the largest lower bound of its window.

    Source: Singh et al. 2019 (DeepPoly), section 4.4, without its case of a certain winner.
    """

    op: MaxPool
    lower: Float[Tensor, "batch *in"]
    upper: Float[Tensor, "batch *in"]

    def seen_from(self, z: Float[Tensor, "batch *in"]) -> tuple[Float[Tensor, "batch *out"], Winners]:
        """See `Relaxation`."""
        highest = self.op.apply(self.upper)
        # Each window's winner is picked by the map whose transpose is the derivative of a maximum.
        pick = torch.func.vjp(torch.func.vjp(self.op.apply, self.lower)[1], torch.zeros_like(highest))[1]
        (winners,) = pick((z,))
        return highest, Winners(self.op, self.lower, highest - winners)


def relax(
    op: Activation,
    lower: Float[Tensor, "batch *shape"],
    upper: Float[Tensor, "batch *shape"],
    slope: Slope,
) -> Relaxation:
    """The relaxation of an activation whose inputs lie in `[lower, upper]`.

    Raises:
        InputError: if there is none for this activation.
    """
    rule = _RULES.get(type(op))
    if rule is None:
        raise InputError(f"there is no linear relaxation of {type(op).__name__}; use the verifier ibp")
    return rule(op, lower, upper, slope)


def seen_from_middle(
    op: Kinked,
    lower: Float[Tensor, "batch *shape"],
    upper: Float[Tensor, "batch *shape"],
    slope: Slope,
) -> Slopes:
    """The same relaxation, seen from the middle of its box, where the chord is halfway between its ends."""
    if slope != "adaptive":
        return _kinked(op, lower, upper, slope).seen_from(torch.lerp(lower, upper, 0.5))[1]
    low = _more_active(lower, upper)
    high, gap = _Adaptive.apply(lower, upper, low)
    left = op.slope
    return Slopes(_bent(low, left), _bent(high, left), (1 - left) * gap if left else gap)


def _bent(slope: Tensor, left: float) -> Tensor:
    """The slope of `max(z, left z)` where ReLU's is `slope`."""
    return left + (1 - left) * slope if left else slope


def _more_active(lower: Tensor, upper: Tensor) -> Tensor:
    """1 where more of the box lies right of the kink, else 0: CROWN's slope, and that of a stable neuron."""
    return (upper.detach() + lower.detach()).gt_(0)


def _kinked(op: Kinked, lower: Tensor, upper: Tensor, slope: Slope) -> Lines:
    """`max(z, left z)`: the chord above; below, a line through the kink with a slope in [left, 1].

    For ReLU (left = 0): upper line `u (z - l) / (u - l)`; "parallel" is Fast-Lin (Weng et al. 2018,
    and the dual of Wong and Kolter), "adaptive" is CROWN (Zhang et al. 2018): the line that leaves
    the smaller area.
    """
    left = op.slope
    chord, offset = _Chord.apply(lower, upper)
    if left:
        chord, offset = _bent(chord, left), (1 - left) * offset
    if slope == "parallel":
        return Lines(chord, None, chord, offset)
    if slope == "adaptive":
        return Lines(_bent(_more_active(lower, upper), left), None, chord, offset)
    steepest = slope.clamp(left, 1) if isinstance(slope, Tensor) else {"zero": left, "one": 1.0}[slope]
    stable = _bent((lower >= 0).to(lower), left)
    return Lines(torch.where((lower < 0) & (upper > 0), steepest, stable), None, chord, offset)


class _Chord(torch.autograd.Function):
    """Slope `u / (u - l)` and offset `-u l / (u - l)` of ReLU's chord where `l < 0 < u`, else ReLU's own.

    A third of the operations that autograd would do, none of them with a mask (a choice element by element
    takes a processor as long as 25 products), and finite at boxes without width.
    """

    @staticmethod
    def forward(ctx: Any, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        low, high = lower.clamp(max=0), upper.clamp(min=0).mul_(0.5)
        width = high.sub(low, alpha=0.5).clamp_(min=torch.finfo(lower.dtype).tiny)  # a half: all may overflow
        slope = high / width  # what is not a number stays so
        if any(ctx.needs_input_grad):
            unstable = slope.mul(1 - slope).gt_(0)
            ctx.save_for_backward(slope, unstable, unstable.mul(0.5).div_(width))
        return slope, low.mul_(slope).neg_()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, for_slope: Tensor, for_offset: Tensor) -> tuple[Tensor, Tensor]:
        slope, unstable, by_width = ctx.saved_tensors
        along, aside = for_slope * by_width, for_offset * unstable
        # With r = 1 - slope: slope (along - slope aside), and r (along + r aside).
        share = aside * slope
        for_lower = (along - share).mul_(slope)
        rest = along.add_(aside).sub_(share)
        return for_lower, rest.addcmul(rest, slope, value=-1)


class _Adaptive(torch.autograd.Function):
    """ReLU's chord and CROWN's line below it: the chord's slope, and the gap between them in the middle.

    The gap is half of `min(-l, u)`, so that neither the chord's offset nor the middle is needed.

    Args:
        lower: lower end of the box.
        upper: upper end.
        low: slope of the line below.
    """

    @staticmethod
    def forward(ctx: Any, lower: Tensor, upper: Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
        below, above = lower.clamp(max=0).mul_(-0.5), upper.clamp(min=0).mul_(0.5)  # halves, as in `_Chord`
        width = (below + above).clamp_(min=torch.finfo(lower.dtype).tiny)
        high = above / width
        gap = torch.minimum(below, above).add_(width, alpha=0)  # not a number where the width is none
        if any(ctx.needs_input_grad):
            half = gap.sign().mul_(0.5)
            ctx.save_for_backward(high, low, half, half / width)
        return high, gap

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, for_high: Tensor, for_gap: Tensor) -> tuple[Tensor, Tensor, None]:
        high, low, half, by_width = ctx.saved_tensors
        along, aside = for_high * by_width, for_gap * half
        for_lower, pushed = along * high, aside * low
        return for_lower - pushed, along.sub_(for_lower).add_(aside).sub_(pushed), None


def _s_shaped(op: Sigmoid | Tanh, lower: Tensor, upper: Tensor, _slope: Slope) -> Lines:
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


def _max_pool(op: MaxPool, lower: Tensor, upper: Tensor, _slope: Slope) -> Pooled:
    return Pooled(op, lower, upper)


def _derivative(op: Sigmoid | Tanh, value: Tensor) -> Tensor:
    return value * (1 - value) if isinstance(op, Sigmoid) else 1 - value.square()


_RULES: dict[type[Activation], Callable[[Any, Tensor, Tensor, Slope], Relaxation]] = {
    ReLU: _kinked,
    LeakyReLU: _kinked,
    Sigmoid: _s_shaped,
    Tanh: _s_shaped,
    MaxPool: _max_pool,
}

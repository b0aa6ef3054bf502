"""Regularisers, computed from the bounds that the losses use anyway: one value for a batch or per example."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tightrope.bounds import Estimator, Interval
from tightrope.bounds.pullback import Scheme
from tightrope.bounds.relax import Slopes, channels_lie_innermost, once_differentiable
from tightrope.errors import InputError
from tightrope.graph.ops import Kinked
from tightrope.train.batch import Batch, Term


def shi_tightness(engine: Estimator, tau: float = 0.5) -> Term:
    """Keep the boxes from growing: `L_tight = 1/M sum_i relu(tau - r_0 / r_i) / tau`.

    `r_0` is the mean half-width of the input box, `r_i` that of layer i's pre-activations.
    Source: Shi et al. 2021, eq. 7; methods.md, section 4.
    """

    def term(batch: Batch) -> Float[Tensor, ""]:
        boxes = _relu_boxes(batch, engine)
        if not boxes:
            return batch.x.new_zeros(())
        lower, upper = batch.floored.corners(batch.x)
        reference = ((upper - lower) / 2).mean()
        widths = torch.stack([((upper - lower) / 2).mean() for lower, upper in boxes])
        return torch.relu(tau - reference / widths.clamp(min=1e-12)).mean() / tau

    return term


def shi_relu(engine: Estimator, tau: float = 0.5) -> Term:
    """Keep active and inactive neurons in balance, in their mean and in their variance.

    `c` is the centre of a pre-activation's box. `a = sum c [l > 0] / -sum c [u < 0]` and
    `v = sum (c - mean c)^2 [l > 0] / sum (c - mean c)^2 [u < 0]`, each folded to `min(q, 1/q)`;
    `L_relu = 1/M sum_i (relu(tau - a_i) + relu(tau - v_i)) / tau`. A layer without neurons on one
    side contributes nothing for that ratio. Source: Shi et al. 2021, eqs. 8-10; methods.md, section 4.
    """

    def term(batch: Batch) -> Float[Tensor, ""]:
        boxes = _relu_boxes(batch, engine)
        total = batch.x.new_zeros(())
        for lower, upper in boxes:
            centre = (lower + upper) / 2
            active, inactive = (lower > 0).to(centre), (upper < 0).to(centre)
            spread = (centre - centre.mean()).square()
            total = total + _imbalance((centre * active).sum(), -(centre * inactive).sum(), tau)
            total = total + _imbalance((spread * active).sum(), (spread * inactive).sum(), tau)
        return total / (max(len(boxes), 1) * tau)

    return term


def tightness_d(scheme: Scheme) -> Term:
    """The gap between relaxation and network at the relaxation's worst input: `sum_t d_t`.

    `d_t = <c_t, h(x + delta_0*)> - p_t*`, never negative; `p_t*` is the relaxed lower bound of the margin
    over class t. Source: tight_relaxation.txt, section 4.2; seeds.md, section 2.
    """

    def term(batch: Batch) -> Float[Tensor, "batch"]:
        if batch.still:
            return batch.x.new_zeros(len(batch.x))
        worst = batch.worst(scheme)
        return (worst.margins - worst.bound).sum(1)

    return term


def tightness_r(scheme: Scheme) -> Term:
    """How far the worst input is from where each relaxation is exact: `sum_t r_t`.

    `r_t` is the mean over the unstable neurons of the distance from the network's own pre-activation z at
    `x + delta_0*` to where the line that the bound rests on meets the activation. The upper line does so
    at the ends l and u, Fast-Lin's lower line at 0 (tight_relaxation.txt, section 4.3), CROWN's lower
    lines of slope 0 and 1 on all of one side of 0.

    Raises:
        InputError: where an activation has no kink at 0.
    """

    def term(batch: Batch) -> Float[Tensor, "batch"]:
        if batch.still:
            return batch.x.new_zeros(len(batch.x))
        pulled, worst = batch.pulled(scheme), batch.worst(scheme)
        total = torch.zeros_like(worst.bound)
        unstable = batch.x.new_zeros(len(batch.x))
        for i, coefficients in worst.coefficients.items():
            op, step = batch.graph.nodes[i].op, pulled.steps[i]
            if not isinstance(op, Kinked) or not isinstance(step, Slopes):
                raise InputError(f"tightness-r is about ReLU and LeakyReLU, not {type(op).__name__}")
            lower, upper = pulled.boxes[i]
            counted = (lower < 0) & (upper > 0)
            leaves = (counted & (step.low > op.slope), counted & (step.low < 1))
            total = total + distance(worst.entering[i], coefficients, lower, upper, *leaves)
            unstable = unstable + counted.flatten(1).sum(1)
        return total.sum(1) / unstable.clamp(min=1)

    return term


class _Distance(torch.autograd.Function):
    """In a fifth of the time that autograd takes: masks are factors 0 and 1, for choices are slower."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, coefficients: Tensor, lower: Tensor, upper: Tensor, left: Tensor, right: Tensor
    ) -> Tensor:
        chord, high = torch.empty_like(z), torch.empty_like(z)
        torch.lt(coefficients, 0, out=chord)
        torch.gt(z, (lower + upper) / 2, out=high)
        exact = torch.lerp(lower, upper, high).mul_(chord)
        gap = torch.sub(z, exact, out=exact)
        sign = gap.sign()
        side = sign.clamp(-left, right)
        sign = torch.lerp(side, sign, chord, out=side).mul_(torch.maximum(left, right))
        at_ends = chord.mul_(sign)
        ctx.save_for_backward(sign, at_ends, high.mul_(at_ends))
        return gap.mul_(sign).sum(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, total: Tensor) -> tuple[Tensor | None, ...]:
        sign, at_ends, at_upper = ctx.saved_tensors
        for_ends, for_upper = (-total.unsqueeze(1) @ side for side in (at_ends, at_upper))
        return sign * total.unsqueeze(2), None, for_ends - for_upper, for_upper, None, None


def distance(
    z: Float[Tensor, "batch rows *shape"],
    coefficients: Float[Tensor, "batch rows *shape"],
    lower: Float[Tensor, "batch *shape"],
    upper: Float[Tensor, "batch *shape"],
    left: Bool[Tensor, "batch *shape"],
    right: Bool[Tensor, "batch *shape"],
) -> Float[Tensor, "batch rows"]:
    """How far `z` is from where the lines that its coefficients rest on meet the activation, summed up.

    A negative coefficient rests on the upper line, which meets the activation at both ends of the box; any
    other on the lower one, which meets it at 0.

    Args:
        z: what enters the activation.
        coefficients: of what it yields.
        lower: of the neurons' boxes.
        upper: of the neurons' boxes.
        left: where the lower line leaves the activation left of 0.
        right: where it does right of 0; a neuron with neither does not count.
    """
    of_neurons = [lower, upper, left.to(z), right.to(z)]
    if channels_lie_innermost(z):
        z, coefficients = z.movedim(2, -1), coefficients.movedim(2, -1)
        of_neurons = [value.movedim(1, -1) for value in of_neurons]
    flat = (value.flatten(1).unsqueeze(1) for value in of_neurons)
    total: Tensor = _Distance.apply(z.flatten(2), coefficients.flatten(2), *flat)
    return total


def relu_stability(boxes: Estimator, factor: float) -> Term:
    """`factor^stage sum relu(-l) relu(u)` over the first activation that is still trained.

    It keeps neurons away from where their sign is open. Source: COLT's code (methods.md, section 9); there
    is no term where the network has no activation behind the region.
    """

    def term(batch: Batch) -> Float[Tensor, "batch"]:
        after = batch.stage.after
        if after is None:
            return batch.x.new_zeros(len(batch.x))
        lower, upper = batch.boxes(boxes, after)[after]
        open_by = torch.relu(-lower) * torch.relu(upper)
        return float(factor**batch.stage.number) * open_by.flatten(1).sum(1)

    return term


def xiao_stability(batch: Batch) -> Float[Tensor, "batch"]:
    """`-sum tanh(1 + l u)` over all ReLUs, by interval bounds: neurons whose sign is known count less.

    Source: Xiao et al. 2019, "Training for faster adversarial robustness verification".
    """
    total = batch.x.new_zeros(len(batch.x))
    for lower, upper in _relu_boxes(batch, Interval()):
        total = total - torch.tanh(1 + lower * upper).flatten(1).sum(1)
    return total


def l1(batch: Batch) -> Float[Tensor, ""]:
    """`sum |W|` over the weights that are trained, as the network reads them; biases do not count."""
    weights = {id(p): p for p in _weights(batch.graph.module) if p.requires_grad and p.ndim > 1}
    return sum((weight.abs().sum() for weight in weights.values()), batch.x.new_zeros(()))


def _weights(module: nn.Module) -> Iterator[Tensor]:
    """The parameters of every module; of parametrised ones what is computed, not what of."""
    for path, owner in module.named_modules():
        if "parametrizations" not in path.split("."):
            yield from owner.parameters(recurse=False)
        if parametrize.is_parametrized(owner):
            yield from (getattr(owner, name) for name in owner.parametrizations)


def _relu_boxes(batch: Batch, engine: Estimator) -> list[tuple[Tensor, Tensor]]:
    """The boxes of the pre-activations of every layer of ReLUs."""
    boxes = batch.problem.bounds(engine).boxes
    return [box for i, box in boxes.items() if isinstance(batch.graph.nodes[i].op, Kinked)]


def _imbalance(first: Tensor, second: Tensor, tau: float) -> Tensor:
    """`relu(tau - min(q, 1/q))` for `q = first / second`, 0 where a side is empty."""
    usable = (first > 0) & (second > 0)
    one = torch.ones_like(first)
    small = torch.where(usable, torch.minimum(first, second), one)
    large = torch.where(usable, torch.maximum(first, second), one)
    return torch.relu(tau - small / large)

"""Regularisers: one value for a batch, computed from the bounds that the losses use anyway."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from tightrope.bounds import Estimator
from tightrope.graph.ops import LeakyReLU, ReLU
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


def _relu_boxes(batch: Batch, engine: Estimator) -> list[tuple[Tensor, Tensor]]:
    """The boxes of the pre-activations of every layer of ReLUs."""
    boxes = batch.problem.bounds(engine).boxes
    return [box for i, box in boxes.items() if isinstance(batch.graph.nodes[i].op, ReLU | LeakyReLU)]


def _imbalance(first: Tensor, second: Tensor, tau: float) -> Tensor:
    """`relu(tau - min(q, 1/q))` for `q = first / second`, 0 where a side is empty."""
    usable = (first > 0) & (second > 0)
    one = torch.ones_like(first)
    small = torch.where(usable, torch.minimum(first, second), one)
    large = torch.where(usable, torch.maximum(first, second), one)
    return torch.relu(tau - small / large)

"""Weights and radii of single examples."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tightrope.attacks import Pgd
from tightrope.spec import smallest_margin
from tightrope.train.batch import Batch, Margins, State
from tightrope.train.objective import Weigh


def confidence(batch: Batch, margins: Margins) -> Float[Tensor, "batch"]:
    """`p_y - max_t p_t` of the worst-case logits, in [-1, 1]: positive if and only if certified.

    Source: decision_boundary.txt, section 3.1; seeds.md, section 4.
    """
    return _confidence(-margins(batch).detach(), batch.y)


def _confidence(logits: Tensor, y: Tensor) -> Tensor:
    """`p_y - max_t p_t` over the other classes t."""
    p = logits.softmax(1)
    right = p.gather(1, y.unsqueeze(1))
    return smallest_margin(right - p, y)


def near_the_boundary(gamma: float, alpha: float) -> Weigh:
    """`exp(-gamma |margin|) + alpha`, by the certified margin (decision_boundary.txt, eq. 7)."""

    def weigh(batch: Batch, margins: Margins) -> Float[Tensor, "batch"]:
        return torch.exp(-gamma * confidence(batch, margins).abs()) + alpha

    return weigh


def by_attack(alpha: float, attack: Pgd) -> Weigh:
    """`exp(-alpha margin)`, by the margin at an attacked point (Zeng et al. 2020)."""

    @torch.no_grad()
    def weigh(batch: Batch, margins: Margins) -> Float[Tensor, "batch"]:  # noqa: ARG001
        logits = batch.evaluated.run(batch.attacked(attack))[0]
        return torch.exp(-alpha * _confidence(logits, batch.y))

    return weigh


def by_steps(lam: float, attack: Pgd) -> Weigh:
    """GAIRAT: `(1 + tanh(lam + 5 (1 - 2 k / K))) / 2`, k the steps that an attack of K needs.

    Source: Zhang et al. 2020, "Geometry-aware instance-reweighted adversarial training".
    """

    @torch.no_grad()
    def weigh(batch: Batch, margins: Margins) -> Float[Tensor, "batch"]:  # noqa: ARG001
        needed = (
            attack.steps_needed(batch.evaluated, batch.x, batch.y, batch.region, batch.generator)
            / attack.steps
        )
        return (1 + torch.tanh(lam + 5 * (1 - 2 * needed))) / 2

    return weigh


@dataclass(frozen=True)
class AutoEps:
    """Radii that shrink for the examples that could not be certified when they were last seen.

    Each example has an offset o, 0 at first: it is trained at `max(0, eps - o)`, and then
    `o = largest * -margin` if its margin is negative, else 0. Source: decision_boundary.txt, section 3.2.

    Args:
        largest: offset of an example that is lost for certain, in pixel units.
    """

    largest: float

    def begin(self, examples: int) -> State:
        """See `Radii`."""
        return {"eps.offsets": torch.zeros(examples, dtype=torch.float32)}

    def __call__(self, eps: float, index: Int[Tensor, "batch"], state: State) -> Float[Tensor, "batch"]:
        """See `Radii`."""
        return (eps - state["eps.offsets"][index.cpu()]).clamp(min=0)

    def learn(self, batch: Batch, margins: Margins) -> None:
        """See `Radii`."""
        if batch.index is not None:
            margin = confidence(batch, _clean_margins if batch.still else margins)
            offsets = self.largest * (-margin).clamp(min=0)
            batch.state["eps.offsets"][batch.index.cpu()] = offsets.cpu().float()


def _clean_margins(batch: Batch) -> Float[Tensor, "batch classes"]:
    """What bounds come to where the region is a point, at the cost of nothing."""
    return batch.margins

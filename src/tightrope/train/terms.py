"""Losses per example: `batch -> (batch,)`."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from tightrope.attacks import Pgd
from tightrope.bounds import Estimator
from tightrope.train.batch import Batch, Term


def natural(batch: Batch) -> Float[Tensor, "batch"]:
    """`CE(f(x), y)`."""
    return F.cross_entropy(batch.logits, batch.y, reduction="none")


def adversarial(attack: Pgd) -> Term:
    """`CE(f(x'), y)` at the attack's point `x'` (Madry et al. 2018, eq. 2.1)."""

    def term(batch: Batch) -> Float[Tensor, "batch"]:
        if batch.still:
            return natural(batch)
        return F.cross_entropy(batch.graph.run(batch.attacked(attack))[0], batch.y, reduction="none")

    return term


def robust(engine: Estimator) -> Term:
    """`CE(-m_low, y)` with lower bounds of the margins: never below the worst `CE(f(x'), y)`.

    Source: Wong and Kolter 2018; certified_training_chapter.txt, eq. 14.4.
    """

    def term(batch: Batch) -> Float[Tensor, "batch"]:
        if batch.still:
            return natural(batch)
        return F.cross_entropy(-batch.problem.bounds(engine).lower, batch.y, reduction="none")

    return term

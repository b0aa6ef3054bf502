"""Losses per example: `batch -> (batch,)`, and how the means of two are joined."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from tightrope.attacks import Pgd
from tightrope.bounds import Estimator, Interval, Problem
from tightrope.bounds.backward import lower_bound
from tightrope.bounds.linear import path_over
from tightrope.bounds.pullback import Scheme
from tightrope.train.batch import Batch, Margins, Search, Term
from tightrope.train.schedules import Number, Ramp, at

Inside = Callable[[Batch], Problem]
"""Where inside the region margins are asked for."""


def natural(batch: Batch) -> Float[Tensor, "batch"]:
    """`CE(f(x), y)`."""
    return F.cross_entropy(batch.logits, batch.y, reduction="none")


def adversarial(attack: Pgd, warm: Ramp | None = None, fixed: bool = False) -> Term:
    """`CE(f(x'), y)` at the attack's point `x'` (Madry et al. 2018, eq. 2.1).

    Args:
        attack: what looks for the point.
        warm: radius of the attack until this ramp has arrived; then it is the region's.
        fixed: take the network at the clean batch's BatchNorm statistics, as bounds do.
    """

    def term(batch: Batch) -> Float[Tensor, "batch"]:
        if warm is not None and batch.progress < warm.finish:
            region = batch.region.with_eps(warm(batch.progress))
            point = attack(batch.evaluated, batch.x, batch.y, region, batch.generator)
            network = batch.fixed if fixed else batch.graph
            return F.cross_entropy(network.run(point)[0], batch.y, reduction="none")
        if batch.still:
            return natural(batch)
        return F.cross_entropy(batch.moved(attack, fixed), batch.y, reduction="none")

    return term


def _divergence(clean: Tensor, moved: Tensor) -> Float[Tensor, "batch"]:
    """`KL(p(x) || p(x'))` of two batches of logits."""
    clean, moved = clean.log_softmax(1), moved.log_softmax(1)
    return (clean.exp() * (clean - moved)).sum(1)


def divergence(attack: Pgd) -> Term:
    """`KL(p(x) || p(x'))` at the attack's point (Zhang et al. 2019, TRADES)."""

    def term(batch: Batch) -> Float[Tensor, "batch"]:
        return 0 * natural(batch) if batch.still else _divergence(batch.logits, batch.moved(attack))

    return term


def mart(attack: Pgd, lam: float) -> Term:
    """`CE(p(x'), y) - log(1 - max_t p_t(x')) + lam KL(p(x) || p(x')) (1 - p_y(x))`, t over the wrong classes.

    Source: Wang et al. 2020 (MART); methods.md, section 12.
    """

    def term(batch: Batch) -> Float[Tensor, "batch"]:
        if batch.still:
            return natural(batch)
        moved, label = batch.moved(attack), batch.y.unsqueeze(1)
        rival = moved.softmax(1).scatter(1, label, 0.0).amax(1)
        boosted = F.cross_entropy(moved, batch.y, reduction="none") - torch.log(1.0001 - rival)
        doubt = 1 - batch.logits.softmax(1).gather(1, label).squeeze(1)
        return boosted + lam * _divergence(batch.logits, moved) * doubt

    return term


def between(attack: Pgd, alpha: float) -> Margins:
    """`alpha m_IBP + (1 - alpha) m(x')`: bounds and an attack's margins (De Palma et al. 2024)."""

    def margins(batch: Batch) -> Float[Tensor, "batch classes"]:
        if batch.still:
            return batch.margins
        moved = batch.moved(attack, fixed=True)
        found = moved.gather(1, batch.y.unsqueeze(1)) - moved
        return torch.lerp(found, batch.problem.bounds(Interval()).lower, alpha)

    return margins


def both(first: Term, second: Term) -> Term:
    """Two terms, `(batch, 2)`, for a loss that joins their means; `natural` while nothing moves."""
    return lambda batch: natural(batch) if batch.still else torch.stack([first(batch), second(batch)], 1)


def geometric(alpha: float) -> Callable[[Tensor], Tensor]:
    """`L_1^(1 - alpha) L_2^alpha` of two losses (De Palma et al. 2024, Exp-IBP)."""

    def join(losses: Float[Tensor, "2"]) -> Float[Tensor, ""]:
        first, second = losses.clamp(min=1e-12).log()
        return torch.lerp(first, second, alpha).exp()

    return join


def worst_case(margins: Margins) -> Term:
    """`CE(-m_low, y)` with lower bounds of the margins: never below the worst `CE(f(x'), y)`.

    Source: Wong and Kolter 2018, eq. 12; certified_training_chapter.txt, eq. 14.4.
    """

    def term(batch: Batch) -> Float[Tensor, "batch"]:
        return F.cross_entropy(-margins(batch), batch.y, reduction="none")

    return term


def whole(batch: Batch) -> Problem:
    """The margins over the whole region."""
    return batch.problem


def small(attack: Pgd | None, share: Number) -> Inside:
    """The margins over a box of a share of the radius inside the region.

    Args:
        attack: the box lies near what it finds (Müller et al. 2023, SABR); None is anywhere (DiffAI).
        share: of the radius.
    """
    return lambda batch: batch.small(attack, at(share, batch.progress))


def bounded(engine: Estimator, inside: Inside = whole) -> Margins:
    """Margins bounded by an engine."""

    def margins(batch: Batch) -> Float[Tensor, "batch classes"]:
        return batch.margins if batch.still else inside(batch).bounds(engine).lower

    return margins


def connected(attack: Pgd, split: int, inside: Inside = whole) -> Margins:
    """Margins that an attack finds for each class in the interval box of a node (Mao et al. 2023, TAPS).

    No lower bounds, but never below those of intervals. Gradients reach the box through the connector of
    `tightrope.bounds.Hull`.

    Args:
        attack: what looks for the points; its steps are counted in half-widths of the box.
        split: how many activations lie behind the node.
        inside: where the inputs move.
    """

    def margins(batch: Batch) -> Float[Tensor, "batch classes"]:
        return batch.margins if batch.still else batch.connected(inside(batch), attack, split)

    return margins


def product(weight: float) -> Callable[[Tensor], Tensor]:
    """`L_1 L_2` of two losses; the gradient of the first is multiplied by `weight`.

    Source: Mao et al. 2023 (TAPS); methods.md, section 7.
    """

    def join(losses: Float[Tensor, "2"]) -> Float[Tensor, ""]:
        one, two = losses.unbind()
        return (weight * one - (weight - 1) * one.detach()) * two

    return join


def relaxed(scheme: Scheme) -> Margins:
    """Margins pulled back over a linear relaxation (tight_relaxation.txt, eq. 10)."""

    def margins(batch: Batch) -> Float[Tensor, "batch classes"]:
        return batch.margins if batch.still else batch.relaxed(scheme)

    return margins


CROWN_IBP = Scheme(Interval(), "adaptive")
"""CROWN's lines over interval boxes."""


def crown_ibp(share: Number) -> Margins:
    """`share m_CROWN-IBP + (1 - share) m_IBP`.

    Source: Zhang et al. 2020, eq. 10; certified_training_chapter.txt, section 14.3 (share is its beta).
    """

    def margins(batch: Batch) -> Float[Tensor, "batch classes"]:
        beta = at(share, batch.progress)
        if batch.still or beta == 0:
            return bounded(Interval())(batch)
        interval = batch.problem.bounds(Interval()).lower
        return torch.lerp(interval, batch.relaxed(CROWN_IBP), beta)

    return margins


def fused_crown_ibp(share: Number) -> Term:
    """CROWN-IBP with one backward row per example instead of one per class: loss fusion.

    `CE(-m, y) = log S` with `S = sum_t exp(-m_t)`, convex in the margins m. Over the interval bounds
    `l <= m <= u`, S lies below its chord `sum_t s_t m_t + o_t`, whose linear part is a single row of
    logits; the loss is `log(share S_CROWN-IBP + (1 - share) S_IBP)`. Neither tighter nor looser than a
    row per class: the chord loses something, one row for all classes at once gains something.
    Source: Xu et al. 2020 (auto_LiRPA), section 3.3; methods.md, section 5.
    """

    def term(batch: Batch) -> Float[Tensor, "batch"]:
        beta = at(share, batch.progress)
        if batch.still or beta == 0:
            return worst_case(bounded(Interval()))(batch)
        problem = batch.problem
        interval = problem.bounds(Interval())
        lower, upper = interval.lower, interval.upper
        largest = -lower.detach().amin(1, keepdim=True)  # at least 0: the margin over y itself is 0
        top, bottom = torch.exp(-lower - largest), torch.exp(-upper - largest)
        wide = upper - lower > 1e-6  # a constant bounds S above where rounding would spoil the chord
        slope = torch.where(wide, (bottom - top) / torch.where(wide, upper - lower, 1.0), 0.0)
        row = -(slope.unsqueeze(1) @ problem.spec.rows)
        seen = path_over(problem, interval.boxes, CROWN_IBP.slope)
        last = len(problem.graph.nodes) - 1
        least = lower_bound(problem.graph, problem.x, problem.region, last, row, seen).squeeze(1)
        chord = (top - slope * lower).sum(1) - least
        linear = torch.maximum(chord, bottom.sum(1))  # S is nowhere smaller; rounding may say so
        return largest.squeeze(1) + torch.log(beta * linear + (1 - beta) * top.sum(1))

    return term


def latent(search: Search, before: bool = False) -> Term:
    """`CE(p(x'), y)` at a point x' of the latent region behind the frozen layers (maar.txt, eqs. 2 and 6).

    Args:
        search: how x' is found, and by which labels: those of the data (COLT), or the network's own (MAT).
        before: whether to look into the region of the stage before; before the first, that is x itself.
    """

    def term(batch: Batch) -> Float[Tensor, "batch"]:
        node = batch.stage.before if before else batch.stage.cut
        if node is None or batch.still:
            return natural(batch)
        return F.cross_entropy(batch.inside(search, node), batch.target(search), reduction="none")

    return term


Awareness = Literal["soft", "hard", "uniform"]


def consistent(search: Search, lam: float, weight: Awareness, before: bool = False) -> Term:
    """COLT's loss and `lam KL(p(x) || p(x')) w`, which keeps the answer where it may be wrong.

    `w = 1 - p_y(x)` is MAAR ("soft"; maar.txt, eqs. 13 and 14), `w = 1[h(x) != y]` its hard form (eq. 12),
    `w = 1` ignores what is misclassified ("uniform").

    Args:
        search: how x' is found.
        lam: weight of the divergence.
        weight: w.
        before: as in `latent`.
    """
    found = latent(search, before)

    def term(batch: Batch) -> Float[Tensor, "batch"]:
        node = batch.stage.before if before else batch.stage.cut
        if node is None or batch.still:
            return natural(batch)
        distance = _divergence(batch.logits, batch.inside(search, node))
        label = batch.y.unsqueeze(1)
        weights = {
            "soft": 1 - batch.logits.softmax(1).gather(1, label).squeeze(1),
            "hard": (batch.logits.argmax(1) != batch.y).to(distance),
            "uniform": torch.ones_like(distance),
        }[weight]
        return found(batch) + lam * distance * weights

    return term

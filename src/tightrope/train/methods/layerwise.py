"""Training layer by layer, in the latent regions behind the frozen layers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from tightrope.attacks import Pgd
from tightrope.bounds import Linear
from tightrope.bounds.projected import Projected
from tightrope.train import regularisers, terms
from tightrope.train.batch import Search, Term
from tightrope.train.methods.base import METHODS, Method, published
from tightrope.train.objective import Loss
from tightrope.train.schedules import Course, NotNegative, Positive, Share, Whole
from tightrope.train.stages import Layerwise


class LatentAttack(BaseModel):
    """How points of a latent region are looked for.

    Args:
        steps: gradient steps.
        step: length of one, where noise lies between -1 and 1.
        projections: random directions that the bounds before the region are estimated from; 0 computes them
            exactly, which costs a backward pass for each open neuron.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: Annotated[Whole, Field(ge=1)] = 8
    step: Positive = 0.25
    projections: Annotated[Whole, Field(ge=0)] = 50

    def search(self, predicted: bool = False) -> Search:
        """The attack and its bounds; `predicted` says that it goes by the network's own answers."""
        boxes = Projected(self.projections) if self.projections else Linear("parallel", sides="none")
        return Search(Pgd(self.steps, self.step, keep_best=False), boxes, predicted)


class Penalty(BaseModel):
    """What else is made small.

    Args:
        l1: weight of the size of all weights in training.
        stability: weight of the instability of the first activation in training.
        stability_factor: what that weight is multiplied by from stage to stage.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    l1: NotNegative = 1e-5
    stability: NotNegative = 0.005
    stability_factor: Positive = 1.5


@published(METHODS)
def colt(
    eps: Positive,
    natural: Share = 0.0,
    attack: LatentAttack = LatentAttack(),
    stages: Layerwise = Layerwise(),
    penalty: Penalty = Penalty(),
) -> Method:
    """COLT (Balunovic and Vechev 2020): adversarial training in the convex region of one layer after another.

    `(1 - natural) CE(p(x')) + natural CE(p(x))`, x' in the latent region behind the frozen layers.

    Args:
        eps: radius, in pixel units; `stages` widens it.
        natural: share of the natural loss.
        attack: how x' is found.
        stages: how it goes through the layers.
        penalty: what else is made small.
    """
    search = attack.search()
    return _layerwise("colt", eps, natural, search, stages, penalty, partial(terms.latent, search))


@published(METHODS)
def mat(
    eps: Positive,
    natural: Share = 0.0,
    attack: LatentAttack = LatentAttack(),
    stages: Layerwise = Layerwise(),
    penalty: Penalty = Penalty(),
) -> Method:
    """Misclassification-aware training (maar.txt, eq. 2): COLT by the network's own answers.

    Args:
        eps: radius, in pixel units; `stages` widens it.
        natural: share of the natural loss.
        attack: how x' is found.
        stages: how it goes through the layers.
        penalty: what else is made small.
    """
    search = attack.search(predicted=True)
    return _layerwise("mat", eps, natural, search, stages, penalty, partial(terms.latent, search))


@published(METHODS)
def maar(
    eps: Positive,
    lam: NotNegative = 6.0,
    weight: terms.Awareness = "soft",
    natural: Share = 0.0,
    attack: LatentAttack = LatentAttack(),
    stages: Layerwise = Layerwise(),
    penalty: Penalty = Penalty(),
) -> Method:
    """Misclassification-aware adversarial regularisation (maar.txt, eq. 14): COLT and a consistent answer.

    `CE(p(x')) + lam KL(p(x) || p(x')) (1 - p_y(x))` in the place of COLT's `CE(p(x'))`.

    Args:
        eps: radius, in pixel units; `stages` widens it.
        lam: weight lambda of the divergence.
        weight: "soft" is `1 - p_y(x)`; "hard" 1 where x is misclassified, else 0; "uniform" 1 everywhere.
        natural: share of the natural loss.
        attack: how x' is found.
        stages: how it goes through the layers.
        penalty: what else is made small.
    """
    search = attack.search()
    term = partial(terms.consistent, search, lam, weight)
    return _layerwise("maar", eps, natural, search, stages, penalty, term)


def _layerwise(
    name: str,
    eps: float,
    natural: float,
    search: Search,
    stages: Layerwise,
    penalty: Penalty,
    term: Callable[[bool], Term],
) -> Method:
    """A loss in the region of a stage, which takes over from that in the region of the stage before."""
    mixing = Course(begin=0.0, finish=stages.mix)
    losses = (  # the stability looks furthest into the network: it comes first, and all share its bounds
        Loss(
            "stability",
            mixing.between(0.0, penalty.stability),
            regularisers.relu_stability(search.boxes, penalty.stability_factor),
        ),
        Loss("latent", mixing.between(0.0, 1 - natural), term(False)),
        Loss("latent before", mixing.between(1 - natural, 0.0), term(True)),
        Loss("natural", natural, terms.natural),
        Loss("l1", penalty.l1, regularisers.l1),
    )
    engine = Linear("adaptive", "interval", sides="lower")
    return Method(name, eps, losses, engine=engine, layerwise=stages, search=search)

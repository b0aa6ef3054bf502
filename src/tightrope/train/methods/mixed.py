"""Between an attack and a bound: methods that leave the proof to a strong verifier."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from pydantic import Field

from tightrope.attacks import Pgd
from tightrope.bounds import Interval
from tightrope.bounds.hull import split_node
from tightrope.train import terms
from tightrope.train.initialise import ibp_initialisation
from tightrope.train.methods.base import METHODS, Method, on, published, robust_loss
from tightrope.train.objective import Loss
from tightrope.train.schedules import Course, Number, Positive, Ramp, Share, Steps, Whole

EXPRESSIVE = Course(shape="smooth", begin=1 / 70, finish=21 / 70)
"""When eps rises in the methods that mix bounds and attacks: epochs 1 to 21 of 70."""

Some = Annotated[Share, Field(gt=0)]
"""The share of bounds in a mixture: without any, nothing would be trained to be certified."""


@published(METHODS)
def sabr(
    eps: Number, share: Some = 0.6, steps: Whole = 8, step: Positive = 0.25, ramp: Course = EXPRESSIVE
) -> Method:
    """SABR (Müller et al. 2023): `CE(-m_IBP)` over a small box inside the region, where an attack points.

    Args:
        eps: radius of the whole region at the end of the ramp, in pixel units; or a schedule.
        share: size of the small box, as a share of eps: lambda in the paper.
        steps: gradient steps of the attack.
        step: length of one step, as a share of eps.
        ramp: when eps rises.
    """
    eps, _ = on(ramp, eps)
    attack = Pgd(steps=steps, step=step, keep_best=False)
    loss = robust_loss(1.0, terms.bounded(Interval(), terms.small(attack, share)))
    return Method("sabr", eps, (loss,), initialise=ibp_initialisation)


@published(METHODS)
def cc_ibp(
    eps: Number, alpha: Some = 0.3, steps: Whole = 1, step: Positive = 10.0, ramp: Course = EXPRESSIVE
) -> Method:
    """CC-IBP (De Palma et al. 2024): `CE(-(alpha m_IBP + (1 - alpha) m(x')))`.

    Args:
        eps: radius at the end of the ramp, in pixel units; or a schedule.
        alpha: from an attack alone (0, refused) to intervals alone (1).
        steps: gradient steps of the attack; with one long step it is FGSM from a random start.
        step: length of one step, as a share of eps.
        ramp: when eps rises.
    """
    eps, _ = on(ramp, eps)
    attack = Pgd(steps=steps, step=step, keep_best=False)
    term = terms.worst_case(terms.between(attack, alpha))
    loss = Loss("robust", 1.0, term, terms.bounded(Interval()))
    return Method("cc-ibp", eps, (loss,), initialise=ibp_initialisation)


@published(METHODS)
def mtl_ibp(
    eps: Number, alpha: Some = 0.08, steps: Whole = 1, step: Positive = 10.0, ramp: Course = EXPRESSIVE
) -> Method:
    """MTL-IBP (De Palma et al. 2024): `alpha L_IBP + (1 - alpha) L_adv`.

    Args:
        eps: radius at the end of the ramp, in pixel units; or a schedule.
        alpha: from an attack alone (0, refused) to intervals alone (1).
        steps: gradient steps of the attack; with one long step it is FGSM from a random start.
        step: length of one step, as a share of eps.
        ramp: when eps rises.
    """
    eps, _ = on(ramp, eps)
    attack = Pgd(steps=steps, step=step, keep_best=False)
    losses = (
        Loss("adversarial", 1 - alpha, terms.adversarial(attack, fixed=True)),
        robust_loss(alpha, terms.bounded(Interval())),
    )
    return Method("mtl-ibp", eps, losses, initialise=ibp_initialisation)


@published(METHODS)
def exp_ibp(
    eps: Number, alpha: Some = 0.3, steps: Whole = 1, step: Positive = 10.0, ramp: Course = EXPRESSIVE
) -> Method:
    """Exp-IBP (De Palma et al. 2024): `L_IBP^alpha L_adv^(1 - alpha)` of the batch's mean losses.

    Args:
        eps: radius at the end of the ramp, in pixel units; or a schedule.
        alpha: from an attack alone (0, refused) to intervals alone (1).
        steps: gradient steps of the attack; with one long step it is FGSM from a random start.
        step: length of one step, as a share of eps.
        ramp: when eps rises.
    """
    eps, _ = on(ramp, eps)
    attack = Pgd(steps=steps, step=step, keep_best=False)
    margins = terms.bounded(Interval())
    term = terms.both(terms.adversarial(attack, fixed=True), terms.worst_case(margins))
    loss = Loss("robust", 1.0, term, margins, join=terms.geometric(alpha))
    return Method("exp-ibp", eps, (loss,), initialise=ibp_initialisation)


@published(METHODS)
def taps(
    eps: Number,
    split: Annotated[Whole, Field(ge=1)] = 1,
    weight: Positive = 4.0,
    steps: Whole = 8,
    step: Positive = 0.25,
    ramp: Course = EXPRESSIVE,
) -> Method:
    """TAPS (Mao et al. 2023): `L_IBP L_PIA`, an attack of each class in the interval box of a middle layer.

    The product is of the batch's mean losses. In the ramp there is `L_IBP` alone.

    Args:
        eps: radius at the end of the ramp, in pixel units; or a schedule (a ramp sets the course too).
        split: how many activations lie behind the box, where the network is attacked (1 is the last hidden
            layer's); at least one must be left in front.
        weight: what the gradient of `L_PIA` is multiplied by: w in the paper.
        steps: gradient steps of the attack.
        step: length of one step, as a share of the box's half-width.
        ramp: when eps rises.
    """
    attack = Pgd(steps=steps, step=step, loss="margin", keep_best=False)
    return _connected("taps", eps, split, weight, attack, terms.whole, ramp)


@published(METHODS)
def staps(
    eps: Number,
    share: Some = 0.6,
    split: Annotated[Whole, Field(ge=1)] = 1,
    weight: Positive = 4.0,
    steps: Whole = 8,
    step: Positive = 0.25,
    ramp: Course = EXPRESSIVE,
) -> Method:
    """STAPS (Mao et al. 2023): TAPS over SABR's small box.

    In the ramp there is IBP's loss over the whole region alone.

    Args:
        eps: radius of the whole region at the end of the ramp, in pixel units; or a schedule.
        share: size of the small box, as a share of eps: lambda in the paper.
        split: how many activations lie behind the box, where the network is attacked (1 is the last hidden
            layer's); at least one must be left in front.
        weight: what the gradient of `L_PIA` is multiplied by: w in the paper.
        steps: gradient steps of each attack.
        step: length of one step, as a share of eps, or of the latent box's half-width.
        ramp: when eps rises.
    """
    outer = Pgd(steps=steps, step=step, keep_best=False)
    attack = Pgd(steps=steps, step=step, loss="margin", keep_best=False)
    return _connected("staps", eps, split, weight, attack, terms.small(outer, share), ramp)


def _connected(
    name: str,
    eps: float | Ramp | Steps,
    split: int,
    weight: float,
    attack: Pgd,
    inside: terms.Inside,
    ramp: Course,
) -> Method:
    """IBP in the ramp; from its end on, the product of IBP's loss and of an attack's in a latent box."""
    eps, ramp = on(ramp, eps)
    after, margins = Course(begin=ramp.finish, finish=ramp.finish), terms.bounded(Interval(), inside)
    factors = map(terms.worst_case, (terms.connected(attack, split, inside), margins))
    losses = (
        robust_loss(after.between(1.0, 0.0), terms.bounded(Interval())),
        Loss("connected", after.between(0.0, 1.0), terms.both(*factors), margins, join=terms.product(weight)),
    )
    fits = partial(split_node, behind=split)
    return Method(name, eps, losses, initialise=ibp_initialisation, fits=fits)

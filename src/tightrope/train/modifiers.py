"""Modifiers: what can be added to many methods, as `method | modifier`.

To add a modifier: one function here, one row in the tests, one page in docs/methods.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated

from pydantic import Field

from tightrope.attacks import Pgd
from tightrope.bounds.pullback import Scheme
from tightrope.errors import InputError
from tightrope.train import regularisers, weights
from tightrope.train.batch import Term
from tightrope.train.methods import MODIFIERS, Method, Modifier, published, shi_regularisers
from tightrope.train.objective import Loss, Weigh
from tightrope.train.schedules import Positive, Ramp, Real, Whole


@published(MODIFIERS)
def tightness_r(gamma: Positive = 0.5) -> Modifier:
    """Regulariser r: the worst input should meet each relaxation where it is exact (tight_relaxation.txt).

    It comes in over the ramp of `wong-kolter`, and fades out with beta in `crown-ibp`.

    Args:
        gamma: weight of `sum_t r_t`.
    """
    return Modifier("tightness-r", _on_the_relaxation("tightness-r", gamma, regularisers.tightness_r))


@published(MODIFIERS)
def tightness_d(lam: Positive = 5e-3) -> Modifier:
    """Regulariser d: the worst input should attain the relaxed bound (tight_relaxation.txt).

    It comes in over the ramp of `wong-kolter`, and fades out with beta in `crown-ibp`.

    Args:
        lam: weight of `sum_t d_t`, lambda in the paper.
    """
    return Modifier("tightness-d", _on_the_relaxation("tightness-d", lam, regularisers.tightness_d))


@published(MODIFIERS)
def reweight(gamma: Positive = 5.0, alpha: Positive = 0.1) -> Modifier:
    """Weigh the robust loss of each example by how near it is to being certified or not.

    `exp(-gamma |margin|) + alpha`, by the certified margin `p_y - max_t p_t` (decision_boundary.txt).

    Args:
        gamma: how fast the weight falls away from the boundary.
        alpha: weight of the examples far from it.
    """
    return Modifier("reweight", _weighted("reweight", weights.near_the_boundary(gamma, alpha)))


@published(MODIFIERS)
def reweight_attack(
    alpha: Positive = 1.0, steps: Annotated[Whole, Field(ge=1)] = 10, step: Positive = 0.25
) -> Modifier:
    """Weigh the robust loss of each example by `exp(-alpha margin)` at an attacked point (Zeng et al. 2020).

    Args:
        alpha: how fast the weight falls with the margin.
        steps: gradient steps of the attack.
        step: length of one, as a share of eps.
    """
    attack = Pgd(steps=steps, step=step, keep_best=False)
    return Modifier("reweight-attack", _weighted("reweight-attack", weights.by_attack(alpha, attack)))


@published(MODIFIERS)
def reweight_gairat(
    lam: Real = -1.0, steps: Annotated[Whole, Field(ge=1)] = 10, step: Positive = 0.25
) -> Modifier:
    """Weigh the robust loss of each example by how many steps an attack needs (GAIRAT, Zhang et al. 2020).

    Args:
        lam: lambda, by which all weights are shifted.
        steps: gradient steps of the attack.
        step: length of one, as a share of eps.
    """
    attack = Pgd(steps=steps, step=step, keep_best=False)
    return Modifier("reweight-gairat", _weighted("reweight-gairat", weights.by_steps(lam, attack)))


@published(MODIFIERS)
def auto_eps(max_offset: Positive = 0.15) -> Modifier:
    """Train each example at its own radius, smaller where it could not be certified (decision_boundary.txt).

    Args:
        max_offset: by how much at most, in pixel units: 0.15 for MNIST at 0.4, 0.01 for CIFAR-10 at 14/255.
    """

    def change(method: Method) -> Method:
        _certified("auto-eps", method)
        return replace(method, radii=weights.AutoEps(max_offset))

    return Modifier("auto-eps", change)


@published(MODIFIERS)
def l1(weight: Positive = 1e-5) -> Modifier:
    """Keep the weights small: `weight sum |W|` over all but biases.

    Args:
        weight: of the sum.
    """

    def change(method: Method) -> Method:
        if any(loss.name == "l1" for loss in method.losses):
            raise InputError(f"{method.name} has an l1 term of its own: set its option instead")
        return replace(method, losses=(*method.losses, Loss("l1", weight, regularisers.l1)))

    return Modifier("l1", change)


@published(MODIFIERS)
def shi_reg(lam: Positive = 0.5) -> Modifier:
    """The two regularisers of `shi-ibp` on another method, fading out as its eps rises.

    Args:
        lam: their weight at the start, lambda in the paper (Shi et al. 2021).
    """

    def change(method: Method) -> Method:
        if not isinstance(method.eps, Ramp):
            raise InputError(f"shi-reg fades out while eps rises, and the eps of {method.name} does not")
        if any(loss.name == "tightness" for loss in method.losses):
            raise InputError(f"{method.name} has these regularisers already")
        return replace(method, losses=(*method.losses, *shi_regularisers(method.eps.course(), lam)))

    return Modifier("shi-reg", change)


def _certified(name: str, method: Method) -> None:
    if not any(loss.certified for loss in method.losses):
        raise InputError(
            f"{name} is for methods with a certified term, and {method.name} has none: add it to ibp, for "
            "example"
        )


def _weighted(name: str, weigh: Weigh) -> Callable[[Method], Method]:
    def change(method: Method) -> Method:
        _certified(name, method)
        if any(loss.weigh is not None for loss in method.losses):
            raise InputError(f"{name}: the examples of {method.name} have weights already")
        losses = (replace(loss, weigh=weigh) if loss.certified else loss for loss in method.losses)
        return replace(method, losses=tuple(losses))

    return change


def _on_the_relaxation(
    name: str, weight: float, regulariser: Callable[[Scheme], Term]
) -> Callable[[Method], Method]:
    def change(method: Method) -> Method:
        if method.relaxation is None:
            raise InputError(
                f"{name} regularises a linear relaxation, and {method.name} has none: "
                "add it to crown-ibp or wong-kolter"
            )
        presence = method.relaxation.presence
        present = presence.course().between(weight * presence.start, weight * presence.end)
        loss = Loss(name, present, regulariser(method.relaxation.scheme))
        return replace(method, losses=(*method.losses, loss))

    return change

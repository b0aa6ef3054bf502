"""Modifiers: what can be added to many methods, as `method | modifier`.

To add a modifier: one function here, one row in the tests, one page in docs/methods.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated

from pydantic import Field

from tightrope.bounds.pullback import Scheme
from tightrope.errors import InputError
from tightrope.train import regularisers
from tightrope.train.batch import Term
from tightrope.train.methods import MODIFIERS, Loss, Method, Modifier, published
from tightrope.train.schedules import Real

Positive = Annotated[Real, Field(gt=0)]


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
        weights = presence.course().between(weight * presence.start, weight * presence.end)
        loss = Loss(name, weights, regulariser(method.relaxation.scheme))
        return replace(method, losses=(*method.losses, loss))

    return change

"""AdvIBP and AdvCROWN-IBP: two losses whose gradients are weighed against each other."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from tightrope.attacks import fgsm as one_step
from tightrope.bounds import Interval
from tightrope.errors import InputError
from tightrope.train import terms
from tightrope.train.combine import Bisector, Total
from tightrope.train.methods.base import (
    METHODS,
    Method,
    Relaxation,
    crown_ibp_loss,
    on,
    published,
    robust_loss,
)
from tightrope.train.objective import Loss
from tightrope.train.schedules import Course, Decay, Number, NumberOrRamp, Ramp, Share, Steps, last


@published(METHODS)
def advibp(
    eps: Number,
    combiner: Literal["bisector", "total"] = "bisector",
    threshold: NumberOrRamp = 0.02,
    beta1: Decay = 0.9,
    beta2: Decay = 0.999,
    clean: Share = 0.01,
    ramp: Course = Course(begin=0.05, finish=0.3),
) -> Method:
    """AdvIBP (Fan and Li 2021): an adversarial and an IBP loss, together (advibp.txt, algorithms 1 and 2).

    Args:
        eps: radius at the end of the ramp, in pixel units; or a schedule (a ramp sets the course too).
        combiner: "bisector" weighs the two gradients by their moments; "total" adds them up (the paper's
            baseline).
        threshold: FOSC up to which the adversarial loss has priority where the gradients disagree, at the
            end of the ramp; it falls to 0 over the next 40 % of what is left. Or a schedule.
        beta1: decay of the moving averages of the gradients.
        beta2: decay of the moving averages of their lengths.
        clean: share of the run until which there is the natural loss alone; from there until the ramp begins
            there is the adversarial loss alone, at a radius of its own that rises to eps.
        ramp: when eps rises.
    """
    robust = robust_loss(1.0, terms.bounded(Interval()))
    return _joint("advibp", eps, robust, combiner, threshold, beta1, beta2, clean, ramp)


@published(METHODS)
def advcrown_ibp(
    eps: Number,
    combiner: Literal["bisector", "total"] = "bisector",
    threshold: NumberOrRamp = 0.02,
    beta1: Decay = 0.9,
    beta2: Decay = 0.999,
    clean: Share = 0.01,
    fusion: bool = False,
    ramp: Course = Course(begin=0.05, finish=0.3),
) -> Method:
    """AdvCROWN-IBP (Fan and Li 2021): AdvIBP with CROWN-IBP's bounds fading to IBP's over the ramp.

    Args:
        eps: radius at the end of the ramp, in pixel units; or a schedule (a ramp sets the course too).
        combiner: "bisector" weighs the two gradients by their moments; "total" adds them up.
        threshold: FOSC up to which the adversarial loss has priority where the gradients disagree, at the
            end of the ramp; it falls to 0 over the next 40 % of what is left. Or a schedule.
        beta1: decay of the moving averages of the gradients.
        beta2: decay of the moving averages of their lengths.
        clean: share of the run until which there is the natural loss alone; from there until the ramp begins
            there is the adversarial loss alone, at a radius of its own that rises to eps.
        fusion: whether all classes share one backward row, as in `crown-ibp`.
        ramp: when eps rises, and CROWN-IBP's share falls from 1 to 0.
    """
    eps, ramp = on(ramp, eps)
    beta = ramp.between(1.0, 0.0)
    robust = crown_ibp_loss(1.0, beta, fusion)
    method = _joint("advcrown-ibp", eps, robust, combiner, threshold, beta1, beta2, clean, ramp)
    return replace(method, relaxation=Relaxation(terms.CROWN_IBP, beta))


def _joint(
    name: str,
    eps: float | Ramp | Steps,
    robust: Loss,
    combiner: Literal["bisector", "total"],
    threshold: float | Ramp,
    beta1: float,
    beta2: float,
    clean: float,
    ramp: Course,
) -> Method:
    """An adversarial and a robust loss, after clean and adversarial warm-up."""
    eps, ramp = on(ramp, eps)
    if not isinstance(threshold, Ramp):
        over = ramp.finish + 0.4 * (1 - ramp.finish)
        threshold = Course(begin=ramp.finish, finish=over).between(threshold, 0.0)
    if clean > ramp.begin:
        raise InputError(
            f"{name}: clean training ({clean}) ends before the ramp of eps begins ({ramp.begin}), with "
            "adversarial training between them"
        )
    attack, warm = one_step(), Course(begin=clean, finish=ramp.begin).between(0.0, last(eps))
    first, second = Course(begin=clean, finish=clean), Course(begin=ramp.begin, finish=ramp.begin)
    losses = (
        Loss("natural", first.between(1.0, 0.0), terms.natural),
        Loss("adversarial", first.between(0.0, 1.0), terms.adversarial(attack, warm, fixed=True)),
        replace(robust, weight=second.between(0.0, 1.0)),
    )
    both = Bisector(attack, threshold, beta1, beta2) if combiner == "bisector" else Total()
    return Method(name, eps, losses, combiner=both)

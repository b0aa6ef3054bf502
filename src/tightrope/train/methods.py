"""Training methods: each a short composition of terms, weights, radii and schedules.

A method's options are its function's parameters; recipes, the command line and their checks are
derived from the signature. To add a method: one function here, one row in the tests, one recipe.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ParamSpec

from pydantic import BaseModel

from tightrope.attacks import Pgd
from tightrope.attacks import fgsm as one_step
from tightrope.bounds import Interval, Linear
from tightrope.errors import InputError
from tightrope.graph import Graph
from tightrope.train import regularisers, terms
from tightrope.train.batch import Term
from tightrope.train.initialise import ibp_initialisation
from tightrope.train.schedules import Course, Number, NumberOrRamp, Ramp, Real, Steps, Whole, at, last

P = ParamSpec("P")


@dataclass(frozen=True)
class Loss:
    """One part of an objective.

    Args:
        name: how metrics and errors call it.
        weight: a number or a schedule; while it is 0, the term is not computed.
        term: the loss per example.
        certified: whether it bounds the worst case over the region.
    """

    name: str
    weight: Number
    term: Term
    certified: bool = False


@dataclass(frozen=True)
class Method:
    """What a network is trained for.

    Args:
        name: its published name.
        eps: radius of the region in pixel units, a number or a schedule.
        losses: what is summed, each times its weight.
        initialise: what is done to the network before the first step.
        options: what its function was called with; part of a run's identity.
    """

    name: str
    eps: Number
    losses: tuple[Loss, ...]
    initialise: Callable[[Graph], None] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        certified = [loss for loss in self.losses if loss.certified]
        if certified and not any(last(loss.weight) > 0 for loss in certified):
            raise InputError(
                f"{self.name} is a certified method, but its robust term ends with weight 0: "
                "it would train nothing robust; lower kappa below 1"
            )
        if certified and last(self.eps) <= 0:
            raise InputError(f"{self.name} needs a training eps above 0, got {last(self.eps)}")
        weights = {f"the weight of its {loss.name} term": loss.weight for loss in self.losses}
        for what, number in {"eps": self.eps, **weights}.items():
            if not all(0 <= at(number, moment) < math.inf for moment in (0.0, 1.0)):
                raise InputError(f"{self.name}: {what} must be finite and not negative, got {number}")


METHODS: dict[str, Callable[..., Method]] = {}


def _published(function: Callable[P, Method]) -> Callable[P, Method]:
    """Register a method under its name, and note the options it was made with."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def make(*args: P.args, **kwargs: P.kwargs) -> Method:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        options = {k: v.model_dump() if isinstance(v, BaseModel) else v for k, v in bound.arguments.items()}
        return replace(function(*args, **kwargs), options=options)

    METHODS[function.__name__.replace("_", "-")] = make
    return make


@_published
def standard() -> Method:
    """Natural training: the cross-entropy of the clean inputs."""
    return Method("standard", 0.0, (Loss("natural", 1.0, terms.natural),))


@_published
def fgsm(eps: Number, step: Real = 1.25) -> Method:
    """Adversarial training with one gradient step from a random start (Wong et al. 2020).

    Args:
        eps: radius, in pixel units.
        step: length of the step, as a share of eps.
    """
    return Method("fgsm", eps, (Loss("adversarial", 1.0, terms.adversarial(one_step(step))),))


@_published
def pgd(eps: Number, steps: Whole = 7, step: Real = 0.3) -> Method:
    """Adversarial training with projected gradient ascent (Madry et al. 2018).

    Args:
        eps: radius, in pixel units.
        steps: gradient steps.
        step: length of one step, as a share of eps.
    """
    attack = Pgd(steps=steps, step=step, keep_best=False)
    return Method("pgd", eps, (Loss("adversarial", 1.0, terms.adversarial(attack)),))


@_published
def ibp(eps: Number, kappa: NumberOrRamp = 0.5, ramp: Course = Course(begin=0.03, finish=0.2)) -> Method:
    """Interval bound propagation (Gowal et al. 2018): `kappa CE(f(x)) + (1 - kappa) CE(-m_IBP)`.

    Args:
        eps: radius at the end of the ramp, in pixel units; or a schedule (a ramp sets the course too).
        kappa: weight of the natural loss at the end of the ramp (1 at its beginning), or a schedule.
        ramp: when eps and kappa move; the default is the MNIST schedule, epochs 3 to 20 of 100.
    """
    eps, ramp = _on(ramp, eps)
    kappa = kappa if isinstance(kappa, Ramp) else ramp.between(1.0, kappa)
    robust = terms.robust(Interval())
    losses = (Loss("natural", kappa, terms.natural), Loss("robust", _rest(kappa), robust, certified=True))
    return Method("ibp", eps, losses)


@_published
def shi_ibp(
    eps: Number,
    regularise: Real = 0.5,
    ramp: Course = Course(shape="smooth", begin=1 / 70, finish=21 / 70),
) -> Method:
    """Improved IBP (Shi et al. 2021): IBP initialisation, BatchNorm, and two regularisers in the ramp.

    `CE(-m_IBP) + lambda (1 - eps_t / eps) (L_tight + L_relu)`. Use a network with BatchNorm after
    each layer (the models named `...-bn`).

    Args:
        eps: radius at the end of the ramp, in pixel units; or a schedule (a ramp sets the course too).
        regularise: weight lambda of the regularisers at the start; it falls to 0 as eps rises.
        ramp: when eps rises; the default is epochs 1 to 21 of 70.
    """
    eps, ramp = _on(ramp, eps)
    engine = Interval()
    weight = ramp.between(regularise, 0.0)
    losses = (
        Loss("robust", 1.0, terms.robust(engine), certified=True),
        Loss("tightness", weight, regularisers.shi_tightness(engine)),
        Loss("relu-balance", weight, regularisers.shi_relu(engine)),
    )
    return Method("shi-ibp", eps, losses, initialise=ibp_initialisation)


@_published
def crown_ibp(
    eps: Number,
    kappa: NumberOrRamp = 0.5,
    beta: NumberOrRamp = 0.0,
    fusion: bool = False,
    ramp: Course = Course(begin=10 / 200, finish=60 / 200),
) -> Method:
    """CROWN-IBP (Zhang et al. 2020): `kappa CE(f(x)) + (1 - kappa) CE(-m)`, CROWN's bounds fading to IBP's.

    `m = beta m_CROWN-IBP + (1 - beta) m_IBP`, both over the same interval boxes.

    Args:
        eps: radius at the end of the ramp, in pixel units; or a schedule (a ramp sets the course too).
        kappa: weight of the natural loss at the end of the ramp (1 at its beginning), or a schedule.
        beta: share of the CROWN-IBP bounds at the end of the ramp (1 at its beginning), or a schedule.
        fusion: whether all classes share one backward row: about a quarter of the cost.
        ramp: when eps, kappa and beta move; the default is epochs 10 to 60 of 200.
    """
    eps, ramp = _on(ramp, eps)
    kappa = kappa if isinstance(kappa, Ramp) else ramp.between(1.0, kappa)
    beta = beta if isinstance(beta, Ramp) else ramp.between(1.0, beta)
    if not all(0 <= share <= 1 for share in (beta.start, beta.end)):
        raise InputError(f"crown-ibp: beta is a share and must lie in [0, 1], got {beta}")
    engine = Linear("adaptive", "interval", sides="lower")
    robust = terms.fused_crown_ibp(beta) if fusion else terms.robust_mix(engine, Interval(), beta)
    losses = (Loss("natural", kappa, terms.natural), Loss("robust", _rest(kappa), robust, certified=True))
    return Method("crown-ibp", eps, losses)


def _on(ramp: Course, eps: float | Ramp | Steps) -> tuple[Ramp | Steps, Course]:
    """The schedule of eps, and the course that everything else in the method follows."""
    if isinstance(eps, Ramp):
        return eps, eps.course()
    return (eps if isinstance(eps, Steps) else ramp.between(0.0, eps)), ramp


def _rest(kappa: float | Ramp) -> float | Ramp:
    """`1 - kappa`, moving as kappa moves."""
    if isinstance(kappa, Ramp):
        return kappa.course().between(1 - kappa.start, 1 - kappa.end)
    return 1 - kappa

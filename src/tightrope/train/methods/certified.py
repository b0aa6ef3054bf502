"""Training on bounds of the whole region."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tightrope.bounds import HybridZonotope, Intersect, Interval, Linear
from tightrope.bounds.projected import Projected
from tightrope.bounds.pullback import Scheme
from tightrope.bounds.relax import LowerSlope
from tightrope.errors import InputError
from tightrope.train import regularisers, terms
from tightrope.train.initialise import ibp_initialisation
from tightrope.train.methods.base import (
    METHODS,
    Method,
    Relaxation,
    crown_ibp_loss,
    on,
    published,
    rest,
    robust_loss,
)
from tightrope.train.objective import Loss
from tightrope.train.schedules import Course, Number, NumberOrRamp, Ramp, Real, Whole


@published(METHODS)
def ibp(eps: Number, kappa: NumberOrRamp = 0.5, ramp: Course = Course(begin=0.03, finish=0.2)) -> Method:
    """Interval bound propagation (Gowal et al. 2018): `kappa CE(f(x)) + (1 - kappa) CE(-m_IBP)`.

    Args:
        eps: radius at the end of the ramp, in pixel units; or a schedule (a ramp sets the course too).
        kappa: weight of the natural loss at the end of the ramp (1 at its beginning), or a schedule.
        ramp: when eps and kappa move; the default is the MNIST schedule, epochs 3 to 20 of 100.
    """
    eps, ramp = on(ramp, eps)
    kappa = kappa if isinstance(kappa, Ramp) else ramp.between(1.0, kappa)
    losses = (Loss("natural", kappa, terms.natural), robust_loss(rest(kappa), terms.bounded(Interval())))
    return Method("ibp", eps, losses)


@published(METHODS)
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
    eps, ramp = on(ramp, eps)
    losses = (robust_loss(1.0, terms.bounded(Interval())), *shi_regularisers(ramp, regularise))
    return Method("shi-ibp", eps, losses, initialise=ibp_initialisation)


@published(METHODS)
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
    eps, ramp = on(ramp, eps)
    kappa = kappa if isinstance(kappa, Ramp) else ramp.between(1.0, kappa)
    beta = beta if isinstance(beta, Ramp) else ramp.between(1.0, beta)
    if not all(0 <= share <= 1 for share in (beta.start, beta.end)):
        raise InputError(f"crown-ibp: beta is a share and must lie in [0, 1], got {beta}")
    losses = (Loss("natural", kappa, terms.natural), crown_ibp_loss(rest(kappa), beta, fusion))
    engine = Intersect(Linear("adaptive", "interval", sides="lower"), Interval()) if beta.end else Interval()
    return Method("crown-ibp", eps, losses, engine=engine, relaxation=Relaxation(terms.CROWN_IBP, beta))


@published(METHODS)
def wong_kolter(
    eps: Number,
    projections: Annotated[Whole, Field(ge=0)] = 50,
    ramp: Course = Course(begin=0.0, finish=0.25),
) -> Method:
    """Wong and Kolter 2018: `CE(-m)` with the dual (Fast-Lin) bound of the margins.

    Args:
        eps: radius at the end of the ramp, in pixel units; or a schedule (a ramp sets the course too).
        projections: random directions that stand for the columns of a layer with more of them (Wong et
            al. 2018): an estimate, for training alone. 0 bounds every neuron exactly.
        ramp: when eps rises, and a regulariser of the relaxation comes in; the default is the first
            20 epochs of 80.
    """
    eps, ramp = on(ramp, eps)
    boxes = Projected(projections) if projections else Linear("parallel", "linear", sides="none")
    scheme = Scheme(boxes, "parallel")
    losses = (robust_loss(1.0, terms.relaxed(scheme)),)
    relaxation = Relaxation(scheme, ramp.between(0.0, 1.0))
    exact = Linear("parallel", "linear", sides="lower")
    return Method("wong-kolter", eps, losses, engine=exact, relaxation=relaxation)


@published(METHODS)
def diffai(
    eps: Number,
    domain: Literal["box", "switch", "deepz"] = "box",
    sample: bool = True,
    kappa: NumberOrRamp = 0.5,
    ramp: Course = Course(begin=10 / 420, finish=160 / 420),
) -> Method:
    """DiffAI (Mirman et al. 2018): `kappa CE(f(x)) + (1 - kappa) CE(-m)` by a hybrid zonotope.

    Args:
        eps: radius at the end of the ramp, in pixel units; or a schedule (a ramp sets the course too).
        domain: "box" carries nothing of the input (intervals); "switch" and "deepz" carry its noise, in a
            forward pass for each of its entries, through DiffAI's ReLUs of these names.
        sample: whether the robust loss looks at a box somewhere inside the region that grows over the ramp
            (Mirman et al. 2019), instead of all of it.
        kappa: weight of the natural loss at the end of the ramp (1 at its beginning), or a schedule.
        ramp: when eps, kappa and the box move; the default is epochs 10 to 160 of 420.
    """
    eps, ramp = on(ramp, eps)
    kappa = kappa if isinstance(kappa, Ramp) else ramp.between(1.0, kappa)
    slopes: dict[str, LowerSlope] = {"switch": "adaptive", "deepz": "parallel"}
    engine = Interval() if domain == "box" else HybridZonotope(slopes[domain])
    inside = terms.small(None, ramp.between(0.0, 1.0)) if sample else terms.whole
    robust = robust_loss(rest(kappa), terms.bounded(engine, inside))
    return Method("diffai", eps, (Loss("natural", kappa, terms.natural), robust), engine=engine)


def shi_regularisers(ramp: Course, lam: float) -> tuple[Loss, Loss]:
    """The two regularisers of Shi et al. 2021, fading out over a ramp."""
    weight, engine = ramp.between(lam, 0.0), Interval()
    return (
        Loss("tightness", weight, regularisers.shi_tightness(engine)),
        Loss("relu-balance", weight, regularisers.shi_relu(engine)),
    )

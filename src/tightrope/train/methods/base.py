"""What a method and a modifier are, where they are registered, and what many of them are made of."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ParamSpec, TypeVar, cast

from jaxtyping import Int
from pydantic import BaseModel
from torch import Tensor

from tightrope.bounds import Engine, Interval, Projected
from tightrope.bounds.pullback import Scheme
from tightrope.errors import InputError
from tightrope.graph import Graph
from tightrope.region import REGIONS, Region
from tightrope.train import terms
from tightrope.train.batch import Margins, Search, State
from tightrope.train.combine import Total
from tightrope.train.objective import Combiner, Loss, Radii
from tightrope.train.options import check_options
from tightrope.train.schedules import Course, Number, Ramp, Steps, at, last
from tightrope.train.stages import WHOLE, Layerwise, Stage

P = ParamSpec("P")
R = TypeVar("R", "Method", "Modifier")


@dataclass(frozen=True)
class Relaxation:
    """The linear relaxation that a robust loss rests on.

    Args:
        scheme: how the activations are relaxed.
        presence: how much of a regulariser of this relaxation counts: 1 is all of it.
    """

    scheme: Scheme
    presence: Ramp


@dataclass(frozen=True)
class Method:
    """What a network is trained for.

    Args:
        name: its published name.
        eps: radius of the region in pixel units, a number or a schedule.
        norm: in which the radius is measured, a key of `REGIONS`; see `over`.
        losses: what is summed, each times its weight.
        initialise: what is done to the network before the first step.
        engine: what certifies the held-out examples in the metrics.
        relaxation: the linear relaxation that its robust loss rests on, if it does.
        combiner: how its losses become one gradient.
        radii: the radius of each example, if not `eps` for all.
        layerwise: how it goes through the layers, if it trains them one after another; its schedules are
            then those of a stage.
        search: how the metrics of such a method attack the region of a stage.
        fits: refuses a network that it cannot train, by an InputError.
        options: what its function was called with; part of a run's identity.
        modifiers: what was added by `method | modifier`: each one's options by its name.
    """

    name: str
    eps: Number
    losses: tuple[Loss, ...]
    norm: str = "inf"
    initialise: Callable[[Graph], None] | None = None
    engine: Engine = field(default_factory=Interval)
    relaxation: Relaxation | None = None
    combiner: Combiner = field(default_factory=Total)
    radii: Radii | None = None
    layerwise: Layerwise | None = None
    search: Search | None = None
    fits: Callable[[Graph], object] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    modifiers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __or__(self, modifier: Modifier) -> Method:
        """The method with something more: `ibp(eps=0.3) | tightness_r()`.

        Raises:
            InputError: if it already has this modifier, or the modifier does not apply to it, or is none.
        """
        if not isinstance(modifier, Modifier):
            raise InputError(f"call the modifier, for example tightrope.reweight(); got {modifier!r}")
        if modifier.name in self.modifiers:
            raise InputError(f"{self.name} already has the modifier {modifier.name}")
        modifiers = {**self.modifiers, modifier.name: modifier.options}
        return replace(modifier.change(self), modifiers=modifiers)

    def __repr__(self) -> str:
        """How it is called, with its defaults: `ibp(eps=0.3, kappa=0.5, ramp=...) | l1(weight=1e-05)`."""
        return " | ".join(
            f"{name.replace('-', '_')}({', '.join(f'{key}={value!r}' for key, value in options.items())})"
            for name, options in ((self.name, self.options), *self.modifiers.items())
        )

    def over(self, norm: str) -> Method:
        """The method for inputs that move in balls of a norm.

        Raises:
            InputError: if it bounds something that is there for other norms only.
        """
        if norm != "inf" and self.layerwise is not None:
            raise InputError(f"{self.name} trains on latent regions, which are there for l_inf, not l_{norm}")
        if norm == "1" and self.relaxation and isinstance(self.relaxation.scheme.boxes, Projected):
            raise InputError(
                f"{self.name}: projections estimate bounds for l_inf and l_2, not for l_1; compute them "
                "exactly, projections = 0"
            )
        return replace(self, norm=norm)

    def begin(self, graph: Graph, examples: int) -> State:
        """What it remembers, at the beginning of a run on this many examples.

        Raises:
            InputError: if it cannot train this network.
        """
        if self.fits is not None:
            self.fits(graph)
        return self.combiner.begin(graph) | ({} if self.radii is None else self.radii.begin(examples))

    def stages(self, graph: Graph) -> list[Stage]:
        """The parts of a run on this network."""
        return [WHOLE] if self.layerwise is None else self.layerwise.of(graph)

    def region(self, stage: Stage, progress: float, index: Int[Tensor, "batch"], state: State) -> Region:
        """Where the examples with these numbers may move when this share of a stage is done."""
        eps = stage.eps * at(self.eps, progress)
        return self.ball(eps if self.radii is None else self.radii(eps, index, state))

    def ball(self, eps: float | Tensor) -> Region:
        """Where inputs may move with this radius."""
        return REGIONS[self.norm](eps)

    def __post_init__(self) -> None:
        certified = [loss for loss in self.losses if loss.certified]
        if certified and not any(last(loss.weight) > 0 for loss in certified):
            weight = max(last(loss.weight) for loss in certified)
            raise InputError(
                f"{self.name} is a certified method, but its robust term ends with weight {weight:g}: "
                "it would train nothing robust; lower kappa below 1"
            )
        if certified and last(self.eps) <= 0:
            raise InputError(f"{self.name} needs a training eps above 0, got {last(self.eps)}")
        weights = {f"the weight of its {loss.name} term": loss.weight for loss in self.losses}
        for what, number in {"eps": self.eps, **weights}.items():
            if not all(0 <= at(number, moment) < math.inf for moment in (0.0, 1.0)):
                raise InputError(f"{self.name}: {what} must be finite and not negative, got {number}")


@dataclass(frozen=True)
class Modifier:
    """What can be added to many methods.

    Args:
        name: its published name.
        change: the method with it.
        options: what its function was called with; part of a run's identity.
    """

    name: str
    change: Callable[[Method], Method]
    options: Mapping[str, Any] = field(default_factory=dict)


METHODS: dict[str, Callable[..., Method]] = {}
MODIFIERS: dict[str, Callable[..., Modifier]] = {}


def published(registry: dict[str, Callable[..., R]]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Register a method or modifier under its name, check its options, and note what they were."""

    def register(function: Callable[P, R]) -> Callable[P, R]:
        signature, name = inspect.signature(function), function.__name__.replace("_", "-")

        @functools.wraps(function)
        def make(*args: P.args, **kwargs: P.kwargs) -> R:
            known = {key: value for key, value in kwargs.items() if key in signature.parameters}
            said = {**signature.bind_partial(*args, **known).arguments, **kwargs}
            given = check_options(function, said, name)
            options = {k: v.model_dump() if isinstance(v, BaseModel) else v for k, v in given.items()}
            return replace(cast(Callable[..., R], function)(**given), options=options)

        registry[name] = make
        return make

    return register


def robust_loss(weight: Number, margins: Margins) -> Loss:
    """The loss of the worst case, by lower bounds of the margins."""
    return Loss("robust", weight, terms.worst_case(margins), margins)


def crown_ibp_loss(weight: Number, beta: Number, fusion: bool) -> Loss:
    """The loss of the worst case by CROWN-IBP's bounds, of which beta counts; the rest are those of IBP.

    With loss fusion there are no margins of single classes but those of IBP.
    """
    robust = robust_loss(weight, terms.crown_ibp(beta))
    if not fusion:
        return robust
    return replace(robust, term=terms.fused_crown_ibp(beta), margins=terms.bounded(Interval()))


def on(ramp: Course, eps: float | Ramp | Steps) -> tuple[Ramp | Steps, Course]:
    """The schedule of eps, and the course that everything else in the method follows."""
    if isinstance(eps, Ramp):
        return eps, eps.course()
    return (eps if isinstance(eps, Steps) else ramp.between(0.0, eps)), ramp


def rest(kappa: float | Ramp) -> float | Ramp:
    """`1 - kappa`, moving as kappa moves."""
    if isinstance(kappa, Ramp):
        return kappa.course().between(1 - kappa.start, 1 - kappa.end)
    return 1 - kappa

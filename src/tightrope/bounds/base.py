"""What is asked of an engine, what it yields, and what an engine is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, Protocol, overload, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tightrope.errors import InputError
from tightrope.graph import Graph
from tightrope.region import Region
from tightrope.spec import Spec

Guarantee = Literal["sound", "estimate"]

Boxes = dict[int, tuple[Tensor, Tensor]]
"""By node number of each activation, the lower and upper bound of what enters it."""


@dataclass(frozen=True)
class Estimate:
    """Guessed bounds of `C f(x')` over a region: good enough to train on, never to prove anything.

    Args:
        lower: lower bound of every row of the specification.
        upper: upper bound.
        boxes: by node number of each activation, the lower and upper bound of what enters it.
    """

    guarantee: ClassVar[Guarantee] = "estimate"

    lower: Float[Tensor, "batch rows"]
    upper: Float[Tensor, "batch rows"]
    boxes: Boxes

    def map(self, change: Callable[[Tensor], Tensor]) -> Estimate:
        """The same with every tensor changed."""
        boxes = {i: (change(lower), change(upper)) for i, (lower, upper) in self.boxes.items()}
        return replace(self, lower=change(self.lower), upper=change(self.upper), boxes=boxes)


@dataclass(frozen=True)
class Bounds(Estimate):
    """Bounds of `C f(x')` over a region that hold, up to rounding (docs/soundness.md)."""

    guarantee: ClassVar[Guarantee] = "sound"


def sound(found: Estimate, name: str) -> Bounds:
    """What was found, if these are bounds that hold.

    Args:
        found: by something that stands in an engine's place.
        name: how the error calls that.

    Raises:
        InputError: if it only estimates.
    """
    if not isinstance(found, Bounds):
        raise InputError(f"{name} yields estimates, which prove nothing; use a sound engine or verifier")
    return found


@dataclass(frozen=True, eq=False)
class Problem:
    """What is to be bounded: `C f(x')` for every x' of the region around each example.

    It remembers what engines found, so that engines which build on the same bounds share them.

    Args:
        graph: the network; BatchNorm at fixed statistics.
        x: inputs.
        region: where each input may move.
        spec: the rows `C`.
        generator: source of randomness for estimators; torch's default if None.

    Raises:
        InputError: if `x` has another shape than the network was traced with.
    """

    graph: Graph
    x: Float[Tensor, "batch *shape"]
    region: Region
    spec: Spec
    generator: torch.Generator | None = None
    _found: dict[Estimator, Estimate] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        self.graph.check(self.x)

    @overload
    def bounds(self, engine: Engine) -> Bounds: ...

    @overload
    def bounds(self, engine: Estimator) -> Estimate: ...

    def bounds(self, engine: Estimator) -> Estimate:
        """The engine's bounds, computed when first asked for."""
        if engine not in self._found:
            self._found[engine] = engine(self)
        return self._found[engine]

    def at(self, examples: Int[Tensor, "chosen"]) -> Problem:
        """The problem of some examples, some of them perhaps more than once, with what was found for them."""
        copies: dict[int, Tensor] = {}  # engines share boxes: what is one tensor here is one there

        def chosen(value: Tensor) -> Tensor:
            if id(value) not in copies:
                copies[id(value)] = value[examples]
            return copies[id(value)]

        spec = Spec(self.spec.rows[examples])
        part = replace(self, x=self.x[examples], region=self.region.at(examples), spec=spec)
        part._found.update({engine: found.map(chosen) for engine, found in self._found.items()})
        return part


@runtime_checkable
class Engine(Protocol):
    """Bounds a specification of a network over a region around each input. Hashable: equal engines agree."""

    def __call__(self, problem: Problem) -> Bounds:
        """Bounds of the problem's specification for every example; differentiable."""
        ...


@runtime_checkable
class Estimator(Protocol):
    """What training may use in an engine's place: every engine, and what only guesses."""

    def __call__(self, problem: Problem) -> Estimate:
        """Guessed bounds of the problem's specification for every example; differentiable."""
        ...

"""What an engine yields, and what an engine is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from tightrope.graph import Graph
from tightrope.region import Region
from tightrope.spec import Spec

Guarantee = Literal["sound", "estimate"]


@dataclass(frozen=True)
class Bounds:
    """Bounds of `C f(x')` over a region.

    Args:
        lower: lower bound of every row of the specification.
        upper: upper bound.
        guarantee: "sound" if the bounds hold up to rounding, "estimate" if they may not hold.
        boxes: by node number of each activation, the lower and upper bound of what enters it.
    """

    lower: Float[Tensor, "batch rows"]
    upper: Float[Tensor, "batch rows"]
    guarantee: Guarantee
    boxes: dict[int, tuple[Tensor, Tensor]]


@runtime_checkable
class Engine(Protocol):
    """Bounds a specification of a network over a region around each input."""

    def __call__(self, graph: Graph, x: Float[Tensor, "batch *shape"], region: Region, spec: Spec) -> Bounds:
        """Bounds of `spec` over `region` around every example of `x`; differentiable."""
        ...

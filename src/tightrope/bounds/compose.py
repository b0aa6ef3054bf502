"""Engines made of engines."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tightrope.bounds.base import Bounds, Engine
from tightrope.graph import Graph
from tightrope.region import Region
from tightrope.spec import Spec


@dataclass(frozen=True)
class Intersect:
    """The better of two engines' bounds, row by row: no engine is tighter than another everywhere.

    The boxes are those of the first engine.
    """

    first: Engine
    second: Engine

    def __call__(self, graph: Graph, x: Float[Tensor, "batch *shape"], region: Region, spec: Spec) -> Bounds:
        """See `Engine`; an estimate if one of the two is."""
        one, two = self.first(graph, x, region, spec), self.second(graph, x, region, spec)
        return Bounds(
            torch.maximum(one.lower, two.lower),
            torch.minimum(one.upper, two.upper),
            guarantee="sound" if one.guarantee == two.guarantee == "sound" else "estimate",
            boxes=one.boxes,
        )

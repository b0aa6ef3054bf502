"""Boxes in the middle of a network, with points of theirs that know the box they lie in."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tightrope.bounds.base import Problem
from tightrope.bounds.interval import box_of
from tightrope.errors import InputError
from tightrope.graph import Graph


@dataclass(frozen=True, eq=False)
class Hull:
    """The box that intervals find for a node's value, and the network behind it.

    A point is the box's middle plus noise in [-1, 1] times its half-width. There is a point for each row of
    a specification: to an attack, the hull is a network of two classes that takes noise, and the row's value
    is the margin of the first. Source: Mao et al. 2023 (TAPS); methods.md, section 7.

    Args:
        network: what lies behind the node, at fixed statistics.
        lower: lower corner of the box.
        upper: upper corner.
        rows: coefficients of the network's output.
    """

    network: Graph
    lower: Float[Tensor, "batch *value"]
    upper: Float[Tensor, "batch *value"]
    rows: Float[Tensor, "batch rows classes"]

    @classmethod
    def over(cls, problem: Problem, node: int, rows: Float[Tensor, "batch rows classes"]) -> Hull:
        """The hull of a node's value.

        Args:
            problem: says network, inputs and region.
            node: a node that separates the network.
            rows: coefficients of the output.

        Raises:
            InputError: if a path goes around the node.
        """
        return cls(problem.graph.since(node), *box_of(problem, node), rows)

    @property
    def still(self) -> Float[Tensor, "points *value"]:
        """No noise."""
        return self.lower.new_zeros(self.rows.shape[0] * self.rows.shape[1], *self.lower.shape[1:])

    @property
    def labels(self) -> Int[Tensor, "points"]:
        """The class whose margins the rows' values are: always the first of the two."""
        return torch.zeros(self.rows.shape[:2], dtype=torch.long, device=self.rows.device).flatten()

    def run(self, noise: Float[Tensor, "points *value"]) -> tuple[Float[Tensor, "points 2"], Hull]:
        """The value of each point's row, and 0: what an attack looks at."""
        middle, half = (self.lower + self.upper) / 2, (self.upper - self.lower) / 2
        value = self._value(middle.detach().unsqueeze(1) + half.detach().unsqueeze(1) * self._each(noise))
        return torch.stack([value, torch.zeros_like(value)], 2).flatten(0, 1), self

    def points(self, noise: Float[Tensor, "points *value"]) -> Float[Tensor, "batch rows *value"]:
        """The points of noise, through which a gradient reaches the box: TAPS's connector.

        Between the middle and the upper corner, `p = e u + (1 - e) c` with the middle c held still; in the
        lower half likewise. That is the linear connector with c = 0.5: `dp/du = relu(e)`, `dp/dl = relu(-e)`.
        """
        lower, upper = self.lower.unsqueeze(1), self.upper.unsqueeze(1)
        # Where a box has no width, its point moves with it and noise means nothing.
        noise = torch.where(lower < upper, self._each(noise), 1.0)
        middle = ((lower + upper) / 2).detach()
        return noise.clamp(min=0) * upper + (-noise).clamp(min=0) * lower + (1 - noise.abs()) * middle

    def values(self, noise: Float[Tensor, "points *value"]) -> Float[Tensor, "batch rows"]:
        """The value of each row at its point; differentiable."""
        return self._value(self.points(noise))

    def _each(self, noise: Float[Tensor, "points *value"]) -> Float[Tensor, "batch rows *value"]:
        each: Tensor = noise.unflatten(0, self.rows.shape[:2])
        return each

    def _value(self, points: Float[Tensor, "batch rows *value"]) -> Float[Tensor, "batch rows"]:
        # Not `run`: dropout is a noise of its own, and the box does not know of it.
        outputs = self.network.entering(points.flatten(0, 1))[0]
        return (self.rows * self._each(outputs)).sum(2)


def split_node(graph: Graph, behind: int) -> int:
    """Where to split a network so that this many activations lie behind: as early as can be.

    It lies behind at least one activation, and every path goes through it. Where no such node has exactly
    this many activations behind it, as inside a residual block, it is the one with the next larger number.

    Args:
        graph: the network.
        behind: how many activations (ReLUs, max pools).

    Raises:
        InputError: if there is no such node.
    """
    activations = [i for i, _ in graph.activations()]
    readers = [[i for i, node in enumerate(graph.nodes) if j in node.inputs] for j in range(len(graph.nodes))]
    # The box in front of an activation holds no more than the one behind it.
    nodes = [j for j in graph.separators() if len(readers[j]) != 1 or readers[j][0] not in activations]
    left = {j: sum(i > j for i in activations) for j in nodes}
    fitting = [j for j, count in left.items() if behind <= count < len(activations)]
    if not fitting:
        most = max((count for count in left.values() if count < len(activations)), default=0)
        raise InputError(
            f"a split needs {behind} activations behind it and at least one in front, and this network has "
            f"{len(activations)}: "
            + (f"set split to {most} at most" if most else "use another network, or sabr or mtl-ibp")
        )
    return min(fitting, key=lambda j: (left[j], j))

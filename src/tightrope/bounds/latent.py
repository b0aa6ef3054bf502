"""Latent regions: what a network may hold in its middle while the input moves in a box."""

from __future__ import annotations

from dataclasses import dataclass, replace

from jaxtyping import Float
from torch import Tensor

from tightrope.bounds.base import Boxes, Estimator, Problem
from tightrope.bounds.relaxed import RelaxedNetwork
from tightrope.errors import InputError
from tightrope.graph import Graph
from tightrope.region import Box, Region
from tightrope.spec import Spec

NOISE = Box(1.0, domain=None)
"""Where the noise of a latent region lies, around 0: attacks take it for any other region."""


@dataclass(frozen=True, eq=False)
class Latent:
    """The zonotope `{a + A e : e in [-1, 1]^m}` that a node's value lies in, with the network behind it.

    `e` has an entry for every input and for every neuron of an activation up to the node. A is never formed:
    noise is pushed through the relaxed network, gradients come back through it. Every value that the network
    takes over the region is `a + A e` for some e, and so is everything that two branches hold at once, since
    they share the noise. Source: maar.txt, eqs. 15, 16 and 22, with the centre shift `+ mu` that eq. 15
    leaves out; seeds.md, section 5.

    Args:
        network: relaxed up to the node, exact behind it.
        node: a node number; 0 is the input, whose region is the input's box itself.
        middle: of the input's box.
        half: half its width.
    """

    network: RelaxedNetwork
    node: int
    middle: Float[Tensor, "batch *shape"]
    half: Float[Tensor, "batch *shape"]

    @classmethod
    def over(
        cls, graph: Graph, x: Float[Tensor, "batch *shape"], region: Region, node: int, boxes: Boxes
    ) -> Latent:
        """The latent region of a node.

        Args:
            graph: the network at fixed statistics.
            x: inputs.
            region: where each input may move; an l_inf ball.
            node: whose region it is.
            boxes: of what enters each activation up to the node; those of others are not looked at. An
                estimate serves for training, where nothing is proved.

        Raises:
            InputError: if the region is no `Box`, or an activation up to the node is not ReLU or LeakyReLU.
        """
        if not isinstance(region, Box):
            raise InputError(f"latent regions are there for l_inf, not for {type(region).__name__}")
        lower, upper = region.corners(x)
        network = RelaxedNetwork.over(graph, {i: box for i, box in boxes.items() if i <= node})
        return cls(network, node, (lower + upper) / 2, (upper - lower) / 2)

    def on(self, graph: Graph) -> Latent:
        """The same region in front of the same network in another mode."""
        return replace(self, network=replace(self.network, graph=graph))

    @property
    def still(self) -> Float[Tensor, "batch noise"]:
        """No noise."""
        shapes = [self.middle.shape[1:], *(self.network.graph.nodes[i].shape for i in self.network.lines)]
        return self.middle.new_zeros(len(self.middle), sum(shape.numel() for shape in shapes))

    def run(self, noise: Float[Tensor, "batch noise"]) -> tuple[Float[Tensor, "batch classes"], Latent]:
        """The logits at `a + A e`, as `Graph.run` yields them: an attack sees a network that takes noise."""
        return self._value(noise, None), self

    def point(self, noise: Float[Tensor, "batch noise"]) -> Float[Tensor, "batch *value"]:
        """`a + A e`: the node's value."""
        return self._value(noise, self.node)

    def _value(self, noise: Float[Tensor, "batch noise"], node: int | None) -> Tensor:
        numbers = [*self.network.lines]
        shapes = [self.middle.shape[1:], *(self.network.graph.nodes[i].shape for i in numbers)]
        first, *rest = noise.split([shape.numel() for shape in shapes], 1)
        pushed = {i: e.view(-1, 1, *s) for i, e, s in zip(numbers, rest, shapes[1:], strict=True)}
        points = self.middle + self.half * first.view_as(self.middle)
        value: Tensor = self.network.run(points.unsqueeze(1), pushed, node).squeeze(1)
        return value


def boxes_upto(problem: Problem, node: int, estimator: Estimator) -> Boxes:
    """Bounds of what enters each activation up to a node, without what lies behind it.

    Args:
        problem: says network, inputs and region.
        node: an activation, or the input, which has none before it.
        estimator: how to bound.
    """
    if node == 0:
        return {}
    x, part = problem.x, problem.graph.upto(node)
    nothing = Spec(x.new_zeros(len(x), 0, part.classes))
    return estimator(Problem(part, x, problem.region, nothing, problem.generator)).boxes

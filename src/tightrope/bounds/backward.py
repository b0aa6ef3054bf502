"""One pass back: coefficients of a node's value, pulled through the network to its input."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from tightrope.bounds.patches import Patches, descend, pull
from tightrope.bounds.relax import Relaxation, Step
from tightrope.graph import Graph
from tightrope.graph.ops import Affine, Identity
from tightrope.graph.ops import Linear as Dense
from tightrope.memory import free_bytes
from tightrope.region import Region, dot

COPIES = 16  # of a layer's coefficients: the layer before, products of a convolution before they are added up
CACHED = 2**21  # coefficients that a CPU works on without waiting for its memory


@dataclass(frozen=True)
class Seen:
    """The activations before a node between linear bounds, counted from one path to the node.

    Args:
        steps: by node number, an activation's bounds as they are seen from the path.
        end: where the path ends, the node's value.
    """

    steps: Mapping[int, Step]
    end: Float[Tensor, "batch *value"]


def lower_bound(
    graph: Graph,
    x: Float[Tensor, "batch *shape"],
    region: Region,
    node: int,
    rows: Float[Tensor, "batch rows *value"],
    seen: Seen,
    reached: dict[int, Tensor] | None = None,
) -> Float[Tensor, "batch rows"]:
    """A lower bound of `<row, value of the node>` over the region, by one pass back to the input.

    Args:
        graph: the network at fixed statistics.
        x: inputs.
        region: where each input may move.
        node: whose value the rows are about.
        rows: coefficients.
        seen: every activation before the node.
        reached: takes, if given, the coefficients of what the input (0) and each activation yields.
    """
    if not rows.shape[1]:
        return rows.new_zeros(len(rows), 0)
    started = dot(rows.flatten(2), seen.end.flatten(1))
    return started + pull_from(graph, x, region, node, rows, seen.steps, reached)


def path(
    graph: Graph,
    x: Float[Tensor, "batch *shape"],
    region: Region,
    node: int,
    relaxations: Mapping[int, Relaxation],
) -> tuple[Seen, dict[int, Tensor]]:
    """The path of the upper bounds from the region's middle to a node; where it enters each activation."""
    steps, entering, values = dict[int, Step](), dict[int, Tensor](), {0: region.middle(x)}
    for i, (op, inputs) in enumerate(((n.op, n.inputs) for n in graph.nodes[1 : node + 1]), start=1):
        if isinstance(op, Affine):
            values[i] = op.apply(*[values[j] for j in inputs])
        else:
            entering[i] = values[inputs[0]]
            values[i], steps[i] = relaxations[i].seen_from(entering[i])
    return Seen(steps, values[node]), entering


def pull_from(
    graph: Graph,
    x: Float[Tensor, "batch *shape"],
    region: Region,
    node: int,
    rows: Float[Tensor, "batch rows *value"],
    seen: Mapping[int, Step],
    reached: dict[int, Tensor] | None = None,
    mirrored: bool = False,
) -> Float[Tensor, "batch bounds"]:
    """`lower_bound`, counted from where the path ends; if mirrored, also of the rows negated."""
    pending = {node: rows}
    bound = rows.new_zeros(len(rows), rows.shape[1] * (1 + mirrored))
    for i in range(node, 0, -1):
        if i not in pending:
            continue
        rows, op, inputs = pending.pop(i), graph.nodes[i].op, graph.nodes[i].inputs
        if isinstance(op, Affine):
            parts = op.transpose(rows, [graph.nodes[j].shape for j in inputs])
        else:
            if reached is not None:
                reached[i] = rows
            pulled, offset = pull(seen[i], rows, mirrored)
            bound, parts = bound + offset, (pulled,)
        for j, part in zip(inputs, parts, strict=True):
            pending[j] = pending[j] + part if j in pending else part
    if 0 not in pending:
        return bound
    if reached is not None:
        reached[0] = pending[0]
    return bound + descend(region, x, pending[0], mirrored)


@dataclass(frozen=True)
class Rows:
    """The way from any neuron back to the input, with a coefficient for each neuron: see `Patches`."""

    graph: Graph
    x: Tensor
    region: Region
    node: int
    seen: Mapping[int, Step]
    mirrored: bool

    locations: ClassVar[int] = 1

    @property
    def width(self) -> int:
        """Coefficients that a neuron has at most in one layer."""
        return max(node.shape.numel() for node in self.graph.nodes[: self.node + 1])

    def lower_bound(self, examples: Tensor, members: Tensor) -> Tensor:
        """Lower bounds of some neurons of some examples, and then of the neurons negated.

        Counted from where the path ends.
        """
        graph, node = self.graph, self.node
        while isinstance(graph.nodes[node].op, Identity):
            (node,) = graph.nodes[node].inputs
        op, shape = graph.nodes[node].op, graph.nodes[node].shape
        if isinstance(op, Dense) and len(shape) == 1:
            (node,) = graph.nodes[node].inputs
            rows = F.embedding(members, op.weight())
        else:
            rows = self.x.new_zeros(*members.shape, shape.numel()).scatter_(2, members.unsqueeze(2), 1.0)
            rows = rows.unflatten(2, shape)
        seen = {i: step.map(lambda part: part[examples]) for i, step in self.seen.items()}
        region = self.region.at(examples)
        rows = rows if self.mirrored else torch.cat([rows, -rows], 1)
        return pull_from(graph, self.x[examples], region, node, rows, seen, mirrored=self.mirrored)


def reach(
    graph: Graph, x: Float[Tensor, "batch *shape"], region: Region, node: int
) -> Float[Tensor, "1 *value"]:
    """How far a node goes from its value at the centre over a ball of radius 1: the dual norms of its rows.

    Args:
        graph: the network at fixed statistics, which has no activation before the node.
        x: says in what arithmetic.
        region: a ball; its radius and its domain do not matter.
        node: whose value it is.
    """
    ball, centre = replace(region, eps=1.0, domain=None), x.new_zeros(1, *graph.input_shape)
    way = Patches.to(graph, centre, ball, node, {}, True) or Rows(graph, centre, ball, node, {}, True)
    shape = graph.nodes[node].shape
    members = shape.numel() // way.locations
    cells = coefficients_at_once(x) // (2 * way.width)
    places, found = [], []
    for groups, columns in rectangles([members] * way.locations, max(1, cells)):
        group = torch.arange(way.locations, device=x.device)[groups]
        member = torch.arange(members, device=x.device)[columns].expand(len(group), -1)
        places.append((member * way.locations + group.unsqueeze(1)).flatten())
        found.append(-way.lower_bound(group, member).chunk(2, 1)[0].flatten())
    return x.new_zeros(shape.numel()).index_put((torch.cat(places),), torch.cat(found)).view(1, *shape)


def rectangles(counts: list[int], cells: int) -> Iterator[tuple[slice, slice]]:
    """Rectangles of at most `cells` cells over the first `counts[i]` cells of every line i; counts fall."""
    top = 0
    while top < len(counts) and counts[top]:
        wide = min(counts[top], cells)
        tall = cells // wide
        for left in range(0, counts[top], wide):
            lines = sum(count > left for count in counts[top : top + tall])
            yield slice(top, top + lines), slice(left, left + wide)
        top += tall


def coefficients_at_once(x: Tensor) -> int:
    """How many coefficients of a layer one backward pass may hold on this device at this moment."""
    fitting = free_bytes(x.device) // (COPIES * x.element_size())
    return min(fitting, CACHED) if x.device.type == "cpu" else fitting

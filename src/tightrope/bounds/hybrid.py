"""DiffAI's hybrid zonotope: what the input does is carried exactly, what activations add is a box."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tightrope.bounds.base import Bounds, Boxes, Problem
from tightrope.bounds.relax import Lines, LowerSlope, relax
from tightrope.bounds.relaxed import Columns, Source, Sources, push_columns
from tightrope.graph.ops import Affine, Kinked, Operator
from tightrope.region import dot


@dataclass(frozen=True, eq=False)
class Hybrid:
    """`centre + box e' + sum_k column_k e_k`: e' of each entry its own, e_k of each entry of the input.

    Args:
        centre: h in DiffAI.
        box: b, not negative.
        columns: E, at most one entry, with key 0.
        source: what the e_k may be.
    """

    centre: Float[Tensor, "batch *shape"]
    box: Float[Tensor, "batch *shape"]
    columns: dict[int, Columns]
    source: Source

    def bound(
        self, rows: Float[Tensor, "batch rows *shape"]
    ) -> tuple[Float[Tensor, "batch rows"], Float[Tensor, "batch rows"]]:
        """The smallest and the largest that each row yields."""
        rows = rows.flatten(2)
        middle, spread = dot(rows, self.centre.flatten(1)), dot(rows.abs(), self.box.flatten(1))
        lower, upper = middle - spread, middle + spread
        for columns in self.columns.values():
            down, up = self.source.sides(rows @ columns.product().flatten(2).mT)
            lower, upper = lower - down, upper + up
        return lower, upper

    def corners(self) -> tuple[Float[Tensor, "batch *shape"], Float[Tensor, "batch *shape"]]:
        """The smallest and the largest that each entry may be."""
        lower, upper = self.centre - self.box, self.centre + self.box
        for columns in self.columns.values():
            down, up = self.source.sides(columns.product().flatten(2).mT)
            lower, upper = lower - down.view_as(lower), upper + up.view_as(upper)
        return lower, upper


@dataclass(frozen=True)
class HybridZonotope:
    """A zonotope with a column for each entry of the input and a box, pushed through the network.

    A ReLU with `l < 0 < u` becomes `s z + mu + mu e'` with `mu = max(-s l, (1 - s) u) / 2`: the centre and
    the columns are scaled by s, the box too and then mu is added to it. What an activation adds is known
    to no other neuron, so that there are as many columns behind the last layer as at the input; `Forward`,
    which carries that noise as well, is tighter with the same slopes. Sources: Mirman et al. 2018 (DiffAI);
    methods.md, section 11. Neither is it always tighter than intervals: a line of slope 1 lets a value
    below 0 that a ReLU never yields.

    It costs a forward pass for each entry of the input, and their values are in memory at once: it is for
    networks of linear layers and for small inputs. Up to the first activation one pass serves all examples.

    Args:
        slope: s of a ReLU whose sign is open. "adaptive" is DiffAI's switch (1 where `u > -l`, else 0),
            "zero" its box, "parallel" is DeepZ (`u / (u - l)`), "one" keeps all columns. DiffAI's smooth
            ReLU has DeepZ's slope and twice the noise.

    Example:
        >>> import torch, tightrope as tr
        >>> net = torch.nn.Sequential(torch.nn.Linear(1, 2), torch.nn.ReLU(), torch.nn.Linear(2, 1))
        >>> for p, value in zip(net.parameters(), ([[1.0], [-1.0]], [0.0, 1.0], [[1.0, 1.0]], [0.0])):
        ...     _ = p.data.copy_(torch.tensor(value))
        >>> b = tr.bounds(net, torch.tensor([[0.5]]), tr.Box(eps=0.1), tr.engines.hybrid_zonotope())
        >>> [round(v, 6) for v in (b.lower.item(), b.upper.item())]
        [1.0, 1.0]
    """

    slope: LowerSlope = "adaptive"

    def __call__(self, problem: Problem) -> Bounds:
        """See `Engine`."""
        graph, x = problem.graph, problem.x
        last, rows, offset = graph.merge(problem.spec)
        middle = problem.region.minimiser(x, torch.zeros_like(x).unsqueeze(1)).squeeze(1)
        source, start = Sources().input(problem, middle)
        values = [Hybrid(middle, torch.zeros_like(middle), {0: Columns(start)}, source)]
        boxes: Boxes = {}
        for i, node in enumerate(graph.nodes[1 : last + 1], start=1):
            inputs = [values[j] for j in node.inputs]
            assert node.op is not None
            if isinstance(node.op, Affine):
                values.append(_affine(node.op, inputs))
            else:
                boxes[i] = inputs[0].corners()
                values.append(self._activation(node.op, inputs[0], *boxes[i]))
        lower, upper = values[last].bound(rows)
        return Bounds(lower + offset, upper + offset, boxes)

    def _activation(self, op: Operator, value: Hybrid, lower: Tensor, upper: Tensor) -> Hybrid:
        """An activation's value; one without a kink at 0 forgets the columns."""
        if not isinstance(op, Kinked):
            lower, upper = op.apply(lower), op.apply(upper)
            return Hybrid((lower + upper) / 2, (upper - lower) / 2, {}, value.source)
        lines = relax(op, lower, upper, self.slope)
        assert isinstance(lines, Lines)
        slope = lines.lower_slope  # a line through the kink lies below; the activation is convex
        half = torch.maximum(op.apply(lower) - slope * lower, op.apply(upper) - slope * upper) / 2
        columns = {k: Columns(c.product(), slope) for k, c in value.columns.items()}
        return Hybrid(slope * value.centre + half, slope * value.box + half, columns, value.source)


def _affine(op: Affine, inputs: list[Hybrid]) -> Hybrid:
    centres, source = [value.centre for value in inputs], inputs[0].source
    columns = push_columns(op, centres, [value.columns for value in inputs], {0: source})
    box = op.absolute(*[value.box for value in inputs])
    return Hybrid(op.apply(*centres), box, columns, source)

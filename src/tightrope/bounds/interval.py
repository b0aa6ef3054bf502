"""Interval bound propagation (IBP), Gowal et al. 2018, in centre/radius form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tightrope.bounds.backward import reach
from tightrope.bounds.base import Bounds, Boxes, Problem
from tightrope.graph.ops import Affine
from tightrope.region import dot


@dataclass(frozen=True)
class Interval:
    """Boxes pushed through the network: `c' = W c + b`, `r' = |W| r`, activations corner to corner.

    Source: seeds.md section 1; certified_training_chapter.txt, section 14.2. The affine operators
    after the last activation are merged with the specification, which is tighter than bounding the
    logits and subtracting. Costs two forward passes. Over an `l_2` or `l_1` ball, what enters the first
    activations is bounded by `W x + b ± eps ||W||_dual`, row by row, and by the ball's bounding box.

    Example:
        >>> import torch, tightrope as tr
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False))
        >>> _ = net[0].weight.data.copy_(torch.tensor([[1.0, -1.0], [0.0, 1.0]]))
        >>> b = tr.bounds(net, torch.tensor([[0.5, 0.5]]), tr.Box(eps=0.1))
        >>> [round(v, 6) for v in (*b.lower[0].tolist(), *b.upper[0].tolist())]
        [-0.2, 0.4, 0.2, 0.6]
    """

    def __call__(self, problem: Problem) -> Bounds:
        """See `Engine`."""
        graph, x, region = problem.graph, problem.x, problem.region
        last, rows, offset = graph.merge(problem.spec)
        if last == 0:  # the whole network is affine: the region bounds it better than its box
            return Bounds(
                region.minimise(x, rows) + offset,
                offset - region.minimise(x, -rows),
                boxes={},
            )
        value, boxes = _push(problem, last)
        centre, radius = (part.flatten(1) for part in value)
        rows = rows.flatten(2)
        middle, spread = dot(rows, centre) + offset, dot(rows.abs(), radius)
        return Bounds(middle - spread, middle + spread, boxes=boxes)


def box_of(
    problem: Problem, node: int
) -> tuple[Float[Tensor, "batch *value"], Float[Tensor, "batch *value"]]:
    """Interval bounds of a node's value; behind an activation they cost nothing beside `Interval`'s own."""
    boxes, op = problem.bounds(Interval()).boxes, problem.graph.nodes[node].op
    if node in boxes and op is not None:
        lower, upper = boxes[node]
        return op.apply(lower), op.apply(upper)
    (centre, radius), _ = _push(problem, node)
    return centre - radius, centre + radius


def _push(problem: Problem, node: int) -> tuple[tuple[Tensor, Tensor], Boxes]:
    """Centre and radius of a node's value, and the boxes of what enters the activations on the way."""
    graph, x, region = problem.graph, problem.x, problem.region
    boxes: Boxes = {}
    lower, upper = region.corners(x)
    values = {0: ((lower + upper) / 2, (upper - lower) / 2)}
    # Of the nodes with no activation before them: their values at the centre of a ball.
    centres = {} if region.norm == "inf" else {0: x}
    for i, n in enumerate(graph.nodes[1 : node + 1], start=1):
        inputs = [values[j] for j in n.inputs]
        if isinstance(n.op, Affine):
            values[i] = n.op.apply(*[c for c, _ in inputs]), n.op.absolute(*[r for _, r in inputs])
            if centres.keys() >= set(n.inputs):
                centres[i] = n.op.apply(*[centres[j] for j in n.inputs])
        else:
            assert n.op is not None
            lower, upper = _Corners.apply(*inputs[0])
            if n.inputs[0] in centres:
                centre = centres[n.inputs[0]]
                spread = reach(graph, x, region, n.inputs[0]) * region.radius(centre)
                lower, upper = torch.maximum(lower, centre - spread), torch.minimum(upper, centre + spread)
            boxes[i] = lower, upper
            values[i] = _Middle.apply(n.op.apply(lower), n.op.apply(upper))
    return values[node], boxes


class _Linear(torch.autograd.Function):
    """A linear map whose derivative is written out, in fewer operations than autograd finds."""

    generate_vmap_rule = True  # for torch.func

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass


class _Corners(_Linear):
    """`c - r` and `c + r`. It and `_Middle` have two operations back, where autograd has three and more."""

    @staticmethod
    def forward(centre: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
        return centre - radius, centre + radius

    @staticmethod
    def backward(ctx: Any, for_lower: Tensor, for_upper: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG004
        return for_upper + for_lower, for_upper - for_lower


class _Middle(_Linear):
    """`(l + u) / 2` and `(u - l) / 2`."""

    @staticmethod
    def forward(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        centre = torch.lerp(lower, upper, 0.5)
        return centre, upper - centre

    @staticmethod
    def backward(ctx: Any, for_centre: Tensor, for_radius: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG004
        for_upper = torch.lerp(for_centre, for_radius, 0.5)
        return for_centre - for_upper, for_upper

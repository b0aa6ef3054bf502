"""Interval bound propagation (IBP), Gowal et al. 2018, in centre/radius form."""

from __future__ import annotations

from dataclasses import dataclass

from tightrope.bounds.base import Bounds, Boxes, Problem
from tightrope.graph.ops import Affine
from tightrope.region import dot


@dataclass(frozen=True)
class Interval:
    """Boxes pushed through the network: `c' = W c + b`, `r' = |W| r`, activations corner to corner.

    Source: seeds.md section 1; certified_training_chapter.txt, section 14.2. The affine operators
    after the last activation are merged with the specification, which is tighter than bounding the
    logits and subtracting. Costs two forward passes. Differs from most code in the field in that
    an `l_2` or `l_1` region is replaced by its bounding box, except where the network is affine.

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
        boxes: Boxes = {}
        lower, upper = region.corners(x)
        values = {0: ((lower + upper) / 2, (upper - lower) / 2)}
        for i, node in enumerate(graph.nodes[1 : last + 1], start=1):
            inputs = [values[j] for j in node.inputs]
            if isinstance(node.op, Affine):
                values[i] = (
                    node.op.apply(*[c for c, _ in inputs]),
                    node.op.absolute(*[r for _, r in inputs]),
                )
            else:
                assert node.op is not None
                ((centre, radius),) = inputs
                boxes[i] = lower, upper = centre - radius, centre + radius
                lower, upper = node.op.apply(lower), node.op.apply(upper)
                values[i] = (lower + upper) / 2, (upper - lower) / 2
        centre, radius = (value.flatten(1) for value in values[last])
        rows = rows.flatten(2)
        middle, spread = dot(rows, centre) + offset, dot(rows.abs(), radius)
        return Bounds(middle - spread, middle + spread, boxes=boxes)

"""Backward linear bound propagation: Fast-Lin, CROWN and CROWN-IBP are one pass with other parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tightrope.bounds.base import Bounds, Boxes, Problem
from tightrope.bounds.interval import Interval
from tightrope.bounds.relax import LowerSlope, Relaxation, relax
from tightrope.graph import Graph
from tightrope.graph.ops import Activation, Affine
from tightrope.region import Region

LARGEST = 2**25  # coefficients that one backward pass may hold per layer: 256 MB in float64


def lower_bound(
    graph: Graph,
    x: Float[Tensor, "batch *shape"],
    region: Region,
    node: int,
    rows: Float[Tensor, "batch rows *value"],
    relaxations: dict[int, Relaxation],
    reached: dict[int, Tensor] | None = None,
) -> Float[Tensor, "batch rows"]:
    """A lower bound of `<row, value of the node>` over the region, by one pass back to the input.

    Args:
        graph: the network at fixed statistics.
        x: inputs.
        region: where each input may move.
        node: whose value the rows are about.
        rows: coefficients.
        relaxations: for every activation before the node.
        reached: takes, if given, the coefficients of what the input (0) and each activation yields.
    """
    pending = {node: rows}
    bound = rows.new_zeros(rows.shape[:2])
    for i in range(node, 0, -1):
        if i not in pending:
            continue
        rows, op, inputs = pending.pop(i), graph.nodes[i].op, graph.nodes[i].inputs
        if isinstance(op, Affine):
            parts, offset = op.transpose(rows, [graph.nodes[j].shape for j in inputs])
        else:
            if reached is not None:
                reached[i] = rows
            pulled, offset = relaxations[i].pull(rows)
            parts = (pulled,)
        bound = bound + offset
        for j, part in zip(inputs, parts, strict=True):
            pending[j] = pending[j] + part if j in pending else part
    if 0 not in pending:
        return bound
    if reached is not None:
        reached[0] = pending[0]
    return bound + region.minimise(x, pending[0])


@dataclass(frozen=True)
class Linear:
    """Linear relaxations pulled back from the specification to the input.

    `<c, f(x')> >= <A, x'> + b` over the region, minimised exactly there. Sources: Weng et al. 2018
    (Fast-Lin), Zhang et al. 2018 (CROWN), Zhang et al. 2020 (CROWN-IBP); seeds.md, sections 1 and 2.

    Args:
        slope: which line bounds an unstable ReLU from below.
        inner: how the inputs of the activations are bounded: by intervals alone, or, where intervals
            leave the sign open, by this engine itself, layer after layer.
        sides: "both", or "lower" alone at half the cost; the upper bound is then the interval one.
    """

    slope: LowerSlope = "adaptive"
    inner: Literal["interval", "linear"] = "linear"
    sides: Literal["both", "lower"] = "both"

    def __call__(self, problem: Problem) -> Bounds:
        """See `Engine`."""
        graph, x, region, spec = problem.graph, problem.x, problem.region, problem.spec
        interval = problem.bounds(Interval())
        boxes = (
            interval.boxes if self.inner == "interval" else self._own_boxes(graph, x, region, interval.boxes)
        )
        relaxations = relax_all(graph, boxes, self.slope)
        rows = spec.rows if self.sides == "lower" else torch.cat([spec.rows, -spec.rows], 1)
        bounds = lower_bound(graph, x, region, len(graph.nodes) - 1, rows, relaxations)
        if self.sides == "lower":
            return Bounds(bounds, interval.upper, boxes=boxes)
        lower, negated = bounds.chunk(2, 1)
        return Bounds(lower, -negated, boxes=boxes)

    def _own_boxes(
        self, graph: Graph, x: Float[Tensor, "batch *shape"], region: Region, boxes: Boxes
    ) -> Boxes:
        """Boxes tightened, activation after activation, where intervals leave the sign open."""
        tight: Boxes = {}
        relaxations: dict[int, Relaxation] = {}
        for i, (lower, upper) in boxes.items():
            (source,) = graph.nodes[i].inputs
            if tight or region.norm != "inf":  # before the first activation, intervals are exact for a box
                lower, upper = _tighten(graph, x, region, source, lower, upper, relaxations)
            tight[i] = lower, upper
            op = graph.nodes[i].op
            assert isinstance(op, Activation)
            relaxations[i] = relax(op, lower, upper, self.slope)
        return tight


def relax_all(graph: Graph, boxes: Boxes, slope: LowerSlope) -> dict[int, Relaxation]:
    """The relaxation of every activation over its box."""
    relaxations = {}
    for i, (lower, upper) in boxes.items():
        op = graph.nodes[i].op
        assert isinstance(op, Activation)
        relaxations[i] = relax(op, lower, upper, slope)
    return relaxations


def _tighten(
    graph: Graph,
    x: Tensor,
    region: Region,
    node: int,
    lower: Tensor,
    upper: Tensor,
    relaxations: dict[int, Relaxation],
    largest: int = LARGEST,
) -> tuple[Tensor, Tensor]:
    """Bounds of the neurons of one layer whose sign is open, each by its own backward pass."""
    shape = lower.shape
    widest = max(n.shape.numel() for n in graph.nodes[: node + 1])
    chunk = max(1, largest // (2 * len(x) * widest))
    lower, upper = lower.flatten(1), upper.flatten(1)
    unstable = (lower < 0) & (upper > 0)
    # Each example's open neurons come first; examples with fewer of them are padded with any others.
    order = unstable.int().argsort(dim=1, descending=True, stable=True)[:, : int(unstable.sum(1).max())]
    for index in order.split(chunk, 1):
        rows = torch.zeros(*index.shape, lower.shape[1], dtype=x.dtype, device=x.device)
        rows.scatter_(2, index.unsqueeze(2), 1.0)
        rows = rows.view(*index.shape, *shape[1:])
        bounds = lower_bound(graph, x, region, node, torch.cat([rows, -rows], 1), relaxations)
        low, negated = bounds.chunk(2, 1)
        lower = lower.scatter(1, index, torch.maximum(lower.gather(1, index), low))
        upper = upper.scatter(1, index, torch.minimum(upper.gather(1, index), -negated))
    return lower.view(shape), upper.view(shape)


def crown() -> Linear:
    """CROWN: adaptive lower slopes, every box by CROWN itself."""
    return Linear("adaptive", "linear")


def crown_ibp() -> Linear:
    """CROWN-IBP: adaptive lower slopes, boxes by intervals."""
    return Linear("adaptive", "interval")


def fast_lin() -> Linear:
    """Fast-Lin: parallel lines, every box by Fast-Lin itself; the dual of Wong and Kolter."""
    return Linear("parallel", "linear")

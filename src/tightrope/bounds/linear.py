"""Backward linear bound propagation: Fast-Lin, CROWN and CROWN-IBP are one pass with other parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tightrope.bounds.backward import Rows, Seen, coefficients_at_once, lower_bound, path, rectangles
from tightrope.bounds.base import Bounds, Boxes, Problem
from tightrope.bounds.interval import Interval
from tightrope.bounds.patches import Patches
from tightrope.bounds.relax import LowerSlope, Relaxation, Slopes, relax, seen_from_middle
from tightrope.graph import Graph
from tightrope.graph.ops import Activation, Affine, Kinked
from tightrope.region import Region


def path_over(problem: Problem, boxes: Boxes, slope: LowerSlope) -> Seen:
    """The path to the network's output where activations are relaxed over boxes.

    Over the boxes of intervals around a box it is that of the boxes' middles, since a chord goes through the
    middle of the box that intervals propagate: nothing before the last activations has to be computed.
    """
    graph, x, region = problem.graph, problem.x, problem.region
    last = len(graph.nodes) - 1
    activations = ((i, graph.nodes[i].op) for i in boxes)
    kinks = {i: op for i, op in activations if isinstance(op, Kinked)}
    tightened = boxes is not problem.bounds(Interval()).boxes
    # A ball's first boxes are cut, so that its middle is not mapped to theirs: a bound would be wrong.
    if tightened or len(kinks) < len(boxes) or region.norm != "inf":
        return path(graph, x, region, last, relax_all(graph, boxes, slope))[0]
    needed = {last}
    for i in range(last, 0, -1):
        if i in needed and i not in kinks:
            needed.update(graph.nodes[i].inputs)
    values = {0: region.middle(x)}
    for i in sorted(needed - {0}):
        op, inputs = graph.nodes[i].op, graph.nodes[i].inputs
        if isinstance(op, Affine):
            values[i] = op.apply(*[values[j] for j in inputs])
        else:
            lower, upper = (kinks[i].apply(end) for end in boxes[i])
            values[i] = torch.lerp(lower, upper, 0.5)
    return Seen({i: seen_from_middle(op, *boxes[i], slope) for i, op in kinks.items()}, values[last])


@dataclass(frozen=True)
class Linear:
    """Linear relaxations pulled back from the specification to the input.

    `<c, f(x')> >= <A, x'> + b` over the region, minimised exactly there. Sources: Weng et al. 2018
    (Fast-Lin), Zhang et al. 2018 (CROWN), Zhang et al. 2020 (CROWN-IBP); seeds.md, sections 1 and 2.

    Args:
        slope: which line bounds an unstable ReLU from below.
        inner: how the inputs of the activations are bounded: by intervals alone, or, where intervals
            leave the sign open, by this engine itself, layer after layer.
        sides: "both", or "lower" alone at half the cost; the upper bound is then the interval one. With
            "none" only the activations' inputs are bounded: for training, which pulls the specification
            back itself.
    """

    slope: LowerSlope = "adaptive"
    inner: Literal["interval", "linear"] = "linear"
    sides: Literal["both", "lower", "none"] = "both"

    def __call__(self, problem: Problem) -> Bounds:
        """See `Engine`."""
        graph, x, region, spec = problem.graph, problem.x, problem.region, problem.spec
        interval = problem.bounds(Interval())
        if not len(x):
            return interval
        boxes = (
            interval.boxes if self.inner == "interval" else self._own_boxes(graph, x, region, interval.boxes)
        )
        if self.sides == "none":
            return Bounds(interval.lower, interval.upper, boxes=boxes)
        rows = spec.rows if self.sides == "lower" else torch.cat([spec.rows, -spec.rows], 1)
        seen = path_over(problem, boxes, self.slope)
        bounds = lower_bound(graph, x, region, len(graph.nodes) - 1, rows, seen)
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
) -> tuple[Tensor, Tensor]:
    """Bounds of the neurons of one layer whose sign is open, each by its own backward pass.

    Neurons are bounded in rectangles of a group times some of its members: the channels of a location where
    patches are smaller than whole rows, else the neurons of an example.
    """
    seen, _ = path(graph, x, region, node, relaxations)
    mirrored = all(isinstance(step, Slopes) and step.parallel for step in seen.steps.values())
    rest = (graph, x, region, node, seen.steps, mirrored)
    way = Patches.to(*rest) or Rows(*rest)
    unstable = ((lower < 0) & (upper > 0)).reshape(len(x), -1, way.locations)
    members = unstable.shape[1]
    unstable = unstable.transpose(1, 2).flatten(0, 1)
    # Each group's open neurons come first, and groups with many of them come first.
    order = unstable.int().argsort(dim=1, descending=True, stable=True)
    counts, ranked = unstable.sum(1).sort(descending=True)
    cells = coefficients_at_once(x) // (2 * way.width)
    places, bounds = [], []
    for groups, columns in rectangles(counts.tolist(), max(1, cells)):
        group = ranked[groups]
        member = order[group, columns]
        place = (group // way.locations).unsqueeze(1) * members + member
        place = place * way.locations + (group % way.locations).unsqueeze(1)
        needed = unstable[group].gather(1, member)
        places.append(place[needed])
        bounds.append(torch.stack(way.lower_bound(group, member).chunk(2, 1))[:, needed])
    if not places:
        return lower, upper
    place, (low, negated) = torch.cat(places), torch.cat(bounds, 1)
    flat, start = (lower.flatten(), upper.flatten()), seen.end.flatten()[place]
    low, up = torch.maximum(flat[0][place], start + low), torch.minimum(flat[1][place], start - negated)
    lower, upper = (
        old.index_put((place,), new).view(lower.shape) for old, new in zip(flat, (low, up), strict=True)
    )
    return lower, upper


def crown() -> Linear:
    """CROWN: adaptive lower slopes, every box by CROWN itself."""
    return Linear("adaptive", "linear")


def crown_ibp() -> Linear:
    """CROWN-IBP: adaptive lower slopes, boxes by intervals."""
    return Linear("adaptive", "interval")


def fast_lin() -> Linear:
    """Fast-Lin: parallel lines, every box by Fast-Lin itself; the dual of Wong and Kolter."""
    return Linear("parallel", "linear")

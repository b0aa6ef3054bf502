"""The relaxed linear network: each ReLU becomes a line plus a bounded noise of its own.

`f(z) = D z + mu + mu e` with `e` in `[-1, 1]`, where D is the slope of Fast-Lin's parallel lines and mu
half their distance: 0 where the sign of z is known. Every value that the true network takes over the
region is one that this network takes for some noise. Sources: tight_relaxation.txt, eq. 3 (there
`delta = mu + mu e`); maar.txt, eq. 15; seeds.md, sections 2 and 5.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from tightrope.bounds.backward import lower_bound, path
from tightrope.bounds.base import Bounds, Boxes, Problem
from tightrope.bounds.interval import Interval
from tightrope.bounds.relax import Lines, Relaxation, relax
from tightrope.errors import InputError
from tightrope.graph import Graph
from tightrope.graph.ops import Affine, Conv, Kinked, Linear, Operator
from tightrope.region import Box, Region, dot


def _parallel(op: Operator | None, lower: Tensor, upper: Tensor) -> Lines:
    """Two lines of one slope around an activation, the lower one through 0."""
    if not isinstance(op, Kinked):
        raise InputError(
            f"only ReLU and LeakyReLU lie between parallel lines, this network has {type(op).__name__}: "
            "use another engine, for example crown"
        )
    lines = relax(op, lower, upper, "parallel")
    assert isinstance(lines, Lines)
    return lines


@dataclass(frozen=True, eq=False)
class RelaxedNetwork:
    """A network with activations replaced by `D z + mu + mu e`.

    Args:
        graph: the network at fixed statistics.
        lines: by node number of each activation that is replaced, its two parallel lines.
    """

    graph: Graph
    lines: dict[int, Lines]

    @classmethod
    def over(cls, graph: Graph, boxes: Boxes) -> RelaxedNetwork:
        """The network relaxed over boxes of what enters each activation.

        Raises:
            InputError: if an activation is not ReLU or LeakyReLU.
        """
        return cls(graph, {i: _parallel(graph.nodes[i].op, *box) for i, box in boxes.items()})

    def run(
        self,
        points: Float[Tensor, "batch points *shape"],
        noise: Mapping[int, Tensor],
        until: int | None = None,
    ) -> Float[Tensor, "batch points *value"]:
        """The relaxed network's value at some points for each example; differentiable.

        An activation without lines is computed as it is.

        Args:
            points: inputs.
            noise: by node number, `(batch, points, *shape)` with entries in [-1, 1]; 0 where it is missing.
            until: the node whose value is asked for; the last one if None.
        """
        batch_and_points = points.shape[:2]
        values = [points.flatten(0, 1)]
        last = len(self.graph.nodes) - 1 if until is None else until
        for i, node in enumerate(self.graph.nodes[1 : last + 1], start=1):
            inputs = [values[j] for j in node.inputs]
            if i not in self.lines:
                assert node.op is not None
                values.append(node.op.apply(*inputs))
                continue
            z, lines = inputs[0].unflatten(0, batch_and_points), self.lines[i]
            half = (lines.upper_offset / 2).unsqueeze(1)
            shift = half + half * noise[i] if i in noise else half
            values.append((lines.upper_slope.unsqueeze(1) * z + shift).flatten(0, 1))
        value: Tensor = values[last].unflatten(0, batch_and_points)
        return value


class Source(ABC):
    """One source of noise: the input, or an activation. What it does to a value is a set of columns.

    Columns have shape `(1, count, *value)` while they are the same for all examples, and
    `(batch, count, *value)` behind the first activation that they pass.
    """

    @abstractmethod
    def sides(
        self, rows: Float[Tensor, "copies rows count"]
    ) -> tuple[Float[Tensor, "batch rows"], Float[Tensor, "batch rows"]]:
        """How far `<row, noise>` goes below and above 0, where rows hold the coefficients of the columns."""

    def own(self, columns: Float[Tensor, "copies count *value"]) -> Float[Tensor, "own_copies own *value"]:
        """Of columns that all examples share, those that each example needs."""
        return columns


@dataclass(frozen=True, eq=False)
class Coordinates(Source):
    """`weight_k e_k` with `e_k` in [-1, 1]: a column for each k.

    Args:
        weights: by example, of the columns that all examples share.
        kept: which of those columns each example needs, or None if it is all of them.
    """

    weights: Float[Tensor, "batch count"]
    kept: Int[Tensor, "batch own"] | None = None

    def sides(
        self, rows: Float[Tensor, "copies rows count"]
    ) -> tuple[Float[Tensor, "batch rows"], Float[Tensor, "batch rows"]]:
        """See `Source`."""
        weights = self.weights
        if self.kept is not None and rows.shape[2] < weights.shape[1]:
            weights = weights.gather(1, self.kept)
        spread = weights @ rows[0].abs().T if len(rows) == 1 else dot(rows.abs(), weights)
        return spread, spread

    def own(self, columns: Float[Tensor, "copies count *value"]) -> Float[Tensor, "own_copies own *value"]:
        """See `Source`."""
        if self.kept is None or len(columns) > 1:
            return columns
        chosen = F.embedding(self.kept, columns[0].flatten(1))
        return chosen.view(*self.kept.shape, *columns.shape[2:])


@dataclass(frozen=True, eq=False)
class Ball(Source):
    """The step from the centre of a norm ball: a column for each entry of the input."""

    region: Region
    x: Float[Tensor, "batch *shape"]

    def sides(
        self, rows: Float[Tensor, "copies rows count"]
    ) -> tuple[Float[Tensor, "batch rows"], Float[Tensor, "batch rows"]]:
        """See `Source`."""
        rows = rows.expand(len(self.x), -1, -1)
        steps, centre = rows.unflatten(2, self.x.shape[1:]), dot(rows, self.x.flatten(1))
        down = centre - self.region.minimise(self.x, steps)
        return down, -centre - self.region.minimise(self.x, -steps)


class Sources:
    """Where noise comes from, with a column for every coordinate of it: nothing is estimated."""

    def input(self, problem: Problem, middle: Float[Tensor, "batch *shape"]) -> tuple[Source, Tensor]:
        """The input's step away from the middle of its region, and its columns."""
        x, region = problem.x, problem.region
        count = problem.graph.input_shape.numel()
        columns = torch.eye(count, dtype=x.dtype, device=x.device).view(1, count, *x.shape[1:])
        if not isinstance(region, Box):
            return Ball(region, x), columns
        return Coordinates((region.corners(x)[1] - middle).flatten(1)), columns

    def noise(self, half: Float[Tensor, "batch *shape"]) -> tuple[Source, Tensor] | None:
        """An activation's noise and its columns; None where every sign is known.

        Args:
            half: mu.
        """
        flat = half.flatten(1)
        unstable = flat > 0
        shared = unstable.any(0).nonzero()
        if not len(shared):
            return None
        columns = flat.new_zeros(len(shared), flat.shape[1]).scatter_(1, shared, 1.0)
        weights, unstable = flat[:, shared[:, 0]], unstable[:, shared[:, 0]]
        most = int(unstable.sum(1).max())
        # Each example's unstable neurons come first; examples with fewer of them keep some others.
        order = unstable.int().argsort(dim=1, descending=True, stable=True)[:, :most]
        kept = None if most == len(shared) else order
        return Coordinates(weights, kept), columns.view(1, -1, *half.shape[1:])


@dataclass(frozen=True, eq=False)
class Columns:
    """`slope * values`: what the noise of one source does to the value of a node.

    The slope of an activation waits for the next operator: a linear layer with fewer outputs than there
    are columns had better take it into its weights.
    """

    values: Float[Tensor, "copies count *value"]
    slope: Float[Tensor, "batch *value"] | None = None

    def product(self) -> Float[Tensor, "copies count *value"]:
        """The columns themselves."""
        return self.values if self.slope is None else self.slope.unsqueeze(1) * self.values


def forward(problem: Problem, sources: Sources) -> tuple[Tensor, Tensor, Boxes]:
    """Lower bound, upper bound and boxes of a problem.

    The boxes come from columns of noise, pushed forward through the network; the specification, which has
    few rows, is pulled back once over the lines that they give.
    """
    graph, x, region, spec = problem.graph, problem.x, problem.region, problem.spec
    intervals = problem.bounds(Interval()).boxes
    last = max(intervals, default=0)
    if len(intervals) == 1 and region.norm == "inf":
        last = 0  # in front of the first activation, intervals are exact for a box: there is nothing to push
    middle = region.minimiser(x, torch.zeros_like(x).unsqueeze(1)).squeeze(1)
    source, start = sources.input(problem, middle)
    found = {0: source}
    centres: list[Tensor] = [middle]
    columns: list[dict[int, Columns]] = [{0: Columns(start)}]
    boxes: Boxes = {}
    lines: dict[int, Relaxation] = {}
    for i, node in enumerate(graph.nodes[1:], start=1):
        inputs = [centres[j] for j in node.inputs]
        if isinstance(node.op, Affine):
            centres.append(node.op.apply(*inputs))
            columns.append(
                push_columns(node.op, inputs, [columns[j] for j in node.inputs], found) if i < last else {}
            )
            continue
        (centre,), entering = inputs, {k: c.product() for k, c in columns[node.inputs[0]].items()}
        box = intervals[i]
        if boxes or region.norm != "inf":
            sides = [found[k].sides(c.flatten(2).mT) for k, c in entering.items()]
            down, up = (torch.stack(side).sum(0).view_as(centre) for side in zip(*sides, strict=True))
            # A bound leaves the interval by rounding only, an estimate may lie anywhere.
            box = (centre - down).clamp(*box), (centre + up).clamp(*box)
        boxes[i], lines[i] = box, (line := _parallel(node.op, *box))
        slope, half = line.upper_slope, line.upper_offset / 2
        centres.append(slope * centre + half)
        columns.append({k: Columns(found[k].own(c), slope) for k, c in entering.items()} if i < last else {})
        if i < last and (noise := sources.noise(half)) is not None:
            found[i], start = noise
            columns[i][i] = Columns(start)
    output = len(graph.nodes) - 1
    seen, _ = path(graph, x, region, output, lines)
    lower = lower_bound(graph, x, region, output, spec.rows, seen)
    if region.norm == "inf":  # parallel lines around a box: bounds are symmetric
        return lower, 2 * dot(spec.rows, centres[-1]) - lower, boxes
    return lower, -lower_bound(graph, x, region, output, -spec.rows, seen), boxes


def push_columns(
    op: Affine, centres: list[Tensor], columns: list[dict[int, Columns]], found: dict[int, Source]
) -> dict[int, Columns]:
    """The columns of an affine operator's value; centres and columns are those of its inputs."""
    numbers = sorted(set[int]().union(*columns))
    return {k: Columns(_apply(op, centres, [c.get(k) for c in columns], found[k])) for k in numbers}


def _apply(op: Affine, centres: list[Tensor], columns: list[Columns | None], source: Source) -> Tensor:
    """`W z` for the columns of one source; None where an input has none of it."""
    first = columns[0]
    if isinstance(op, Linear) and first is not None and first.slope is not None and first.values.ndim == 3:
        weight, (batch, count, _) = op.weight(), first.values.shape
        if len(weight) < count:
            scaled = weight * first.slope.unsqueeze(1)
            return (scaled @ (first.values[0].T if batch == 1 else first.values.mT)).mT
    parts = [None if c is None else c.product() for c in columns]
    batch = max(len(part) for part in parts if part is not None)
    if any(part is not None and len(part) < batch for part in parts):
        # One path to here passed an activation, another did not.
        parts = [None if part is None else source.own(part) for part in parts]
        parts = [None if part is None else part.expand(batch, *part.shape[1:]) for part in parts]
    count = max(part.shape[1] for part in parts if part is not None)
    values = [
        centre.new_zeros(batch * count, *centre.shape[1:]) if part is None else part.flatten(0, 1)
        for part, centre in zip(parts, centres, strict=True)
    ]
    pushed: Tensor = _linear(op, values).unflatten(0, (batch, count))
    return pushed


def _linear(op: Affine, values: list[Tensor]) -> Tensor:
    """An affine operator without its constant."""
    if isinstance(op, Conv | Linear):
        return replace(op, bias=None).apply(*values)
    constant = op.apply(*[value.new_zeros(1, *value.shape[1:]) for value in values])
    return op.apply(*values) - constant if constant.any() else op.apply(*values)


@dataclass(frozen=True)
class Forward:
    """Fast-Lin's bounds with every box found on one way from the input to the output.

    The input and each unstable neuron are sources of noise, and what they do to a layer is one column
    each: a box is its centre plus and minus the sum of the columns' sizes. The numbers are those of
    `fast_lin()`. Sources: Wong and Kolter 2018, algorithm 1; Weng et al. 2018; as a zonotope, Singh et al.
    2018 (DeepZ). A layer costs as many forward passes as the input has entries and the layers before it
    have unstable neurons (up to the first activation, one pass serves the whole batch), and all its
    columns are in memory at once. `fast_lin()` costs as many backward passes as the layer has unstable
    neurons itself: this engine is for layers that are wider than what comes before them.

    Raises:
        InputError: if an activation is not ReLU or LeakyReLU.

    Example:
        >>> import torch, tightrope as tr
        >>> net = torch.nn.Sequential(torch.nn.Linear(1, 2), torch.nn.ReLU(), torch.nn.Linear(2, 1))
        >>> for p, value in zip(net.parameters(), ([[1.0], [-1.0]], [-0.5, 0.5], [[1.0, 1.0]], [0.0])):
        ...     _ = p.data.copy_(torch.tensor(value))
        >>> b = tr.bounds(net, torch.tensor([[0.5]]), tr.Box(eps=0.1), tr.engines.forward())
        >>> [round(v, 6) for v in (b.lower.item(), b.upper.item())]
        [0.0, 0.1]
    """

    def __call__(self, problem: Problem) -> Bounds:
        """See `Engine`."""
        lower, upper, boxes = forward(problem, Sources())
        return Bounds(lower, upper, boxes)

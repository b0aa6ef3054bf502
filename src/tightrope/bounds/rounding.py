"""How far bounds may be off because they were computed in floating point."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

from tightrope.bounds.base import Problem
from tightrope.bounds.interval import Interval
from tightrope.graph import Graph, Node
from tightrope.graph.ops import Activation, Affine, Conv, Dropout, Identity, Kinked, Linear, MaxPool, Reshape
from tightrope.region import dot

STEPS = 24  # roundings at a node besides those of its sums: lines, gaps, the middle and the radius of a box


_USING = list[bool]()  # whether cuDNN was on before, for every user of `plain_sums` at the moment
_LOCK = threading.Lock()


@contextmanager
def plain_sums() -> Iterator[None]:
    """Convolutions in float64 on a GPU as sums of products, which is what is counted here.

    cuDNN may take Fourier's transform, and other sums the next time.
    """
    cudnn = torch.backends.cudnn
    with _LOCK:
        _USING.append(_USING[-1] if _USING else cudnn.enabled)
        cudnn.enabled = False
    try:
        yield
    finally:
        with _LOCK:
            before = _USING.pop()
            cudnn.enabled = before and not _USING


def rounding_error(problem: Problem) -> Float[Tensor, "batch rows"]:
    """By how much a computed lower or upper bound may be wrong because of rounding.

    `2 (|C| E + G |C| M)`, where M bounds the size of everything that adds up to a value and E what the lines
    around the activations are violated by, since the boxes that they were made for are rounded too. Both are
    pushed through the network once, over interval boxes. docs/soundness.md derives it.

    It holds for `Interval`, for `Linear` with any slopes, and for the better of such bounds: for whatever
    relaxes activations over boxes inside the interval ones and pulls rows back through the lines. An engine
    that computes anything else needs its own argument.

    Args:
        problem: in the arithmetic in which the bounds were computed.
    """
    values, share = _values(problem)
    size, error = (value.flatten(1) for value in values[len(problem.graph.nodes) - 1])
    return 2 * dot(problem.spec.rows.abs(), error + share * size)


def entering_error(problem: Problem) -> dict[int, Float[Tensor, "batch *in"]]:
    """Likewise of bounds of what enters each activation, by its node number: `2 (E + G M)` there.

    A bound of a margin less multiples of neurons may be wrong by these multiples more.
    """
    values, share = _values(problem)
    entering = ((i, values[node.inputs[0]]) for i, node in problem.graph.activations())
    return {i: 2 * (error + share * size) for i, (size, error) in entering}


def _values(problem: Problem) -> tuple[dict[int, tuple[Tensor, Tensor]], float]:
    """M and E of every node, and G."""
    graph, x, region = problem.graph, problem.x, problem.region
    boxes = problem.bounds(Interval()).boxes
    share = unit(graph, x.dtype)
    size = x.abs() + region.radius(x)
    # A share of this is more than what a sum loses to underflow, even if later weights make that loss large.
    least = torch.finfo(x.dtype).tiny ** 0.9
    values = {0: (size + least, torch.zeros_like(size))}
    for i, node in enumerate(graph.nodes[1:], start=1):
        sizes, errors = zip(*[values[j] for j in node.inputs], strict=True)
        if isinstance(node.op, Affine):
            constant = node.op.apply(*[torch.zeros_like(size[:1]) for size in sizes])
            values[i] = node.op.absolute(*sizes) + constant.abs() + least, node.op.absolute(*errors)
        else:
            assert isinstance(node.op, Activation)
            values[i] = _through(node.op, sizes[0], errors[0], boxes[i], share)
    return values, share


def unit(graph: Graph, dtype: torch.dtype) -> float:
    """G: the error of a bound of any value, as a share of the value's size.

    `k N u / (1 - N u)`: u is the unit roundoff, N the roundings that a number goes through on the way from
    the input to the value and back again, and a bound is the sum of numbers that together are at most k
    times as large as the value: docs/soundness.md counts them.
    """
    roundings = sum(STEPS + len(node.inputs) + _longest_sums(graph, node) for node in graph.nodes)
    # What a pass leaves behind in one layer is added up over all its neurons.
    roundings += max(node.shape.numel() for node in graph.nodes)
    parts = 5 + 3 * sum(1 for _ in graph.activations())
    u = torch.finfo(dtype).eps / 2
    return parts * roundings * u / (1 - roundings * u)


def _longest_sums(graph: Graph, node: Node) -> int:
    """Terms of the longest sum in `apply` and in `transpose` together."""
    if isinstance(node.op, Linear) or (isinstance(node.op, Conv) and not node.op.pad):
        weight = node.op.weight()
        return weight[0].numel() + weight.numel() // weight.shape[1]
    if isinstance(node.op, Identity | Reshape | Dropout | Kinked | None):
        return 0
    return node.shape.numel() + sum(graph.nodes[j].shape.numel() for j in node.inputs)


def _through(
    op: Activation,
    size: Float[Tensor, "batch *in"],
    error: Float[Tensor, "batch *in"],
    box: tuple[Tensor, Tensor],
    share: float,
) -> tuple[Float[Tensor, "batch *out"], Float[Tensor, "batch *out"]]:
    """Size and error behind an activation."""
    outside = error + share * size  # how far the input may lie outside its box
    if isinstance(op, Kinked):
        lower, upper = box
        steepest = torch.where(upper < 0, op.slope, 1.0)
        offset = torch.minimum(-lower, upper).clamp(min=0)
        violated = (lower < outside) & (upper > -outside)
        return steepest * size + offset, steepest * error + torch.where(violated, outside, 0.0)
    if isinstance(op, MaxPool):
        size, error, outside = op.apply(size), op.apply(error), op.apply(outside)
    # Slopes are at most 1; an S-shaped function's lines reach as far from 0 as its input and 1 together.
    return 2 * size + 1, error + 2 * outside + share

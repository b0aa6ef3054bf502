"""The exact minima of margins over a region, by an LP for every activation pattern that occurs there.

It shares nothing with the encoder: within a pattern the network is an affine function of its input, whose
coefficients come from running the operators on the origin and on unit vectors.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linprog
from torch import Tensor, nn

from tightrope.bounds import Problem
from tightrope.graph import Graph, trace
from tightrope.graph.ops import Affine, LeakyReLU
from tightrope.region import Box, L1Ball, Region
from tightrope.spec import Spec
from tightrope.verify import Finding, Stage

Array = np.ndarray


@dataclass(frozen=True)
class Polytope:
    """`A x <= b` within a box."""

    lower: Array
    upper: Array
    A: Array
    b: Array

    def cut(self, row: Array, most: float) -> Polytope:
        return Polytope(self.lower, self.upper, np.vstack([self.A, row]), np.append(self.b, most))

    def minimum(self, row: Array, offset: float) -> float:
        """Infinity where there is no point."""
        limits = np.column_stack([self.lower, self.upper])
        found = linprog(row, self.A, self.b, bounds=limits, method="highs-ds")
        if found.status == 2:
            return math.inf
        assert found.status == 0, found.message
        return float(found.fun) + offset

    def least(self, row: Array, offset: float) -> float:
        """A lower bound of the minimum, by the box alone."""
        return float(np.where(row > 0, row * self.lower, row * self.upper).sum() + offset)


def ask(stage: Stage, graph: Graph, x: Tensor, y: Tensor, region: Region, limit: float = math.inf) -> Finding:
    """What a stage finds out where nothing is known yet."""
    return stage(Problem(graph, x, region, Spec.margins(y, graph.classes, x)), y, limit)


def polytope(x: Tensor, region: Region) -> Polytope:
    lower, upper = (corner.flatten().numpy() for corner in region.corners(x))
    box = Polytope(lower, upper, np.zeros((0, len(lower))), np.zeros(0))
    if isinstance(region, L1Ball):  # a facet for every choice of signs
        for signs in itertools.product((-1.0, 1.0), repeat=len(lower)):
            row = np.array(signs)
            box = box.cut(row, float(row @ x.flatten().numpy() + region.eps))
    return box


def exact_minima(graph: Graph, x: Tensor, region: Region, rows: Tensor) -> Array:
    """The minimum of `<row, logits>` over the region around one input, for each row."""
    size = x.numel()
    points = torch.cat([torch.zeros(1, size), torch.eye(size)]).double().view(-1, *x.shape[1:])
    return _from(graph, 1, {0: points}, polytope(x, region), rows)


def _from(graph: Graph, i: int, values: dict[int, Tensor], where: Polytope, rows: Tensor) -> Array:
    """The minima, given the values of the first i nodes at the origin and the unit vectors."""
    if i == len(graph.nodes):
        return np.array([where.minimum(*_line(values[i - 1] @ row)) for row in rows])
    node = graph.nodes[i]
    inputs = [values[j] for j in node.inputs]
    if isinstance(node.op, Affine):
        return _from(graph, i + 1, {**values, i: node.op.apply(*inputs)}, where, rows)
    slope = node.op.slope if isinstance(node.op, LeakyReLU) else 0.0
    return _split(graph, i, values, where, rows, inputs[0].flatten(1), [], slope)


def _split(
    graph: Graph,
    i: int,
    values: dict[int, Tensor],
    where: Polytope,
    rows: Tensor,
    z: Tensor,
    done: list[Tensor],
    slope: float,
) -> Array:
    """The minima over the two sides of each neuron of an activation."""
    k = len(done)
    if k == z.shape[1]:
        value = torch.stack(done, 1).view(-1, *graph.nodes[i].shape)
        return _from(graph, i + 1, {**values, i: value}, where, rows)
    line, offset = _line(z[:, k])

    def on(side: Polytope, factor: float) -> Array:
        return _split(graph, i, values, side, rows, z, [*done, factor * z[:, k]], slope)

    if where.least(line, offset) >= 0:
        return on(where, 1.0)
    if where.least(-line, -offset) >= 0:
        return on(where, slope)
    found = np.full(len(rows), math.inf)
    for sign, factor in ((-1.0, 1.0), (1.0, slope)):
        side = where.cut(sign * line, -sign * offset)
        if side.minimum(np.zeros_like(line), 0.0) < math.inf:
            found = np.minimum(found, on(side, factor))
    return found


def _line(values: Tensor) -> tuple[Array, float]:
    """An affine function from its values at the origin and the unit vectors."""
    return (values[1:] - values[0]).numpy(), float(values[0])


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch, self.last = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.relu(self.stem(x))
        return self.last(torch.relu(self.branch(z) + z))  # type: ignore[no-any-return]


def _dense(activation: nn.Module) -> nn.Module:
    return nn.Sequential(
        nn.Linear(4, 6), activation, nn.Linear(6, 5), activation, nn.Linear(5, 4), activation, nn.Linear(4, 3)
    )


def _convolutional(activation: nn.Module) -> nn.Module:
    first, second = nn.Conv2d(1, 3, 2, padding=1, stride=2), nn.Conv2d(3, 4, 2)
    return nn.Sequential(
        first, activation, second, nn.BatchNorm2d(4), activation, nn.Flatten(), nn.Linear(4, 3)
    )


KINDS = {
    "dense": lambda: _dense(nn.ReLU()),
    "conv": lambda: _convolutional(nn.ReLU()),
    "residual": Residual,
    "leaky": lambda: _dense(nn.LeakyReLU(0.15)),
    "leaky conv": lambda: _convolutional(nn.LeakyReLU(0.3)),
}


@dataclass(frozen=True)
class Case:
    """A random network, an input with the class that it is given, and a region."""

    graph: Graph
    x: Tensor
    y: Tensor
    region: Region


def case(seed: int, norm: type[Region] = Box, widest: float = 0.35) -> Case:
    """Small enough for the referee: up to a dozen unstable neurons where no input moves by more than 0.35."""
    generator = torch.Generator().manual_seed(seed)
    kind = list(KINDS)[seed % len(KINDS)]
    net = KINDS[kind]().double().eval().requires_grad_(False)
    shape = (1, 2, 2) if "conv" in kind else (4,)
    for parameter in net.parameters():
        scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3
        parameter.copy_(1.5 * scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    for buffer in net.buffers():
        if buffer.is_floating_point():
            buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator, dtype=torch.float64))
    graph = trace(net, shape)
    x = torch.rand(1, *shape, generator=generator, dtype=torch.float64)
    eps = 0.05 + (widest - 0.05) * float(torch.rand(1, generator=generator))
    return Case(graph, x, net(x).argmax(1), norm(eps if norm is Box else 2 * eps))


def smallest_margin(asked: Case) -> float:
    """The minimum of the margins over the wrong classes."""
    classes, label = asked.graph.classes, int(asked.y)
    unit = torch.eye(classes, dtype=torch.float64)
    rows = torch.stack([unit[label] - unit[t] for t in range(classes) if t != label])
    return float(exact_minima(asked.graph, asked.x, asked.region, rows).min())

"""The smallest margin of small ReLU networks, by enumeration: a linear program for each activation pattern.

It shares nothing with the verifiers but the operators' `apply`: the network of a pattern is read off by
running it on the unit vectors.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from scipy.optimize import linprog
from torch import Tensor, nn

from tightrope.graph import Graph, trace
from tightrope.graph.ops import Activation, LeakyReLU
from tightrope.region import L1Ball, Region

Pattern = dict[int, Tensor]  # by node number: 1 or -1, and 0 for neurons whose sign is not given yet


def run(graph: Graph, x: Tensor, pattern: Pattern) -> tuple[Tensor, dict[int, Tensor]]:
    """Logits, and what enters each activation, with the signs that the pattern gives."""
    values, entering = [x], {}
    for i, node in enumerate(graph.nodes[1:], start=1):
        inputs = [values[j] for j in node.inputs]
        if isinstance(node.op, Activation):
            left = node.op.slope if isinstance(node.op, LeakyReLU) else 0.0
            entering[i] = inputs[0].flatten(1)
            values.append(torch.where(pattern[i].view(node.shape) > 0, inputs[0], left * inputs[0]))
        else:
            values.append(node.op.apply(*inputs))
    return values[-1], entering


def smallest_margin(graph: Graph, x: Tensor, label: int, region: Region) -> float:
    """The exact minimum of the margins over the region (l_inf or l_1) around one input `(1, *shape)`."""
    shape, n = x.shape[1:], x.numel()
    units = torch.cat([torch.zeros(1, n), torch.eye(n)]).double().view(n + 1, *shape)
    lower, upper = (side.flatten().numpy() for side in region.corners(x))
    rows, limits = [], []  # of what the pattern demands, as rows @ x <= limit
    bounds = list(zip(lower, upper, strict=True))
    if isinstance(region, L1Ball):  # x - t <= centre, -x - t <= -centre, sum t <= eps
        bounds += [(0, None)] * n
        eye, centre = np.eye(n), x.flatten().numpy()
        rows += [*np.hstack([eye, -eye]), *np.hstack([-eye, -eye]), np.append(np.zeros(n), np.ones(n))]
        limits += [*centre, *-centre, region.eps]
    width = len(bounds)

    def least(cost, constant) -> float:
        cost = np.append(cost, np.zeros(width - n))
        found = linprog(cost, A_ub=np.array(rows) if rows else None, b_ub=limits or None, bounds=bounds)
        assert found.status in (0, 2), found.message
        return found.fun + constant if found.status == 0 else np.inf

    def affine(values) -> tuple[np.ndarray, np.ndarray]:
        return (values[1:] - values[0]).numpy(), values[0].numpy()

    def patterns(pattern: Pattern) -> Iterator[Pattern]:
        """All patterns that some point of the region has, neurons in order."""
        place = next(((i, k) for i in pattern for k in range(len(pattern[i])) if pattern[i][k] == 0), None)
        if place is None:
            yield pattern
            return
        i, k = place
        A, b = affine(run(graph, units, pattern)[1][i][:, k])
        for sign in (1, -1):
            if -least(-sign * A, -sign * b) >= 0:  # the neuron can have this sign
                given = {j: s.clone() for j, s in pattern.items()}
                given[i][k] = sign
                rows.append(np.append(-sign * A, np.zeros(width - n)))
                limits.append(sign * b)
                yield from patterns(given)
                rows.pop(), limits.pop()

    smallest = np.inf
    for pattern in patterns({i: torch.zeros(node.shape.numel()) for i, node in graph.activations()}):
        A, b = affine(run(graph, units, pattern)[0])
        rivals = [t for t in range(graph.classes) if t != label]
        smallest = min(smallest, *(least(A[:, label] - A[:, t], b[label] - b[t]) for t in rivals))
    return float(smallest)


class Residual(nn.Module):
    """A small residual network."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.stem, self.inner, self.skip = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.last, self.activation = nn.Linear(4, 3), activation

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.stem(x.flatten(1)))
        return self.last(self.activation(self.inner(x) + x))


def case(seed: int) -> tuple[Graph, Tensor, int, float]:
    """A random network of one of five kinds, an input, its class, and an eps."""
    torch.manual_seed(seed)
    net = [
        lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)),
        lambda: nn.Sequential(
            nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 3, 2, padding=1, stride=2), nn.ReLU(), nn.Flatten(),
            nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 3),
        ),
        lambda: Residual(nn.ReLU()),
        lambda: Residual(nn.LeakyReLU(0.1)),
        lambda: nn.Sequential(
            nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(),
            nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3),
        ),
    ][seed % 5]().double().eval().requires_grad_(False)  # fmt: skip
    for parameter in net.parameters():
        parameter.mul_(2 if parameter.ndim > 1 else 0.5)
    x = torch.rand(1, 4, dtype=torch.float64)
    net_out = net(torch.rand(200, 4, dtype=torch.float64)).mean(0)
    net.get_submodule("last" if isinstance(net, Residual) else str(len(net) - 1)).bias.sub_(net_out)
    return trace(net, (4,)), x, int(net(x).argmax()), float(0.02 + 0.15 * torch.rand(()))

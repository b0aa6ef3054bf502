"""Passes back: how far values go over balls, and how many coefficients are in memory at once."""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tightrope.bounds.backward import CACHED, COPIES, coefficients_at_once, reach
from tightrope.graph import trace
from tightrope.region import L1Ball, L2Ball

from .test_patches import NETWORKS, NOT_IN_PATCHES, SHAPE, network

AFFINE = {
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(math.prod(SHAPE), 5)),
    "two linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(math.prod(SHAPE), 4), nn.Linear(4, 3)),
    "pooled": lambda: nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.AvgPool2d(2), nn.Flatten()),
    "nothing": nn.Flatten,
}


def first_layer(name: str):
    """The network, and the node that enters its first activation."""
    if name not in AFFINE:
        graph = network(name)
        return graph, graph.nodes[next(i for i, _ in graph.activations())].inputs[0]
    torch.manual_seed(0)
    graph = trace(AFFINE[name]().double().eval().requires_grad_(False), SHAPE)
    return graph, len(graph.nodes) - 1


@pytest.mark.parametrize("name", [*AFFINE, *NETWORKS, *NOT_IN_PATCHES])
@pytest.mark.parametrize(("ball", "dual"), [(L2Ball, 2), (L1Ball, math.inf)])
@pytest.mark.parametrize("coefficients", [1, 10**6])
def test_a_value_goes_as_far_over_a_ball_as_its_row_is_long(name, ball, dual, coefficients, monkeypatch):
    monkeypatch.setattr(sys.modules[reach.__module__], "coefficients_at_once", lambda _: coefficients)
    monkeypatch.setitem(NETWORKS, name, (NETWORKS | NOT_IN_PATCHES).get(name))
    graph, node = first_layer(name)
    centre = torch.zeros(1, *SHAPE, dtype=torch.float64)
    pixels = torch.eye(math.prod(SHAPE), dtype=torch.float64).view(-1, *SHAPE)

    def value(x):
        values = [x]
        for one in graph.nodes[1 : node + 1]:
            values.append(one.op.apply(*[values[j] for j in one.inputs]))
        return values[node]

    columns = value(pixels) - value(centre)
    expected = torch.linalg.vector_norm(columns, dual, dim=0)
    found = reach(graph, centre.expand(3, *SHAPE), ball(0.1), node)
    torch.testing.assert_close(found, expected.unsqueeze(0), atol=1e-12, rtol=0)


def test_chunks_fit_the_free_memory(monkeypatch):
    x = torch.zeros(1, dtype=torch.float64)
    for free, coefficients in ((0, 0), (8 * COPIES * 1000, 1000), (2**50, CACHED)):
        monkeypatch.setattr("psutil.virtual_memory", lambda free=free: SimpleNamespace(available=free))
        assert coefficients_at_once(x) == coefficients

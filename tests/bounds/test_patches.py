"""Backward passes in patches find what backward passes of whole rows find."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tightrope.bounds import Interval, Problem
from tightrope.bounds.backward import path
from tightrope.bounds.linear import crown, fast_lin, relax_all
from tightrope.bounds.patches import NARROW, Patches, Window
from tightrope.graph import trace
from tightrope.region import REGIONS, Box
from tightrope.spec import Spec

SHAPE = (2, 9, 8)
WIDE = NARROW + 1


class Scaled(nn.Module):
    """BatchNorm after the activation, a constant and a factor: nothing that a convolution takes over."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.second, self.last = nn.Conv2d(3, 2, 2), nn.Linear(2 * 8 * 7, 3)

    def forward(self, x):
        x = self.norm(torch.relu(self.first((x - 0.5) / 0.3)))
        return self.last(torch.relu(self.second(x)).flatten(1))


def chain(*convolutions: nn.Conv2d, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    layers = [layer for conv in convolutions for layer in (conv, activation())]
    body = nn.Sequential(*layers, nn.Flatten())
    return nn.Sequential(*body, nn.Linear(body(torch.zeros(1, *SHAPE)).shape[1], 3))


NETWORKS = {
    "plain": lambda: chain(nn.Conv2d(2, 3, 2), nn.Conv2d(3, 4, 2), nn.Conv2d(4, 2, 2)),
    "wide": lambda: chain(nn.Conv2d(2, WIDE, 2), nn.Conv2d(WIDE, 3, 2)),
    "strided": lambda: chain(nn.Conv2d(2, WIDE, 3, stride=(2, 1)), nn.Conv2d(WIDE, 3, 2, stride=(1, 2))),
    "padded": lambda: chain(nn.Conv2d(2, 3, 3, padding=(2, 1)), nn.Conv2d(3, 4, 3, padding=1)),
    "dilated": lambda: chain(nn.Conv2d(2, 3, 2, dilation=2), nn.Conv2d(3, 2, 2, dilation=(1, 3))),
    "no bias": lambda: chain(nn.Conv2d(2, 3, 2, bias=False), nn.Conv2d(3, 4, 2, bias=False)),
    "cropped": lambda: chain(nn.Conv2d(2, 3, 2, stride=3), nn.Conv2d(3, 4, (2, 1))),
    "tanh": lambda: chain(nn.Conv2d(2, 3, 2), nn.Conv2d(3, 4, 2), activation=nn.Tanh),
    "scaled": Scaled,
}


def network(name: str):
    torch.manual_seed(0)
    model = NETWORKS[name]().double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return trace(model.eval().requires_grad_(False), SHAPE)


def problem(graph, region):
    x = torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return Problem(graph, x, region, Spec.margins(torch.arange(3), 3, x))


def way_to_last_convolution(graph):
    asked = problem(graph, Box(0.1))
    boxes = asked.bounds(Interval()).boxes
    (source,) = graph.nodes[max(boxes)].inputs
    seen, _ = path(graph, asked.x, asked.region, source, relax_all(graph, boxes, "adaptive"))
    return Patches.to(graph, asked.x, asked.region, source, seen.steps, mirrored=False)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("norm", REGIONS)
@pytest.mark.parametrize("engine", [crown(), fast_lin()], ids=["crown", "fast-lin"])
def test_patches_find_what_whole_rows_find(name, norm, engine, monkeypatch):
    if name == "tanh" and engine == fast_lin():
        engine = crown()
    graph = network(name)
    assert way_to_last_convolution(graph) is not None
    eps = torch.tensor([0.05, 0.2, 0.0], dtype=torch.float64)
    asked = problem(graph, REGIONS[norm](eps))
    by_patches = engine(asked)
    monkeypatch.setattr(Patches, "to", lambda *_: None)
    by_rows = engine(asked)
    torch.testing.assert_close(vars(by_patches), vars(by_rows), atol=1e-11, rtol=0)


NOT_IN_PATCHES = {
    "groups": lambda: chain(nn.Conv2d(2, 4, 2), nn.Conv2d(4, 4, 2, groups=2)),
    "circular padding": lambda: chain(
        nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"), nn.Conv2d(4, 2, 2)
    ),
    "padding by name": lambda: chain(nn.Conv2d(2, 4, 3, padding="same"), nn.Conv2d(4, 2, 2)),
    "windows as large as layers": lambda: chain(nn.Conv2d(2, 3, 8), nn.Conv2d(3, 9, (2, 1))),
}


@pytest.mark.parametrize("name", NOT_IN_PATCHES)
def test_some_networks_have_no_patches(name, monkeypatch):
    monkeypatch.setitem(NETWORKS, name, NOT_IN_PATCHES[name])
    assert way_to_last_convolution(network(name)) is None


def test_a_window_before_a_convolution_is_what_its_neurons_read():
    conv = network("strided").nodes[3].op
    first = Window().before(conv)
    assert first == Window(size=(2, 2), stride=(1, 2), start=(0, 0))
    assert first.before(network("strided").nodes[1].op) == Window(size=(5, 4), stride=(2, 2), start=(0, 0))

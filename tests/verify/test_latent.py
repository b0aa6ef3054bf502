"""Latent robustness: a statistic of attacks behind a layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tightrope.attacks import Pgd
from tightrope.data import Split, as_source
from tightrope.errors import InputError
from tightrope.graph import trace
from tightrope.region import Box, L2Ball
from tightrope.verify import certify, latent_robustness


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


@pytest.fixture
def graph():
    return trace(network().eval(), (4,))


@pytest.fixture
def examples(graph):
    x = torch.rand(40, 4, generator=torch.Generator().manual_seed(0))
    y = graph.run(x)[0].argmax(1)
    y[:5] = (y[:5] + 1) % 3  # five are misclassified
    return as_source(Split(x, y))


def test_what_fast_lin_proves_withstands_everywhere(graph, examples):
    """Behind any activation the region lies within what Fast-Lin bounds."""
    proved = certify(graph, examples, Box(0.05), verifier="fast-lin").summary()["robust"]
    assert proved > 0
    for node in ("input", "1", "3"):
        found = latent_robustness(graph, examples, Box(0.05), node)
        assert (found.examples, found.clean_correct) == (40, 35)
        assert proved <= found.withstood <= 35


def test_a_region_further_in_is_no_harder_to_find_points_in(graph, examples):
    attack = Pgd(steps=50, step=0.05, restarts=3, loss="margin")
    found = [
        latent_robustness(graph, examples, Box(0.2), node, attack=attack) for node in ("input", "1", "3")
    ]
    shares = [one.summary()["latent_robustness"] for one in found]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > shares[-1]


def test_it_is_repeatable_and_says_what_it_rests_on(graph, examples):
    one, two = (latent_robustness(graph, examples, Box(0.1), "1", first=10) for _ in range(2))
    assert one.withstood == two.withstood
    assert one.identity == two.identity
    assert one.identity["attack"]["steps"] == 150
    assert one.summary()["examples"] == 10


def test_what_cannot_be_asked_is_refused(graph, examples):
    with pytest.raises(InputError, match="no activation 'relu'; there are input, 1, 3"):
        latent_robustness(graph, examples, Box(0.1), "relu")
    with pytest.raises(InputError, match="l_inf"):
        latent_robustness(graph, examples, L2Ball(0.1), "1")
    with pytest.raises(InputError, match="a whole number from 1 up"):
        latent_robustness(graph, examples, Box(0.1), "1", first=0)

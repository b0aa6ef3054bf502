"""Small images of three classes, small networks, and the batches that terms see."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tightrope.data import Split
from tightrope.graph import trace
from tightrope.region import Box
from tightrope.train.batch import Batch
from tightrope.train.stages import WHOLE

SHAPE, CLASSES = (1, 6, 6), 3


def make_network(norm: bool = False, dropout: bool = False, seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=2),
            *[nn.BatchNorm2d(4)] * norm,
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16, 8),
            *[nn.BatchNorm1d(8)] * norm,
            nn.ReLU(),
            *[nn.Dropout(0.25)] * dropout,
            nn.Linear(8, CLASSES),
        )


def make_images(count: int, seed: int = 0) -> Split:
    """Noisy images, each class bright in its own two rows."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % CLASSES
    x = 0.4 * torch.rand(count, *SHAPE, generator=generator)
    for row in range(2):
        x[torch.arange(count), 0, 2 * y + row] += 0.5
    return Split(x, y)


@pytest.fixture(scope="session")
def network():
    """Builds a small convolutional network, with BatchNorm and dropout on request."""
    return make_network


@pytest.fixture(scope="session")
def images():
    """Makes a small data set."""
    return make_images


@pytest.fixture(scope="session")
def batch():
    """Makes a training batch over the images of `make_images`, or the ones given."""

    def make(
        module,
        eps=0.05,
        progress=1.0,
        x=None,
        y=None,
        seed=0,
        count=12,
        index=None,
        state=None,
        stage=WHOLE,
        kind=Box,
    ):
        if x is None:
            split = make_images(count)
            x, y = split.x, split.y
        graph = trace(module.train(), x.shape[1:])
        generator = torch.Generator().manual_seed(seed)
        return Batch(graph, x, y, kind(eps), progress, generator, index, state, stage)

    return make

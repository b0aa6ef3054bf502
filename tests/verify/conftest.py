"""Networks small enough to know the answers by hand."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tightrope.data import Split, as_source
from tightrope.data.source import Source
from tightrope.graph import Graph, trace
from tightrope.verify import Verdict
from tightrope.verify.records import to_record


def handmade() -> nn.Sequential:
    """The margin of class 0 over class 1 is `x0 - x1`.

    Intervals see `x0 - x1 + relu(x2 - 1/2) - relu(x2 - 1/2)` and do not know that the last two agree:
    where x2 may exceed 1/2, they lose what it can move by.
    """
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 1]]))
        net[0].bias.copy_(torch.tensor([0, 0, -0.5, -0.5]))
        net[2].weight.copy_(torch.tensor([[1.0, 0, 1, 0], [0, 1, 0, 1]]))
    return net.eval()


# At eps 0.1, by hand: status, stage, margin.
POINTS = [[0.9, 0.1, 0.0], [0.55, 0.45, 0.0], [0.62, 0.38, 1.0], [0.1, 0.9, 0.0]]
ANSWERS = [
    ("robust", "ibp", 0.6),
    ("falsified", "attack", -0.1),
    ("undecided", "ibp", -0.06),
    ("misclassified", "clean", -0.8),
]


@pytest.fixture
def chunks_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tightrope.verify.pipeline.CHUNK", 2)


@pytest.fixture
def graph() -> Graph:
    return trace(handmade(), (3,))


@pytest.fixture
def examples() -> Source:
    """Four examples of class 0, one for each status."""
    return as_source(Split(torch.tensor(POINTS), torch.zeros(4, dtype=torch.int64)))


def random_net(
    seed: int, inputs: int = 4, classes: int = 3, layer: Callable[[], nn.Module] = nn.ReLU
) -> Graph:
    """A network that gives about as many inputs to each class."""
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Linear(inputs, 8), layer(), nn.Linear(8, 8), layer(), nn.Linear(8, classes))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
        net[-1].bias.sub_(net(torch.rand(500, inputs, generator=generator)).mean(0))
    return trace(net.eval(), (inputs,))


def labelled(graph: Graph, count: int, seed: int = 0) -> Source:
    """Random inputs with the network's own answers as labels."""
    x = torch.rand(count, *graph.input_shape, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return as_source(Split(x, graph.module(x).argmax(1)))


def timeless(verdicts: Any) -> list[dict[str, Any]]:
    """Verdicts as records, without how long they took."""

    def record(verdict: Verdict) -> dict[str, Any]:
        return {**to_record(verdict), "seconds": None}

    return [record(verdict) for verdict in verdicts]


def same(found: Any, wanted: Any) -> None:
    """Assert that verdicts agree, but for times, what rounding does to margins, and where witnesses lie."""

    def split(verdicts: Any) -> tuple[list[dict[str, Any]], list[float]]:
        records = timeless(verdicts)
        for record in records:
            record["witness"] = record["witness"] is not None
        return records, [record.pop("margin") for record in records]

    (found, found_margins), (wanted, wanted_margins) = split(found), split(wanted)
    assert found == wanted
    assert found_margins == pytest.approx(wanted_margins, rel=1e-6, abs=1e-6)

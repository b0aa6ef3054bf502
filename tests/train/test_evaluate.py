"""What the metrics say about held-out examples."""

import json

import pytest
import torch
from torch import nn

import tightrope as tr
from tightrope.bounds import Interval
from tightrope.files import to_json
from tightrope.graph import trace
from tightrope.region import Box
from tightrope.train import evaluate as module_under_test
from tightrope.train.evaluate import HeldOut, evaluate


def held_out(split):
    return HeldOut(split.x, split.y)


def by_hand():
    """Four neurons that see the one pixel: always active, always dead, unstable, and at the edge."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([[1.0], [1.0], [1.0], [2.0]]))
        net[1].bias.copy_(torch.tensor([1.0, -2.0, -0.5, 0.0]))
        net[3].weight.copy_(torch.tensor([[0.0, 0.0, 1.0, 0.0], [0.0, 0.0, -1.0, 0.0]]))
        net[3].bias.copy_(torch.tensor([0.0, 0.1]))
    return net


def test_a_network_worked_out_by_hand():
    """Logits are relu(x - 0.5) and 0.1 - relu(x - 0.5): class 0 from x = 0.55 on."""
    x = torch.tensor([0.5, 0.6, 0.7, 0.2]).view(4, 1, 1, 1)
    y = torch.tensor([1, 0, 0, 0])
    record, (layer,) = evaluate(trace(by_hand(), (1, 1, 1)), HeldOut(x, y), Box(0.1), Interval())
    # 0.5 may move to 0.6 and is lost, 0.6 may move to 0.5 and is lost, 0.7 holds, 0.2 is wrong anyway.
    assert record == {"examples": 4, "eps": 0.1, "clean": 3 / 4, "certified": 1 / 4}
    # Dead: the second neuron, and the third at x = 0.2. Active: the first and fourth, and the third at 0.7
    # and (its lower end on the edge, up to rounding) at 0.6. Widths: 0.2 for three neurons, 0.4 for one.
    assert layer["name"] == "2"
    assert layer["dead"] == pytest.approx((4 + 1) / 16)
    assert layer["active"] + layer["unstable"] == pytest.approx(11 / 16)
    assert 9 / 16 <= layer["active"] <= 10 / 16
    assert layer["width"] == pytest.approx((3 * 0.2 + 0.4) / 4)


@pytest.mark.parametrize("norm", [False, True])
def test_the_accuracies_are_those_of_the_public_functions(network, images, norm):
    module, split = network(norm=norm).eval(), images(40)
    record, _ = evaluate(trace(module, (1, 6, 6)), held_out(split), Box(0.05), Interval())
    margins = tr.margins(module, split.x, split.y, tr.Box(eps=0.05))
    wrong = torch.ones_like(margins).scatter(1, split.y.unsqueeze(1), 0).bool()
    certified = margins.masked_fill(~wrong, torch.inf).amin(1) > 0
    assert record["clean"] == (module(split.x).argmax(1) == split.y).float().mean()
    assert record["certified"] == certified.float().mean()


def test_a_point_is_certified_where_it_is_right(network, images):
    record, layers = evaluate(trace(network(), (1, 6, 6)), held_out(images(40)), Box(0.0), Interval())
    assert record["certified"] == record["clean"]
    assert all(layer["unstable"] == pytest.approx(0, abs=1e-6) for layer in layers)


def test_the_layers_are_the_relus_in_order_and_their_shares_add_up(network, images):
    _, layers = evaluate(trace(network(norm=True), (1, 6, 6)), held_out(images(40)), Box(0.1), Interval())
    assert [layer["name"] for layer in layers] == ["2", "6"]
    for layer in layers:
        assert layer["dead"] + layer["active"] + layer["unstable"] == pytest.approx(1)
        assert layer["width"] > 0


def test_nothing_depends_on_the_chunks(network, images, monkeypatch):
    graph, examples = trace(network(norm=True), (1, 6, 6)), held_out(images(40))
    whole = evaluate(graph, examples, Box(0.1), Interval())
    monkeypatch.setattr(module_under_test, "CHUNK", 7)
    record, layers = evaluate(graph, examples, Box(0.1), Interval())
    assert record == whole[0]
    for layer, expected in zip(layers, whole[1], strict=True):
        assert layer.pop("name") == expected.pop("name")
        assert layer == pytest.approx(expected, rel=1e-5)


def test_evaluation_leaves_no_trace_on_a_network_in_training(network, images):
    module = network(norm=True, dropout=True).train()
    graph = trace(module, (1, 6, 6))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    state = torch.get_rng_state()
    first = evaluate(graph, held_out(images(40)), Box(0.1), Interval())
    assert module.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert first == evaluate(trace(module.eval(), (1, 6, 6)), held_out(images(40)), Box(0.1), Interval())


def test_a_network_without_activations_has_no_layers(images):
    record, layers = evaluate(
        trace(nn.Sequential(nn.Flatten(), nn.Linear(36, 3)), (1, 6, 6)),
        held_out(images(9)),
        Box(0.1),
        Interval(),
    )
    assert layers == []
    assert record["examples"] == 9


def test_bounds_that_overflow_are_still_json(images):
    """The network's own logits may be finite where its bounds no longer are."""
    net = nn.Sequential(
        nn.Flatten(),
        nn.Linear(36, 8),
        nn.ReLU(),
        nn.Linear(8, 8),
        nn.ReLU(),
        nn.Linear(8, 8),
        nn.ReLU(),
        nn.Linear(8, 3),
    )
    with torch.no_grad():
        for layer in (net[1], net[3], net[5]):
            layer.weight.fill_(1e15)
            layer.weight[:, ::2] = -1e15
    record, layers = evaluate(trace(net, (1, 6, 6)), held_out(images(9)), Box(0.3), Interval())
    assert record["certified"] == 0.0
    read = json.loads(to_json({"held_out": record, "layers": layers}))
    assert read["layers"][-1]["width"] > 1e38

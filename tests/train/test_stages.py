"""Training layer by layer: which stages there are, what stands still, and what a run leaves behind."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from tightrope import fit, methods
from tightrope.errors import InputError
from tightrope.files import load_tensors
from tightrope.graph import trace
from tightrope.models import build
from tightrope.train.methods import LatentAttack
from tightrope.train.stages import Layerwise, Stage, frozen_upto
from tightrope.train.step import train_step

SEARCH = LatentAttack(steps=2, step=0.5, projections=4)
METHOD = methods.colt(eps=0.1, attack=SEARCH)


def graph_of(module):
    return trace(module.train(), (1, 6, 6))


class TestLayerwise:
    def test_there_is_a_stage_for_the_input_and_for_every_activation_but_the_last(self):
        """COLT's layers -1, 2 and 4 of ConvMed (methods.md, section 9)."""
        graph = trace(build("convmed", (1, 28, 28), 10), (1, 28, 28))
        first, second, last = (i for i, _ in graph.activations())
        stages = Layerwise().of(graph)
        assert [stage.cut for stage in stages] == [0, first, second]
        assert [stage.before for stage in stages] == [None, 0, first]
        assert [stage.after for stage in stages] == [first, second, last]

    def test_radius_and_learning_rate_change_by_their_factors(self):
        """`eps start_factor eps_factor^(stages to come)`, `lr lr_layer_dec^stage`."""
        graph = trace(build("convmed", (1, 28, 28), 10), (1, 28, 28))
        stages = Layerwise(widen=1.05, eps_factor=1.2, lr_factor=0.5).of(graph)
        assert [stage.eps for stage in stages] == pytest.approx([1.05 * 1.44, 1.05 * 1.2, 1.05])
        assert [stage.lr for stage in stages] == pytest.approx([1, 0.5, 0.25])

    def test_stages_are_as_long_as_they_are_said_to_be(self, network):
        graph = graph_of(network())
        assert [(s.begin, s.end) for s in Layerwise().of(graph)] == [(0, 0.5), (0.5, 1)]
        assert [(s.begin, s.end) for s in Layerwise(lengths=(1, 3)).of(graph)] == [(0, 0.25), (0.25, 1)]
        with pytest.raises(InputError, match="2 stages"):
            Layerwise(lengths=(1, 2, 3)).of(graph)

    def test_a_network_with_one_activation_or_none_has_one_stage(self):
        for hidden in ([nn.Linear(36, 4), nn.ReLU(), nn.Linear(4, 3)], [nn.Linear(36, 3)]):
            (stage,) = Layerwise(widen=1).of(graph_of(nn.Sequential(nn.Flatten(), *hidden)))
            assert (stage.cut, stage.begin, stage.end, stage.eps) == (0, 0, 1, 1)

    def test_activations_that_no_zonotope_goes_through_are_refused_by_name(self):
        layers = [nn.Flatten(), nn.Linear(36, 4), nn.Tanh(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)]
        with pytest.raises(InputError, match=r"2 \(Tanh\)"):
            Layerwise().of(graph_of(nn.Sequential(*layers)))

    def test_a_stage_has_a_clock_of_its_own(self):
        stage = Stage(begin=0.25, end=0.75)
        assert [stage.progress(share) for share in (0.0, 0.25, 0.5, 0.75, 1.0)] == [0, 0, 0.5, 1, 1]


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(36, 6), nn.Linear(6, 6)
        self.skip, self.last = nn.Linear(36, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = x.flatten(1)
        return self.last(torch.relu(self.second(torch.relu(self.first(x))) + self.skip(x)))


class TestFrozen:
    def test_layers_before_the_region_do_not_move_by_a_bit(self, network, batch):
        module = network(norm=True, dropout=True)
        graph = graph_of(module)
        stage = Layerwise().of(graph)[1]
        before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        with frozen_upto(graph, stage.cut) as live:
            trained = [p for p in module.parameters() if p.requires_grad]
            optimiser = torch.optim.Adam(trained, 0.01, weight_decay=0.1)
            for progress in (0.1, 0.5, 1.0):
                asked = batch(module, progress=progress, stage=stage)
                asked.graph = live
                train_step(METHOD, asked, optimiser, clip=0.0)
        moved = {
            name for name, tensor in module.state_dict().items() if not torch.equal(tensor, before[name])
        }
        assert moved == {name for name in before if int(name.split(".")[0]) >= 4}

    def test_afterwards_everything_is_as_trainable_as_it_was(self, network):
        module = network(norm=True)
        module[-1].bias.requires_grad_(False)
        graph = graph_of(module)
        with frozen_upto(graph, graph.nodes[-1].inputs[0]):
            (moving,) = (p for p in module.parameters() if p.requires_grad)
            assert moving is module[-1].weight
        assert [name for name, p in module.named_parameters() if not p.requires_grad] == ["7.bias"]
        assert module.training

    def test_a_branch_that_comes_later_is_still_trained(self):
        module = Residual()
        graph = graph_of(module)
        with frozen_upto(graph, Layerwise().of(graph)[1].cut):
            moving = {name.split(".")[0] for name, p in module.named_parameters() if p.requires_grad}
        assert moving == {"second", "skip", "last"}

    def test_at_the_input_nothing_is_frozen(self, network):
        module = network()
        graph = graph_of(module)
        with frozen_upto(graph, 0) as live:
            assert live is graph
            assert all(p.requires_grad for p in module.parameters())


@pytest.fixture(scope="module")
def folder(network, images, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    options = {"epochs": 4, "batch": 16, "held_out": 12, "device": "cpu", "lr": 0.01}
    fit(network(norm=True), images(60), METHOD, out=out, **options)
    return out


class TestRun:
    def test_the_metrics_say_in_which_stage_and_how_much_an_attack_turns(self, folder):
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [record["stage"] for record in records] == [1, 1, 2, 2]
        assert [record["eps"] for record in records] == pytest.approx([0.1155] * 2 + [0.105] * 2)
        assert [record["lr"] for record in records] == pytest.approx([0.01] * 2 + [0.0075] * 2)
        assert all(0 <= record["held_out"]["verified_error"] <= 1 for record in records)

    def test_every_stage_leaves_its_network(self, folder):
        first, last, end = (
            load_tensors(folder / name)[0]
            for name in ("stages/1/model.safetensors", "stages/2/model.safetensors", "model.safetensors")
        )
        assert all(torch.equal(last[name], end[name]) for name in end)
        same = {name for name in end if torch.equal(first[name], last[name])}
        assert same == {name for name in end if int(name.split(".")[0]) < 3}
        for stage in ("1", "2"):
            assert (folder / "stages" / stage / "model.json").read_text() == (
                folder / "model.json"
            ).read_text()

"""Boxes in the middle of a network, held against the network itself and the connector's formula."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tightrope.attacks import Pgd
from tightrope.bounds import Hull, Interval
from tightrope.bounds.hull import split_node
from tightrope.bounds.latent import NOISE
from tightrope.errors import InputError
from tightrope.graph import trace
from tightrope.region import Box

from .test_relaxed import CLASSES, NETWORKS, dense, network, problem

SPLITS = {  # by network and number of activations behind: the name of the node
    "growing": {0: "6", 1: "4", 2: "2"},
    "norm": {0: "8", 1: "4"},
    "residual": {0: "relu_3", 1: "relu_2", 2: "relu", 3: "relu"},
    "difference": {0: "relu_1", 1: "sub_1"},
    "beside": {0: "relu_2", 1: "cat"},
}
ATTACK = Pgd(steps=8, step=0.25, loss="margin", keep_best=False)


def hull(name: str, behind: int = 1, eps=0.2) -> Hull:
    asked = problem(name, Box(eps))
    rivals = asked.spec.rows[asked.spec.rows.abs().sum(2) > 0].view(len(asked.x), CLASSES - 1, CLASSES)
    return Hull.over(asked, split_node(asked.graph, behind), rivals)


def noises(region: Hull, count: int = 10):
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        noise = NOISE.sample(region.still, generator)
        yield noise
        yield noise.sign()


@pytest.mark.parametrize(("name", "nodes"), SPLITS.items(), ids=SPLITS)
class TestSplit:
    def test_it_has_so_many_activations_behind_it_and_lies_where_every_path_goes(self, name, nodes):
        graph = network(name)
        for behind, node in nodes.items():
            assert graph.nodes[split_node(graph, behind)].name == node

    def test_one_activation_must_be_left_in_front(self, name, nodes):
        most = max(nodes)
        with pytest.raises(InputError, match=rf"one in front, and this .*: set split to {most} at most"):
            split_node(network(name), most + 1)


def test_a_network_too_shallow_to_be_split_is_refused():
    graph = trace(dense(9, 4), (1, 3, 3))
    with pytest.raises(InputError, match="this network has 1: use another network, or sabr or mtl-ibp"):
        split_node(graph, 1)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("eps", [0.05, torch.tensor([0.0, 0.1, 0.4], dtype=torch.float64)])
def test_what_the_network_yields_lies_in_the_box_and_goes_on_behind_it(name, eps):
    asked, region = problem(name, Box(eps)), hull(name, eps=eps)
    node = split_node(asked.graph, 1)
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        point = asked.region.sample(asked.x, generator)
        value = asked.graph.upto(node).run(point)[0].view_as(region.lower)
        assert (value >= region.lower - 1e-12).all()
        assert (value <= region.upper + 1e-12).all()
        torch.testing.assert_close(region.network.run(value)[0], asked.graph.run(point)[0])


@pytest.mark.parametrize("name", NETWORKS)
def test_points_lie_in_the_box_and_an_attack_finds_what_lies_between_bounds_and_chance(name):
    region = hull(name)
    noise = ATTACK(region, region.still, region.labels, NOISE, torch.Generator().manual_seed(0))
    for e in (noise, *noises(region)):
        points = region.points(e)
        assert (points >= region.lower.unsqueeze(1) - 1e-12).all()
        assert (points <= region.upper.unsqueeze(1) + 1e-12).all()
    found, asked = region.values(noise), problem(name, Box(0.2))
    interval = asked.bounds(Interval()).lower[asked.spec.rows.abs().sum(2) > 0].view_as(found)
    assert (found >= interval - 1e-12).all()
    chance = torch.stack([region.values(e) for e in noises(region)]).mean(0)
    assert found.mean() < chance.mean()


def test_an_attack_sees_what_the_rows_are_worth():
    region = hull("growing")
    for noise in noises(region):
        logits, _ = region.run(noise)
        torch.testing.assert_close(logits[:, 0] - logits[:, 1], region.values(noise).flatten())


def test_behind_the_last_activation_an_attack_finds_what_intervals_bound():
    region, asked = hull("growing", behind=0), problem("growing", Box(0.2))
    noise = ATTACK(region, region.still, region.labels, NOISE, torch.Generator().manual_seed(0))
    interval = asked.bounds(Interval()).lower[asked.spec.rows.abs().sum(2) > 0]
    torch.testing.assert_close(region.values(noise).flatten(), interval)


def test_the_connector_is_the_formula_of_the_papers():
    """methods.md, section 7, with c = 0.5: g adds `g (p - (u - c (u - l))) / (c (u - l))` to u's gradient."""
    lower = torch.tensor([[0.0, -1.0, 2.0, 1.0]], requires_grad=True)
    upper = torch.tensor([[1.0, 3.0, 2.5, 5.0]], requires_grad=True)
    network = trace(nn.Linear(4, 2), (4,))
    region = Hull(network, lower, upper, torch.tensor([[[1.0, -1.0]]]))
    noise = torch.tensor([[1.0, -0.5, 0.25, -1.0]])
    points, weight = region.points(noise), torch.tensor([3.0, 5.0, -7.0, 11.0])
    torch.testing.assert_close(points, torch.tensor([[[1.0, 0.0, 2.3125, 1.0]]]))
    for_lower, for_upper = torch.autograd.grad((weight * points).sum(), (lower, upper))
    half = 0.5 * (upper - lower)
    along_upper = (points[:, 0] - (upper - half)).clamp(min=0) / half
    along_lower = ((lower + half) - points[:, 0]).clamp(min=0) / half
    torch.testing.assert_close(for_upper, weight * along_upper)
    torch.testing.assert_close(for_lower, weight * along_lower)
    torch.testing.assert_close(for_upper, torch.tensor([[3.0, 0.0, -1.75, 0.0]]))
    torch.testing.assert_close(for_lower, torch.tensor([[0.0, 2.5, 0.0, 11.0]]))


def test_a_point_of_a_box_without_width_moves_with_the_box():
    corner = torch.tensor([[0.5, -1.0]], requires_grad=True)
    region = Hull(trace(nn.Linear(2, 2), (2,)), corner, corner, torch.tensor([[[1.0, -1.0]]]))
    points = region.points(torch.tensor([[0.3, -0.2]]))
    assert torch.equal(points.squeeze(1), corner)
    (gradient,) = torch.autograd.grad(points.sum(), corner)
    assert torch.equal(gradient, torch.ones(1, 2))

"""Latent regions, held against the network itself, Fast-Lin, and a matrix that is written out."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from tightrope.attacks import Pgd
from tightrope.bounds import Interval, Latent, Linear, Problem, Projected, fast_lin
from tightrope.bounds.latent import NOISE, boxes_upto
from tightrope.errors import InputError
from tightrope.graph import trace
from tightrope.region import Box, L2Ball
from tightrope.spec import Spec

from .test_relaxed import CLASSES, EPS, NETWORKS, inputs, network, problem, worst_of

EXACT = Linear("parallel", "linear", sides="none")


def nodes(graph):
    return [0, *(i for i, _ in graph.activations())]


def latent(asked: Problem, node: int, engine=EXACT) -> Latent:
    return Latent.over(asked.graph, asked.x, asked.region, node, boxes_upto(asked, node, engine))


def noises(region: Latent, count: int = 20):
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        noise = NOISE.sample(region.still, generator)
        yield noise
        yield noise.sign()


def exact_bounds(region: Latent, asked: Problem, node: int):
    """Bounds of every entry of a node's value over the region."""
    shape = asked.graph.nodes[node].shape
    rows = torch.eye(shape.numel(), dtype=torch.float64).view(1, -1, *shape).expand(len(asked.x), -1, *shape)
    lower = worst_of(region.network, asked, rows, node).lower
    upper = -worst_of(region.network, asked, -rows, node).lower
    return lower.view(-1, *shape), upper.view(-1, *shape)


def noise_of(region: Latent, graph, point):
    """The noise that yields what the network computes at a point of the input's region."""
    _, entering = graph.entering(point)
    parts = [((point - region.middle) / region.half.clamp(min=1e-300)).flatten(1)]
    for i, lines in region.network.lines.items():
        half = lines.upper_offset / 2
        gap = graph.nodes[i].op.apply(entering[i]) - lines.upper_slope * entering[i] - half
        parts.append(torch.where(half > 0, gap / half.clamp(min=1e-300), 0.0).flatten(1))
    return torch.cat(parts, 1)


def points_of(asked: Problem, count: int = 20):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        point = asked.region.sample(asked.x, generator)
        yield point
        yield torch.where(point > asked.x, asked.region.corners(asked.x)[1], asked.region.corners(asked.x)[0])


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("eps", EPS, ids=["small", "large", "each its own"])
class TestSoundness:
    def test_every_activation_of_a_point_of_the_region_is_reached_by_some_noise(self, name, eps):
        asked = problem(name, Box(eps))
        for node in nodes(asked.graph):
            region = latent(asked, node)
            for point in points_of(asked):
                noise = noise_of(region, asked.graph, point)
                assert noise.abs().max() <= 1 + 1e-9
                # What lies behind the node is the network itself, and all branches come along.
                torch.testing.assert_close(region.run(noise)[0], asked.graph.run(point)[0])

    def test_what_the_network_yields_lies_in_the_bounds_of_the_region(self, name, eps):
        asked = problem(name, Box(eps))
        for node in nodes(asked.graph)[1:]:
            region = latent(asked, node)
            lower, upper = exact_bounds(region, asked, node)
            for point in points_of(asked):
                value = asked.graph.upto(node).run(point)[0].view_as(lower)
                assert (value >= lower - 1e-9).all()
                assert (value <= upper + 1e-9).all()

    def test_no_noise_leaves_the_bounds(self, name, eps):
        asked = problem(name, Box(eps))
        for node in nodes(asked.graph)[1:]:
            region = latent(asked, node)
            lower, upper = exact_bounds(region, asked, node)
            for noise in noises(region):
                value = region.point(noise)
                assert (value >= lower - 1e-9).all()
                assert (value <= upper + 1e-9).all()


@pytest.mark.parametrize("name", NETWORKS)
def test_behind_the_last_activation_the_bounds_are_those_of_fast_lin(name):
    asked = problem(name, Box(0.2))
    region = latent(asked, nodes(asked.graph)[-1])
    found = worst_of(region.network, asked, asked.spec.rows).lower
    torch.testing.assert_close(found, asked.bounds(fast_lin()).lower, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("engine", [Interval(), EXACT], ids=["interval", "linear"])
def test_bounds_up_to_a_node_are_those_of_the_whole_network(name, engine):
    asked = problem(name, Box(0.2))
    whole = asked.bounds(engine).boxes
    for node in nodes(asked.graph):
        part = boxes_upto(asked, node, engine)
        assert list(part) == [i for i in whole if i <= node]
        for i, box in part.items():
            for one, other in zip(box, whole[i], strict=True):
                torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", NETWORKS)
def test_estimated_bounds_do_for_a_region_to_train_on(name):
    asked = problem(name, Box(0.2))
    for node in nodes(asked.graph):
        region = latent(asked, node, Projected(3))
        assert torch.isfinite(region.run(region.still)[0]).all()


def summed(region, noise):
    return region.point(noise).sum(0).flatten()


@pytest.mark.parametrize("name", NETWORKS)
def test_a_gradient_through_the_network_is_that_through_the_matrix(name):
    """`A^T grad`, with A written out column by column."""
    asked = problem(name, Box(0.2))
    for node in nodes(asked.graph):
        region = latent(asked, node)
        noise = 0.3 * torch.ones_like(region.still)
        matrix = torch.func.jacrev(partial(summed, region))(noise)
        matrix = matrix.movedim(1, 0)  # (batch, entries, noise)
        centre = region.point(region.still).flatten(1)
        straight = centre + (matrix @ noise.unsqueeze(2)).squeeze(2)
        torch.testing.assert_close(straight, region.point(noise).flatten(1))

        noise.requires_grad_()
        value = region.point(noise)
        target = torch.linspace(-1, 1, value[0].numel(), dtype=torch.float64).view(value[0].shape)
        (value * target).square().sum().backward()
        inner = 2 * value.detach() * target.square()
        expected = (inner.flatten(1).unsqueeze(1) @ matrix).squeeze(1)
        torch.testing.assert_close(noise.grad, expected)


class TestAttack:
    @pytest.mark.parametrize("name", NETWORKS)
    def test_it_stays_in_the_region_and_raises_the_loss(self, name):
        asked, y = problem(name, Box(0.2)), inputs()[1]
        for node in nodes(asked.graph):
            region = latent(asked, node)
            attack = Pgd(steps=8, step=0.25)
            noise = attack(region, region.still, y, NOISE, torch.Generator().manual_seed(0))
            assert noise.abs().max() <= 1
            loss = nn.functional.cross_entropy
            assert loss(region.run(noise)[0], y) > loss(region.run(region.still)[0], y)

    def test_at_the_input_it_is_the_attack_on_the_input(self):
        """On a network without activations the strongest noise is the corner that lowers the margin."""
        torch.manual_seed(0)
        graph = trace(nn.Sequential(nn.Flatten(), nn.Linear(9, 2)).double(), (1, 3, 3))
        x, y = inputs()[0], torch.zeros(3, dtype=torch.int64)
        asked = Problem(graph, x, Box(0.1), Spec.margins(y, 2, x))
        region = latent(asked, 0)
        noise = Pgd(steps=8, step=0.25)(region, region.still, y, NOISE, torch.Generator().manual_seed(0))
        logits = region.run(noise)[0]
        margins = (asked.spec.rows @ logits.unsqueeze(2)).squeeze(2)
        torch.testing.assert_close(margins, asked.bounds(Interval()).lower)


def test_the_same_region_in_front_of_another_network():
    asked, other = problem("norm", Box(0.2)), network("norm", seed=5)
    region = latent(asked, nodes(asked.graph)[1])
    moved = region.on(other)
    assert moved.network.graph is other
    assert moved.network.lines is region.network.lines
    assert not torch.equal(moved.run(region.still)[0], region.run(region.still)[0])


def test_there_are_no_regions_in_other_norms():
    asked = problem("narrow", L2Ball(0.2))
    with pytest.raises(InputError, match="l_inf"):
        latent(asked, 0)


def test_there_is_none_behind_an_activation_without_parallel_lines():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(9, 5), nn.Sigmoid(), nn.Linear(5, CLASSES)).double()
    x, y = inputs()
    graph = trace(model, (1, 3, 3))
    asked = Problem(graph, x, Box(0.1), Spec.margins(y, CLASSES, x))
    with pytest.raises(InputError, match="Sigmoid"):
        latent(asked, nodes(graph)[1], Interval())

"""The hybrid zonotope, held against sampling, intervals, and the engine that forgets nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tightrope.bounds import Bounds, Engine, Forward, HybridZonotope, Interval, Problem
from tightrope.graph import trace
from tightrope.region import REGIONS, Box, L2Ball
from tightrope.spec import Spec

from .test_relaxed import CLASSES, EPS, NETWORKS, assert_equal, inputs, network, problem

SLOPES = ["adaptive", "zero", "parallel", "one"]


def assert_sound(asked: Problem, bounds: Bounds, seed: int = 0) -> None:
    """No corner and no random point leaves the bounds, or the boxes of the activations."""
    generator = torch.Generator().manual_seed(seed)
    x, region = asked.x, asked.region
    points = [region.sample(x, generator) for _ in range(30)]
    if region.norm == "inf":
        coins = [torch.rand(x.shape, generator=generator) < 0.5 for _ in range(30)]
        points += [torch.where(coin, *region.corners(x)) for coin in coins]
    for point in points:
        logits, entering = asked.graph.entering(point)
        margins = (asked.spec.rows @ logits.unsqueeze(2)).squeeze(2)
        assert (bounds.lower - 1e-9 <= margins).all()
        assert (margins <= bounds.upper + 1e-9).all()
        for i, (lower, upper) in bounds.boxes.items():
            assert (lower - 1e-9 <= entering[i]).all()
            assert (entering[i] <= upper + 1e-9).all()


@given(st.sampled_from(SLOPES), st.sampled_from(list(NETWORKS)), st.integers(0, 10**6), st.floats(1e-3, 0.6))
@settings(max_examples=15, deadline=None)
def test_no_point_leaves_the_bounds_of_any_network(slope, name, seed, eps):
    asked = problem(name, Box(eps), seed)
    assert_sound(asked, asked.bounds(HybridZonotope(slope)), seed)


@pytest.mark.parametrize("slope", SLOPES)
class TestSoundness:
    @pytest.mark.parametrize("name", NETWORKS)
    @pytest.mark.parametrize("norm", REGIONS)
    def test_no_point_of_the_region_leaves_bounds_or_boxes(self, name, norm, slope):
        asked = problem(name, REGIONS[norm](EPS[2]), seed=1)
        assert_sound(asked, asked.bounds(HybridZonotope(slope)))

    @pytest.mark.parametrize("activation", [nn.Sigmoid(), nn.Tanh(), nn.MaxPool2d(2, 1, 1)], ids=str)
    def test_behind_other_activations_it_is_a_box(self, slope, activation):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Conv2d(1, 2, 2), activation, nn.Flatten(), nn.LazyLinear(4)).double().eval()
        module(torch.zeros(1, 1, 3, 3, dtype=torch.float64))
        x, y = inputs()
        asked = Problem(trace(module, (1, 3, 3)), x, Box(0.2), Spec.margins(y, CLASSES, x))
        bounds = asked.bounds(HybridZonotope(slope))
        assert_sound(asked, bounds)
        assert_equal(bounds.lower, asked.bounds(Interval()).lower)

    @pytest.mark.parametrize("norm", REGIONS)
    def test_an_affine_network_is_bounded_exactly(self, slope, norm):
        torch.manual_seed(0)
        layers = [nn.Conv2d(1, 3, 2), nn.Flatten(), nn.Linear(12, 7), nn.Linear(7, CLASSES)]
        x, y = inputs()
        asked = Problem(
            trace(nn.Sequential(*layers).double(), (1, 3, 3)),
            x,
            REGIONS[norm](0.3),
            Spec.margins(y, CLASSES, x),
        )
        ours, exact = asked.bounds(HybridZonotope(slope)), asked.bounds(Interval())
        assert_equal(ours.lower, exact.lower)
        assert_equal(ours.upper, exact.upper)

    def test_it_stays_exact_behind_activations_whose_sign_is_known(self, slope):
        torch.manual_seed(0)
        first, second = nn.Linear(9, 8), nn.Linear(8, CLASSES)
        with torch.no_grad():
            first.bias.copy_(torch.where(torch.arange(8) % 2 == 0, 20.0, -20.0))
        x, y = inputs()
        spec, region = Spec.margins(y, CLASSES, x), Box(0.3)
        asked = Problem(
            trace(nn.Sequential(nn.Flatten(), first, nn.ReLU(), second).double(), (1, 3, 3)), x, region, spec
        )
        kept = nn.Linear(9, CLASSES).double()
        with torch.no_grad():
            kept.weight.copy_(second.weight[:, ::2] @ first.weight[::2])
            kept.bias.copy_(second.weight[:, ::2] @ first.bias[::2] + second.bias)
        exact = Problem(trace(nn.Sequential(nn.Flatten(), kept), (1, 3, 3)), x, region, spec).bounds(
            Interval()
        )
        found = asked.bounds(HybridZonotope(slope))
        assert_equal(found.lower, exact.lower)
        assert_equal(found.upper, exact.upper)
        assert (found.lower > asked.bounds(Interval()).lower + 1e-3).any()

    def test_gradients_are_those_of_finite_differences(self, slope):
        asked = problem("narrow", Box(0.1))
        parameters = [p.requires_grad_() for p in asked.graph.module.parameters()]

        def bounds(*_parameters):
            found = Problem(asked.graph, asked.x, asked.region, asked.spec).bounds(HybridZonotope(slope))
            return found.lower, found.upper

        assert torch.autograd.gradcheck(bounds, tuple(parameters), fast_mode=True)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("eps", EPS, ids=["small", "large", "each its own"])
class TestAgainstOthers:
    def test_with_diffai_s_box_relu_no_bound_is_looser_than_an_interval(self, name, eps):
        asked = problem(name, Box(eps))
        ours, interval = asked.bounds(HybridZonotope("zero")), asked.bounds(Interval())
        assert (ours.lower >= interval.lower - 1e-12).all()
        assert (ours.upper <= interval.upper + 1e-12).all()
        for i, (lower, upper) in ours.boxes.items():
            assert (lower >= interval.boxes[i][0] - 1e-12).all()
            assert (upper <= interval.boxes[i][1] + 1e-12).all()

    def test_with_deepz_s_relu_it_is_no_tighter_than_the_engine_that_forgets_nothing(self, name, eps):
        if name in ("difference", "beside"):
            pytest.skip(
                "there it takes two layers in front of the first activation at once, and Forward does not"
            )
        asked = problem(name, Box(eps))
        ours, theirs = asked.bounds(HybridZonotope("parallel")), asked.bounds(Forward())
        assert (ours.lower <= theirs.lower + 1e-12).all()
        assert (ours.upper >= theirs.upper - 1e-12).all()

    def test_each_example_is_bounded_as_if_it_were_alone(self, name, eps):
        asked = problem(name, Box(eps))
        together = asked.bounds(HybridZonotope())
        for i in range(len(asked.x)):
            one = slice(i, i + 1)
            region = Box(eps[one]) if isinstance(eps, torch.Tensor) else Box(eps)
            alone = Problem(asked.graph, asked.x[one], region, Spec(asked.spec.rows[one]))
            assert_equal(alone.bounds(HybridZonotope()).lower, together.lower[one])


def test_a_switch_is_that_of_diffai():
    """methods.md, section 11: where `-l > u`, `u/2 +- u/2`; else centre and box grow by -l/2."""
    first, second = nn.Linear(2, 2), nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
        first.bias.copy_(torch.tensor([-0.9, -0.1]))  # at 0.5, eps 0.1: [-0.1, 0.3] and [-0.3, 0.1]
        second.weight.copy_(torch.tensor([[1.0, 1.0]]))
    x = torch.full((1, 2), 0.5, dtype=torch.float64)
    graph = trace(nn.Sequential(first, nn.ReLU(), second).double(), (2,))
    bounds = Problem(graph, x, Box(0.1), Spec.logits(1, 1, x)).bounds(HybridZonotope())
    centre, box, columns = (0.1 + 0.1 / 2) + 0.1 / 2, 0.1 / 2 + 0.1 / 2, 0.1 + 0.1
    assert bounds.lower.item() == pytest.approx(centre - box - columns)
    assert bounds.upper.item() == pytest.approx(centre + box + columns)


def test_it_is_an_engine_for_empty_batches_and_at_the_statistics_of_a_batch():
    assert isinstance(HybridZonotope(), Engine)
    assert hash(HybridZonotope()) == hash(HybridZonotope("adaptive"))
    graph, x = network("residual"), torch.zeros(0, 1, 3, 3, dtype=torch.float64)
    found = HybridZonotope()(Problem(graph, x, L2Ball(0.1), Spec.logits(0, CLASSES, x)))
    assert found.lower.shape == (0, CLASSES)
    graph, (x, y) = network("residual"), inputs()
    graph.module.train()
    fixed = graph.run(x)[1]
    asked = Problem(fixed, x, Box(0.1), Spec.margins(y, CLASSES, x))
    assert_sound(asked, asked.bounds(HybridZonotope()))


def test_in_front_of_the_first_activation_it_is_an_interval():
    asked = problem("growing", Box(0.2))
    ours, interval = asked.bounds(HybridZonotope()).boxes, asked.bounds(Interval()).boxes
    for one, other in zip(ours[min(ours)], interval[min(ours)], strict=True):
        assert_equal(one, other)

"""Random projections: they estimate the exact boxes, and prove nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import get_type_hints

import pytest
import torch
from torch import nn

from tightrope.bounds import Bounds, Engine, Estimate, Estimator, Forward, Interval, Problem, Projected
from tightrope.bounds.projected import Length, Median
from tightrope.errors import InputError, TightropeError
from tightrope.graph import trace
from tightrope.region import Box, L1Ball, L2Ball
from tightrope.spec import Spec
from tightrope.verify import BoundStage

CLASSES, BALLS = 3, [Box, L2Ball]
each_ball = pytest.mark.parametrize("kind", BALLS, ids=lambda kind: kind.__name__)


def network(seed: int = 0):
    torch.manual_seed(seed)
    layers = [nn.Conv2d(1, 8, 4, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 4, stride=2, padding=1)]
    return trace(
        nn.Sequential(
            *(*layers, nn.ReLU(), nn.Flatten(), nn.Linear(128, 60), nn.ReLU(), nn.Linear(60, CLASSES))
        ).double(),
        (1, 16, 16),
    )


def problem(region, seed: int | None = 0, batch: int = 2, graph=None):
    graph = graph or network()
    x = torch.rand(batch, *graph.input_shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    spec = Spec.margins(torch.arange(batch) % CLASSES, CLASSES, x)
    return Problem(graph, x, region, spec, generator)


def widths(estimate: Estimate) -> list[torch.Tensor]:
    return [(upper - lower).detach() for lower, upper in estimate.boxes.values()]


class TestEstimators:
    def test_the_median_of_cauchy_directions_comes_to_the_sum_of_sizes(self):
        torch.manual_seed(0)
        rows, weights = torch.randn(2, 5, 30), torch.rand(2, 30)
        columns = torch.empty(1, 20_000, 30).cauchy_() * weights.unsqueeze(1)
        true = (rows.abs() @ weights.unsqueeze(2)).squeeze(2)
        torch.testing.assert_close(Median().sides(rows @ columns.mT)[0], true, rtol=0.04, atol=0)

    def test_the_length_of_normal_directions_comes_to_the_norm(self):
        torch.manual_seed(0)
        rows, radius = torch.randn(1, 5, 30), torch.tensor([[0.1], [0.3]])
        true = radius * rows.norm(dim=2)
        spread = Length(radius).sides(rows @ torch.randn(1, 20_000, 30).mT)[0]
        torch.testing.assert_close(spread, true, rtol=0.03, atol=0)

    @each_ball
    def test_more_directions_estimate_the_boxes_better(self, kind):
        region = kind(0.05 if kind is Box else 1.0, domain=None)
        exact = problem(region).bounds(Forward())
        true = torch.cat([w.flatten() for w in widths(exact)[1:]])  # the first box of a `Box` is exact
        errors = []
        for count in (1, 5, 25):
            found = [problem(region, seed).bounds(Projected(count)) for seed in range(8)]
            ratios = torch.stack([torch.cat([w.flatten() for w in widths(e)[1:]]) / true for e in found])
            errors.append(float((ratios - 1).abs().mean()))
        assert errors[0] > 1.3 * errors[1] > 2.5 * errors[2]
        assert errors[2] < 0.25  # 1.25 / sqrt(25) for a median of its own
        assert float(ratios.log().mean()) == pytest.approx(0, abs=0.1)  # as often too large as too small
        lower = torch.stack([e.lower for e in found]).mean(0)
        assert (lower - exact.lower).norm() < 0.1 * (exact.upper - exact.lower).norm()


class TestProjected:
    @each_ball
    def test_small_sources_are_carried_exactly(self, kind):
        region = kind(0.05)
        exact, estimate = problem(region).bounds(Forward()), problem(region).bounds(Projected(512))
        torch.testing.assert_close(estimate.lower, exact.lower, atol=1e-12, rtol=0)
        torch.testing.assert_close(estimate.upper, exact.upper, atol=1e-12, rtol=0)
        for a, b in zip(widths(estimate), widths(exact), strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=0)

    @each_ball
    def test_the_seed_decides(self, kind):
        one, same, other = (
            problem(kind(0.1), seed).bounds(Projected(10)).lower.detach() for seed in (0, 0, 1)
        )
        assert torch.equal(one, same)
        assert not torch.equal(one, other)

    def test_each_call_draws_anew_but_a_problem_is_asked_once(self):
        asked, engine = problem(Box(0.1), seed=None), Projected(10)
        assert not torch.equal(engine(asked).lower, engine(asked).lower)
        assert asked.bounds(engine) is asked.bounds(Projected(10))

    @each_ball
    def test_boxes_lie_within_the_intervals_and_are_no_box_upside_down(self, kind):
        for seed in range(5):
            asked = problem(kind(0.3), seed)
            intervals = asked.bounds(Interval()).boxes
            for i, (lower, upper) in asked.bounds(Projected(1)).boxes.items():
                assert (lower <= upper).all()
                assert (lower >= intervals[i][0]).all()
                assert (upper <= intervals[i][1]).all()

    @each_ball
    def test_a_radius_of_each_example_is_its_own(self, kind):
        eps = torch.tensor([0.0, 0.1], dtype=torch.float64)
        estimate = problem(kind(eps)).bounds(Projected(10))
        for width in widths(estimate):
            torch.testing.assert_close(width[0], torch.zeros_like(width[0]), atol=1e-12, rtol=0)
            assert (width[1] > 0).any()

    @each_ball
    def test_gradients_are_those_of_finite_differences(self, kind):
        torch.manual_seed(0)
        graph = trace(
            nn.Sequential(nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 3)).double(),
            (8,),
        )
        eps = torch.tensor([0.1, 0.2], dtype=torch.float64, requires_grad=True)

        def bounds(eps, *_parameters):
            estimate = problem(kind(eps), graph=graph).bounds(Projected(3))
            return estimate.lower, *(side for box in estimate.boxes.values() for side in box)

        assert torch.autograd.gradcheck(bounds, (eps, *graph.module.parameters()), fast_mode=True)

    @each_ball
    def test_a_batch_may_be_empty(self, kind):
        assert problem(kind(0.1), batch=0).bounds(Projected(10)).lower.shape == (0, CLASSES)

    def test_l_1_balls_are_refused(self):
        with pytest.raises(InputError, match="not for L1Ball; use forward"):
            problem(L1Ball(0.1)).bounds(Projected())

    def test_there_is_at_least_one_direction(self):
        with pytest.raises(InputError, match="at least one direction, got 0"):
            Projected(0)


class TestGuarantee:
    @pytest.mark.parametrize("count", [10, 10_000])
    def test_an_estimate_is_never_bounds_even_if_it_is_exact(self, count):
        estimate = problem(Box(0.1)).bounds(Projected(count))
        assert isinstance(Projected(count), Estimator)
        assert type(estimate) is Estimate
        assert not isinstance(estimate, Bounds)
        assert estimate.guarantee == "estimate"

    def test_a_verifier_refuses_it(self):
        asked = problem(Box(1e-6))
        y = asked.graph.run(asked.x)[0].argmax(1)
        asked = replace(asked, spec=Spec.margins(y, CLASSES, asked.x))
        assert BoundStage("exact", Forward())(asked, y).proved.all()
        with pytest.raises(TightropeError, match="projected yields estimates, which prove nothing"):
            BoundStage("projected", Projected())(asked, y)

    def test_its_type_is_not_what_a_verifier_asks_for(self):
        """What mypy goes by: a stage takes an `Engine`, which promises `Bounds`, and this promises less."""
        assert get_type_hints(BoundStage)["engine"] is Engine
        assert get_type_hints(Engine.__call__)["return"] is Bounds
        assert get_type_hints(Projected.__call__)["return"] is Estimate

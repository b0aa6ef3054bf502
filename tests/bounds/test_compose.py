"""Engines made of engines: the better of two, and a mixture."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tightrope.bounds import Intersect, Interval, Mix, Problem, Projected, crown_ibp
from tightrope.errors import InputError
from tightrope.graph import trace
from tightrope.region import Box
from tightrope.spec import Spec


def setting():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    x = torch.rand(5, 4, dtype=torch.float64)
    return Problem(trace(model, (4,)), x, Box(0.3), Spec.logits(5, 3, x))


def test_the_intersection_takes_the_better_bound_of_every_row():
    problem = setting()
    one, two, both = map(problem.bounds, (crown_ibp(), Interval(), Intersect(crown_ibp(), Interval())))
    torch.testing.assert_close(both.lower, torch.maximum(one.lower, two.lower))
    torch.testing.assert_close(both.upper, torch.minimum(one.upper, two.upper))


def test_a_mixture_lies_between_its_two_engines():
    problem = setting()
    one, two, mixed = map(problem.bounds, (crown_ibp(), Interval(), Mix(crown_ibp(), Interval(), 0.25)))
    torch.testing.assert_close(mixed.lower, 0.25 * one.lower + 0.75 * two.lower)
    torch.testing.assert_close(mixed.upper, 0.25 * one.upper + 0.75 * two.upper)


def test_a_mixture_with_nothing_of_an_engine_does_not_compute_it():
    def never(problem):
        raise AssertionError("computed")

    problem = setting()
    assert problem.bounds(Mix(never, Interval(), 0.0)) is problem.bounds(Interval())
    assert problem.bounds(Mix(Interval(), never, 1.0)) is problem.bounds(Interval())


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_mixture_that_would_not_be_sound_is_refused(share):
    with pytest.raises(InputError, match="share in"):
        Mix(crown_ibp(), Interval(), share)


def test_engines_that_build_on_the_same_bounds_share_them():
    calls = []

    class Spy(Interval):
        def __call__(self, problem):
            calls.append(problem)
            return super().__call__(problem)

    problem = setting()
    problem.bounds(Intersect(Mix(crown_ibp(), Spy(), 0.5), Spy()))
    assert len(calls) == 1


@pytest.mark.parametrize("engine", [Intersect(Projected(), Interval()), Mix(Interval(), Projected(), 0.5)])
def test_what_only_estimates_makes_no_bounds(engine):
    with pytest.raises(InputError, match=r"Projected\(.* yields estimates, which prove nothing"):
        setting().bounds(engine)

"""Engines made of engines: as tight as the tighter one, as trustworthy as the less trustworthy one."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from tightrope.bounds import Intersect, Interval, crown_ibp
from tightrope.graph import trace
from tightrope.region import Box
from tightrope.spec import Spec


def setting():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    x = torch.rand(5, 4, dtype=torch.float64)
    return trace(model, (4,)), x, Box(0.3), Spec.logits(5, 3, x)


def test_the_intersection_takes_the_better_bound_of_every_row():
    one, two, both = (
        engine(*setting()) for engine in (crown_ibp(), Interval(), Intersect(crown_ibp(), Interval()))
    )
    torch.testing.assert_close(both.lower, torch.maximum(one.lower, two.lower))
    torch.testing.assert_close(both.upper, torch.minimum(one.upper, two.upper))
    assert both.guarantee == "sound"


def test_the_intersection_with_an_estimate_is_an_estimate():
    def guess(graph, x, region, spec):
        return replace(Interval()(graph, x, region, spec), guarantee="estimate")

    assert Intersect(guess, Interval())(*setting()).guarantee == "estimate"
    assert Intersect(Interval(), guess)(*setting()).guarantee == "estimate"

"""Optimised slopes: sound against sampling, corners and attacks, and between CROWN and the exact referees."""

from __future__ import annotations

import itertools
import math
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from tightrope.attacks import Pgd
from tightrope.bounds import Engine, Interval, Optimised, Problem, alpha_crown, crown, fast_lin, zonotope
from tightrope.bounds.alpha import Frame, climb
from tightrope.graph import trace
from tightrope.region import REGIONS, Box
from tightrope.spec import Spec

from .test_linear import dense, exact_minimum, network, problem

ENGINES = {"alpha-crown": alpha_crown(6), "zonotope": zonotope(6)}
BEGINNINGS = {"alpha-crown": crown(), "zonotope": fast_lin()}
ANY = ["dense", "conv", "leaky", "sigmoid", "residual", "pool", "affine"]
KINKED = ["dense", "conv", "leaky", "residual"]
SUITABLE = [("alpha-crown", name) for name in ANY] + [("zonotope", name) for name in KINKED]


def ask(name: str, region, seed: int = 0, batch: int = 3):
    x, y = problem(seed, batch)
    return Problem(network(name, seed), x, region, Spec.margins(y, 4, x))


def margins_at(asked: Problem, point: torch.Tensor) -> torch.Tensor:
    return (asked.spec.rows @ asked.graph.run(point)[0].unsqueeze(2)).squeeze(2)


def frame_of(asked: Problem, lines: str = "triangle") -> Frame:
    boxes = asked.bounds(crown()).boxes
    return Frame.over(asked.graph, asked.x, asked.region, boxes, lines)


@pytest.mark.parametrize(("engine", "name"), SUITABLE)
@pytest.mark.parametrize("norm", REGIONS)
@torch.no_grad()
def test_no_point_of_the_region_leaves_the_bounds(engine, name, norm):
    (x, y), asked = problem(1), ask(name, REGIONS[norm](0.3), 1)
    bounds, generator = asked.bounds(ENGINES[engine]), torch.Generator().manual_seed(0)
    points = [asked.region.sample(x, generator) for _ in range(40)]
    if norm == "inf":
        coins = [torch.rand(x.shape, generator=generator) < 0.5 for _ in range(40)]
        points += [torch.where(coin, *asked.region.corners(x)) for coin in coins]
    points += [Pgd(steps=10, step=0.3, loss="margin")(asked.graph, x, y, asked.region, generator)]
    for point in points:
        margins = margins_at(asked, point)
        assert (bounds.lower - 1e-9 <= margins).all()
        assert (margins <= bounds.upper + 1e-9).all()


@pytest.mark.parametrize(("engine", "name"), SUITABLE)
@pytest.mark.parametrize("norm", REGIONS)
@torch.no_grad()
def test_a_bound_is_never_looser_than_where_it_began_nor_than_intervals(engine, name, norm):
    tighter = 0
    for seed in range(2):
        asked = ask(name, REGIONS[norm](0.3), seed)
        ours = asked.bounds(ENGINES[engine])
        for other in (asked.bounds(BEGINNINGS[engine]), asked.bounds(Interval())):
            assert (ours.lower >= other.lower - 1e-12).all()
            assert (ours.upper <= other.upper + 1e-12).all()
        tighter += int((ours.lower > asked.bounds(BEGINNINGS[engine]).lower + 1e-6).sum())
    assert tighter or name in ("affine", "sigmoid", "pool")


@pytest.mark.parametrize("engine", ENGINES)
@torch.no_grad()
def test_without_a_step_it_is_where_it_begins(engine):
    asked = ask("residual", Box(0.2))
    begun, interval = asked.bounds(BEGINNINGS[engine]), asked.bounds(Interval())
    for still in (replace(ENGINES[engine], iterations=0), replace(ENGINES[engine], seconds=0.0)):
        torch.testing.assert_close(
            asked.bounds(still).lower, torch.maximum(begun.lower, interval.lower), atol=1e-12, rtol=0
        )


@pytest.mark.parametrize("engine", ENGINES)
@torch.no_grad()
def test_more_steps_never_make_it_worse(engine):
    asked = ask("dense", Box(0.3), seed=1)
    bounds = [asked.bounds(replace(ENGINES[engine], iterations=n)).lower for n in (0, 1, 2, 5, 10, 40)]
    for less, more in itertools.pairwise(bounds):
        assert (more >= less).all()
    assert (bounds[-1] > bounds[0] + 1e-3).any()


@pytest.mark.parametrize("seed", range(3))
@torch.no_grad()
def test_it_is_below_the_triangle_lp_which_is_below_the_milp(seed):
    torch.manual_seed(seed)
    graph = trace(dense(9, 6, 6).double().eval(), (1, 3, 3))
    x, y = problem(seed, batch=1)
    spec = Spec.margins(y, 4, x)
    for engine in (alpha_crown(60), zonotope(60)):
        bounds = engine(Problem(graph, x, Box(0.2), spec))
        boxes = {i: (low[0], up[0]) for i, (low, up) in bounds.boxes.items()}
        for t in range(1, 4):
            row = spec.rows[0, t].numpy()
            triangle = exact_minimum(graph, x, 0.2, row, boxes, binary=False)
            assert bounds.lower[0, t].item() <= triangle + 1e-6
            assert triangle <= exact_minimum(graph, x, 0.2, row, boxes, binary=True) + 1e-6


@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES.keys())
@torch.no_grad()
def test_each_example_is_bounded_as_if_it_were_alone_and_with_its_own_eps(engine):
    (x, y), graph = problem(), network("conv")
    eps = torch.tensor([0.0, 0.1, 0.3], dtype=torch.float64)
    together = engine(Problem(graph, x, Box(eps), Spec.margins(y, 4, x)))
    for i in range(len(x)):
        one = slice(i, i + 1)
        alone = engine(Problem(graph, x[one], Box(float(eps[i])), Spec.margins(y[one], 4, x)))
        torch.testing.assert_close(together.lower[one], alone.lower, atol=1e-9, rtol=0)
        torch.testing.assert_close(together.upper[one], alone.upper, atol=1e-9, rtol=0)


@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES.keys())
@torch.no_grad()
def test_to_stop_early_changes_no_verdict(engine):
    for seed in range(4):
        asked = ask("dense", Box(0.12), seed, batch=6)
        patient = asked.bounds(replace(engine, iterations=20)).lower
        brief = asked.bounds(replace(engine, iterations=20, enough=0.0)).lower
        assert torch.equal(patient > 0, brief > 0)
        torch.testing.assert_close(brief[patient <= 0], patient[patient <= 0], atol=1e-3, rtol=0)


@torch.no_grad()
def test_lots_of_pairs_change_nothing(monkeypatch):
    asked = ask("residual", Box(0.2))
    whole = asked.bounds(alpha_crown(5)).lower
    monkeypatch.setattr(sys.modules[Optimised.__module__], "coefficients_at_once", lambda _: 100)
    pieces = ask("residual", Box(0.2)).bounds(alpha_crown(5)).lower
    torch.testing.assert_close(pieces, whole, atol=1e-9, rtol=0)


@torch.no_grad()
def test_the_lower_side_alone_is_the_same_lower_side():
    asked = ask("residual", Box(0.2))
    both, lower = asked.bounds(alpha_crown(5)), asked.bounds(Optimised(iterations=5, sides="lower"))
    torch.testing.assert_close(lower.lower, both.lower, atol=1e-9, rtol=0)
    assert torch.equal(lower.upper, asked.bounds(Interval()).upper)


@pytest.mark.parametrize("lines", ["triangle", "parallel"])
@pytest.mark.parametrize("name", KINKED)
@torch.no_grad()
def test_any_slopes_and_multipliers_yield_a_bound_where_the_signs_are_as_given(lines, name):
    seen = 0
    for seed in range(6):
        asked = ask(name, Box(0.3), seed)
        frame, generator = frame_of(asked, lines), torch.Generator().manual_seed(seed)
        x, shape = asked.x, frame.places.shape
        # A few neurons' signs are given, as they are at one point.
        _, entering = asked.graph.entering(asked.region.sample(x, generator))
        signs = beside(frame, entering).sign().gather(1, frame.places)
        signs = signs * (torch.rand(shape, generator=generator) < 2 / max(1, shape[1]))
        left = frame.left.expand(len(x), -1).gather(1, frame.places)
        slopes = left + (1 - left) * torch.rand(shape, generator=generator, dtype=x.dtype)
        push = 0.3 * torch.rand(shape, generator=generator, dtype=x.dtype) * signs
        bound = frame.bound(asked.spec.rows, slopes, push)
        for _ in range(20):
            point = asked.region.sample(x, generator)
            z = beside(frame, asked.graph.entering(point)[1]).gather(1, frame.places)
            inside = (z * signs >= 0).all(1)
            seen += int((inside & (signs != 0).any(1)).sum())
            assert (bound <= margins_at(asked, point) + 1e-9)[inside].all()
    assert seen > 10


def beside(frame: Frame, entering: dict[int, torch.Tensor]) -> torch.Tensor:
    parts = [entering[i].flatten(1) for i, _ in frame.slices()]
    return torch.cat([*parts, parts[0].new_zeros(len(parts[0]), 1)], 1)


@torch.no_grad()
def test_the_chords_slopes_between_parallel_lines_are_fast_lin():
    asked = ask("leaky", Box(0.2))
    frame = Frame.over(asked.graph, asked.x, asked.region, asked.bounds(fast_lin()).boxes, "parallel")
    bound = frame.bound(asked.spec.rows, frame.slopes())
    torch.testing.assert_close(bound, asked.bounds(fast_lin()).lower, atol=1e-12, rtol=0)


@torch.no_grad()
def test_what_is_not_a_number_is_no_bound():
    asked = ask("dense", Box(0.2))
    frame, rows = frame_of(asked), asked.spec.rows[:, :1] * math.nan
    found = climb(
        frame, rows, frame.slopes(), iterations=3, rate=0.1, enough=torch.zeros(3, dtype=torch.float64)
    )
    assert (found.lower == -math.inf).all()


def test_gradients_are_those_at_the_slopes_that_were_found():
    asked = ask("conv", Box(0.2))
    weight = next(iter(asked.graph.module.parameters())).requires_grad_()
    bounds = asked.bounds(alpha_crown(5))
    (gradient,) = torch.autograd.grad(bounds.lower.sum(), weight)
    with torch.no_grad():
        same = ask("conv", Box(0.2)).bounds(alpha_crown(5)).lower
        torch.testing.assert_close(bounds.lower.detach(), same, atol=1e-9, rtol=0)
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 0


@torch.no_grad()
def test_a_network_may_be_dead():
    dead = nn.Sequential(nn.Flatten(), nn.Linear(9, 3), nn.ReLU(), nn.Linear(3, 4)).double()
    dead[1].bias.fill_(-100)
    (x, y), graph = problem(), trace(dead, (1, 3, 3))
    asked = Problem(graph, x, Box(0.1), Spec.margins(y, 4, x))
    torch.testing.assert_close(asked.bounds(alpha_crown()).lower, asked.bounds(crown()).lower)


def test_they_are_engines():
    for engine in ENGINES.values():
        assert isinstance(engine, Engine)
        assert hash(engine) == hash(replace(engine))


@pytest.mark.parametrize("lines", ["triangle", "parallel"])
def test_where_all_is_known_already_nothing_climbs(lines):
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).double().eval().requires_grad_(False)
    graph, x = trace(net, (2,)), torch.rand(4, 2, dtype=torch.float64)
    asked = Problem(graph, x, Box(0.1), Spec.logits(4, 2, x))
    engine = Optimised(lines, sides="lower", enough=-1e6)
    assert torch.equal(asked.bounds(engine).lower, asked.bounds(replace(engine, iterations=0)).lower)

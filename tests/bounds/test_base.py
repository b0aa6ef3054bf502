"""The problem of some examples of a batch knows what was found for the batch."""

from __future__ import annotations

import pytest
import torch

from tightrope.bounds import (
    Forward,
    HybridZonotope,
    Intersect,
    Interval,
    Linear,
    Mix,
    Problem,
    Projected,
    alpha_crown,
    crown,
    crown_ibp,
    fast_lin,
)
from tightrope.region import REGIONS
from tightrope.spec import Spec

from . import test_linear, test_patches

ENGINES = {
    "intervals": Interval(),
    "crown": crown(),
    "crown-ibp": crown_ibp(),
    "fast-lin": fast_lin(),
    "boxes alone": Linear(sides="none"),
    "alpha-crown": alpha_crown(iterations=1),
    "forward": Forward(),
    "hybrid": HybridZonotope(),
    "better of two": Intersect(crown(), Interval()),
    "mixture": Mix(crown_ibp(), Interval(), 0.5),
}
NETWORKS = {
    "dense": lambda: test_linear.network("dense"),
    "residual": lambda: test_linear.network("residual"),
    "patches": lambda: test_patches.network("padded"),
    "affine": lambda: test_linear.network("affine"),
}
EPS = {"inf": 0.1, "2": 0.3, "1": 0.5}
SHARES = torch.tensor([1.0, 0.3, 0.0, 1.7], dtype=torch.float64)
PERMUTED, REPEATED = torch.tensor([3, 0, 2, 1]), torch.tensor([2, 0, 2])


def problem(name: str, norm: str = "inf", each: bool = False) -> Problem:
    graph = NETWORKS[name]()
    x = torch.rand(4, *graph.input_shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    region = REGIONS[norm](EPS[norm] * SHARES if each else EPS[norm])
    return Problem(graph, x, region, Spec.margins(torch.tensor([2, 0, 1, 0]), graph.classes, x))


def afresh(asked: Problem, rows: torch.Tensor) -> Problem:
    """Some examples of a problem, with nothing known about them."""
    region = asked.region
    if isinstance(region.eps, torch.Tensor):
        region = region.with_eps(region.eps[rows])
    return Problem(asked.graph, asked.x[rows], region, Spec(asked.spec.rows[rows]))


@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(("norm", "each"), [("inf", False), *((norm, True) for norm in REGIONS)], ids=str)
def test_what_is_known_of_some_examples_is_what_would_be_found_afresh(engine, name, norm, each):
    asked = problem(name, norm, each)
    whole = asked.bounds(engine)
    for rows in (PERMUTED, REPEATED):
        known, found = asked.at(rows).bounds(engine), engine(afresh(asked, rows))
        assert type(known) is type(whole)
        torch.testing.assert_close(vars(known), vars(found), atol=1e-11, rtol=0)
        assert torch.equal(known.lower, whole.lower[rows])  # looked up, so not a digit is lost
        assert torch.equal(known.upper, whole.upper[rows])
        for box, sides in zip(known.boxes.values(), whole.boxes.values(), strict=True):
            assert all(torch.equal(part, side[rows]) for part, side in zip(box, sides, strict=True))


@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
@pytest.mark.parametrize("each", [False, True])
def test_what_builds_on_it_finds_the_same(engine, each):
    asked = problem("patches", "inf", each)
    for base in (Interval(), crown_ibp(), crown()):
        asked.bounds(base)
    part = asked.at(PERMUTED).at(torch.tensor([1, 3]))
    expected = engine(afresh(asked, PERMUTED[[1, 3]]))
    torch.testing.assert_close(vars(engine(part)), vars(expected), atol=1e-11, rtol=0)


def test_what_is_known_is_not_computed_again_and_what_is_not_is_found_for_some_alone():
    sizes = []

    class Spy(Interval):
        def __call__(self, problem):
            sizes.append(len(problem.x))
            return super().__call__(problem)

    asked = problem("dense")
    asked.bounds(Spy())
    asked.at(REPEATED).bounds(Spy())
    assert sizes == [4]
    other = problem("dense")
    other.at(REPEATED).bounds(Spy())
    other.bounds(Spy())
    assert sizes == [4, 3, 4]


def test_guesses_go_with_their_examples_too():
    asked = problem("dense")
    whole = asked.bounds(Projected(3))
    known = asked.at(PERMUTED).bounds(Projected(3))
    assert known.guarantee == "estimate"
    assert torch.equal(known.lower, whole.lower[PERMUTED])


def test_no_example_is_left():
    asked = problem("patches", each=True)
    asked.bounds(crown())
    part = asked.at(torch.tensor([], dtype=torch.int64))
    assert part.bounds(crown()).lower.shape == (0, 3)
    assert part.bounds(Interval()).upper.shape == (0, 3)


def test_boxes_that_engines_share_are_copied_once():
    asked = problem("dense")
    asked.bounds(crown_ibp())
    part = asked.at(PERMUTED)
    one, two = (part.bounds(engine).boxes for engine in (crown_ibp(), Interval()))
    assert all(one[i][side] is two[i][side] for i in one for side in (0, 1))
    assert all(one[i][0] is not asked.bounds(crown_ibp()).boxes[i][0] for i in one)

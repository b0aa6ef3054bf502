"""Branch and bound: the exact answer on small networks; undecided where time or memory end."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from tightrope.attacks import Pgd
from tightrope.bounds import Problem
from tightrope.errors import InputError
from tightrope.graph import recast, trace
from tightrope.region import REGIONS, Box, L1Ball, L2Ball
from tightrope.spec import Spec
from tightrope.verify import BranchAndBound, Stage, bab
from tightrope.verify.stages import answer
from tightrope.verify.verifiers import find_verifier

from .conftest import random_net
from .referee import ask, case, smallest_margin

# Without gradient steps it has to split down to single patterns.
SEARCHES = {"usual": BranchAndBound(), "blunt": BranchAndBound(iterations=0, candidates=1)}


def verdicts(found) -> list[str]:
    refuted = ~found.point.flatten(1).isnan().any(1)
    assert not (refuted & found.proved).any()
    words = {(True, False): "robust", (False, True): "falsified", (False, False): "undecided"}
    return [words[pair] for pair in zip(found.proved.tolist(), refuted.tolist(), strict=True)]


def examples(seed: int, count: int, eps: float):
    """Examples of one network whose answers at this eps differ, some of them after many splits."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 3))
    for parameter in net.requires_grad_(False).parameters():
        parameter.mul_(2)
    graph = recast(trace(net, (4,)), torch.float64)
    x = torch.rand(count, 4, dtype=torch.float64)
    return graph, x, graph.run(x)[0].argmax(1), Box(eps)


@pytest.mark.parametrize("seed", range(60))
def test_it_agrees_with_the_enumeration_of_all_activation_patterns(seed):
    asked = case(seed, L1Ball if seed % 4 > 1 else Box)
    graph, x, y, region = asked.graph, asked.x, asked.y, asked.region
    exact = smallest_margin(asked)
    found = ask(list(SEARCHES.values())[seed % 2], graph, x, y, region)
    assert verdicts(found) == ["robust" if exact > 0 else "falsified"]
    if exact > 0:
        assert found.margin.item() <= exact + 1e-9
    else:
        assert answer(graph, found.point, y).margin.item() <= 0
        assert region.contains(x, found.point).item() == 0


@pytest.mark.parametrize("norm", REGIONS)
@pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES)
def test_it_decides_every_example_and_no_attack_refutes_a_proof(norm, search):
    seen = set()
    for seed in (0, 4):
        graph, x, y, _ = examples(seed, 5, 0.1)
        region = REGIONS[norm]({"inf": 0.1, "2": 0.2, "1": 0.3}[norm])
        found = ask(search, graph, x, y, region)
        seen |= set(verdicts(found))
        attack = Pgd(steps=30, step=0.2, restarts=3, loss="margin")
        point = attack(graph, x, y, region, torch.Generator().manual_seed(0))
        points = [point, *(region.sample(x) for _ in range(30))]
        for other in points:
            assert (answer(graph, other, y).margin > 0)[found.proved].all()
        refuted = ~found.point.isnan().any(1)
        assert (answer(graph, found.point[refuted], y[refuted]).margin <= 0).all()
    assert seen == {"robust", "falsified"}


def test_no_corner_refutes_a_proof():
    graph, x, y, region = examples(0, 10, 0.1)
    found = ask(BranchAndBound(), graph, x, y, region)
    assert 0 < found.proved.sum() < len(x)
    for corner in itertools.product((False, True), repeat=4):
        point = torch.where(torch.tensor(corner), *region.corners(x))
        assert (answer(graph, point, y).margin >= found.margin - 1e-12)[found.proved].all()


def test_it_proves_what_alpha_crown_proves_and_more():
    more = 0
    for seed in (0, 4):
        problem = examples(seed, 10, 0.12)
        ours, theirs = ask(BranchAndBound(), *problem), ask(find_verifier("alpha-crown")[0], *problem)
        assert (ours.proved >= theirs.proved).all()
        more += int((ours.proved > theirs.proved).sum())
    assert more


@pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES)
def test_verdicts_do_not_depend_on_the_batch_and_each_example_has_its_own_eps(search):
    graph, x, y, _ = examples(0, 10, 0.1)
    eps = torch.linspace(0, 0.2, 10, dtype=torch.float64)
    together = ask(search, graph, x, y, Box(eps))
    alone = [ask(search, graph, x[i : i + 1], y[i : i + 1], Box(float(eps[i]))) for i in range(10)]
    assert verdicts(together) == [verdicts(one)[0] for one in alone]
    some = torch.tensor([7, 2, 5])
    assert verdicts(ask(search, graph, x[some], y[some], Box(eps[some]))) == [
        verdicts(together)[i] for i in some.tolist()
    ]


def test_halves_begin_with_bounds_that_are_no_lower_than_their_cell_s(monkeypatch):
    compared = 0
    halve = bab._Search._halves

    def begun(search, cells):
        settings = {"rate": 0.1, "enough": search.slack[cells.example], "signs": cells.signs}
        frame, rows = search._frame(cells), search._row(cells)
        return bab.climb(
            frame, rows, cells.slopes, iterations=0, multipliers=cells.multipliers, **settings
        ).lower

    def halves(search, cells):
        nonlocal compared
        found, whole = halve(search, cells), begun(search, cells).repeat(2)
        assert (begun(search, found) >= whole - 1e-9 * (1 + whole.abs())).all()
        compared += len(found)
        return found

    monkeypatch.setattr(bab._Search, "_halves", halves)
    for seed in (0, 1):
        ask(BranchAndBound(iterations=3), *examples(seed, 10, 0.15))
    assert compared > 50


def test_a_bound_keeps_the_rounding_of_the_multipliers_that_it_was_found_with():
    graph, x, y, region = examples(0, 5, 0.15)
    search = bab._Search(BranchAndBound(), Problem(graph, x, region, Spec.margins(y, 3, x)), y, math.inf)
    cells = search._roots()
    cells = search._split(cells, torch.zeros_like(cells.example))
    cells = replace(cells, multipliers=(cells.signs != 0) * 1e3, rounding=torch.full_like(cells.lower, 7.0))
    frame = search._frame(cells)
    inherited = search._climb(replace(cells, lower=torch.full_like(cells.lower, 1e6)), frame, 0)
    assert (inherited.lower == 1e6).all()
    assert (inherited.rounding == 7.0).all()
    own = search._climb(replace(cells, lower=torch.full_like(cells.lower, -1e6)), frame, 0)
    assert (own.lower > -1e6).all()
    assert ((own.rounding > 0) & (own.rounding < 7.0)).all()


def test_a_bound_within_its_rounding_closes_no_cell():
    graph, x, y, region = examples(0, 5, 0.15)
    search = bab._Search(BranchAndBound(), Problem(graph, x, region, Spec.margins(y, 3, x)), y, math.inf)
    cells = search._roots()
    high = replace(cells, lower=torch.full_like(cells.lower, 5.0))
    assert len(search._examine_lot(high)) == 0
    assert len(search._examine_lot(replace(high, rounding=torch.full_like(cells.lower, 7.0)))) == len(cells)


def test_witnesses_are_looked_for_before_anything_is_split(monkeypatch):
    graph, x, y, region = examples(0, 20, 0.15)
    wrong = ~ask(BranchAndBound(), graph, x, y, region).proved
    assert 3 < wrong.sum() < 20
    monkeypatch.setattr(bab._Search, "_examine", lambda search, cells: cells.at(cells.example < 0))
    found = ask(BranchAndBound(), graph, x, y, region)
    refuted = ~found.point.isnan().any(1)
    assert torch.equal(refuted, wrong)
    alone = ask(BranchAndBound(), graph, x[wrong][-1:], y[wrong][-1:], region)
    torch.testing.assert_close(alone.point[0], found.point[wrong][-1])


def test_a_witness_of_several_cells_is_the_point_of_one_of_them():
    graph, x, y, region = examples(0, 5, 0.15)
    y = (y + 1) % 3  # another label is wrong everywhere near
    search = bab._Search(BranchAndBound(), Problem(graph, x, region, Spec.margins(y, 3, x)), y, math.inf)
    cells = search._roots()
    assert len(cells) > len(cells.example.unique())
    points = region.project(x[cells.example], torch.rand_like(x[cells.example]))
    search._try(points, cells)
    for example in cells.example.unique():
        assert (search.point[example] == points[cells.example == example]).all(1).any()


def test_lots_of_cells_change_no_verdict(monkeypatch):
    problem = examples(0, 10, 0.1)
    whole = verdicts(ask(BranchAndBound(), *problem))
    monkeypatch.setattr("tightrope.verify.bab.at_once", lambda *_: 3)
    assert verdicts(ask(BranchAndBound(), *problem)) == whole


def test_without_time_nothing_is_decided():
    found = ask(BranchAndBound(), *examples(0, 20, 0.05), limit=1e-9)
    assert verdicts(found) == ["undecided"] * 20


@pytest.fixture(scope="module")
def final():
    """What the blunt search comes to with all the time in the world."""
    return verdicts(ask(SEARCHES["blunt"], *examples(0, 10, 0.1)))


@pytest.mark.parametrize("moments", [1, 2, 3, 4, 6])
def test_when_time_is_over_what_is_open_is_undecided(moments, final, monkeypatch):
    """A clock that moves by a second each time it is read."""
    problem = examples(0, 10, 0.1)
    clock = itertools.count()
    monkeypatch.setattr("time.perf_counter", lambda: float(next(clock)))
    found = verdicts(ask(SEARCHES["blunt"], *problem, limit=moments / 10))
    assert all(mine in (true, "undecided") for mine, true in zip(found, final, strict=True))
    assert "undecided" in found


def test_an_example_that_has_used_up_its_time_is_given_up_and_the_others_are_not(monkeypatch):
    """A clock that moves by a second for each cell that is bounded."""
    problem, clock, look = examples(0, 10, 0.1), [0.0], bab.climb

    def timed(frame, *args, **options):
        clock[0] += len(frame.x)
        return look(frame, *args, **options)

    monkeypatch.setattr(bab, "climb", timed)
    monkeypatch.setattr(bab, "at_once", lambda *_: 4)
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    graph, x, y, region = problem
    alone, cost = [], []
    for i in range(10):
        began = clock[0]
        alone += verdicts(ask(SEARCHES["blunt"], graph, x[i : i + 1], y[i : i + 1], region))
        cost.append(clock[0] - began)
    limit = 50.0
    assert sum(cost) < limit * 10, "shared, the time would suffice for all"
    found = verdicts(ask(SEARCHES["blunt"], *problem, limit=limit))
    for mine, true, seconds in zip(found, alone, cost, strict=True):
        assert mine == true if seconds < limit else mine in (true, "undecided")
    assert found[cost.index(max(cost))] == "undecided"
    assert max(c for c in cost if c < limit) > 10


def test_when_memory_is_over_examples_are_given_up():
    problem = examples(0, 10, 0.1)
    final = verdicts(ask(BranchAndBound(), *problem))
    found = verdicts(ask(BranchAndBound(iterations=0, candidates=1, most=2), *problem))
    assert all(mine in (true, "undecided") for mine, true in zip(found, final, strict=True))
    assert "undecided" in found


def test_other_activations_are_refused_with_what_to_do():
    graph = recast(random_net(0, layer=nn.Tanh), torch.float64)
    x = torch.full((1, 4), 0.5, dtype=torch.float64)
    with pytest.raises(InputError, match="this network has Tanh: use the verifier alpha-crown"):
        ask(BranchAndBound(), graph, x, torch.tensor([0]), Box(0.1))


def test_in_the_cascade_other_activations_are_only_bounded():
    graph = recast(random_net(0, layer=nn.Tanh), torch.float64)
    x = torch.rand(10, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = graph.run(x)[0].argmax(1)
    ours = ask(find_verifier("cascade")[-1], graph, x, y, Box(0.05))
    theirs = ask(find_verifier("alpha-crown")[0], graph, x, y, Box(0.05))
    assert torch.equal(ours.proved, theirs.proved)
    assert 0 < ours.proved.sum() < 10


def test_the_cascade_ends_with_it():
    assert find_verifier("cascade")[-1].name == "complete"
    assert isinstance(BranchAndBound(), Stage)


def test_what_is_not_finite_proves_nothing():
    graph, x, y, region = examples(0, 3, 0.05)
    for layer in (0, 2):
        graph.module[layer].weight.mul_(1e200)
    assert not ask(BranchAndBound(), graph, x, y, region, limit=1.0).proved.any()


def test_a_network_without_unstable_neurons_is_decided_at_once():
    net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)).double().requires_grad_(False)
    graph = trace(net, (2,))
    x = torch.tensor([[0.0, 0.0]], dtype=torch.float64)
    net[0].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))
    net[0].bias.zero_()
    net[1].weight.copy_(torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]))
    net[1].bias.copy_(torch.tensor([0.1, 0.0]))
    y = torch.tensor([0])
    # The least margin in the disc lies outside the domain.
    assert verdicts(ask(BranchAndBound(), graph, x, y, L2Ball(0.5))) == ["robust"]
    assert verdicts(ask(BranchAndBound(), graph, x, y, L2Ball(0.5, domain=None))) == ["falsified"]

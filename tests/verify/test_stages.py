import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from tightrope.attacks import Pgd
from tightrope.bounds import Bounds, Estimate, Problem
from tightrope.errors import InputError, TightropeError
from tightrope.graph import recast, trace
from tightrope.region import Box, L1Ball, L2Ball
from tightrope.spec import Spec
from tightrope.verify import VERIFIERS, BoundStage
from tightrope.verify.stages import LARGEST, SLACK_ABSOLUTE, answer, attack_stage
from tightrope.verify.verifiers import IBP, find_verifier

from .conftest import handmade, random_net
from .referee import ask


@dataclass(frozen=True)
class Says:
    """An engine that bounds the margin over class 1 by what it is told, whatever the network."""

    lower: float
    upper: float = 1.0
    result: type[Estimate] = Bounds

    def __call__(self, problem):
        x = problem.x
        lower = torch.tensor([[0.0, self.lower]], dtype=x.dtype).expand(len(x), -1)
        upper = torch.tensor([[0.0, self.upper]], dtype=x.dtype).expand(len(x), -1)
        return self.result(lower, upper, boxes={})


def prove(engine):
    x, y = torch.full((1, 3), 0.5, dtype=torch.float64), torch.tensor([0])
    proved, margin, *_ = ask(BoundStage("test", engine), trace(handmade().double(), (3,)), x, y, Box(0.1))
    return proved.item(), margin.item()


class TestProof:
    def test_a_positive_lower_bound_proves(self):
        assert prove(Says(0.5)) == (True, 0.5)

    @pytest.mark.parametrize("lower", [-0.5, 0.0])
    def test_any_other_does_not(self, lower):
        assert prove(Says(lower)) == (False, lower)

    def test_a_lower_bound_within_rounding_does_not(self):
        assert prove(Says(1e-7)) == (False, 1e-7)
        assert prove(Says(2e-6))[0]

    def test_the_slack_grows_with_the_size_of_the_bounds(self):
        assert not prove(Says(1e-3, upper=1e7))[0]
        assert prove(Says(1e-1, upper=1e7))[0]

    @pytest.mark.parametrize(
        "engine", [Says(math.nan), Says(0.5, upper=math.nan), Says(math.inf), Says(-math.inf)]
    )
    def test_what_is_not_finite_proves_nothing(self, engine):
        assert not prove(engine)[0]

    def test_the_margin_of_nan_is_the_smallest_number(self):
        assert prove(Says(math.nan))[1] == -LARGEST

    def test_estimates_are_refused_however_good(self):
        with pytest.raises(TightropeError, match="test yields estimates, which prove nothing"):
            prove(Says(0.5, result=Estimate))


class TestRounding:
    """`relu(x0 + B) - relu(x1 + B) + b`: B is so large that x0 is rounded up by as much as x1 is down."""

    @staticmethod
    def prove(x, verifier, large=2.0**43):
        unit = large * 2**-52
        net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)).double().requires_grad_(False)
        net[0].weight.copy_(torch.eye(2))
        net[0].bias.fill_(large)
        net[2].weight.copy_(torch.tensor([[1.0, -1.0], [0.0, 0.0]]))
        net[2].bias.copy_(torch.tensor([0.5, 0.0]) * unit)
        graph, x = trace(net.eval(), (2,)), torch.tensor([x], dtype=torch.float64) * unit
        return ask(VERIFIERS[verifier][-1], graph, x, torch.tensor([0]), Box(0.0))

    @pytest.mark.parametrize("verifier", [name for name, stages in VERIFIERS.items() if stages])
    def test_a_margin_that_is_positive_by_rounding_alone_proves_nothing(self, verifier):
        proved, margin, *_ = self.prove([0.6, 1.4], verifier)  # the true margin is -0.3 units
        assert margin.item() == 0.5 * 2.0**-9 > SLACK_ABSOLUTE
        assert not proved.item()

    def test_one_that_is_larger_than_rounding_does(self):
        assert self.prove([2.0**18, 0.0], "ibp", large=2.0**33).proved.item()  # the margin is 1/2


@pytest.mark.parametrize("seed", range(12))
def test_what_intervals_prove_no_corner_and_no_attack_refutes(seed):
    graph = recast(random_net(seed), torch.float64)
    x = torch.rand(200, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    y = graph.run(x)[0].argmax(1)
    region = Box(0.03)
    proved, lower, *_ = ask(IBP, graph, x, y, region)
    assert 0 < proved.sum() < len(x)  # else this shows nothing
    low, high = region.corners(x)
    for corner in itertools.product((False, True), repeat=4):
        point = torch.where(torch.tensor(corner), high, low)
        assert (answer(graph, point, y).margin >= lower - 1e-12).all()
    strong = Pgd(steps=30, step=0.2, restarts=3, loss="margin")
    point = strong(graph, x, y, region, torch.Generator().manual_seed(0))
    found = answer(graph, point, y)
    assert (found.margin >= lower - 1e-12).all()
    assert (found.predicted == y)[proved].all()


class TestAnswer:
    @staticmethod
    def of(logits, label):
        graph = recast(trace(nn.Linear(1, len(logits)), (1,)), torch.float64)
        graph.module.weight.zero_()
        graph.module.bias.copy_(torch.tensor(logits))
        found = answer(graph, torch.zeros(1, 1, dtype=torch.float64), label)
        return found.predicted.item(), found.margin.item()

    @pytest.mark.parametrize(
        ("logits", "label", "predicted", "margin"),
        [
            ([1.0, 3.0, 0.0], 1, 1, 2.0),
            ([1.0, 3.0, 0.0], 0, 1, -2.0),
            ([3.0, 1.0, 3.0], 0, 2, 0.0),  # a tie counts against the label
            ([3.0, 1.0, 3.0], 2, 0, 0.0),
            ([0.0, math.nan, 0.0], 0, 1, -LARGEST),
            ([math.inf, math.inf, 0.0], 0, 1, -LARGEST),
            ([0.0], 0, 0, LARGEST),  # there is no wrong class
        ],
    )
    def test_the_label_is_predicted_exactly_where_the_margin_is_positive(
        self, logits, label, predicted, margin
    ):
        assert self.of(logits, torch.tensor([label])) == (predicted, margin)


@pytest.mark.parametrize("region", [Box(0.1), L2Ball(0.15), L1Ball(0.3)], ids=lambda region: region.norm)
def test_attacked_points_lie_in_the_region_in_float64(region):
    graph = random_net(1)
    x = torch.rand(100, 4, generator=torch.Generator().manual_seed(1)).double()
    y = torch.zeros(100, dtype=torch.int64)
    attack, seeds = Pgd(steps=5, step=0.5, restarts=2, loss="margin"), range(100)
    fast, exact = recast(graph, torch.float32), recast(graph, torch.float64)
    found = attack_stage(attack, fast, exact, x, y, region, seeds)
    assert found.point.dtype == found.margin.dtype == torch.float64
    assert (region.contains(x, found.point) == 0).all()
    again = answer(exact, found.point, y)
    assert torch.equal(again.margin, found.margin)


def test_an_example_is_attacked_from_the_same_points_in_any_batch():
    graph = recast(random_net(1), torch.float64)
    x = torch.rand(20, 4, generator=torch.Generator().manual_seed(1)).double()
    y = graph.run(x)[0].argmax(1)
    attack, fast = Pgd(steps=1, step=0.01, restarts=2, loss="margin"), recast(graph, torch.float32)

    def points(rows):
        seeds = [100 + i for i in rows]
        return attack_stage(attack, fast, graph, x[rows], y[rows], Box(0.1), seeds).point

    together = points(list(range(20)))
    torch.testing.assert_close(torch.cat([points([i]) for i in range(20)]), together)
    assert len(set((together - x).flatten().tolist())) > 20  # each from points of its own


def test_of_several_restarts_the_point_of_the_smallest_margin_is_kept():
    graph = recast(random_net(1), torch.float64)
    x = torch.rand(50, 4, generator=torch.Generator().manual_seed(1)).double()
    y, fast = graph.run(x)[0].argmax(1), recast(graph, torch.float32)

    def margins(restarts):
        attack = Pgd(steps=1, step=0.01, restarts=restarts, loss="margin")
        return attack_stage(attack, fast, graph, x, y, Box(0.1), range(50)).margin

    one, many = margins(1), margins(8)
    assert (many <= one).all()
    assert (many < one).any()


def test_a_verifier_that_there_is_not():
    with pytest.raises(InputError, match="no verifier 'ipb': did you mean 'ibp'\\? Choose none, ibp, "):
        find_verifier("ipb")


def test_every_verifier_is_made_of_stages_with_names_of_their_own():
    for stages in VERIFIERS.values():
        assert len({stage.name for stage in stages}) == len(stages)


def test_cheap_stages_come_first_so_that_all_of_them_see_what_was_falsified():
    for stages in VERIFIERS.values():
        cheap = [stage.cheap for stage in stages]
        assert cheap == sorted(cheap, reverse=True)


@pytest.mark.parametrize("name", ["alpha-crown", "zonotope", "complete"])
def test_a_stage_that_ran_out_of_time_leaves_nothing_unfinished_behind(name):
    graph, x, y = TestClimb.some()
    known = Problem(graph, x, Box(0.12), Spec.margins(y, 3, x))
    (stage,) = VERIFIERS[name]
    brief, patient, afresh = stage(known, y, 1e-9), stage(known, y), ask(stage, graph, x, y, Box(0.12))
    assert brief.proved.sum() < patient.proved.sum()
    assert torch.equal(patient.proved, afresh.proved)
    assert torch.equal(patient.margin, afresh.margin)


class TestClimb:
    """The stages whose slopes climb."""

    @staticmethod
    def some(seed=0, count=40):
        graph = recast(random_net(seed), torch.float64)
        x = torch.rand(count, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return graph, x, graph.run(x)[0].argmax(1)

    @pytest.mark.parametrize(("name", "weaker"), [("alpha-crown", "crown"), ("zonotope", "fast-lin")])
    def test_they_prove_what_they_begin_with_and_more(self, name, weaker):
        more = 0
        for seed in range(3):
            problem = (*self.some(seed), Box(0.12))
            ours, theirs = (ask(find_verifier(n)[0], *problem) for n in (name, weaker))
            assert (ours.proved >= theirs.proved).all()
            assert (ours.margin >= theirs.margin - 1e-12).all()
            more += int((ours.proved > theirs.proved).sum())
        assert more

    @pytest.mark.parametrize("name", ["alpha-crown", "zonotope"])
    def test_what_they_prove_no_attack_refutes(self, name):
        graph, x, y = self.some()
        found = ask(find_verifier(name)[0], graph, x, y, Box(0.1))
        attack = Pgd(steps=30, step=0.2, restarts=3, loss="margin")
        point = attack(graph, x, y, Box(0.1), torch.Generator().manual_seed(0))
        margin = answer(graph, point, y).margin
        assert 0 < found.proved.sum() < len(x)
        assert (margin >= found.margin.clamp(max=1e-3) - 1e-12).all()
        assert (margin > 0)[found.proved].all()

    def test_without_time_it_is_where_it_begins(self):
        problem = (*self.some(), Box(0.12))
        (climbing,), (begin,) = map(find_verifier, ("alpha-crown", "crown"))
        brief, crown = ask(climbing, *problem, limit=1e-9), ask(begin, *problem)
        assert (brief.margin >= crown.margin - 1e-12).all()
        assert brief.margin.sum() < ask(climbing, *problem).margin.sum()

    @pytest.mark.parametrize("name", ["alpha-crown", "zonotope"])
    def test_what_is_not_finite_proves_nothing(self, name):
        graph, x, y = self.some(count=3)
        graph.module[0].weight.mul_(1e200)
        graph.module[2].weight.mul_(1e200)
        assert not ask(find_verifier(name)[0], graph, x, y, Box(0.1)).proved.any()

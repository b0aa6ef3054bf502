"""Against an LP for every activation pattern (referee.py), and against everything that may go wrong."""

import math
import os
import signal
import threading
import time
from dataclasses import replace
from functools import cache

import highspy
import numpy as np
import pytest
import torch
from scipy import sparse
from torch import nn

from tightrope.bounds import Linear, Problem
from tightrope.errors import InputError
from tightrope.graph import trace
from tightrope.region import Box, L1Ball, L2Ball
from tightrope.spec import Spec
from tightrope.verify import certify, milp
from tightrope.verify.encode import encode, layers_of
from tightrope.verify.milp import MARGIN_ABSOLUTE, Milp, Optimum, Status, minimise
from tightrope.verify.stages import LARGEST, answer

from .conftest import labelled, random_net
from .referee import ask, case, exact_minima

SEEDS = range(60)


@cache
def given(seed):
    return case(seed, L1Ball if seed % 4 == 3 else Box)


@cache
def exact(seed):
    """The exact minimum of the margin over each class."""
    one = given(seed)
    return exact_minima(one.graph, one.x, one.region, Spec.margins(one.y, 3, one.x).rows[0])


def problem(one):
    return Problem(one.graph, one.x, one.region, Spec.margins(one.y, one.graph.classes, one.x))


def encoded(one):
    boxes = problem(one).bounds(Linear()).boxes
    return encode(one.graph, layers_of(one.graph), one.x, one.region, boxes)


@pytest.mark.parametrize("seed", SEEDS)
def test_crown_is_below_the_triangles_which_are_below_the_program_which_is_exact(seed):
    one = given(seed)
    triangles = encoded(one)
    program = triangles.switched(np.arange(len(triangles.neurons)))
    lines = problem(one).bounds(Linear()).lower[0].tolist()
    for t, row in enumerate(Spec.margins(one.y, 3, one.x).rows[0].numpy()):
        relaxed, whole = (minimise(constraints, row).lower for constraints in (triangles, program))
        assert lines[t] <= relaxed + 1e-7
        assert relaxed <= whole + 1e-7
        assert whole == pytest.approx(exact(seed)[t], abs=1e-6, rel=1e-4)  # HiGHS ends at a gap of 1e-4


def test_neurons_far_below_the_solvers_tolerances_are_not_lost():
    """The margin is 0.05 - relu(x - 0.55) with a neuron that is tiny: -0.25 at x = 0.85."""
    for tiny in (1e-8, 1e-12, 1e-15):
        layers = nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 2)
        with torch.no_grad():
            for layer, weight, bias in (
                (layers[0], [[tiny]], [-0.55 * tiny]),
                (layers[2], [[-1 / tiny], [0.0]], [0.05, 0.0]),
            ):
                layer.double().weight.copy_(torch.tensor(weight, dtype=torch.float64))
                layer.bias.copy_(torch.tensor(bias, dtype=torch.float64))
        graph = trace(nn.Sequential(*layers), (1,))
        x, y = torch.full((1, 1), 0.55, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
        with torch.no_grad():
            for eps, proved in ((0.3, False), (0.04, True)):
                assert ask(Milp(), graph, x, y, Box(eps)).proved.item() == proved


def test_coefficients_that_the_solver_drops_may_be_anything_in_between():
    one = given(0)
    program = encoded(one)
    row = np.eye(program.output.offset.size)[0]
    column = sparse.csr_array(np.full((program.matrix.shape[0], 1), 1e-13))
    more = replace(
        program,
        matrix=sparse.hstack([program.matrix, column], "csr"),
        lower=np.append(program.lower, -1.0),
        upper=np.append(program.upper, 1.0),
        binary=np.append(program.binary, False),
        output=replace(program.output, matrix=sparse.hstack([program.output.matrix, 0 * column[: row.size]])),
    )
    model, before = milp._model(more, row), milp._model(program, row)
    finite = np.isfinite(before.row_lower_)
    lower = np.array(before.row_lower_)[finite]
    np.testing.assert_array_equal(np.array(model.row_lower_)[finite], lower - 1e-13)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_verdict_is_the_sign_of_the_exact_minimum(seed):
    one = given(seed)
    proved, _, point, *_ = ask(Milp(), one.graph, one.x, one.y, one.region)
    smallest = np.delete(exact(seed), one.y).min()
    assert abs(smallest) > 1e-4  # else the verdict may be left open
    assert proved.item() == (smallest > 0)
    assert point.isfinite().all().item() == (smallest < 0)
    if smallest < 0:
        assert one.region.contains(one.x, point).item() < 1e-6  # HiGHS keeps the l_1 ball up to its tolerance
        assert answer(one.graph, one.region.project(one.x, point), one.y).margin.item() <= 0


@pytest.mark.parametrize("seed", SEEDS)
def test_with_few_switches_it_proves_less_and_nothing_that_is_false(seed):
    one = given(seed)
    proved, _, point, *_ = ask(Milp(extra=1, complete=0), one.graph, one.x, one.y, one.region)
    smallest = np.delete(exact(seed), one.y).min()
    assert not proved.item() or smallest > 0
    assert not point.isfinite().all() or smallest < 0


def hard(seed=0, width=20):
    """A network that takes a while: most of its neurons are unstable."""
    torch.manual_seed(seed)
    layers = [nn.Linear(6, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3)]
    graph = trace(nn.Sequential(*layers).double().eval().requires_grad_(False), (6,))
    x = torch.rand(1, 6, dtype=torch.float64)
    return replace(given(0), graph=graph, x=x, y=graph.run(x)[0].argmax(1), region=Box(0.4))


class TestStopping:
    row = np.array([1.0, -1.0, 0.0])

    def program(self):
        triangles = encoded(hard())
        return triangles.switched(np.arange(len(triangles.neurons)))

    def test_a_lower_bound_that_is_high_enough_ends_the_search(self):
        whole = minimise(self.program(), self.row)
        assert whole.status == Status.kOptimal
        stopped = minimise(self.program(), self.row, enough=whole.lower - 0.05)
        assert stopped.status == Status.kInterrupt
        assert whole.lower - 0.05 < stopped.lower <= whole.lower + 1e-6
        assert stopped.nodes < whole.nodes
        assert stopped.looks < whole.looks

    @pytest.mark.parametrize("seed", [9, 13, 24])  # with dozens of branches
    def test_no_bound_that_is_reported_on_the_way_lies_above_the_minimum(self, seed, monkeypatch):
        """HiGHS also solves parts of a program for good points: their bounds are not those of the whole."""
        reported = []

        class Watched(highspy.Highs):
            def __init__(self):
                super().__init__()
                self.cbMipInterrupt += lambda event: reported.append(event.data_out.mip_dual_bound)

        monkeypatch.setattr(highspy, "Highs", Watched)
        triangles = encoded(hard(seed, width=22))
        for row in (self.row, self.row[[2, 0, 1]]):
            reported.clear()
            whole = minimise(triangles.switched(np.arange(len(triangles.neurons))), row)
            assert whole.status == Status.kOptimal
            assert len(reported) > 50
            assert max(reported) <= whole.lower + 1e-9

    def test_so_does_a_point_whose_value_is_low_enough(self):
        whole = minimise(self.program(), self.row)
        stopped = minimise(self.program(), self.row, hopeless=whole.lower + 0.1)
        assert stopped.status == Status.kObjectiveTarget
        assert stopped.nodes <= whole.nodes
        assert stopped.looks < whole.looks
        assert stopped.lower <= whole.lower + 1e-6
        assert stopped.variables is not None

    def test_and_the_time(self):
        stopped = minimise(self.program(), self.row, seconds=0.0)
        assert stopped.status == Status.kTimeLimit
        assert stopped.lower == -math.inf

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_and_a_signal_that_python_handles(self, number):
        triangles, usual = encoded(hard(width=60)), signal.getsignal(number)
        program = triangles.switched(np.arange(len(triangles.neurons)))
        signal.signal(number, signal.default_int_handler)
        timer = threading.Timer(0.3, lambda: os.kill(os.getpid(), number))
        try:
            timer.start()
            began = time.perf_counter()
            with pytest.raises(KeyboardInterrupt):
                minimise(program, self.row, seconds=60.0)
            assert time.perf_counter() - began < 20
            assert signal.getsignal(number) is signal.default_int_handler
        finally:
            timer.cancel()
            signal.signal(number, usual)

    def test_the_time_is_that_of_all_examples_together(self):
        one = hard(width=60)
        x, y = one.x.repeat(3, 1), one.y.repeat(3)
        began = time.perf_counter()
        proved, margin, *_ = ask(Milp(complete=1000), one.graph, x, y, Box(1.0), limit=0.5)
        assert time.perf_counter() - began < 1.5 + 5  # HiGHS looks at its clock now and then
        assert not proved.any()
        assert (margin < 0).all()

    def test_without_time_nothing_is_proved_but_what_crown_proves(self):
        seeds = [seed for seed in SEEDS if needs_it(seed)]
        assert len(seeds) > 2
        for seed in seeds:
            one = given(seed)
            assert ask(Milp(), one.graph, one.x, one.y, one.region).proved.all()
            assert not ask(Milp(), one.graph, one.x, one.y, one.region, limit=1e-6).proved.any()


def needs_it(seed):
    """Whether an example is robust and CROWN does not prove it."""
    one = given(seed)
    lower = problem(one).bounds(Linear()).lower[0]
    return np.delete(exact(seed), one.y).min() > 0 and lower.min() < 0


class TestWhatGoesWrong:
    row = np.array([1.0, -1.0, 0.0])

    def outcome(self, **changes):
        encoding = encoded(given(0))
        return minimise(
            replace(encoding, **{k: change(getattr(encoding, k)) for k, change in changes.items()}), self.row
        )

    @pytest.mark.parametrize("binary", [False, True])
    def test_a_program_without_a_solution_has_no_lower_bound(self, binary):
        found = self.outcome(
            lower=lambda lower: np.full_like(lower, 0.9), binary=lambda columns: columns | binary
        )
        assert found.status == Status.kInfeasible
        assert found.lower == -math.inf
        assert found.variables is None

    def test_nor_has_one_without_a_minimum(self):
        encoding = encoded(given(0))
        free = np.full_like(encoding.lower, math.inf)
        rows = np.full_like(encoding.least, math.inf)
        found = minimise(replace(encoding, lower=-free, upper=free, least=-rows, most=rows), self.row)
        assert found.status in (Status.kUnbounded, Status.kUnboundedOrInfeasible)
        assert found.lower == -math.inf

    @pytest.mark.parametrize("value", [math.nan, math.inf, 1e20])  # HiGHS itself takes nan for 0
    def test_nor_has_one_that_the_solver_refuses(self, value):
        encoding = encoded(given(0))
        matrix = encoding.matrix.copy()
        matrix.data[0] = value
        found = minimise(replace(encoding, matrix=matrix), self.row)
        assert (found.lower, found.variables) == (-math.inf, None)

    def test_nor_has_one_whose_limits_are_not_numbers(self):
        assert self.outcome(most=lambda most: most * math.nan).lower == -math.inf

    @pytest.mark.parametrize("status", sorted(set(Status.__members__) - {"kOptimal", "kObjectiveTarget"}))
    def test_only_an_end_of_its_own_counts(self, status, monkeypatch):
        monkeypatch.setattr(highspy.Highs, "getModelStatus", lambda _: Status.__members__[status])
        assert self.outcome().lower == -math.inf

    @pytest.mark.parametrize("lower", [-math.inf, math.nan, MARGIN_ABSOLUTE])
    def test_a_bound_within_the_solvers_tolerance_proves_nothing(self, lower, monkeypatch):
        one = given(next(filter(needs_it, SEEDS)))
        said = Optimum(lower, None, 0, 0, Status.kOptimal)
        monkeypatch.setattr(milp, "minimise", lambda *_, **__: said)
        proved, _, point, *_ = ask(Milp(), one.graph, one.x, one.y, one.region)
        assert not proved.any()
        assert point.isnan().all()

    def test_numbers_that_overflow_prove_nothing(self):
        one = hard()
        for layer in (0, 2, 4):
            one.graph.module[layer].weight.mul_(1e150)
        proved, margin, point, *_ = ask(Milp(), one.graph, one.x, one.y, one.region)
        assert (proved.item(), margin.item()) == (False, -LARGEST)
        assert point.isnan().all()

    def test_what_cannot_be_encoded_is_refused(self):
        one = given(0)
        with pytest.raises(InputError, match="an l_2 ball"):
            ask(Milp(), one.graph, one.x, one.y, L2Ball(0.1))
        tanh = random_net(0, layer=nn.Tanh)
        with pytest.raises(InputError, match="Tanh"):
            ask(Milp(), tanh, one.x, one.y, one.region)


class Spy:
    """Remembers what was asked of the solver, which may be out of order."""

    def __init__(self, monkeypatch, works=True):
        self.asked, self.works = [], works
        monkeypatch.setattr(milp, "minimise", self)

    def __call__(self, program, row, *args, **kwargs):
        self.asked.append((program, row.tolist()))
        if not self.works:
            return Optimum(-math.inf, None, 0, 0, Status.kSolveError)
        return minimise(program, row, *args, **kwargs)


class TestSteps:
    def test_classes_that_crown_proves_are_left_out(self, monkeypatch):
        spy = Spy(monkeypatch)
        for seed in SEEDS[:20]:
            one = given(seed)
            open_classes = (problem(one).bounds(Linear()).lower[0] <= 0).sum().item() - 1
            ask(Milp(), one.graph, one.x, one.y, one.region)
            assert len(spy.asked) <= open_classes
            assert bool(spy.asked) == bool(open_classes)
            spy.asked.clear()

    def test_the_class_with_the_smallest_bound_comes_first(self, monkeypatch):
        one, spy = hard(), Spy(monkeypatch)
        ask(Milp(), one.graph, one.x, one.y, one.region)
        lower = problem(one).bounds(Linear()).lower[0]
        t = lower.argmin().item()
        assert spy.asked[0][1] == Spec.margins(one.y, 3, one.x).rows[0, t].tolist()

    def test_first_the_last_hidden_layer_then_some_behind_the_last_convolution(self, monkeypatch):
        torch.manual_seed(1)
        net = nn.Sequential(
            *(nn.Conv2d(1, 4, 2), nn.ReLU(), nn.Conv2d(4, 6, 2), nn.ReLU(), nn.Flatten(), nn.Linear(24, 8)),
            *(nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)),
        )
        graph = trace(net.double().eval().requires_grad_(False), (1, 4, 4))
        x, spy = torch.rand(1, 1, 4, 4, dtype=torch.float64), Spy(monkeypatch, works=False)
        ask(Milp(extra=3, complete=10), graph, x, graph.run(x)[0].argmin(1), Box(0.4))
        (first, _), (second, _) = spy.asked[:2]
        neurons = first.neurons
        switched = [self.switched(program) for program in (first, second)]
        last, conv = (max(i for i, n in graph.activations() if len(n.shape) == d) for d in (1, 3))
        assert switched[0] == set((neurons.node == last).nonzero()[0].tolist())
        assert switched[0] < switched[1]
        assert set(neurons.node[sorted(switched[1] - switched[0])].tolist()) == {conv}
        assert len(switched[1] - switched[0]) == 3

    @staticmethod
    def switched(program):
        """Numbers of the neurons that have a 0/1 variable."""
        rows = program.matrix[:, program.binary.nonzero()[0]].nonzero()[0]
        columns = set(program.matrix[rows].nonzero()[1].tolist())
        return {k for k, p in enumerate(program.neurons.positive.tolist()) if p in columns}


def test_examples_with_a_radius_each_are_judged_as_if_alone():
    graph = random_net(2).module.double()
    graph = trace(graph, (4,))
    x = torch.rand(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y, eps = graph.run(x)[0].argmax(1), torch.linspace(0.01, 0.3, 6, dtype=torch.float64)
    with torch.no_grad():
        together = ask(Milp(), graph, x, y, Box(eps)).proved
        alone = [
            ask(Milp(), graph, x[i : i + 1], y[i : i + 1], Box(float(eps[i]))).proved.item() for i in range(6)
        ]
    assert together.tolist() == alone
    assert 0 < sum(alone) < 6


def test_the_verifier_decides_what_crown_leaves_open():
    graph = random_net(3)
    examples = labelled(graph, 60)
    before, after = (list(certify(graph, examples, Box(0.12), verifier=v)) for v in ("crown", "milp"))
    left_open = [v.index for v in before if v.status == "undecided"]
    assert left_open
    decided = {after[i].status for i in left_open}
    assert decided == {"robust", "falsified"}
    for i in left_open:
        assert after[i].stage == "milp"
        assert (after[i].witness is None) == (after[i].status == "robust")

"""Mixed-integer linear programs: what no linear relaxation decides, HiGHS may."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import ClassVar

import highspy
import numpy as np
import torch
from highspy import HighsModelStatus as Status
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from tightrope.bounds import Interval, Problem
from tightrope.bounds.backward import lower_bound
from tightrope.bounds.linear import path_over
from tightrope.graph import Graph
from tightrope.verify.encode import Encoding, Layers, Neurons, encode, layers_of
from tightrope.verify.stages import CROWN, LARGEST, Finding, answer, size, slack

# By this a bound by HiGHS must exceed the slack of linear bounds to prove anything (docs/soundness.md).
MARGIN_ABSOLUTE = 1e-5
MARGIN_RELATIVE = 1e-6

SMALLEST_VALUE = 1e-12  # of a coefficient; HiGHS drops smaller ones
LARGEST_VALUE = 1e15  # of a coefficient; HiGHS refuses larger ones, but drops those that are not numbers

_OPTIONS: dict[str, bool | int | float | str] = {
    "output_flag": False,
    "threads": 1,
    # By how much rows, reduced costs and 0/1 variables may be off; all variables lie in [-1, 1].
    "primal_feasibility_tolerance": 1e-9,
    "dual_feasibility_tolerance": 1e-9,
    "mip_feasibility_tolerance": 1e-8,  # with 1e-9, some of the points that HiGHS finds fail its own check
    "small_matrix_value": SMALLEST_VALUE,
}


@dataclass(frozen=True)
class Optimum:
    """What HiGHS says about a minimum.

    Args:
        lower: its proven lower bound; minus infinity unless HiGHS came to an end of its own, or was
            stopped because the bound was high enough.
        variables: of the best point found, if there is one.
        nodes: how many branches were looked at.
        looks: how often HiGHS asked whether it should stop.
        status: how it ended.
    """

    lower: float
    variables: Float[ndarray, "variables"] | None
    nodes: int
    looks: int
    status: Status


def minimise(
    encoding: Encoding,
    row: Float[ndarray, "classes"],
    seconds: float = math.inf,
    enough: float = math.inf,
    hopeless: float = -math.inf,
) -> Optimum:
    """The minimum of `<row, logits>` over what the constraints allow.

    Args:
        encoding: the constraints.
        row: coefficients of the logits.
        seconds: when to give up.
        enough: stop as soon as the lower bound exceeds this.
        hopeless: stop as soon as a point is found whose value is at most this.
    """
    _greet()
    highs = highspy.Highs()
    for name, value in (_OPTIONS | {"time_limit": max(seconds, 0.0), "objective_target": hopeless}).items():
        assert highs.setOptionValue(name, value) == highspy.HighsStatus.kOk, name
    proven, signals = list[float](), list[int]()

    def look(event: highspy.HighsCallbackEvent) -> None:
        proven.append(event.data_out.mip_dual_bound)
        event.interrupt(proven[-1] > enough or bool(signals))

    highs.cbMipInterrupt += look
    model = _model(encoding, row)
    coefficients = np.concatenate([encoding.matrix.data, model.col_cost_])
    limits = np.concatenate([encoding.least, encoding.most])
    unfit = not (np.abs(coefficients) < LARGEST_VALUE).all() or np.isnan(limits).any()
    with _held_back(signals):
        failed = unfit or highspy.HighsStatus.kError in (highs.passModel(model), highs.run())
    if failed:
        return Optimum(-math.inf, None, 0, len(proven), Status.kSolveError)
    status, info, lower = highs.getModelStatus(), highs.getInfo(), -math.inf
    if status == Status.kInterrupt and proven:
        lower = proven[-1]
    elif status in (Status.kOptimal, Status.kObjectiveTarget):
        lower = info.mip_dual_bound if encoding.binary.any() else info.objective_function_value
    feasible = info.primal_solution_status == highspy.SolutionStatus.kSolutionStatusFeasible
    variables = np.array(highs.getSolution().col_value) if feasible else None
    return Optimum(lower, variables, info.mip_node_count, len(proven), status)


@contextmanager
def _held_back(signals: list[int]) -> Iterator[None]:
    """Collect the signals that Python would handle, and have them handled afterwards.

    HiGHS swallows what a handler raises in its callback.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    usual = {number: handler for number, handler in handlers.items() if callable(handler)}
    for number in usual:
        signal.signal(number, lambda number, _frame: signals.append(number))
    try:
        yield
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
    if signals:
        signal.raise_signal(signals[0])


_GREETING = threading.Lock()


def _greet() -> None:
    """Have HiGHS say what it says once in a process, on standard output, where nobody reads it."""
    with _GREETING:
        _greet_once()


@cache
def _greet_once() -> None:
    try:
        kept = os.dup(1)
    except OSError:  # closed
        return
    try:
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        highspy.Highs()
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _model(encoding: Encoding, row: Float[ndarray, "classes"]) -> highspy.HighsLp:
    """`minimise` as HiGHS takes it: the whole matrix, column by column."""
    model, columns = highspy.HighsLp(), encoding.matrix.tocsc()
    # What is dropped may be anything that its coefficient allows, since no variable is larger than 1.
    dropped = abs(columns)
    dropped.data[dropped.data >= SMALLEST_VALUE] = 0
    room = dropped.sum(axis=1)
    model.num_row_, model.num_col_ = columns.shape
    model.col_cost_, model.offset_ = encoding.output.matrix.T @ row, float(row @ encoding.output.offset)
    model.col_lower_, model.col_upper_ = encoding.lower, encoding.upper
    model.row_lower_, model.row_upper_ = encoding.least - room, encoding.most + room
    model.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    model.a_matrix_.start_, model.a_matrix_.index_ = columns.indptr, columns.indices
    model.a_matrix_.value_ = columns.data
    kinds = np.array([highspy.HighsVarType.kContinuous, highspy.HighsVarType.kInteger])
    model.integrality_ = kinds[encoding.binary.astype(int)].tolist()
    return model


@dataclass(frozen=True)
class Milp:
    """Proves an example robust, or finds where it is not, by a program for each wrong class.

    The classes that CROWN proves are left out, and the one with the smallest bound comes first. Where there
    are at most `complete` unstable neurons, all of them get a 0/1 variable: the program is the network.
    Where there are more, the neurons of the last hidden layer get one, and if that does not prove the class,
    also those `extra` neurons behind the last convolution (without one, of the layer before the last hidden
    one) that its bound owes most to; the others keep the triangle. Source: maar.txt, A.3, which takes 50.

    Args:
        extra: see above.
        complete: see above.
    """

    extra: int = 50
    complete: int = 60

    name: ClassVar[str] = "milp"
    cheap: ClassVar[bool] = False
    searches: ClassVar[bool] = True

    @torch.no_grad()
    def __call__(self, problem: Problem, y: Int[Tensor, "batch"], limit: float = math.inf) -> Finding:
        """See `Stage`; here the limit holds for every single example.

        Raises:
            InputError: if the region is an l_2 ball, or an activation is not ReLU or LeakyReLU.
        """
        layers = layers_of(problem.graph)
        proved, margins, points = [], [], torch.full_like(problem.x, math.nan)
        seconds = problem.x.new_zeros(len(y))
        for i in range(len(y)):
            one, began = torch.tensor([i]), time.perf_counter()
            robust, margin, point = self._look(problem.at(one), layers, y[one], began + limit)
            seconds[i] = time.perf_counter() - began
            proved.append(robust)
            margins.append(margin)
            if point is not None:
                points[i] = point
        return Finding(torch.tensor(proved), problem.x.new_tensor(margins), points, seconds=seconds)

    def _look(
        self, problem: Problem, layers: Layers, y: Int[Tensor, "1"], until: float
    ) -> tuple[bool, float, Float[Tensor, "1 *shape"] | None]:
        """Whether one example is robust, its smallest lower bound, and where its answer changes."""
        graph, x, region = problem.graph, problem.x, problem.region
        bounds, interval = problem.bounds(CROWN), problem.bounds(Interval())
        seen, reached = path_over(problem, bounds.boxes, "adaptive"), dict[int, Tensor]()
        rows, last = problem.spec.rows, len(graph.nodes) - 1
        crown = lower_bound(graph, x, region, last, rows, seen, reached)
        bounds = replace(bounds, lower=torch.maximum(crown, interval.lower))
        values = [bounds.lower, bounds.upper, *(side for box in bounds.boxes.values() for side in box)]
        if not all(bool(value.isfinite().all()) for value in values):
            return False, -LARGEST, None
        encoding = encode(graph, layers, x, region, bounds.boxes)
        lower = bounds.lower[0].index_fill(0, y, LARGEST).tolist()
        rounding = slack(problem, bounds).item()
        enough = rounding + MARGIN_ABSOLUTE + MARGIN_RELATIVE * size(bounds).item()
        for t in sorted(range(graph.classes), key=lower.__getitem__):
            if lower[t] > rounding:
                continue
            steps = self._steps(graph, encoding.neurons, {i: A[0, t] for i, A in reached.items()})
            for i, chosen in enumerate(steps, start=1):
                left = until - time.perf_counter()
                seconds = left if i == len(steps) else left / 2
                program = encoding.switched(chosen)
                found = minimise(program, rows[0, t].numpy(), seconds, enough, hopeless=-enough)
                lower[t] = max(lower[t], found.lower)
                if found.variables is not None:
                    point = torch.from_numpy(program.point(found.variables)).view_as(x)
                    if answer(graph, region.project(x, point), y).margin <= 0:
                        return False, min(lower), point
                if lower[t] > enough:
                    break
            else:  # no class after this one can save the example
                return False, min(lower), None
        return True, min(lower), None

    def _steps(
        self, graph: Graph, neurons: Neurons, coefficients: dict[int, Tensor]
    ) -> list[Int[ndarray, "chosen"]]:
        """The numbers of the neurons that get a 0/1 variable, in each program for a class.

        Args:
            graph: the network.
            neurons: the unstable ones.
            coefficients: of each activation's values in CROWN's bound.
        """
        if len(neurons) <= self.complete:
            return [np.arange(len(neurons))]
        *before, last = (i for i, _ in graph.activations())
        first = (neurons.node == last).nonzero()[0]
        images = [i for i in before if len(graph.nodes[i].shape) > 1]
        more = np.isin(neurons.node, (images or before)[-1:]).nonzero()[0]
        if not len(more):
            return [first]
        (node,) = set(neurons.node[more].tolist())
        coefficient = coefficients[node].flatten().numpy()[neurons.place[more]]
        owed = np.abs(coefficient) * neurons.gap[more]
        return [first, np.concatenate([first, more[np.argsort(-owed)[: self.extra]]])]

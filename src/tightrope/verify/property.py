"""Is there an input in a box whose outputs obey linear inequalities? Asked as a question of robustness.

A box becomes the cube [-1, 1] by an affine layer before the network. Behind it, a linear layer and a maximum
yield one margin per case, positive where the case does not hold. That network's class 0 is robust in the cube
exactly if there is no counter-example in the box: every attack and every verifier can be asked, unchanged.
Stages that search are given the maximum as ReLUs, which can be split; others as one operator, which can be
bounded closer.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float64
from torch import Tensor, nn

from tightrope.attacks import Pgd
from tightrope.bounds.rounding import plain_sums
from tightrope.given import positive
from tightrope.graph import trace
from tightrope.region import Box
from tightrope.verify.pipeline import Judge, stop_at_contradictions
from tightrope.verify.stages import CERTIFICATION_ATTACK, attack_stage
from tightrope.verify.verdict import Verdict, Witness
from tightrope.verify.verifiers import find_verifier
from tightrope.verify.vnnlib import Case, Query

Result = Literal["sat", "unsat", "unknown"]


@dataclass(frozen=True, eq=False)
class CounterExample:
    """An input in one of a property's boxes, and the outputs that it must not have.

    Args:
        x: the input, in the network's shape; where no number of float64 lies between an input's bounds, it is
            the one nearest to them.
        y: the outputs, computed in float64.
    """

    x: Float64[Tensor, "*shape"]
    y: Float64[Tensor, "outputs"]


@dataclass(frozen=True)
class Decision:
    """What is known about a property.

    Args:
        result: "unsat" (there is no counter-example: the property is proved), "sat" (there is one), or
            "unknown".
        counterexample: if the result is "sat".
        undecided: in how many boxes nothing was decided.
        seconds: time spent.
    """

    result: Result
    counterexample: CounterExample | None
    undecided: int
    seconds: float


@plain_sums()
def decide(
    model: nn.Module,
    input_shape: Sequence[int],
    queries: Sequence[Query],
    *,
    verifier: str = "cascade",
    attack: Pgd | None = CERTIFICATION_ATTACK,
    time_limit: float = 60.0,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Decision:
    """Look for a counter-example to a property, or prove that there is none.

    Args:
        model: a network that `trace` takes; a float64 copy in evaluation mode is judged.
        input_shape: shape of one input; a property numbers its entries in order.
        queries: the property (`read_vnnlib`).
        verifier: a name in `VERIFIERS`.
        attack: what to look for counter-examples with; None looks for none.
        time_limit: seconds that each stage may take for each box.
        seed: of the attack's random starts.
        device: where to compute.

    Raises:
        InputError: if the verifier is unknown, or the network cannot be traced.
        SoundnessViolation: if a counter-example was found where there was proved to be none.

    Example:
        >>> import torch
        >>> net = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.constant_(net.weight, 2.0)
        >>> zero, one = torch.zeros(1).double(), torch.ones(1).double()
        >>> at_most = lambda limit: Case(one.view(1, 1), limit * one, torch.tensor([False]))
        >>> decide(net, (1,), [Query(one, 2 * one, (at_most(1.9),))]).result
        'unsat'
        >>> decide(net, (1,), [Query(one, 2 * one, (at_most(2.1),))]).counterexample.y.item() <= 2.1
        True
    """
    began = time.perf_counter()
    time_limit = positive(time_limit, "the time limit in seconds")
    stages = find_verifier(verifier)
    network = copy.deepcopy(model).to(device, torch.float64).eval().requires_grad_(False)
    shape, undecided = tuple(input_shape), 0
    for number, query in enumerate(queries):
        asked = _Question(network, shape, query).to(device)
        graph, cube = trace(asked, shape), Box(1.0, domain=None)
        conjunctions = any(len(case.rows) > 1 for case in query.cases)
        bounding = [stage for stage in stages if not (conjunctions and stage.searches)]
        judge = Judge(graph, cube, bounding, attack, seed, time_limit)
        centre = torch.zeros(1, *shape, dtype=torch.float64, device=device)
        label = torch.zeros(1, dtype=torch.int64, device=device)
        index = torch.tensor([number], device=device)
        with stop_at_contradictions():
            (verdict,) = judge(centre, label, index)
            if verdict.status == "undecided" and len(bounding) < len(stages):
                graph = trace(_Question(network, shape, query, split=True).to(device), shape)
                searches = [stage for stage in stages if stage.searches]
                (verdict,) = Judge(graph, cube, searches, None, seed, time_limit)(centre, label, index)
        found = _replay(verdict, asked, network, query)
        if found is None and verdict.status == "misclassified" and attack is not None:
            # The box's middle is a tie, which a strict inequality leaves out; beside it there may be another.
            near = attack_stage(attack, judge.fast, judge.exact, centre, label, judge.region, [seed + number])
            verdict = replace(verdict, witness=Witness(near.point[0], int(near.predicted[0])))
            found = _replay(verdict, asked, network, query)
        if found is not None:
            return Decision("sat", found, undecided, time.perf_counter() - began)
        undecided += verdict.status != "robust"
    result: Result = "unknown" if undecided else "unsat"
    return Decision(result, None, undecided, time.perf_counter() - began)


@torch.no_grad()
def _replay(verdict: Verdict, asked: _Question, network: nn.Module, query: Query) -> CounterExample | None:
    """The counter-example that a verdict names, if it is one of the network itself."""
    if verdict.status not in ("misclassified", "falsified"):
        return None
    like = next(asked.buffers())
    cube = torch.zeros_like(like) if verdict.witness is None else verdict.witness.point.to(like)
    ends = query.inside or (query.lower, query.upper)
    lower, upper = (corner.to(cube).view_as(cube) for corner in ends)
    x = asked.to_box(cube).clamp(lower, upper)
    y = network(x.unsqueeze(0)).squeeze(0).cpu()
    return CounterExample(x.cpu(), y) if any(case.holds(y) for case in query.cases) else None


class _Question(nn.Module):
    """A network whose class 0 is robust in the cube [-1, 1] exactly if no case holds in the box.

    Args:
        network: from inputs to outputs.
        shape: of one input.
        query: the box and the cases.
        split: whether a maximum is made of ReLUs.
    """

    def __init__(self, network: nn.Module, shape: tuple[int, ...], query: Query, split: bool = False) -> None:
        super().__init__()
        lower, upper = query.lower.view(shape), query.upper.view(shape)
        middle = (lower + upper) / 2
        radius = torch.maximum(upper - middle, middle - lower)
        # Rounded up, so that the whole box is asked about; a side without length stays a point.
        radius = torch.where(upper > lower, radius.nextafter(torch.full_like(radius, torch.inf)), 0.0)
        self.register_buffer("middle", middle)
        self.register_buffer("radius", radius)
        self.network = network
        self.margins = _margins(query.cases, split)
        self.answers = nn.Linear(len(query.cases), len(query.cases) + 1, bias=False, dtype=torch.float64)
        with torch.no_grad():
            self.answers.weight.copy_(-torch.eye(len(query.cases) + 1, dtype=torch.float64)[:, 1:])

    def to_box(self, cube: Any) -> Any:
        """A point of the box for a point of the cube."""
        return cube * self.radius + self.middle

    def forward(self, cube: Any) -> Any:
        """Zero, and minus the margin of each case."""
        return self.answers(self.margins(self.network(self.to_box(cube))))


def _margins(cases: Sequence[Case], split: bool) -> nn.Module:
    """From outputs to `max_i (rows y - limits)_i` of each case: positive where it does not hold."""
    most = max(1, *(len(case.rows) for case in cases))
    outputs = cases[0].rows.shape[1]
    rows = torch.zeros(len(cases), most, outputs, dtype=torch.float64)
    limits = torch.zeros(len(cases), most, dtype=torch.float64)
    for i, case in enumerate(cases):
        if len(case.rows):  # a row may stand there twice, which changes no maximum
            again = torch.arange(most) % len(case.rows)
            rows[i], limits[i] = case.rows[again], case.limits[again]
    linear = nn.Linear(outputs, len(cases) * most, dtype=torch.float64)
    with torch.no_grad():
        linear.weight.copy_(rows.flatten(0, 1))
        linear.bias.copy_(-limits.flatten())
    if most == 1:
        return linear
    if split:
        return nn.Sequential(linear, _Largest(most))
    return nn.Sequential(linear, nn.Unflatten(1, (len(cases), most)), nn.MaxPool1d(most), nn.Flatten())


class _Largest(nn.Module):
    """The largest of every so many entries that follow each other: `max(a, b) = a + relu(b - a)`."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, entries: Any) -> Any:
        largest = entries[:, :: self.count]
        for i in range(1, self.count):
            largest = largest + torch.relu(entries[:, i :: self.count] - largest)
        return largest

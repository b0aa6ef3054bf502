"""The stages of a certification: each tries to prove examples that are still open."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tightrope.attacks import Pgd
from tightrope.bounds import Bounds, Engine, Interval, Linear, Optimised, Optimum, Problem, rounding_error
from tightrope.bounds.base import sound
from tightrope.graph import Graph
from tightrope.region import Region
from tightrope.spec import smallest_margin
from tightrope.verify.proof import Leaf, Proof, Rule

# A bound in float64 must exceed this before it proves anything (docs/soundness.md).
SLACK_ABSOLUTE = 1e-6
SLACK_RELATIVE = 1e-9

LARGEST = 1e300  # what stands for infinity in a margin, since JSON has none


CROWN = Linear("adaptive", "linear", sides="lower")
"""What all searches begin with: a problem that a stage has asked for it knows it from then on."""


class Finding(NamedTuple):
    """What a stage found out about each example of a batch.

    Args:
        proved: whether it is robust.
        margin: the smallest lower bound of its margins that the stage arrived at; -LARGEST if it has none.
        point: where the stage thinks that the answer changes, if it looks for such points: NaN where it
            found none. They are replayed before they count.
        proofs: by place in the batch, what made the proofs; None if they cannot be repeated.
        seconds: time that it spent on each alone; None if on all of them together.
    """

    proved: Bool[Tensor, "batch"]
    margin: Float[Tensor, "batch"]
    point: Float[Tensor, "batch *shape"] | None = None
    proofs: dict[int, Proof] | None = None
    seconds: Float[Tensor, "batch"] | None = None


@runtime_checkable
class Stage(Protocol):
    """Tries to prove examples that are still open, or to find where their answer changes.

    Args:
        name: how verdicts call it.
        cheap: whether it is cheap enough to run on falsified examples too, where a proof would uncover a
            bug. Cheap stages come first: a dear one ends that.
        searches: whether an example may take it as long as its time limit allows. What searches comes last,
            and is given few examples at once.
    """

    @property
    def name(self) -> str:
        """See the class."""
        ...

    @property
    def cheap(self) -> bool:
        """See the class."""
        ...

    @property
    def searches(self) -> bool:
        """See the class."""
        ...

    def __call__(self, problem: Problem, y: Int[Tensor, "batch"], limit: float = math.inf) -> Finding:
        """What it finds out.

        Args:
            problem: the margins of examples that the network classifies as their labels, of a network in
                float64 and evaluation mode. It may know bounds from earlier stages, and learns what this one
                computes in full; what was cut short by the limit stays out of it.
            y: labels.
            limit: seconds that each example may take (on average, where all are worked on at once); a
                stage that takes a moment need not look at it.
        """
        ...


@dataclass(frozen=True)
class BoundStage:
    """Proves an example robust if the lower bounds of all its margins are positive.

    Args:
        name: how verdicts call it.
        engine: a sound engine.
        cheap: whether it is cheap enough to run on falsified examples too, where a proof would
            uncover a bug.
        rule: how a checker repeats the proofs; None if none can.
    """

    name: str
    engine: Engine
    cheap: bool = False
    rule: Rule | None = None

    searches: ClassVar[bool] = False

    @torch.no_grad()
    def __call__(
        self,
        problem: Problem,
        y: Int[Tensor, "batch"],
        limit: float = math.inf,  # noqa: ARG002
    ) -> Finding:
        """See `Stage`.

        Raises:
            InputError: if what stands in the engine's place only estimates.
        """
        bounds = sound(problem.bounds(self.engine), self.name)  # the slack may ask for them again
        margin = finite(smallest_margin(bounds.lower, y))
        proved = margin > slack(problem, bounds)
        proofs = None
        if self.rule is not None:
            proofs = {row: Proof(self.rule) for row in proved.nonzero().flatten().tolist()}
        return Finding(proved, margin, proofs=proofs)


def size(bounds: Bounds) -> Float[Tensor, "batch"]:
    """The largest absolute value of an example's bounds."""
    return torch.maximum(bounds.lower.abs(), bounds.upper.abs()).amax(1)


def slack(problem: Problem, bounds: Bounds) -> Float[Tensor, "batch"]:
    """What an example's lower bounds must exceed to prove anything: at least what rounding may do."""
    stated = SLACK_ABSOLUTE + SLACK_RELATIVE * size(bounds)
    return torch.maximum(stated, rounding_error(problem).amax(1))


@dataclass(frozen=True)
class ClimbStage:
    """As `BoundStage`, with slopes that climb until all is proved or time is over.

    Args:
        name: how verdicts call it.
        engine: what climbs.
    """

    name: str
    engine: Optimised

    cheap: ClassVar[bool] = False
    searches: ClassVar[bool] = False

    @torch.no_grad()
    def __call__(self, problem: Problem, y: Int[Tensor, "batch"], limit: float = math.inf) -> Finding:
        """See `Stage`."""
        # The slack grows with the bounds, which are no larger than those of intervals.
        enough = float(slack(problem, problem.bounds(Interval())).max()) if len(y) else 0.0
        found = replace(self.engine, enough=enough, seconds=limit * len(y)).optimum(problem)
        margin = finite(smallest_margin(found.bounds.lower, y))
        proved = margin > slack(problem, found.bounds)
        rule: Rule = "crown" if self.engine.lines == "triangle" else "fast-lin"
        proofs = {row: _climbed(rule, found, row) for row in proved.nonzero().flatten().tolist()}
        return Finding(proved, margin, proofs=proofs)


def _climbed(rule: Rule, found: Optimum, row: int) -> Proof:
    """One cell for every class that climbed: the whole region, with the best slopes."""
    kept = found.neurons[row] >= 0
    pairs = (found.examples == row).nonzero().flatten()
    rivals, slopes = found.rows[pairs].tolist(), found.slopes[pairs][:, kept].cpu().numpy()
    leaves = tuple(Leaf(rival, {}, line) for rival, line in zip(rivals, slopes, strict=True))
    return Proof(rule, found.neurons[row][kept].cpu().numpy(), leaves)


CERTIFICATION_ATTACK = Pgd(steps=40, step=0.1, loss="margin")
"""What looks for witnesses if nothing else is said."""


@dataclass(frozen=True)
class Answers:
    """What a network says at one point per example.

    Args:
        point: the points.
        margin: the smallest margin over the wrong classes; NaN counts as minus infinity.
        predicted: the class; a tie counts against the label, so that it is the label exactly where
            the margin is positive.
    """

    point: Float[Tensor, "batch *shape"]
    margin: Float[Tensor, "batch"]
    predicted: Int[Tensor, "batch"]

    def or_worse(self, other: Answers) -> Answers:
        """Of two points per example the one of the smaller margin."""
        worse = other.margin < self.margin
        shape = (-1, *[1] * (self.point.ndim - 1))
        return Answers(
            torch.where(worse.view(shape), other.point, self.point),
            torch.where(worse, other.margin, self.margin),
            torch.where(worse, other.predicted, self.predicted),
        )


@torch.no_grad()
def answer(graph: Graph, point: Float[Tensor, "batch *shape"], y: Int[Tensor, "batch"]) -> Answers:
    """What the network says at a point per example, judged by the labels."""
    logits = graph.run(point)[0]
    label = y.unsqueeze(1)
    margin = smallest_margin(logits.gather(1, label) - logits, y)
    rival = logits.scatter(1, label, -torch.inf).argmax(1)
    return Answers(point, finite(margin), torch.where(margin > 0, y, rival))


def attack_stage(
    attack: Pgd,
    fast: Graph,
    graph: Graph,
    x: Float[Tensor, "batch *shape"],
    y: Int[Tensor, "batch"],
    region: Region,
    seeds: Sequence[int],
) -> Answers:
    """Attack in float32 and replay in float64, where alone a witness counts.

    An example is attacked from the same points, whichever others are in its batch. Of several restarts, the
    point of the smallest margin is kept.

    Args:
        attack: the attack.
        fast: the network in float32; the other one, if float32 cannot hold its numbers.
        graph: the network in float64.
        x: inputs in float64.
        y: labels.
        region: where a witness may lie, one radius for all; what the attack yields is projected
            into it again.
        seeds: of each example's random starts.
    """
    near, once = (x if fast is graph else x.float()), replace(attack, restarts=1)
    generators = [torch.Generator(x.device).manual_seed(seed) for seed in seeds]
    best = answer(graph, x, y)
    for _ in range(attack.restarts):
        starts = [region.sample(one, draw) for one, draw in zip(near.split(1), generators, strict=True)]
        point = once(fast, near, y, region, start=torch.cat(starts))
        best = best.or_worse(answer(graph, region.project(x, point.double()), y))
    return best


def finite(margin: Float[Tensor, "batch"]) -> Float[Tensor, "batch"]:
    """Margins that JSON can hold."""
    return margin.clamp(-LARGEST, LARGEST)

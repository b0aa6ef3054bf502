"""A specification pulled back to the input once, with all that training wants to know about the way."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from tightrope.bounds.base import Estimator, Problem
from tightrope.bounds.interval import Interval
from tightrope.bounds.linear import lower_bound, relax_all
from tightrope.bounds.relax import LowerSlope, Relaxation


@dataclass(frozen=True)
class Scheme:
    """How the activations are relaxed.

    Args:
        boxes: whose bounds of what enters each activation; an estimator serves too.
        slope: which line bounds an unstable ReLU from below.
    """

    boxes: Estimator
    slope: LowerSlope


@dataclass(frozen=True)
class Pullback:
    """What one backward pass found. No `Bounds`: it proves as little as the boxes it rests on.

    Args:
        lower: lower bound of every row.
        reached: coefficients of what the input (0) and each activation yields, `(batch, rows, *shape)`.
        relaxations: the relaxation of every activation.
        boxes: what they are relaxed over.
    """

    lower: Float[Tensor, "batch rows"]
    reached: dict[int, Tensor]
    relaxations: dict[int, Relaxation]
    boxes: dict[int, tuple[Tensor, Tensor]]


def pull_back(problem: Problem, scheme: Scheme, rows: Float[Tensor, "batch rows classes"]) -> Pullback:
    """Pull coefficients of the output back to the input over a scheme's relaxations; differentiable."""
    boxes = problem.bounds(scheme.boxes).boxes
    relaxations = relax_all(problem.graph, boxes, scheme.slope)
    reached: dict[int, Tensor] = {}
    last = len(problem.graph.nodes) - 1
    known = boxes if scheme.boxes == Interval() else None
    lower = lower_bound(problem.graph, problem.x, problem.region, last, rows, relaxations, reached, known)
    return Pullback(lower, reached, relaxations, boxes)

"""A specification pulled back to the input once, with all that training wants to know about the way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from tightrope.bounds.backward import lower_bound
from tightrope.bounds.base import Estimator, Problem
from tightrope.bounds.linear import path_over
from tightrope.bounds.relax import LowerSlope, Step


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
        steps: every activation between its lines, counted from one path through the network.
        boxes: what they are relaxed over.
    """

    lower: Float[Tensor, "batch rows"]
    reached: dict[int, Tensor]
    steps: Mapping[int, Step]
    boxes: dict[int, tuple[Tensor, Tensor]]


def pull_back(problem: Problem, scheme: Scheme, rows: Float[Tensor, "batch rows classes"]) -> Pullback:
    """Pull coefficients of the output back to the input over a scheme's relaxations; differentiable."""
    boxes = problem.bounds(scheme.boxes).boxes
    seen = path_over(problem, boxes, scheme.slope)
    reached: dict[int, Tensor] = {}
    last = len(problem.graph.nodes) - 1
    lower = lower_bound(problem.graph, problem.x, problem.region, last, rows, seen, reached)
    return Pullback(lower, reached, seen.steps, boxes)

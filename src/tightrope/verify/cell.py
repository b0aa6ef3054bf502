"""Deciding the last cells of branch and bound, where the sign of every neuron is given, by a linear program.

There the network is affine, and the cell is cut out by one inequality per neuron. The program asks for the
point that comes nearest to being a witness:

    least s with  margin(x') <= s,  sign * neuron(x') >= -s  for every neuron,  x' in the region.

A least s of 0 or less is a witness in the cell; a positive one proves that there is none, also where the
cell is empty. The solver is not trusted. Its multipliers, which sum to 1, make one affine function of the
inequalities, which is at most 0 at every witness; its minimum over the region is computed here, and proves if
it is positive.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tightrope.bounds.alpha import Frame, part_of
from tightrope.bounds.backward import pull_from
from tightrope.region import Region

CUTS = 100  # tangents of a ball, at most, that stand for it in a linear program


@dataclass(frozen=True, eq=False)
class Halves:
    """Affine functions of the step from the region's middle: `<rows, step> + values`.

    The margin comes first. At a witness in the cell it is not positive, and none of the others is negative.
    """

    rows: Float[Tensor, "count *shape"]
    values: Float[Tensor, "count"]


def affine(frame: Frame, row: Float[Tensor, "1 1 classes"], signs: Float[Tensor, "1 most"]) -> Halves:
    """The margin and the neurons of a cell, each neuron times its sign.

    Args:
        frame: of one cell, in which the signs of all neurons are known.
        row: what the margin is, of the output.
        signs: of the frame's places; 0 where a neuron's sign is not a constraint.
    """
    graph, region, x = frame.graph, frame.region, frame.x
    seen = frame.steps(frame.slopes())
    given = torch.zeros_like(frame.low).scatter(1, frame.places, signs)
    last = len(graph.nodes) - 1
    asked = [(last, row, (row.squeeze(1) * frame.end).sum(1))]
    for i, part in frame.slices():
        sign = given[0, part]
        chosen = sign.nonzero().squeeze(1)
        if len(chosen):
            rows = torch.diag_embed(sign)[chosen].unsqueeze(0)
            rows = part_of(graph, i, slice(None))(rows[0]).unsqueeze(0)
            asked.append((graph.nodes[i].inputs[0], rows, sign[chosen] * frame.entering[0, part][chosen]))
    found = []
    for node, rows, _ in asked:
        reached: dict[int, Tensor] = {}
        pull_from(graph, x, region, node, rows, seen, reached)
        # A row that does not depend on the input reaches nothing.
        found.append(reached[0][0] if 0 in reached else x.new_zeros(rows.shape[1], *x.shape[1:]))
    return Halves(torch.cat(found), torch.cat([values for _, _, values in asked]))


@dataclass(frozen=True)
class Nearest:
    """What one linear program found.

    Args:
        proof: a lower bound of the least s over the region, up to rounding.
        size: of the numbers that it was computed from, all counted as positive.
        point: where the program takes its minimum; it may lie outside a ball, which its cuts only enclose.
        weights: the multipliers of the inequalities.
    """

    proof: float
    size: float
    point: Float[Tensor, "1 *shape"]
    weights: Float[Tensor, "count"]


class Program:
    """The linear program of a cell; a ball is enclosed by its box and by cuts that are added one by one.

    Args:
        halves: the margin and the neurons.
        x: the centre.
        region: where the input may move.
    """

    def __init__(self, halves: Halves, x: Float[Tensor, "1 *shape"], region: Region) -> None:
        self.halves, self.x, self.region = halves, x, region
        self.middle = region.middle(x)
        lower, upper = region.corners(x)
        self.lower, self.upper = ((side - self.middle).flatten() for side in (lower, upper))
        # margin - s <= 0 and -neuron - s <= 0, in the variables (step, s).
        self.factors = torch.ones_like(halves.values)
        self.factors[1:] = -1
        rows = (halves.rows.flatten(1) * self.factors.unsqueeze(1)).cpu().numpy()
        self.matrix = np.concatenate([rows, -np.ones((len(rows), 1))], 1)
        self.limits = -(halves.values * self.factors).cpu().numpy()

    def cut(self, outside: Float[Tensor, "1 *shape"]) -> bool:
        """Cut off a point outside the region; False if it is not outside."""
        normal = outside - self.region.project(self.x, outside)
        if not bool(normal.abs().amax() > 1e-12):
            return False
        farthest = -self.region.descend(self.x, -normal.unsqueeze(1))
        line = np.append(normal.flatten().cpu().numpy(), 0.0)
        self.matrix = np.concatenate([self.matrix, line[None]])
        self.limits = np.append(self.limits, float(farthest))
        return True

    def solve(self) -> Nearest | None:
        """The nearest point and what its multipliers prove; None if the solver gives up."""
        from scipy.optimize import linprog  # slow to import, and rarely needed

        count = self.matrix.shape[1] - 1
        sides = torch.stack([self.lower, self.upper], 1).cpu().numpy()
        found: Any = linprog(
            np.append(np.zeros(count), 1.0),
            A_ub=self.matrix,
            b_ub=self.limits,
            bounds=[*map(tuple, sides), (None, None)],
            method="highs",
        )
        if found.status != 0:
            return None
        like = self.x

        def tensor(values: Any) -> Tensor:
            return torch.as_tensor(np.asarray(values), dtype=like.dtype, device=like.device)

        point = self.middle + tensor(found.x[:-1]).view_as(like)
        weights = tensor(-found.ineqlin.marginals[: len(self.halves.values)]).clamp(min=0) * self.factors
        row = weights @ self.halves.rows.flatten(1)
        constant = weights @ self.halves.values
        least = self.region.descend(self.x, row.view(1, 1, *self.x.shape[1:]))[0, 0]
        reach = torch.maximum(self.lower.abs(), self.upper.abs())
        size = weights.abs() @ (self.halves.values.abs() + self.halves.rows.flatten(1).abs() @ reach)
        return Nearest(float(constant + least), float(size), point, weights.abs())


def solvable(halves: Halves) -> bool:
    """Whether all numbers are finite: a solver must not see others."""
    return math.isfinite(float(halves.rows.sum())) and math.isfinite(float(halves.values.sum()))

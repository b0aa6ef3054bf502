"""Branch and bound on the signs of ReLUs: complete, given time.

A cell is one example, one wrong class, and the signs of some unstable neurons. Its margin is bounded by
beta-CROWN; where the bound is not positive, the cell is split at one more neuron, and where all signs are
given, a linear program decides. Cells of all examples and classes are bounded in one batch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tightrope.attacks import Pgd
from tightrope.bounds import Bounds, Interval, Optimised, Problem, entering_error
from tightrope.bounds.alpha import Frame, at_once, climb, part_of
from tightrope.errors import InputError
from tightrope.graph import Graph
from tightrope.graph.ops import LeakyReLU, ReLU
from tightrope.memory import free_bytes
from tightrope.spec import smallest_margin
from tightrope.verify.cell import CUTS, Program, affine, solvable
from tightrope.verify.proof import Leaf, Proof
from tightrope.verify.stages import (
    CROWN,
    SLACK_ABSOLUTE,
    SLACK_RELATIVE,
    ClimbStage,
    Finding,
    answer,
    finite,
    slack,
)

ATTACK = Pgd(steps=25, step=0.5, decay=0.85, loss="margin")
STARTS = 16  # random ones, before anything is split


@dataclass(frozen=True)
class BranchAndBound:
    """Proves or refutes, by splitting at unstable ReLUs; what time or memory leaves open is undecided.

    Bounds: slopes and split multipliers by gradient (Wang et al. 2021, beta-CROWN), over CROWN's boxes, those
    of split neurons cut at 0. Branching: of the neurons whose lines err most at the minimiser of the
    relaxation, the one whose worse half has the best bound (as in filtered smart branching, De Palma et al.
    2021, which looks at the largest errors anywhere). Witnesses: gradient steps towards a cell's own class,
    from random points before anything is split, then from the minimiser of every cell. Examples take turns,
    each with its cells of the lowest bounds; a round's time is charged to them by their cells, and who has
    used up its own is given up.

    Args:
        name: how verdicts call it.
        iterations: gradient steps for each cell.
        rate: length of these steps at the beginning.
        candidates: neurons of which both halves are bounded before a cell is split.
        most: cells that may be open at once, if memory allows; else the examples with most are given up.
        strict: whether other activations than ReLU and LeakyReLU are an error; else they are only bounded.
        keep: whether to keep every closed cell, for certificates.

    Raises:
        InputError: if it is strict and there are other activations.
    """

    name: str = "complete"
    iterations: int = 40
    rate: float = 0.1
    candidates: int = 8
    most: int = 2**17
    strict: bool = True
    keep: bool = False

    cheap: ClassVar[bool] = False
    searches: ClassVar[bool] = True

    @torch.no_grad()
    def __call__(self, problem: Problem, y: Int[Tensor, "batch"], limit: float = math.inf) -> Finding:
        """See `Stage`; here the limit holds for every single example."""
        activations = {type(node.op) for _, node in problem.graph.activations()}
        others = sorted(kind.__name__ for kind in activations - {ReLU, LeakyReLU})
        if others and self.strict:
            raise InputError(
                f"{self.name} splits at ReLU and LeakyReLU, this network has {', '.join(others)}: "
                "use the verifier alpha-crown"
            )
        if others:
            stage = ClimbStage(
                self.name, Optimised(iterations=self.iterations, rate=self.rate, sides="lower")
            )
            return stage(problem, y, limit)
        return _Search(self, problem, y, limit).run()


@dataclass(frozen=True, eq=False)
class _Cells:
    """Cells of a batch of examples.

    Args:
        example: which example each is a part of.
        rival: over which class the margin is meant.
        lower: lower bound of that margin.
        rounding: what the rounding of its multipliers may add to it, beside the example's slack.
        signs: of the example's unstable neurons, 1 or -1 where they are given, else 0.
        slopes: of the lower lines that the cell's own bound was found with; the cell that it is a half of
            may have had a better one, if only by rounding.
        multipliers: likewise.
        picks: neurons that the cell might be split at, best first.
        weights: the coefficients of their values in `lower`.
    """

    example: Int[Tensor, "cells"]
    rival: Int[Tensor, "cells"]
    lower: Float[Tensor, "cells"]
    rounding: Float[Tensor, "cells"]
    signs: Float[Tensor, "cells most"]
    slopes: Float[Tensor, "cells most"]
    multipliers: Float[Tensor, "cells most"]
    picks: Int[Tensor, "cells picks"]
    weights: Float[Tensor, "cells picks"]

    def __len__(self) -> int:
        return len(self.example)

    def at(self, chosen: Tensor) -> _Cells:
        return _Cells(*(getattr(self, field.name)[chosen] for field in fields(self)))

    def and_(self, *others: _Cells) -> _Cells:
        parts = (self, *others)
        return _Cells(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(self)))


@dataclass(frozen=True, eq=False)
class _Duel:
    """The network with two answers left: the label, and the class that a cell is about."""

    graph: Graph
    classes: Int[Tensor, "cells 2"]

    def run(self, x: Float[Tensor, "cells *shape"]) -> tuple[Float[Tensor, "cells 2"], None]:
        """See `Network`."""
        return self.graph.run(x)[0].gather(1, self.classes), None


class _Search:
    """One search; its arrays say what is known about each example so far.

    `floor` bounds the margins in all cells that are closed, `stuck` are the examples that were given up,
    `spent` is the time that each took, and `point` is where an answer changes.
    """

    def __init__(self, how: BranchAndBound, problem: Problem, y: Tensor, limit: float) -> None:
        self.how, self.y, self.limit = how, y, limit
        self.deadline = time.perf_counter() + limit * len(y)
        self.graph, self.x, self.region, self.spec = problem.graph, problem.x, problem.region, problem.spec
        crown = problem.bounds(CROWN)
        interval = problem.bounds(Interval())
        self.known = torch.maximum(crown.lower, interval.lower)
        self.slack = slack(problem, Bounds(self.known, interval.upper, crown.boxes))
        self.frame = Frame.over(self.graph, self.x, self.region, crown.boxes, "triangle")
        errors, nothing = entering_error(problem), self.x.new_zeros(len(y), 1)
        self.errors = torch.cat([*(errors[i].flatten(1) for i, _ in self.frame.slices()), nothing], 1)
        self.floor = self.x.new_full((len(y),), torch.inf)
        self.stuck = torch.zeros_like(y, dtype=torch.bool)
        self.spent = self.x.new_zeros(len(y))
        self.point = torch.full_like(self.x, torch.nan)
        self.closed: list[tuple[Tensor, ...]] = []

    def run(self) -> Finding:
        """Search until all is decided or time is over."""
        if time.perf_counter() >= self.deadline:  # whoever ran out of time says nothing
            nothing = torch.zeros_like(self.stuck)
            return Finding(nothing, finite(smallest_margin(self.known, self.y)), self.point)
        began, roots = time.perf_counter(), self._roots()
        self._attack(roots)
        pool = self._charge(self._examine(self._still_open(roots)), roots, began)
        while len(pool) and (began := time.perf_counter()) < self.deadline:
            pool, chosen = self._choose(pool)
            found = self._examine(self._halves(chosen))
            pool = self._keep(self._charge(pool.and_(found), chosen, began))
        self._close(pool)
        self.stuck[pool.example] = True
        refuted = ~self.point.flatten(1).isnan().any(1)
        proved = ~self.stuck & ~refuted
        proofs = self._proofs(proved) if self.how.keep else None
        return Finding(proved, finite(self.floor), self.point, proofs, self.spent)

    def _charge(self, pool: _Cells, cells: _Cells, began: float) -> _Cells:
        """What is left of the pool after examples paid for the time that their cells took since `began`."""
        counts = torch.bincount(cells.example, minlength=len(self.y))
        self.spent += (time.perf_counter() - began) * counts / max(1, len(cells))
        late = pool.example[self.spent[pool.example] >= self.limit]
        self.stuck[late] = True
        return self._still_open(pool)

    def _log(self, cells: _Cells, weight: float = 1.0) -> None:
        """Keep closed cells, if that was asked for, in as little memory as will do."""
        if self.how.keep:
            parts = (cells.example, cells.rival, cells.signs.to(torch.int8), cells.slopes.float())
            weights = torch.full_like(cells.lower, weight)
            self.closed.append(tuple(part.cpu() for part in (*parts, cells.multipliers, weights)))

    def _proofs(self, proved: Tensor) -> dict[int, Proof]:
        """By place in the batch, the closed cells of every example that is proved."""
        found: dict[int, list[Leaf]] = {row: [] for row in proved.nonzero().flatten().tolist()}
        places = self.frame.places.cpu()
        kept = places < self.frame.low.shape[1] - 1
        for columns in self.closed:
            for example, rival, signs, slopes, multipliers, weight in zip(*columns, strict=True):
                if int(example) not in found:
                    continue
                given = signs.nonzero().flatten()
                neurons = places[example][given].tolist()
                leaf = Leaf(
                    int(rival),
                    dict(zip(neurons, signs[given].tolist(), strict=True)),
                    slopes[kept[example]].numpy(),
                    float(weight),
                    dict(zip(neurons, multipliers[given].tolist(), strict=True)),
                )
                found[int(example)].append(leaf)
        return {
            row: Proof("crown", places[row][kept[row]].numpy(), tuple(cells)) for row, cells in found.items()
        }

    def _roots(self) -> _Cells:
        """A cell for every wrong class; those with a bound that suffices are closed at once."""
        wrong = torch.ones_like(self.known, dtype=torch.bool).scatter(1, self.y.unsqueeze(1), False)
        example, rival = wrong.nonzero().unbind(1)
        slopes = self.frame.slopes()[example]
        none = torch.zeros_like(slopes)
        lower = self.known[example, rival]
        picks = example.new_zeros(len(example), min(self.how.candidates, slopes.shape[1]))
        weights, nothing = lower.new_zeros(picks.shape), torch.zeros_like(lower)
        cells = _Cells(example, rival, lower, nothing, none, slopes, none, picks, weights)
        done = lower > self.slack[example]
        self._close(cells.at(done))
        return cells.at(~done)

    def _close(self, cells: _Cells) -> None:
        """Take the bounds of cells into those of their examples; NaN counts as minus infinity."""
        lower = torch.where(cells.lower.isnan(), -torch.inf, cells.lower)
        self.floor.scatter_reduce_(0, cells.example, lower, "amin")

    def _is_open(self) -> Tensor:
        return ~self.stuck & self.point.flatten(1).isnan().any(1)

    def _frame(self, cells: _Cells) -> Frame:
        """What the cells' bounds are made of, the boxes of neurons cut at 0 where signs are given."""
        whole, places = self.frame, self.frame.places[cells.example]

        def cut(side: Tensor, beyond: Tensor) -> Tensor:
            values = side[cells.example]
            return values.scatter(1, places, values.gather(1, places).masked_fill(beyond, 0.0))

        lower, upper = cut(whole.lower, cells.signs > 0), cut(whole.upper, cells.signs < 0)
        parts = {i: part_of(self.graph, i, part) for i, part in whole.slices()}
        return Frame.over(
            self.graph,
            self.x[cells.example],
            self.region.at(cells.example),
            {i: (of(lower), of(upper)) for i, of in parts.items()},
            "triangle",
            places,
        )

    def _row(self, cells: _Cells) -> Float[Tensor, "cells 1 classes"]:
        return self.spec.rows[cells.example, cells.rival].unsqueeze(1)

    def _climb(self, cells: _Cells, frame: Frame, iterations: int) -> _Cells:
        """The cells with better bounds, and the slopes and multipliers that gave them."""
        found = climb(
            frame,
            self._row(cells),
            cells.slopes,
            iterations=iterations,
            rate=self.how.rate,
            enough=self.slack[cells.example],
            deadline=self.deadline,
            signs=cells.signs,
            multipliers=cells.multipliers,
        )
        assert found.multipliers is not None
        rounding = self._rounding(cells, found.multipliers)
        better = found.lower > cells.lower
        return replace(
            cells,
            lower=torch.where(better, found.lower, cells.lower),
            rounding=torch.where(better, rounding, cells.rounding),
            slopes=found.slopes,
            multipliers=found.multipliers,
        )

    def _rounding(self, cells: _Cells, multipliers: Tensor) -> Float[Tensor, "cells"]:
        """What rounding may do to multiples of the neurons that have these multipliers."""
        errors = self.errors[cells.example].gather(1, self.frame.places[cells.example])
        return (multipliers * errors).sum(1)

    def _examine(self, cells: _Cells) -> _Cells:
        """Bound cells, look for witnesses, decide what cannot be split; the cells that stay open."""
        if not len(cells):
            return cells
        first, *others = [self._examine_lot(lot) for lot in self._lots(cells)]
        return self._still_open(first.and_(*others))

    def _lots(self, cells: _Cells) -> Iterator[_Cells]:
        """As many of the cells at a time as may be worked on at once."""
        for lot in torch.arange(len(cells), device=self.x.device).split(at_once(self.graph, self.x)):
            yield cells.at(lot)

    def _examine_lot(self, cells: _Cells) -> _Cells:
        frame = self._frame(cells)
        cells = self._climb(cells, frame, self.how.iterations)
        done = cells.lower > self.slack[cells.example] + cells.rounding
        self._close(cells.at(done))
        self._log(cells.at(done))
        rest = (~done).nonzero().squeeze(1)
        cells, frame = cells.at(rest), frame.at(rest)
        if not len(cells):
            return cells
        reached: dict[int, Tensor] = {}
        push = cells.multipliers * cells.signs
        frame.bound(self._row(cells), cells.slopes, push, reached)
        points = frame.x
        if 0 in reached:
            points = frame.region.minimiser(frame.x, reached[0]).squeeze(1)
            self._try(points, cells)
            self._try(self._attacked(points, cells), cells)
        free = (cells.signs == 0) & (frame.places < frame.low.shape[1] - 1)
        last = ~free.any(1)
        for one in last.nonzero():
            self._decide(cells.at(one), frame.at(one))
        picks, weights = self._picks(frame, cells, free, reached, points)
        split = (~last).nonzero().squeeze(1)
        return replace(cells, picks=picks, weights=weights).at(split)

    def _attack(self, roots: _Cells) -> None:
        """Look for witnesses from random points, the same ones whichever other examples there are."""
        for seed in range(STARTS):
            cells = self._still_open(roots)
            if not len(cells) or time.perf_counter() >= self.deadline:
                return
            for part in self._lots(cells):
                starts = []
                for example in part.example.split(1):
                    draw = torch.Generator(self.x.device).manual_seed(seed)
                    starts.append(self.region.at(example).sample(self.x[example], draw))
                self._try(self._attacked(torch.cat(starts), part), part)

    def _attacked(self, points: Tensor, cells: _Cells) -> Tensor:
        """Points near these ones at which the cells' margins are smaller."""
        x, region = self.x[cells.example], self.region.at(cells.example)
        duel = _Duel(self.graph, torch.stack([self.y[cells.example], cells.rival], 1))
        label = torch.zeros_like(cells.rival)
        return ATTACK(duel, x, label, region, start=region.project(x, points))

    def _try(self, points: Tensor, cells: _Cells) -> None:
        """Look whether the answer changes at points of some cells' regions."""
        point = self.region.at(cells.example).project(self.x[cells.example], points)
        wrong = answer(self.graph, point, self.y[cells.example]).margin <= 0
        found, example = point[wrong], cells.example[wrong]
        # One point for each example, whole: what writing two into one row leaves there is not defined.
        numbers, nothing = torch.arange(len(found), device=found.device), torch.full((len(self.x),), -1)
        chosen = nothing.to(found.device).scatter_reduce(0, example, numbers, "amax")
        chosen = chosen[chosen >= 0]
        self.point[example[chosen]] = found[chosen]

    def _decide(self, cell: _Cells, frame: Frame) -> None:
        """Decide a cell in which every sign is given; its example is given up if rounding forbids it."""
        if not self._is_open()[cell.example].all():
            return
        halves = affine(frame, self._row(cell), cell.signs)
        program = Program(halves, frame.x, frame.region) if solvable(halves) else None
        for _ in range(CUTS):
            if program is None or time.perf_counter() > self.deadline:
                break
            nearest = program.solve()
            if nearest is None:
                break
            # The program's multipliers come in the order of the neurons, and the margin's first.
            given = cell.signs[0].nonzero().flatten()
            given = given[frame.places[0, given].argsort()]
            weight, multipliers = float(nearest.weights[0]), torch.zeros_like(cell.multipliers)
            multipliers[0, given] = nearest.weights[1:]
            rounding = weight * self.slack[cell.example] + self._rounding(cell, multipliers)
            if nearest.proof > SLACK_ABSOLUTE + SLACK_RELATIVE * nearest.size + float(rounding):
                proof = torch.full_like(cell.lower, nearest.proof)
                self.floor.scatter_reduce_(0, cell.example, torch.maximum(cell.lower, proof), "amin")
                self._log(replace(cell, multipliers=multipliers), weight)
                return
            self._try(nearest.point, cell)
            if not self._is_open()[cell.example].all():
                return
            if not program.cut(nearest.point):
                break
        self._close(cell)
        self.stuck[cell.example] = True

    def _picks(
        self, frame: Frame, cells: _Cells, free: Tensor, reached: dict[int, Tensor], points: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The neurons to which a bound owes most, and their coefficients.

        At the point where the relaxation is smallest, the margin exceeds the bound by the sum over all
        neurons of the coefficient times the distance of the line that was used from the activation; split
        neurons add what their multipliers take off.
        """
        entering = self.graph.entering(points)[1]
        nothing = frame.x.new_zeros(len(cells), 1)

        def of_all(values: dict[int, Tensor]) -> Tensor:
            sizes = [(i, frame.lower[:, part]) for i, part in frame.slices()]
            parts = [values[i].flatten(1) if i in values else torch.zeros_like(size) for i, size in sizes]
            return torch.cat([*parts, nothing], 1).gather(1, frame.places)

        lower, left, high = (
            value.expand(len(cells), -1).gather(1, frame.places)
            for value in (frame.lower, frame.left, frame.high)
        )
        coefficient, z = of_all(reached), of_all(entering)
        value = torch.maximum(z, left * z)
        above, below = (high - left) * -lower + high * z - value, value - cells.slopes * z
        owed = torch.where(coefficient < 0, -coefficient * above, coefficient * below)
        picks = owed.clamp(min=0).nan_to_num().masked_fill(~free, -1.0).topk(cells.picks.shape[1], 1).indices
        return picks, coefficient.gather(1, picks)

    def _choose(self, pool: _Cells) -> tuple[_Cells, _Cells]:
        """Cells to keep for later, and cells to split now: of every example those with the lowest bounds."""
        order = pool.lower.argsort(stable=True)
        order = order[pool.example[order].argsort(stable=True)]
        counts = torch.bincount(pool.example, minlength=len(self.x))
        firsts = (counts.cumsum(0) - counts)[pool.example[order]]
        rank = torch.arange(len(pool), device=self.x.device) - firsts
        order = order[rank.argsort(stable=True)]
        now = max(1, at_once(self.graph, self.x) // 2)
        return pool.at(order[now:]), pool.at(order[:now])

    def _halves(self, cells: _Cells) -> _Cells:
        """Both halves of every cell, split at the candidate whose worse half has the best bound."""
        free = cells.signs.gather(1, cells.picks) == 0
        free &= self.frame.places[cells.example].gather(1, cells.picks) < self.frame.low.shape[1] - 1
        best = torch.zeros_like(cells.example)
        if cells.picks.shape[1] > 1:
            worse = []
            for k in range(cells.picks.shape[1]):
                halves = self._split(cells, torch.full_like(best, k))
                bounds = [self._climb(lot, self._frame(lot), 0).lower for lot in self._lots(halves)]
                # A cell that is already proved needs no better bound.
                bound = torch.minimum(torch.cat(bounds), self.slack[halves.example])
                low, high = bound.chunk(2)
                worse.append(torch.minimum(low, high) + 1e-3 * torch.maximum(low, high))
            best = torch.stack(worse, 1).nan_to_num(-torch.inf).masked_fill(~free, -torch.inf).argmax(1)
        return self._split(cells, best)

    def _split(self, cells: _Cells, pick: Int[Tensor, "cells"]) -> _Cells:
        """Both halves of every cell; where they begin to climb, their bounds are no lower than the cell's.

        A neuron with the coefficient a > 0 has the line `a slope z` in the cell, and `a z` or `a left z` in
        the halves: with the multipliers a (1 - slope) and a (slope - left), these are the same.
        """
        place, weight = (value.gather(1, pick.unsqueeze(1)) for value in (cells.picks, cells.weights))
        slope, at = cells.slopes.gather(1, place), self.frame.places[cells.example].gather(1, place)
        left = self.frame.left.expand(len(cells), -1).gather(1, at)
        active, inactive = (
            replace(
                cells,
                signs=cells.signs.scatter(1, place, sign),
                multipliers=cells.multipliers.scatter(1, place, weight.clamp(min=0) * owed),
            )
            for sign, owed in ((1.0, 1 - slope), (-1.0, slope - left))
        )
        return active.and_(inactive)

    def _still_open(self, cells: _Cells) -> _Cells:
        """The cells of examples that are not settled; the bounds of given-up ones are taken in."""
        is_open = self._is_open()[cells.example]
        self._close(cells.at(~is_open))
        return cells.at(is_open)

    def _keep(self, pool: _Cells) -> _Cells:
        """The open cells, as many as memory allows: the examples with most cells are given up."""
        size = sum(getattr(pool, f.name)[:1].nbytes for f in fields(pool))
        most = min(self.how.most, free_bytes(self.x.device) // (4 * max(1, size)) + len(pool) // 4)
        pool = self._still_open(pool)
        while len(pool) > most:
            self.stuck[torch.bincount(pool.example, minlength=len(self.x)).argmax()] = True
            pool = self._still_open(pool)
        return pool

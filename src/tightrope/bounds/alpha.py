"""Slopes optimised by gradient: alpha-CROWN, beta-CROWN for given signs, DeepZ with learned slopes.

The upper lines of the triangle relaxation do not depend on the lower slopes, so the path that a backward pass
is counted from (`linear.path`) is found once; an iteration is one backward pass and its gradient.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tightrope.bounds.backward import coefficients_at_once, path, pull_from
from tightrope.bounds.base import Bounds, Boxes, Problem
from tightrope.bounds.interval import Interval
from tightrope.bounds.linear import Linear, relax_all
from tightrope.bounds.relax import Slopes, Step
from tightrope.errors import InputError
from tightrope.graph import Graph
from tightrope.graph.ops import Kinked
from tightrope.region import Region, dot

Lines = Literal["triangle", "parallel"]
"""How an unstable neuron is held: a chord above and any line through 0 below, or two lines of one slope."""

DECAY = 0.98  # of the step length, per iteration: as in auto_LiRPA
KEPT = 0.75  # once a smaller share of a batch is still open, the others are taken out of it


@dataclass(frozen=True)
class Given:
    """An activation between lines of given slopes, seen from a path that need not be its upper line.

    Args:
        slopes: as if the path were the upper line.
        above: by how much the upper line lies above the path where that enters; None if it does not.
        push: multiplier times sign of every neuron whose sign is given; None if there is none.
        entering: where the path enters.
    """

    slopes: Slopes
    above: Float[Tensor, "batch *shape"] | None
    push: Float[Tensor, "batch *shape"] | None
    entering: Float[Tensor, "batch *shape"]

    def map(self, change: Callable[[Tensor], Tensor]) -> Given:
        """See `Step`."""
        above = None if self.above is None else change(self.above)
        push = None if self.push is None else change(self.push)
        return Given(self.slopes.map(change), above, push, change(self.entering))

    def pull(
        self, rows: Float[Tensor, "batch rows *shape"]
    ) -> tuple[Float[Tensor, "batch rows *shape"], Float[Tensor, "batch rows"]]:
        """See `Step`; where `push * z >= 0`, what is pushed away can only make the bound lower."""
        pulled, offset = self.slopes.pull(rows)
        if self.above is not None:
            offset = offset + dot(rows.flatten(2), self.above.flatten(1))
        if self.push is not None:
            pulled = pulled - self.push.unsqueeze(1)
            offset = offset - (self.push * self.entering).flatten(1).sum(1, keepdim=True)
        return pulled, offset


@dataclass(frozen=True, eq=False)
class Frame:
    """All that stays as it is while the slopes of a batch climb.

    Values of the neurons of all ReLUs and LeakyReLUs lie side by side, `(batch, neurons + 1)`, with a place
    for nothing at the end.

    Args:
        graph: the network at fixed statistics.
        x: inputs.
        region: where each input may move.
        lines: how unstable neurons are held.
        end: where the path from the region's middle ends.
        others: all other activations, seen from the path.
        lower: lower bounds of the neurons.
        upper: upper bounds.
        entering: where the path enters the neurons.
        value: where it leaves them.
        low: slopes of the lower lines, as CROWN has them (those of the chords, if lines are parallel).
        high: slopes of the upper lines.
        left: slopes of the activations left of 0.
        places: the neurons whose slopes may change, for each member of the batch; the last place, if none.
    """

    graph: Graph
    x: Float[Tensor, "batch *shape"]
    region: Region
    lines: Lines
    end: Float[Tensor, "batch *value"]
    others: dict[int, Step]
    lower: Float[Tensor, "batch neurons"]
    upper: Float[Tensor, "batch neurons"]
    entering: Float[Tensor, "batch neurons"]
    value: Float[Tensor, "batch neurons"]
    low: Float[Tensor, "batch neurons"]
    high: Float[Tensor, "batch neurons"]
    left: Float[Tensor, "1 neurons"]
    places: Int[Tensor, "batch most"]

    @classmethod
    def over(
        cls,
        graph: Graph,
        x: Float[Tensor, "batch *shape"],
        region: Region,
        boxes: Boxes,
        lines: Lines,
        places: Int[Tensor, "batch most"] | None = None,
    ) -> Frame:
        """The frame over boxes of what enters each activation; without places, all unstable neurons'."""
        relaxations = relax_all(graph, boxes, "adaptive" if lines == "triangle" else "parallel")
        seen, entering = path(graph, x, region, len(graph.nodes) - 1, relaxations)
        kinks = {
            i: step for i, step in seen.steps.items() if i in dict(kinked(graph)) and isinstance(step, Slopes)
        }
        values = {i: step.gap + step.low * entering[i] for i, step in kinks.items()}
        left = {i: torch.full_like(boxes[i][0][:1], left_slope(graph, i)) for i in kinks}

        def beside(parts: dict[int, Tensor], batch: int = len(x)) -> Tensor:
            return torch.cat([*(parts[i].flatten(1) for i in kinks), x.new_zeros(batch, 1)], 1)

        lower, upper = (beside({i: boxes[i][side] for i in kinks}) for side in (0, 1))
        return cls(
            graph,
            x,
            region,
            lines,
            seen.end,
            {i: step for i, step in seen.steps.items() if i not in kinks},
            lower,
            upper,
            beside(entering),
            beside(values),
            beside({i: step.low for i, step in kinks.items()}),
            beside({i: step.high for i, step in kinks.items()}),
            beside(left, 1),
            unstable(lower, upper) if places is None else places,
        )

    def at(self, members: Int[Tensor, "chosen"]) -> Frame:
        """The frame of some members of the batch, some of them perhaps more than once."""

        def chosen(value: Tensor) -> Tensor:
            return value[members]

        return replace(
            self,
            region=self.region.at(members),
            others={i: step.map(chosen) for i, step in self.others.items()},
            x=chosen(self.x),
            end=chosen(self.end),
            lower=chosen(self.lower),
            upper=chosen(self.upper),
            entering=chosen(self.entering),
            value=chosen(self.value),
            low=chosen(self.low),
            high=chosen(self.high),
            places=chosen(self.places),
        )

    def slopes(self) -> Float[Tensor, "batch most"]:
        """CROWN's slopes, or those of the chords, at the places."""
        return self.low.gather(1, self.places)

    def bound(
        self,
        rows: Float[Tensor, "batch rows classes"],
        slopes: Float[Tensor, "batch most"],
        push: Float[Tensor, "batch most"] | None = None,
        reached: dict[int, Tensor] | None = None,
    ) -> Float[Tensor, "batch rows"]:
        """A lower bound of `<row, f(x')>` over the region; differentiable.

        Args:
            rows: coefficients of the output.
            slopes: at the places; those of the neurons' lower lines.
            push: multiplier times sign of each place's neuron: then the bound is one where the neurons have
                these signs (Wang et al. 2021, beta-CROWN).
            reached: as for `linear.lower_bound`.
        """
        last = len(self.graph.nodes) - 1
        seen = self.steps(slopes, push)
        return dot(rows, self.end) + pull_from(self.graph, self.x, self.region, last, rows, seen, reached)

    def steps(
        self, slopes: Float[Tensor, "batch most"], push: Float[Tensor, "batch most"] | None = None
    ) -> dict[int, Step]:
        """Every activation, seen from the path, with these slopes and multipliers; see `bound`."""
        low = self.low.scatter(1, self.places, slopes)
        high, above = self.high, None
        if self.lines == "triangle":
            gap = self.value - low * self.entering
        else:
            # f(z) - low z is 0 at 0, and largest at one of the ends.
            gap = torch.maximum((low - self.left) * -self.lower, (1 - low) * self.upper)
            high, above = low, low * self.entering + gap - self.value
        pushed = None if push is None else torch.zeros_like(low).scatter(1, self.places, push)
        seen = dict(self.others)
        for i, part in self.slices():
            of = part_of(self.graph, i, part)
            seen[i] = Given(
                Slopes(of(low), of(high), of(gap)),
                None if above is None else of(above),
                None if pushed is None else of(pushed),
                of(self.entering),
            )
        return seen

    def slices(self) -> Iterator[tuple[int, slice]]:
        """Where the neurons of each ReLU and LeakyReLU lie among those of all."""
        start = 0
        for i, size in kinked(self.graph):
            yield i, slice(start, start + size)
            start += size


def kinked(graph: Graph) -> Iterator[tuple[int, int]]:
    """The ReLUs and LeakyReLUs by node number, and how many neurons each has."""
    return ((i, n.shape.numel()) for i, n in graph.activations() if isinstance(n.op, Kinked))


def left_slope(graph: Graph, node: int) -> float:
    """The slope of a ReLU or LeakyReLU left of 0."""
    op = graph.nodes[node].op
    assert isinstance(op, Kinked)
    return op.slope


def part_of(graph: Graph, node: int, part: slice) -> Callable[[Tensor], Tensor]:
    """What cuts the neurons of one activation out of those of all."""
    return lambda values: values[:, part].unflatten(1, graph.nodes[node].shape)


def unstable(
    lower: Float[Tensor, "batch neurons"], upper: Float[Tensor, "batch neurons"]
) -> Int[Tensor, "batch most"]:
    """The unstable neurons of each example, in order; the last place where one has fewer than others."""
    is_unstable = (lower < 0) & (upper > 0)
    count = is_unstable.sum(1, keepdim=True)
    most = int(count.max()) if len(count) else 0
    order = is_unstable.int().argsort(dim=1, descending=True, stable=True)[:, :most]
    there = torch.arange(most, device=lower.device) < count
    return torch.where(there, order, lower.shape[1] - 1)


@dataclass(frozen=True, eq=False)
class Climb:
    """The best that was found for each member of a batch.

    Args:
        lower: lower bounds.
        slopes: at the frame's places.
        multipliers: likewise; None if no sign is given.
    """

    lower: Float[Tensor, "batch"]
    slopes: Float[Tensor, "batch most"]
    multipliers: Float[Tensor, "batch most"] | None


def climb(
    frame: Frame,
    rows: Float[Tensor, "batch 1 classes"],
    slopes: Float[Tensor, "batch most"],
    *,
    iterations: int,
    rate: float,
    enough: Float[Tensor, "batch"],
    deadline: float = math.inf,
    signs: Float[Tensor, "batch most"] | None = None,
    multipliers: Float[Tensor, "batch most"] | None = None,
) -> Climb:
    """Slopes and multipliers that make a lower bound large: Adam, the best of all iterations kept.

    Each member of the batch climbs as if it were alone, until its bound is enough.

    Args:
        frame: what stays as it is.
        rows: what is bounded.
        slopes: where to begin.
        iterations: gradient steps; with 0, the bound is only computed.
        rate: Adam's step length at the beginning, for slopes; multipliers take half of it.
        enough: a member whose bound is larger than this may stop; it does once enough others may, too.
        deadline: no step is begun after this moment of `time.perf_counter`.
        signs: 1 or -1 where the sign of a place's neuron is given, else 0.
        multipliers: where to begin.

    Raises:
        InputError: in inference mode, which has no gradients.
    """
    if torch.is_inference_mode_enabled():
        raise InputError("slopes are optimised by gradients: take torch.no_grad(), not inference_mode()")
    left = frame.left.expand(len(slopes), -1).gather(1, frame.places)
    lower, upper = (side.gather(1, frame.places) for side in (frame.lower, frame.upper))
    least, most = left.masked_fill(lower >= 0, 1.0), torch.where(upper <= 0, left, 1.0)
    point, rates = slopes, torch.full_like(slopes, rate)
    if signs is not None and multipliers is not None:
        least = torch.cat([least, torch.zeros_like(left)], 1)
        most = torch.cat([most, torch.where(signs == 0, 0.0, torch.inf)], 1)
        point, rates = torch.cat([slopes, multipliers], 1), torch.cat([rates, rates / 2], 1)
    point = point.clamp(least, most)
    # Many bounds suffice as they are: only the others are worth keeping what a gradient needs.
    with torch.no_grad():
        best, best_point = _bound(frame, rows, point, signs), point.clone()
    best = torch.where(best.isnan(), -torch.inf, best)
    members = torch.arange(len(rows), device=rows.device)
    adam = Adam(torch.zeros_like(point), torch.zeros_like(point))
    steps = iterations if point.shape[1] else 0
    for step in range(steps + 1 if steps else 0):
        open_ = ~(best[members] > enough[members])
        if not open_.any() or time.perf_counter() >= deadline:
            break
        if open_.sum() < KEPT * len(open_):
            kept = open_.nonzero().squeeze(1)
            frame, rows, members, adam = frame.at(kept), rows[kept], members[kept], adam.at(kept)
            point, least, most, rates = point[kept], least[kept], most[kept], rates[kept]
            signs = None if signs is None else signs[kept]
        last = step == steps
        with torch.set_grad_enabled(not last):
            point = point.detach().requires_grad_(not last)
            bound = _bound(frame, rows, point, signs)
        better = bound.detach() > best[members]  # what is not a number never is
        best[members] = torch.where(better, bound.detach(), best[members])
        best_point[members[better]] = point.detach()[better]
        if not last:
            (gradient,) = torch.autograd.grad(bound, point, torch.ones_like(bound))
            point = adam.ascend(point.detach(), gradient, rates * DECAY**step).clamp(least, most)
    return Climb(best, *_parts(best_point, signs is not None))


def _parts(point: Tensor, split: bool) -> tuple[Tensor, Tensor | None]:
    if not split:
        return point, None
    slopes, multipliers = point.chunk(2, 1)
    return slopes, multipliers


def _bound(frame: Frame, rows: Tensor, point: Tensor, signs: Tensor | None) -> Tensor:
    slopes, multipliers = _parts(point, signs is not None)
    push = None if multipliers is None or signs is None else multipliers * signs
    return frame.bound(rows, slopes, push).squeeze(1)


@dataclass
class Adam:
    """Adam (Kingma and Ba 2015) that climbs, and whose batch may become smaller on the way."""

    first: Tensor
    second: Tensor
    steps: int = 0

    def ascend(self, point: Tensor, gradient: Tensor, rates: Tensor) -> Tensor:
        """The point after one more step."""
        self.steps += 1
        self.first = torch.lerp(self.first, gradient, 0.1)
        self.second = torch.lerp(self.second, gradient.square(), 0.001)
        size = (self.second / (1 - 0.999**self.steps)).sqrt() + 1e-8
        return point + rates / (1 - 0.9**self.steps) * self.first / size

    def at(self, members: Tensor) -> Adam:
        """The same for some members of the batch."""
        return Adam(self.first[members], self.second[members], self.steps)


@dataclass(frozen=True, eq=False)
class Optimum:
    """What `Optimised` found: bounds, and the slopes of the passes that climbed.

    Args:
        bounds: the better of these passes' and of what they began with.
        neurons: the numbers of each example's unstable neurons among those of all ReLUs; -1 for none.
        examples: for each pass, the number of its example in the batch.
        rows: likewise of the row of the specification.
        slopes: the best that were found, at the example's neurons.
    """

    bounds: Bounds
    neurons: Int[Tensor, "batch most"]
    examples: Int[Tensor, "passes"]
    rows: Int[Tensor, "passes"]
    slopes: Float[Tensor, "passes most"]


@dataclass(frozen=True)
class Optimised:
    """Linear bounds whose slopes are optimised by gradient, for each example and row by themselves.

    "triangle" lines: alpha-CROWN (Xu et al. 2021, "Fast and complete"), from CROWN's slopes on, over CROWN's
    boxes. "parallel" lines: DeepZ with learned slopes (Balunovic and Vechev 2020), from `u / (u - l)`, over
    Fast-Lin's boxes: `s z <= relu(z) <= s z + max(-s l, (1 - s) u)` with s in [0, 1]. A bound is never
    looser than the one it begins with, nor than intervals. The boxes stay as they are; activations without a
    choice of slope are relaxed as CROWN does. An iteration costs about two backward passes for each row that
    is still open.

    Args:
        lines: "triangle" or "parallel".
        iterations: gradient steps.
        rate: Adam's step length at the beginning.
        sides: "both", or "lower" alone; the upper bound is then the interval one.
        enough: a row whose lower bound is larger is not optimised any further.
        seconds: no step is begun later than this.

    Example:
        >>> import torch, tightrope as tr
        >>> net = torch.nn.Sequential(torch.nn.Linear(1, 2), torch.nn.ReLU(), torch.nn.Linear(2, 1))
        >>> for p, value in zip(net.parameters(), ([[1.0], [-1.0]], [-0.5, 0.5], [[1.0, 1.0]], [0.0])):
        ...     _ = p.data.copy_(torch.tensor(value))
        >>> x, region = torch.tensor([[0.53]]), tr.Box(eps=0.1)
        >>> engines = (tr.engines.crown(), tr.engines.alpha_crown())
        >>> [round(tr.bounds(net, x, region, engine).lower.item(), 3) for engine in engines]
        [-0.07, 0.0]
    """

    lines: Lines = "triangle"
    iterations: int = 20
    rate: float = 0.1
    sides: Literal["both", "lower"] = "both"
    enough: float = math.inf
    seconds: float = math.inf

    def __call__(self, problem: Problem) -> Bounds:
        """See `Engine`."""
        return self.optimum(problem).bounds

    def optimum(self, problem: Problem) -> Optimum:
        """The bounds with the slopes that made them."""
        deadline = time.perf_counter() + self.seconds
        slope: Any = "adaptive" if self.lines == "triangle" else "parallel"
        begun, interval = problem.bounds(Linear(slope, "linear", self.sides)), problem.bounds(Interval())
        rows, known = problem.spec.rows, torch.maximum(begun.lower, interval.lower)
        if self.sides == "both":
            negated = torch.maximum(-begun.upper, -interval.upper)
            rows, known = torch.cat([rows, -rows], 1), torch.cat([known, negated], 1)
        return self._optimise(problem, begun.boxes, rows, known, interval.upper, deadline)

    def _optimise(
        self,
        problem: Problem,
        boxes: Boxes,
        rows: Float[Tensor, "batch rows classes"],
        known: Float[Tensor, "batch rows"],
        upper: Float[Tensor, "batch above"],
        deadline: float,
    ) -> Optimum:
        """Climb for all rows but those that are 0, or known to be large enough."""
        graph, x, region = problem.graph, problem.x, problem.region
        with torch.no_grad():
            fixed = Frame.over(graph, x, region, boxes, self.lines)
        trained = Frame.over(graph, x, region, boxes, self.lines) if torch.is_grad_enabled() else None
        places = ((rows != 0).any(2) & ~(known > self.enough)).nonzero()
        results, slopes = list[Tensor](), [fixed.slopes()[:0]]
        for members, row, by in in_turns(places, graph, x, deadline):
            frame, chosen = fixed.at(members), rows[members, row].unsqueeze(1)
            best = climb(
                frame,
                chosen.detach(),
                frame.slopes(),
                iterations=self.iterations,
                rate=self.rate,
                enough=torch.full_like(known[members, row], self.enough),
                deadline=by,
            )
            slopes.append(best.slopes)
            if trained is None:
                results.append(best.lower)
            else:  # the same bounds once more, with gradients
                results.append(trained.at(members).bound(chosen, best.slopes).squeeze(1))
        found = known
        if results:
            found = torch.maximum(known, known.index_put(tuple(places.T), torch.cat(results)))
        if self.sides == "both":
            found, negated = found.chunk(2, 1)
            upper = -negated
        neurons = fixed.places.masked_fill(fixed.places == fixed.low.shape[1] - 1, -1)
        return Optimum(
            Bounds(found, upper, boxes=boxes), neurons, places[:, 0], places[:, 1], torch.cat(slopes)
        )


def in_turns(
    places: Int[Tensor, "pairs 2"], graph: Graph, x: Tensor, deadline: float
) -> Iterator[tuple[Int[Tensor, "chosen"], Int[Tensor, "chosen"], float]]:
    """Pairs of example and row, as many at once as memory allows, and until when each lot may take."""
    done = 0
    for lot in places.split(at_once(graph, x)) if len(places) else ():
        now = time.perf_counter()
        yield lot[:, 0], lot[:, 1], now + (deadline - now) * len(lot) / (len(places) - done)
        done += len(lot)


def at_once(graph: Graph, x: Tensor) -> int:
    """How many backward passes of one row each may run at once."""
    return max(1, coefficients_at_once(x) // max(node.shape.numel() for node in graph.nodes))


def alpha_crown(iterations: int = 20, rate: float = 0.1) -> Optimised:
    """alpha-CROWN: lower slopes optimised by gradient, boxes by CROWN."""
    return Optimised("triangle", iterations, rate)


def zonotope(iterations: int = 20, rate: float = 0.1) -> Optimised:
    """DeepZ with learned slopes: parallel lines, boxes by Fast-Lin."""
    return Optimised("parallel", iterations, rate)

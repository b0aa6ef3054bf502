"""Perturbation sets: everything an engine or an attack may ask of the set an input moves in.

A region is `{x' : ||x' - x||_p <= eps}` cut with the data's domain (pixels lie in `[0, 1]`). The
centre `x` is passed to each method, so one region serves a whole data set. `eps` is in pixel units:
a number, or a `(batch,)` tensor with a radius per example.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from numbers import Real
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tightrope.errors import InputError

TRIALS = 3  # of the multiplier of an l_2 ball


@dataclass(frozen=True)
class Region(ABC):
    """A norm ball of radius `eps` around an input, cut with `domain`.

    Args:
        eps: radius in pixel units, a number or one per example `(batch,)`; finite, not negative.
        domain: smallest and largest value an input may take, or None where inputs are unbounded.

    Raises:
        InputError: if eps is negative, NaN or infinite, or the domain's ends are infinite or not in order.
    """

    eps: float | Float[Tensor, "batch"]
    domain: tuple[float, float] | None = (0.0, 1.0)

    norm: ClassVar[str]

    def __post_init__(self) -> None:
        if isinstance(self.eps, Tensor) and self.eps.ndim:
            usable = self.eps.ndim == 1 and bool((torch.isfinite(self.eps) & (self.eps >= 0)).all())
        else:
            real = isinstance(self.eps, Real) and not isinstance(self.eps, bool)  # numpy's, too
            if real or (isinstance(self.eps, Tensor) and self.eps.is_floating_point()):
                with suppress(OverflowError):
                    object.__setattr__(self, "eps", float(self.eps))
            usable = isinstance(self.eps, float) and math.isfinite(self.eps) and self.eps >= 0
        if not usable:
            raise InputError(
                "eps must be finite and not negative (a number, or a tensor with one per example), got "
                f"{self.eps!r}; it is in pixel units: 0.3, or 8 / 255 without quotes"
            )
        if self.domain is None:
            return
        ends = tuple(self.domain) if isinstance(self.domain, Iterable) else ()
        if len(ends) == 2 and all(isinstance(end, Real) for end in ends):
            object.__setattr__(self, "domain", tuple(map(float, ends)))
        else:
            ends = (math.nan, math.nan)
        if not -math.inf < ends[0] <= ends[1] < math.inf:
            raise InputError(
                "the domain must be the smallest and the largest value of an input, or None where inputs are "
                f"unbounded; got {self.domain}"
            )

    def with_eps(self, eps: float | Float[Tensor, "batch"]) -> Region:
        """The same kind of region with another radius."""
        return replace(self, eps=eps)

    def at(self, examples: Int[Tensor, "chosen"]) -> Region:
        """The region around some examples of a batch, some of them perhaps more than once."""
        return self.with_eps(self.eps[examples.to(self.eps.device)]) if isinstance(self.eps, Tensor) else self

    def radius(self, x: Float[Tensor, "batch *shape"]) -> float | Tensor:
        """`eps` as something that broadcasts against `x`."""
        if isinstance(self.eps, Tensor):
            if len(self.eps) != len(x):
                raise InputError(
                    f"eps has {len(self.eps)} radii for a batch of {len(x)}: give one per example"
                )
            return self.eps.to(x).view(-1, *[1] * (x.ndim - 1))
        return self.eps

    def corners(
        self, x: Float[Tensor, "batch *shape"]
    ) -> tuple[Float[Tensor, "batch *shape"], Float[Tensor, "batch *shape"]]:
        """Lower and upper corner of the smallest box that holds the region."""
        radius = self.radius(x)
        return self.clip(x - radius), self.clip(x + radius)

    def clip(self, x: Float[Tensor, "batch *shape"]) -> Float[Tensor, "batch *shape"]:
        """`x` moved into the domain."""
        return x if self.domain is None else x.clamp(*self.domain)

    def contains(
        self, x: Float[Tensor, "batch *shape"], point: Float[Tensor, "batch *shape"]
    ) -> Float[Tensor, "batch"]:
        """By how much `point` leaves the region around `x`, per example; 0 where it lies inside."""
        outside = (point - self.project(x, point)).flatten(1).abs().amax(1)
        return torch.where(outside.isnan(), torch.inf, outside)

    @abstractmethod
    def minimise(
        self, x: Float[Tensor, "batch *shape"], rows: Float[Tensor, "batch rows *shape"]
    ) -> Float[Tensor, "batch rows"]:
        """A lower bound of `min <row, x'>` over the region, exact where the class says so."""

    def middle(self, x: Float[Tensor, "batch *shape"]) -> Float[Tensor, "batch *shape"]:
        """The middle of the smallest box that holds the region."""
        lower, upper = self.corners(x)
        return (lower + upper) / 2

    def descend(
        self, x: Float[Tensor, "batch *shape"], rows: Float[Tensor, "batch rows *shape"]
    ) -> Float[Tensor, "batch rows"]:
        """As `minimise`, counted from the middle: a lower bound of `min <row, x' - middle>`."""
        return self.minimise(x, rows) - dot(rows.flatten(2), self.middle(x).flatten(1))

    @abstractmethod
    def minimiser(
        self, x: Float[Tensor, "batch *shape"], rows: Float[Tensor, "batch rows *shape"]
    ) -> Float[Tensor, "batch rows *shape"]:
        """Where `<row, x'>` takes the value that `minimise` yields, for each row."""

    @abstractmethod
    def project(
        self, x: Float[Tensor, "batch *shape"], point: Float[Tensor, "batch *shape"]
    ) -> Float[Tensor, "batch *shape"]:
        """A point of the region near `point`; `point` itself where it already lies inside."""

    @abstractmethod
    def sample(
        self, x: Float[Tensor, "batch *shape"], generator: torch.Generator | None = None
    ) -> Float[Tensor, "batch *shape"]:
        """A random point of the region."""

    @abstractmethod
    def steepest(
        self, x: Float[Tensor, "batch *shape"], gradient: Float[Tensor, "batch *shape"]
    ) -> Float[Tensor, "batch *shape"]:
        """The step of length `eps` that increases a function with this gradient most."""


@dataclass(frozen=True)
class Box(Region):
    """The l_inf ball cut with the domain: `[max(0, x - eps), min(1, x + eps)]`. Everything is exact.

    Args:
        eps: radius in pixel units, a number or one per example `(batch,)`; finite, not negative.
        domain: smallest and largest value an input may take, or None where inputs are unbounded.

    Raises:
        InputError: as `Region`.

    Example:
        >>> [corner.tolist() for corner in Box(eps=0.25).corners(torch.tensor([[0.5, 1.0]]))]
        [[[0.25, 0.75]], [[0.75, 1.0]]]
    """

    norm: ClassVar[str] = "inf"

    def minimise(
        self, x: Float[Tensor, "batch *shape"], rows: Float[Tensor, "batch rows *shape"]
    ) -> Float[Tensor, "batch rows"]:
        return dot(rows.flatten(2), self.middle(x).flatten(1)) + self.descend(x, rows)

    def descend(
        self, x: Float[Tensor, "batch *shape"], rows: Float[Tensor, "batch rows *shape"]
    ) -> Float[Tensor, "batch rows"]:
        lower, upper = self.corners(x)
        return -dot(rows.flatten(2).abs(), ((upper - lower) / 2).flatten(1))

    def minimiser(
        self, x: Float[Tensor, "batch *shape"], rows: Float[Tensor, "batch rows *shape"]
    ) -> Float[Tensor, "batch rows *shape"]:
        lower, upper = self.corners(x)
        centre, radius = (lower + upper) / 2, (upper - lower) / 2
        return centre.unsqueeze(1) - rows.sign() * radius.unsqueeze(1)

    def project(
        self, x: Float[Tensor, "batch *shape"], point: Float[Tensor, "batch *shape"]
    ) -> Float[Tensor, "batch *shape"]:
        lower, upper = self.corners(x)
        return torch.minimum(torch.maximum(point, lower), upper)

    def sample(
        self, x: Float[Tensor, "batch *shape"], generator: torch.Generator | None = None
    ) -> Float[Tensor, "batch *shape"]:
        lower, upper = self.corners(x)
        share = torch.rand(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        return torch.minimum(lower + share * (upper - lower), upper)  # rounding may overshoot

    def steepest(
        self, x: Float[Tensor, "batch *shape"], gradient: Float[Tensor, "batch *shape"]
    ) -> Float[Tensor, "batch *shape"]:
        return gradient.sign() * self.radius(x)


@dataclass(frozen=True)
class _Ball(Region):
    """What the l_2 and the l_1 ball have in common."""

    order: ClassVar[float]
    dual: ClassVar[float]

    def minimise(
        self, x: Float[Tensor, "batch *shape"], rows: Float[Tensor, "batch rows *shape"]
    ) -> Float[Tensor, "batch rows"]:
        centre, flat = x.flatten(1), rows.flatten(2)
        if self.domain is None:
            return dot(flat, centre) - self.radius(centre) * _length(flat, self.dual).squeeze(2)
        fall, _ = self._farthest(flat.abs(), self._room(centre, flat), self._radii(flat))
        return dot(flat, centre) - fall

    def minimiser(
        self, x: Float[Tensor, "batch *shape"], rows: Float[Tensor, "batch rows *shape"]
    ) -> Float[Tensor, "batch rows *shape"]:
        centre, flat = x.flatten(1), rows.flatten(2)
        _, steps = self._farthest(flat.abs(), self._room(centre, flat), self._radii(flat))
        # As for a box, where a step's sign has no gradient, the step counts as given.
        points: Tensor = (centre.unsqueeze(1) - flat.sign() * steps.detach()).view_as(rows)
        return points

    def _room(
        self, centre: Float[Tensor, "batch features"], rows: Float[Tensor, "batch rows features"]
    ) -> Float[Tensor, "batch rows features"]:
        """How far each entry may move in the domain so that `<row, x'>` falls."""
        if self.domain is None:
            return self._radii(rows).expand_as(rows)
        least, most = self.domain
        down, up = (way.clamp(min=0).unsqueeze(1) for way in (centre - least, most - centre))
        return torch.where(rows > 0, down, up)

    def _radii(self, rows: Float[Tensor, "batch rows features"]) -> Float[Tensor, "batch rows 1"]:
        return rows.new_zeros(*rows.shape[:2], 1) + self.radius(rows)

    @abstractmethod
    def _farthest(
        self,
        size: Float[Tensor, "batch rows features"],
        room: Float[Tensor, "batch rows features"],
        radius: Float[Tensor, "batch rows 1"],
    ) -> tuple[Float[Tensor, "batch rows"], Float[Tensor, "batch rows features"]]:
        """An upper bound of `max <size, step>` over steps in the ball and in `[0, room]`, and such a step.

        By a Lagrange multiplier of the ball: each yields an upper bound, the best one the maximum.
        """

    def project(
        self, x: Float[Tensor, "batch *shape"], point: Float[Tensor, "batch *shape"]
    ) -> Float[Tensor, "batch *shape"]:
        centre = x.flatten(1)
        step = (point - x).flatten(1)
        radius = step.new_zeros(len(x), 1) + self.radius(centre)
        inside = _length(step, self.order) <= radius
        # Adding the shortened step to x rounds every entry. A radius smaller by that much makes sure
        # that the result is judged to lie inside, so that a projected point stays where it is.
        largest = centre.abs().amax(1, keepdim=True)
        rounding = torch.finfo(x.dtype).eps * centre.shape[1] ** (1 / self.order) * (radius + largest)
        shortened = self._shorten(step, (radius - rounding).clamp(min=0))
        return self.clip(torch.where(inside, point.flatten(1), centre + shortened).view_as(x))

    def sample(
        self, x: Float[Tensor, "batch *shape"], generator: torch.Generator | None = None
    ) -> Float[Tensor, "batch *shape"]:
        direction = self._direction(x.flatten(1), generator)
        share = torch.rand(len(x), 1, generator=generator, dtype=x.dtype, device=x.device)
        step = (share * direction / _length(direction, self.order)).view_as(x)
        return self.project(x, x + step * self.radius(x))

    def _shorten(
        self, step: Float[Tensor, "batch features"], radius: Float[Tensor, "batch 1"]
    ) -> Float[Tensor, "batch features"]:
        """The steps longer than `radius`, scaled down to that length."""
        length = _length(step, self.order)
        longer = length > radius
        return torch.where(longer, step * (radius / torch.where(longer, length, 1)), step)

    @abstractmethod
    def _direction(
        self, like: Float[Tensor, "batch features"], generator: torch.Generator | None
    ) -> Float[Tensor, "batch features"]:
        """A random vector of every length but zero, uniform in direction."""


@dataclass(frozen=True)
class L2Ball(_Ball):
    """The l_2 ball cut with the domain: `eps` (in pixel units) and `domain` as for `Box`.

    `minimise` moves entry i by `min(|row_i| / m, room_i)`, where `room_i` is what the domain leaves. Any
    multiplier m yields a lower bound; it is exact if the entries that reach the domain's edge stayed the
    same in the last of `TRIALS` trials. `project` goes onto the ball and then clips into the domain; since
    `x` lies in the domain, clipping moves no coordinate away from `x`, so the point stays in the ball.
    `sample` draws a uniform direction and a uniform distance, and clips.
    """

    norm: ClassVar[str] = "2"
    order: ClassVar[float] = 2
    dual: ClassVar[float] = 2

    def steepest(
        self, x: Float[Tensor, "batch *shape"], gradient: Float[Tensor, "batch *shape"]
    ) -> Float[Tensor, "batch *shape"]:
        flat = gradient.flatten(1)
        length = _length(flat, self.order)
        unit = flat / torch.where(length > 0, length, 1)
        return unit.view_as(x) * self.radius(x)

    def _farthest(
        self,
        size: Float[Tensor, "batch rows features"],
        room: Float[Tensor, "batch rows features"],
        radius: Float[Tensor, "batch rows 1"],
    ) -> tuple[Float[Tensor, "batch rows"], Float[Tensor, "batch rows features"]]:
        # Steps of min(size, m room) / m yield <size, step> + m / 2 (radius^2 - ||step||^2).
        least, square, scale = torch.finfo(size.dtype).tiny ** 0.5, radius.square(), _scale(size)
        size = size / scale
        with torch.no_grad():
            length = _norm(size)
            multiplier = length / radius.clamp(min=least)
            for _ in range(TRIALS):
                reached = size > multiplier * room
                rest = square - _norm(torch.where(reached, room, 0)).square()
                free = _norm(torch.where(reached, 0, size)) / rest.clamp(min=least**2).sqrt()
                multiplier = torch.minimum(multiplier, free)
            multiplier = multiplier.clamp(min=least)
        moved = torch.minimum(size, multiplier * room)
        fall = (size * moved).sum(2, keepdim=True) - _norm(moved).square() / 2
        fall = fall / multiplier + torch.where(length > 0, multiplier / 2, 0) * square
        return (scale * fall).squeeze(2), moved / multiplier

    def _direction(
        self, like: Float[Tensor, "batch features"], generator: torch.Generator | None
    ) -> Float[Tensor, "batch features"]:
        return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)


@dataclass(frozen=True)
class L1Ball(_Ball):
    """The l_1 ball cut with the domain: `eps` (in pixel units) and `domain` as for `Box`.

    `minimise` is exact: the entries with the largest coefficients move first, each to the domain's edge,
    until eps is used up. `project` goes onto the ball (Duchi et al. 2008,
    "Efficient projections onto the l1-ball") and then clips into the domain; since `x` lies in the
    domain, clipping moves no coordinate away from `x`, so the point stays in the ball. `sample` draws
    a uniform direction and a uniform distance, and clips. `steepest` moves one coordinate only.
    """

    norm: ClassVar[str] = "1"
    order: ClassVar[float] = 1
    dual: ClassVar[float] = math.inf

    def steepest(
        self, x: Float[Tensor, "batch *shape"], gradient: Float[Tensor, "batch *shape"]
    ) -> Float[Tensor, "batch *shape"]:
        flat = gradient.flatten(1)
        largest = flat.abs().argmax(1, keepdim=True)
        signs = torch.zeros_like(flat).scatter(1, largest, flat.gather(1, largest).sign())
        return signs.view_as(x) * self.radius(x)

    def _farthest(
        self,
        size: Float[Tensor, "batch rows features"],
        room: Float[Tensor, "batch rows features"],
        radius: Float[Tensor, "batch rows 1"],
    ) -> tuple[Float[Tensor, "batch rows"], Float[Tensor, "batch rows features"]]:
        falling, order = size.sort(dim=2, descending=True)
        rooms = room.gather(2, order)
        used = rooms.cumsum(2)
        # The multiplier is the coefficient of the entry at which the radius is used up.
        last = (used < radius).sum(2, keepdim=True)
        some = last < size.shape[2]
        multiplier = torch.where(some, falling.gather(2, last.clamp(max=size.shape[2] - 1)), 0)
        # relu, since clamp has a gradient at 0, where entries are as large as the multiplier
        most = ((falling - multiplier).relu() * rooms).sum(2, keepdim=True) + multiplier * radius
        steps = torch.minimum((radius - (used - rooms)).clamp(min=0), rooms)
        return most.squeeze(2), torch.zeros_like(steps).scatter(2, order, steps)

    def _shorten(
        self, step: Float[Tensor, "batch features"], radius: Float[Tensor, "batch 1"]
    ) -> Float[Tensor, "batch features"]:
        """The nearest steps of length `radius`: every entry shrinks by one threshold, at most to zero."""
        size = step.abs()
        falling = size.sort(dim=1, descending=True).values
        count = torch.arange(1, step.shape[1] + 1, dtype=step.dtype, device=step.device)
        thresholds = (falling.cumsum(1) - radius) / count
        kept = (falling > thresholds).sum(1, keepdim=True).clamp(min=1)
        shrunk = (size - thresholds.gather(1, kept - 1)).clamp(min=0)
        return super()._shorten(step.sign() * shrunk, radius)  # what rounding left

    def _direction(
        self, like: Float[Tensor, "batch features"], generator: torch.Generator | None
    ) -> Float[Tensor, "batch features"]:
        size = torch.empty_like(like).exponential_(generator=generator)
        positive = torch.rand(like.shape, generator=generator, dtype=like.dtype, device=like.device) < 0.5
        return torch.where(positive, size, -size)


def _length(vectors: Float[Tensor, "*batch features"], order: float) -> Float[Tensor, "*batch 1"]:
    """`||vector||_order`. Squares that underflow or overflow do not count as none."""
    length: Tensor
    if order != 2:
        length = torch.linalg.vector_norm(vectors, order, dim=-1, keepdim=True)
        return length
    scale = _scale(vectors)
    return scale * _norm(vectors / scale)


def _scale(vectors: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch 1"]:
    """The largest entry of every vector, or 1: measured in it, no square that matters is 0 or infinite.

    Entries below 1e-162 (in float32 1e-23) have squares of 0, and later weights may make up for it.
    """
    largest = vectors.detach().abs().amax(-1, keepdim=True)
    return torch.where((largest > 0) & largest.isfinite(), largest, 1)


def _norm(vectors: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch 1"]:
    norm: Tensor = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return norm


def dot(
    rows: Float[Tensor, "batch rows features"], vector: Float[Tensor, "batch features"]
) -> Float[Tensor, "batch rows"]:
    """`<row, vector>` for every row of every example."""
    if rows.shape[1] == 1:  # an eighth of the time of as many matrix products
        return (rows * vector.unsqueeze(1)).sum(2)
    # Ten times as fast as `rows @ vector`, where there are many examples: each product is then a vector's.
    return (vector.unsqueeze(1) @ rows.mT).squeeze(1)


REGIONS: dict[str, type[Region]] = {kind.norm: kind for kind in (Box, L2Ball, L1Ball)}
"""The regions by the name of their norm."""

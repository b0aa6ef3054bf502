"""Perturbation sets: everything an engine or an attack may ask of the set an input moves in.

A region is `{x' : ||x' - x||_p <= eps}` cut with the data's domain (pixels lie in `[0, 1]`). The
centre `x` is passed to each method, so one region serves a whole data set. `eps` is in pixel units:
a number, or a `(batch,)` tensor with a radius per example.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from tightrope.errors import InputError


@dataclass(frozen=True)
class Region(ABC):
    """A norm ball of radius `eps` around an input, cut with `domain`.

    Args:
        eps: radius in pixel units, a number or one per example `(batch,)`; finite, not negative.
        domain: smallest and largest value an input may take, or None where inputs are unbounded.

    Raises:
        InputError: if eps is negative, NaN or infinite.
    """

    eps: float | Float[Tensor, "batch"]
    domain: tuple[float, float] | None = (0.0, 1.0)

    norm: ClassVar[str]

    def __post_init__(self) -> None:
        if isinstance(self.eps, Tensor):
            usable = self.eps.ndim == 1 and bool((torch.isfinite(self.eps) & (self.eps >= 0)).all())
        else:
            usable = math.isfinite(self.eps) and self.eps >= 0
        if not usable:
            raise InputError(
                f"eps must be finite and not negative (a number, or one per example), got {self.eps}; "
                "it is in pixel units, for example 0.3 or 8/255"
            )

    def with_eps(self, eps: float | Float[Tensor, "batch"]) -> Region:
        """The same kind of region with another radius."""
        return replace(self, eps=eps)

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
    """The l_inf ball cut with the domain: `[max(0, x - eps), min(1, x + eps)]`. Everything is exact."""

    norm: ClassVar[str] = "inf"

    def minimise(
        self, x: Float[Tensor, "batch *shape"], rows: Float[Tensor, "batch rows *shape"]
    ) -> Float[Tensor, "batch rows"]:
        lower, upper = self.corners(x)
        centre, radius = (lower + upper) / 2, (upper - lower) / 2
        flat = rows.flatten(2)
        return dot(flat, centre.flatten(1)) - dot(flat.abs(), radius.flatten(1))

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
        return lower + share * (upper - lower)

    def steepest(
        self, x: Float[Tensor, "batch *shape"], gradient: Float[Tensor, "batch *shape"]
    ) -> Float[Tensor, "batch *shape"]:
        return gradient.sign() * self.radius(x)


def dot(
    rows: Float[Tensor, "batch rows features"], vector: Float[Tensor, "batch features"]
) -> Float[Tensor, "batch rows"]:
    """`<row, vector>` for every row of every example."""
    return (rows @ vector.unsqueeze(-1)).squeeze(-1)

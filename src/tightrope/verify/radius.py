"""Certified radii: for each example the largest eps at which a verifier proves it, by bisection.

What is robust at one radius is robust at every smaller one, so the shares `certified_accuracy` yields
hold at any eps. All examples of a batch are bisected at once: a region has a radius per example.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NotRequired

import torch
from jaxtyping import Float64, Int
from pydantic import ConfigDict, with_config
from torch import Tensor
from typing_extensions import TypedDict  # pydantic refuses typing.TypedDict before Python 3.12

from tightrope.bounds import Problem
from tightrope.bounds.rounding import plain_sums
from tightrope.errors import InputError
from tightrope.examples import Examples
from tightrope.given import positive, whole
from tightrope.graph import Graph, recast
from tightrope.parallel import Workers
from tightrope.region import Region
from tightrope.spec import Spec
from tightrope.verify.pipeline import CHUNK, exact_inputs, identify
from tightrope.verify.records import Count, Kind, Length, read_records
from tightrope.verify.resumable import ALONE, go_through
from tightrope.verify.stages import Stage, answer
from tightrope.verify.verifiers import find_verifier

FORMAT = "tightrope-radius/1"

TIME_LIMIT = 1.0  # seconds per stage and eps: an example is asked about up to a dozen of them

FINEST = 1e-9  # a smaller tolerance, as a share of the largest radius, would be finer than rounding


@dataclass(frozen=True)
class Radius:
    """The certified radius of one example.

    Args:
        index: number of the example in its data set.
        label: its class.
        predicted: what the network says to the unperturbed input; a tie counts against the label.
        status: "robust" (proved at `radius`), "undecided" (proved at no radius looked at), or
            "misclassified" (wrong without any perturbation).
        radius: the largest eps at which it was proved, in pixel units; 0 if there is none.
        seconds: time spent on this example, its share of its batch.
    """

    index: int
    label: int
    predicted: int
    status: Literal["robust", "undecided", "misclassified"]
    radius: float
    seconds: float


@dataclass(frozen=True)
class Radii:
    """The certified radii of a data set; iterate over it to read them one by one.

    Args:
        radii: one per example, by index.
        header: what they rest on: weights, data, norm, verifier, largest radius looked at, tolerance.
    """

    radii: tuple[Radius, ...]
    header: dict[str, Any]

    def __iter__(self) -> Iterator[Radius]:
        return iter(self.radii)

    def __len__(self) -> int:
        return len(self.radii)

    @property
    def largest(self) -> float:
        """The largest radius looked at."""
        found: float = self.header["identity"]["largest"]
        return found

    def certified_accuracy(self, eps: float) -> float:
        """Share of all examples proved to be robust at eps, which bounds the true one from below.

        It bounds the share that the verifier certifies there too, but for what lies within a tolerance.
        At eps 0, where nothing moves, it is the clean accuracy.
        """
        proved = [one.radius >= eps and one.status != "misclassified" for one in self.radii]
        return sum(proved) / len(proved) if proved else 0.0

    def summary(self) -> dict[str, Any]:
        """Mean and median radius (0 where misclassified), the curve at a few eps, what they rest on."""
        values = [one.radius for one in self.radii] or [0.0]
        identity = self.header["identity"]
        points = [self.largest * quarter / 4 for quarter in range(5)]
        return {
            "examples": len(self),
            "clean_correct": sum(one.status != "misclassified" for one in self.radii),
            "mean_radius": statistics.fmean(values),
            "median_radius": statistics.median(values),
            "at_largest": values.count(self.largest),
            "curve": [{"eps": eps, "certified_accuracy": self.certified_accuracy(eps)} for eps in points],
            "largest": self.largest,
            "tolerance": identity["tolerance"],
            "norm": identity["norm"],
            "verifier": identity["verifier"],
            "seconds": round(sum(one.seconds for one in self.radii), 3),
        }


@plain_sums()
def certified_radii(
    graph: Graph,
    examples: Examples,
    region: Region,
    *,
    tolerance: float = 1e-3,
    verifier: str = "linear",
    first: int | None = None,
    batch: int = CHUNK,
    time_limit: float = TIME_LIMIT,
    out: Path | None = None,
    resume: bool = False,
    workers: Workers = ALONE,
    about: dict[str, Any] | None = None,
) -> Radii:
    """The certified radius of every example of a data set.

    Args:
        graph: the network; a float64 copy in evaluation mode is judged.
        examples: the data set.
        region: the largest region looked at, one radius for all.
        tolerance: a radius is at most this much below an eps at which the verifier fails, in pixel units.
        verifier: a name in `VERIFIERS`.
        first: only the first so many examples.
        batch: examples per batch at most, and between two writes.
        time_limit: seconds that each example may take in each stage at each eps.
        out: file to append radii to, JSON lines; None keeps them in memory only.
        resume: go on from that file.
        workers: who searches.
        about: further facts for the file's header.

    Raises:
        InputError: if the verifier is unknown or proves nothing, a number is out of range, an input lies
            outside the region's domain, the file cannot be written, or it already exists and `resume`
            is not asked for.
        IdentityError: if the file to resume from was made with another network, data or settings.
    """
    largest = region.eps
    if isinstance(largest, Tensor) or not largest > 0:
        raise InputError(f"the largest radius to look at must be one number above 0 (--eps), got {largest}")
    tolerance = positive(tolerance, "the tolerance")
    if tolerance < largest * FINEST:
        raise InputError(f"the tolerance must be a number from {largest * FINEST:.2g} up, got {tolerance}")
    batch = whole(batch, "the number of examples in a batch", 1)
    time_limit = positive(time_limit, "the time limit in seconds")
    stages = find_verifier(verifier)
    if not stages:
        raise InputError(f"the verifier {verifier!r} proves nothing, so there is no radius; choose another")
    identity = {
        **identify(graph, examples, region),
        "largest": largest,
        "tolerance": tolerance,
        "verifier": verifier,
        "time_limit": time_limit,
    }
    header = {"format": FORMAT, "identity": identity, **(about or {})}
    exact = recast(graph, torch.float64)
    radii = go_through(
        examples,
        partial(_search, exact, stages, region, tolerance, time_limit),
        RADII,
        header,
        label="radius",
        first=first,
        batch=batch,
        out=out,
        resume=resume,
        workers=workers,
    )
    return Radii(radii, header)


def _search(
    exact: Graph,
    stages: Sequence[Stage],
    region: Region,
    tolerance: float,
    limit: float,
    x: Tensor,
    y: Tensor,
    index: Tensor,
) -> list[Radius]:
    """The radii of a batch."""
    began = time.perf_counter()
    x = exact_inputs(x, region)
    clean = answer(exact, x, y)
    right = clean.margin > 0
    radii = x.new_zeros(len(x))
    radii[right] = bisect(exact, stages, x[right], y[right], region, tolerance, limit)
    columns = [column.tolist() for column in (index, y, clean.predicted, right, radii)]
    seconds = (time.perf_counter() - began) / len(y)
    return [
        Radius(number, label, predicted, _status(correct, radius), radius, seconds)
        for number, label, predicted, correct, radius in zip(*columns, strict=True)
    ]


def bisect(
    graph: Graph,
    stages: Sequence[Stage],
    x: Float64[Tensor, "batch *shape"],
    y: Int[Tensor, "batch"],
    region: Region,
    tolerance: float,
    limit: float = math.inf,
) -> Float64[Tensor, "batch"]:
    """For each example an eps up to the region's at which a stage proved it, or 0 if none did at any.

    The next eps of a grid is one at which the last stage failed, or beyond the region. The grid halves the
    region's eps until it is as fine as the tolerance: halves and quarters of the largest eps are tried as
    they are. Each stage begins where the one before ended, so that dear ones are not asked what cheap ones
    can prove.

    Args:
        graph: the network in float64.
        stages: what tries to prove, in order.
        x: inputs.
        y: labels.
        region: the largest region to try, one radius for all.
        tolerance: the grid's width is at most this.
        limit: seconds that each example may take in each stage at each eps.
    """
    assert not isinstance(region.eps, Tensor)
    steps = 2 ** max(0, math.ceil(math.log2(region.eps / tolerance)))
    proved = torch.zeros_like(y)
    for place, stage in enumerate(stages):
        # Dear stages often add nothing: ask them about the next eps first, and about more if they prove it.
        stride = 1 if place else max(1, steps // 2)
        failed = torch.full_like(y, steps + 1)
        while len(rows := (failed - proved > 1).nonzero().squeeze(1)):
            low, high = proved[rows], failed[rows]
            middle = torch.where(high > steps, low + stride, (low + high) // 2).clamp(max=steps)
            eps = region.eps * (middle.double() / steps)
            spec = Spec.margins(y[rows], graph.classes, x)
            problem = Problem(graph, x[rows], region.with_eps(eps), spec)
            found = stage(problem, y[rows], limit).proved
            proved[rows] = torch.where(found, middle, low)
            failed[rows] = torch.where(found, high, middle)
            stride = min(2 * stride, steps)
    radii: Tensor = region.eps * (proved.double() / steps)
    return radii


def _status(correct: bool, radius: float) -> Literal["robust", "undecided", "misclassified"]:
    if not correct:
        return "misclassified"
    return "robust" if radius > 0 else "undecided"


# -------------------------------------------------------------------------------------------- files


@with_config(ConfigDict(extra="allow", strict=True))
class _Identity(TypedDict):
    norm: Literal["inf", "2", "1"]
    verifier: str
    largest: Length
    tolerance: Length


@with_config(ConfigDict(extra="allow", strict=True))
class _Header(TypedDict):
    format: Literal["tightrope-radius/1"]
    identity: _Identity
    data: NotRequired[str | None]


@with_config(ConfigDict(strict=True))
class _Radius(TypedDict):
    index: Count
    label: Count
    predicted: Count
    status: Literal["robust", "undecided", "misclassified"]
    radius: Length
    seconds: Length


def _load(record: dict[str, Any]) -> Radius:
    radius = Radius(**record)
    if (radius.status == "robust") != (radius.radius > 0):
        raise ValueError(f"the status {radius.status!r} does not go with the radius {radius.radius:g}")
    return radius


RADII: Kind[Radius] = Kind(_Header, _Radius, _load, vars)


def read_radii(path: Path) -> Radii:
    """The radii in a file, by index; a last line that was cut off is left out.

    Raises:
        InputError: if the file cannot be read, or a line is none of a file of radii; the message names
            file and line.
    """
    header, radii = read_records(path, RADII)
    return Radii(tuple(radii), header)

"""What files of radii show: certified accuracy against eps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from tightrope.report import figures
from tightrope.report.figures import Plot
from tightrope.report.read import RadiusFile, Run
from tightrope.report.text import NORMS, duration_text, eps_text, norm_text, number_text, unlike_text
from tightrope.verify import Radii


@dataclass(frozen=True)
class RadiusRow:
    """A file of radii as a line of a table."""

    name: str
    file: str
    setting: str
    mean: str
    median: str
    at_largest: str
    total: str


@dataclass(frozen=True)
class RadiiView:
    """Files of radii as the page shows them: one plot, and one table."""

    plot: Plot
    rows: list[RadiusRow]
    unlike: str


def radii_view(files: Sequence[tuple[str, RadiusFile]], key: str) -> RadiiView:
    """One plot and one table of files, each with its name in the legend; `key` begins the plot's ids."""
    files = sorted(files, key=lambda named: list(NORMS).index(named[1].identity["norm"]))
    curves: dict[str, dict[str, Radii]] = defaultdict(dict)
    for name, one in files:
        curves[norm_text(one.identity)][name] = one.radii
    rows = [_radius_row(name, one) for name, one in files]
    means = "; ".join(f"{row.name}, mean radius {row.mean} ({row.setting})" for row in rows)
    plot = Plot(
        "Certified accuracy against eps",
        figures.radii(curves, f"{key}-radii", f"Certified accuracy against eps: {means}."),
        "For every eps, the share of the examples looked at that is proved robust at that eps or a larger "
        "one; at eps 0 it is the clean accuracy. What is robust at one eps is robust at every smaller one, "
        "so every point of a line is proved, and the true robust accuracy lies on the line or above it.",
    )
    unlike = unlike_text(
        {"data": one.data, "examples": frozenset(radius.index for radius in one.radii)} for _, one in files
    )
    return RadiiView(plot, rows, unlike)


def radii_of_all(runs: Mapping[str, Run]) -> RadiiView | None:
    """The files of all runs, if there are any."""
    files = [named for label, run in runs.items() for named in with_names(run.radii, f"{label}, ")]
    return radii_view(files, "overlay") if files else None


def with_names(files: Sequence[RadiusFile], run: str = "") -> Iterator[tuple[str, RadiusFile]]:
    """The files with what a legend calls them: the verifier, and the file where that is not enough."""
    askings = [(one.identity["verifier"], one.identity["norm"]) for one in files]
    for asking, one in zip(askings, files, strict=True):
        yield run + asking[0] + (f" ({one.path.name})" if askings.count(asking) > 1 else ""), one


def _radius_row(name: str, one: RadiusFile) -> RadiusRow:
    summary = one.radii.summary()
    return RadiusRow(
        name,
        one.path.name,
        f"{norm_text(one.identity)}, {number_text(summary['examples'], 'test example')} of {one.data}, "
        f"to within {summary['tolerance']:.4g}",
        f"{summary['mean_radius']:#.4g}",
        f"{summary['median_radius']:#.4g}",
        f"{summary['at_largest']:,} at {eps_text(summary['largest'])}",
        duration_text(summary["seconds"]),
    )

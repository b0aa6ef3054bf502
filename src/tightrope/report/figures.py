"""The report's plots, each as an SVG element that follows the page's light or dark theme."""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import matplotlib as mpl
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, PercentFormatter

from tightrope.report.read import Epoch
from tightrope.verify import Radii, Status, Verdict
from tightrope.verify.stages import LARGEST

# Okabe and Ito's palette, told apart with every common colour blindness. The page's style sheet gives each
# name a value for light and for dark; the hexadecimal values here only mark the place in matplotlib's output.
PALETTE = {
    "blue": "#0072b2",
    "vermilion": "#d55e00",
    "green": "#009e73",
    "purple": "#cc79a7",
    "orange": "#e69f00",
    "sky": "#56b4e9",
    "grey": "#8a8a8a",
}
STATUS_COLOURS: dict[Status, str] = {  # in the order in which the page lists them
    "robust": "blue",
    "undecided": "grey",
    "falsified": "vermilion",
    "misclassified": "purple",
}
_AXIS, _GRID = "#010203", "#040506"
_VARIABLES = {hexadecimal: f"var(--{name})" for name, hexadecimal in PALETTE.items()} | {
    _AXIS: "var(--axis)",
    _GRID: "var(--grid)",
}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: it can be searched, read aloud, and takes the page's font
    "svg.hashsalt": "tightrope",
    "text.parse_math": False,  # names come from files, and a "$" in one is no formula
    "text.color": _AXIS,
    "axes.edgecolor": _AXIS,
    "axes.labelcolor": _AXIS,
    "axes.titlecolor": _AXIS,
    "xtick.color": _AXIS,
    "ytick.color": _AXIS,
    "grid.color": _GRID,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.linewidth": 0.6,
    "grid.linewidth": 0.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "font.size": 8.5,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
}
_WIDTH = 9.0  # inches; at the page's 900 px a point of text is 1.4 px
_BARS = 48

SHARE = "effective share of "  # how the notes on weighted losses begin; the loss's name follows


@dataclass(frozen=True)
class Plot:
    """A figure with a title, and words on how to read it."""

    title: str
    svg: Markup
    words: str


def accuracies(runs: Mapping[str, Sequence[Epoch]], key: str, alt: str) -> Markup:
    """Clean and certified accuracy on held-out training examples by epoch, one line per run and panel."""
    with mpl.rc_context(_STYLE):
        figure, (left, right) = _panels(2, 2.9)
        for (label, epochs), (colour, dash) in zip(runs.items(), _looks(), strict=False):
            look = {"label": label, "color": PALETTE[colour], "linestyle": dash}
            found = [epoch.get("held_out") for epoch in epochs]
            _line(left, epochs, [held_out and held_out["clean"] for held_out in found], **look)
            _line(right, epochs, [held_out and held_out.get("certified") for held_out in found], **look)
        for axes, title in ((left, "Clean accuracy"), (right, "Certified accuracy")):
            axes.set_title(title)
            axes.set_ylim(-0.02, 1.02)
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        if len(runs) > 1:
            _legend(figure, left)
        return _svg(figure, key, alt)


def stages(runs: Mapping[str, Sequence[Epoch]], key: str, alt: str) -> Markup:
    """Verified error and accuracy by epoch, with a line where a stage ends (maar.txt, figures 2 and 5)."""
    with mpl.rc_context(_STYLE):
        figure, (left, right) = _panels(2, 2.9)
        for (label, epochs), (colour, dash) in zip(runs.items(), _looks(), strict=False):
            look = {"label": label, "color": PALETTE[colour], "linestyle": dash}
            found = [epoch.get("held_out") for epoch in epochs]
            _line(left, epochs, [held_out and held_out.get("verified_error") for held_out in found], **look)
            _line(right, epochs, [held_out and held_out["clean"] for held_out in found], **look)
        ends = {
            before["epoch"] + 0.5
            for epochs in runs.values()
            for before, after in itertools.pairwise(epochs)
            if before.get("stage") != after.get("stage")
        }
        for axes, title in ((left, "Verified error"), (right, "Clean accuracy")):
            axes.set_title(title)
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
            for end in ends:
                axes.axvline(end, color=_AXIS, linewidth=0.9, linestyle=(0, (4, 2)))
        left.set_ylim(bottom=0)
        if len(runs) > 1:
            _legend(figure, left)
        return _svg(figure, key, alt)


def sensitivity(points: Mapping[float, tuple[float, float]], option: str, key: str, alt: str) -> Markup:
    """Clean and certified accuracy against one option of a method (maar.txt, figure 4).

    Args:
        points: the two shares by the option's value.
        option: its name.
        key: what the ids in the SVG begin with.
        alt: the plot in words.
    """
    with mpl.rc_context(_STYLE):
        figure, panels = _panels(2, 2.6)
        values = sorted(points)
        for place, (axes, title, colour) in enumerate(
            zip(panels, ("Clean accuracy", "Certified accuracy"), ("blue", "green"), strict=True)
        ):
            axes.plot(values, [points[value][place] for value in values], "o-", color=PALETTE[colour])
            axes.set_title(title)
            axes.set_xlabel(option)
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))
        return _svg(figure, key, alt)


def losses(epochs: Sequence[Epoch], key: str, alt: str) -> Markup:
    """The loss of each term, and beside it the term's weight, by epoch."""
    terms = _names(epoch.get("losses") or {} for epoch in epochs)
    weighted = any(epoch.get("weights") for epoch in epochs)
    with mpl.rc_context(_STYLE):
        figure, panels = _panels(2 if weighted else 1, 2.9)
        for term, (colour, dash) in zip(terms, _looks(), strict=False):
            look = {"color": PALETTE[colour], "linestyle": dash}
            values = [(epoch.get("losses") or {}).get(term) for epoch in epochs]
            _line(panels[0], epochs, values, label=term, **look)
            if weighted:
                values = [(epoch.get("weights") or {}).get(term) for epoch in epochs]
                _line(panels[1], epochs, values, **look)
        panels[0].set_title("Loss of each term, before weighting")
        _logarithmic(panels[0])
        if weighted:
            panels[1].set_title("Weight of each term")
            panels[1].set_ylim(bottom=min(0.0, panels[1].get_ylim()[0]))
        _legend(figure, panels[0])
        return _svg(figure, key, alt)


def schedules(epochs: Sequence[Epoch], key: str, alt: str) -> Markup:
    """Training eps and learning rate by epoch."""
    with mpl.rc_context(_STYLE):
        figure, (left, right) = _panels(2, 2.2)
        _line(left, epochs, [epoch.get("eps") for epoch in epochs], color=PALETTE["blue"])
        _line(right, epochs, [epoch.get("lr") for epoch in epochs], color=PALETTE["vermilion"])
        left.set_title("Training eps")
        left.set_ylim(bottom=0)
        right.set_title("Learning rate")
        rates = [epoch.get("lr") or 0.0 for epoch in epochs]
        if min(rates) > 1e-4 * max(rates):  # one that falls to zero would fill the axis with its last epochs
            _logarithmic(right)
        if right.get_yscale() == "linear":
            right.set_ylim(bottom=0)
        return _svg(figure, key, alt)


def combination(epochs: Sequence[Epoch], key: str, alt: str) -> Markup:
    """What the bisector notes by epoch: shares of its cases, cosine and FOSC, and the two coefficients."""
    with mpl.rc_context(_STYLE):
        figure, panels = _panels(3, 2.9)
        strength = panels[1].twinx()
        for axes, note, label, colour, dash in (
            (panels[0], "agree", "both gradients", "green", "-"),
            (panels[0], "adversarial first", "adversarial", "vermilion", "-"),
            (panels[0], "robust first", "robust", "blue", "-"),
            (panels[1], "cosine", "cosine", "purple", "-"),
            (strength, "fosc", "FOSC (right scale)", "orange", (0, (5, 2))),
            (panels[2], "adversarial weight", "adversarial", "vermilion", "-"),
            (panels[2], "robust weight", "robust", "blue", "-"),
        ):
            _line(axes, epochs, _note(epochs, note), label=label, color=PALETTE[colour], linestyle=dash)
        titles = ("Share of steps led by", "Cosine and FOSC", "Coefficient of each gradient")
        for axes, title in zip(panels, titles, strict=True):
            axes.set_title(title)
        panels[0].set_ylim(-0.02, 1.02)
        panels[0].yaxis.set_major_formatter(PercentFormatter(1.0))
        panels[1].set_ylim(-1.05, 1.05)
        strength.set_ylim(bottom=0)
        strength.grid(visible=False)
        strength.spines["right"].set_visible(True)
        if not strength.lines:  # FOSC is noted only where the gradients disagree
            strength.set_axis_off()
        _logarithmic(panels[2])
        _legend(figure, panels[0], panels[1], strength, columns=5)
        return _svg(figure, key, alt)


def single_examples(epochs: Sequence[Epoch], key: str, alt: str) -> Markup:
    """Mean radius beside the training eps, and the effective shares of weighted losses, by epoch."""
    notes = _names(epoch.get("notes", {}) for epoch in epochs)
    shares = [note for note in notes if note.startswith(SHARE)]
    looks = ({"color": PALETTE[colour], "linestyle": dash} for colour, dash in _looks())
    with mpl.rc_context(_STYLE):
        figure, panels = _panels(("mean radius" in notes) + bool(shares), 2.6)
        if "mean radius" in notes:
            eps = [epoch.get("eps") for epoch in epochs]
            _line(panels[0], epochs, eps, label="training eps", **next(looks))
            _line(panels[0], epochs, _note(epochs, "mean radius"), label="mean radius", **next(looks))
            panels[0].set_title("Training radius")
            panels[0].set_ylim(bottom=0)
        if shares:
            for note in shares:
                label = f"{note.removeprefix(SHARE)} loss"
                _line(panels[-1], epochs, _note(epochs, note), label=label, **next(looks))
            panels[-1].set_title("Effective share of the examples")
            panels[-1].set_ylim(-0.02, 1.02)
            panels[-1].yaxis.set_major_formatter(PercentFormatter(1.0))
        _legend(figure, *panels)
        return _svg(figure, key, alt)


def layers(epochs: Sequence[Epoch], key: str, alt: str) -> Markup:
    """Unstable and dead shares and mean bound width by epoch, one line per activation."""
    by_epoch = [{layer["name"]: layer for layer in epoch.get("layers") or []} for epoch in epochs]
    with mpl.rc_context(_STYLE):
        figure, panels = _panels(3, 2.7)
        for name, (colour, dash) in zip(_names(by_epoch), _looks(), strict=False):
            look = {"label": f"layer {name}", "color": PALETTE[colour], "linestyle": dash}
            found = [table.get(name) for table in by_epoch]
            _line(panels[0], epochs, [layer and layer["unstable"] for layer in found], **look)
            _line(panels[1], epochs, [layer and layer["dead"] for layer in found], **look)
            _line(panels[2], epochs, [layer and layer["width"] for layer in found], **look)
        for axes, title in zip(panels, ("Unstable neurons", "Dead neurons", "Mean bound width"), strict=True):
            axes.set_title(title)
        for axes in panels[:2]:
            axes.set_ylim(-0.02, 1.02)
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        _logarithmic(panels[2])
        _legend(figure, panels[0])
        return _svg(figure, key, alt)


def margins(verdicts: Sequence[Verdict], key: str, alt: str) -> tuple[Markup, int]:
    """Histogram of the margins, stacked by status, with a line at zero.

    Returns:
        The plot, and how many examples lie beyond its ends (drawn in the outermost bars).
    """
    edges, beyond = _bars(np.array([verdict.margin for verdict in verdicts]))
    inside: dict[Status, list[float]] = {status: [] for status in STATUS_COLOURS}
    for verdict in verdicts:
        inside[verdict.status].append(float(np.clip(verdict.margin, edges[0], edges[-1])))
    inside = {status: values for status, values in inside.items() if values}
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 2.9), layout="constrained")
        axes = figure.add_subplot()
        axes.hist(
            list(inside.values()),
            bins=edges.tolist(),
            stacked=True,
            label=list(inside),
            color=[PALETTE[STATUS_COLOURS[status]] for status in inside],
        )
        _mark_zero(axes)
        axes.set_ylabel("Examples")
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        _legend(figure, axes)
        return _svg(figure, key, alt), beyond


def margins_compared(files: Mapping[str, Sequence[Verdict]], key: str, alt: str) -> tuple[Markup, int]:
    """Histograms of the margins of several files laid over each other, one line each.

    Returns:
        The plot, and how many examples lie beyond its ends (counted where the lines end).
    """
    found = {name: np.array([verdict.margin for verdict in verdicts]) for name, verdicts in files.items()}
    edges, beyond = _bars(np.concatenate([*found.values()]), _BARS // 2)  # finer lines would only cross
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 3.2), layout="constrained")
        axes = figure.add_subplot()
        for (name, everything), (colour, dash) in zip(found.items(), _looks(), strict=False):
            counts, _ = np.histogram(np.clip(everything, edges[0], edges[-1]), edges)
            heights = [0.0, *counts / len(everything), 0.0]
            look: dict[str, Any] = {"color": PALETTE[colour], "linestyle": dash}
            axes.step([edges[0], *edges], heights, where="post", label=name, **look)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        _mark_zero(axes)
        axes.set_ylabel("Share of examples")
        _legend(figure, axes)
        return _svg(figure, key, alt), beyond


def _bars(everything: np.ndarray, number: int = _BARS) -> tuple[np.ndarray, int]:
    """The edges of a histogram of margins, and how many margins lie beyond its ends."""
    # A few huge margins would otherwise squeeze everything of interest into one bar.
    low, high = np.quantile(np.append(everything[abs(everything) < LARGEST], 0.0), (0.01, 0.99))
    low, high = min(low, 0.0), max(high, 0.0)
    width = (high - low) / number or 0.1
    edges = width * np.arange(math.floor(low / width), math.ceil(high / width) + 1)  # zero is an edge
    if len(edges) < 2:
        edges = np.array([-0.1, 0.0, 0.1])
    return edges, int(((everything < edges[0]) | (everything > edges[-1])).sum())


def _mark_zero(axes: Axes) -> None:
    axes.axvline(0.0, color=_AXIS, linewidth=1.2, linestyle=(0, (4, 2)))
    axes.annotate(
        "0", (0, 1), (0, 2), xycoords=("data", "axes fraction"), textcoords="offset points", ha="center"
    )
    axes.grid(visible=False, axis="x")
    axes.set_xlabel("Margin of the deciding stage (more than 0 is safe)")


def compared(labels: Sequence[str], rows: Sequence[Mapping[str, Any]], key: str, alt: str) -> Markup:
    """Clean, attacked and certified accuracy of each row as points on a line, and beside it the costs.

    Args:
        labels: what each row is called.
        rows: shares by these names, and `cost_in_plain_epochs`; None where one is not known.
        key: what the ids in the SVG begin with.
        alt: the plot in words.
    """
    places = list(range(len(rows)))
    costs = [row["cost_in_plain_epochs"] for row in rows]
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 1.2 + 0.5 * len(rows)), layout="constrained")
        if any(costs):
            left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
            right.barh(places, [cost or 0 for cost in costs], height=0.45, color=PALETTE["grey"])
            right.set_title("Cost in plain epochs")
            right.xaxis.set_major_locator(MaxNLocator(4))
            right.grid(visible=False, axis="y")
        else:
            left = figure.add_subplot()
        for place, row in zip(places, rows, strict=True):
            pairs = (("certified", "attacked", 2.4), ("attacked", "clean", 0.8), ("certified", "clean", 0.8))
            for first, second, width in pairs:
                ends = [row[first], row[second]]
                if None not in ends:
                    left.plot(ends, [place, place], color=PALETTE["grey"], linewidth=width, zorder=1)
        for name, colour, marker, size in (  # the last lies on top, so small that both show at one place
            ("clean", "green", "s", 34),
            ("attacked", "vermilion", "D", 46),
            ("certified", "blue", "o", 18),
        ):
            known = {place: row[name] for place, row in enumerate(rows) if row[name] is not None}
            look: dict[str, Any] = {"s": size, "color": PALETTE[colour], "marker": marker, "zorder": 2}
            left.scatter(list(known.values()), list(known), label=name, **look)
        left.set_yticks(places, labels)
        left.set_ylim(len(rows) - 0.5, -0.5)
        left.xaxis.set_major_formatter(PercentFormatter(1.0))
        left.xaxis.set_major_locator(MaxNLocator(6))
        left.set_title("Accuracy on test examples")
        _legend(figure, left)
        return _svg(figure, key, alt)


def front(
    points: Mapping[int, tuple[float, float, bool, str]], best: Sequence[int], key: str, alt: str
) -> Markup:
    """Trials of a search as points, clean against certified accuracy, and the front as a line.

    Args:
        points: for each trial clean and certified accuracy, whether it was finished, and what is said of it
            where one points at it.
        best: the trials on the front, by rising clean accuracy.
        key: what the ids in the SVG begin with.
        alt: the plot in words.
    """
    line = [points[number][:2] for number in best]
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 3.9), layout="constrained")
        for panel, axes in enumerate(figure.subplots(1, 2)):
            for number, (clean, certified, finished, _) in points.items():
                colour = PALETTE["green" if number in best else "blue" if finished else "grey"]
                look: dict[str, Any] = {"s": 34, "edgecolors": colour, "linewidths": 1.2, "zorder": 2}
                dot = axes.scatter(clean, certified, facecolors=colour if finished else "none", **look)
                dot.set_gid(f"trial-{panel}-{number}")
            # Whoever wants more than a point's clean accuracy gets the next point's certified accuracy.
            reach = [(0.0, line[0][1]), *line, (line[-1][0], 0.0)]
            axes.autoscale_view()
            axes.autoscale(False)  # the line leaves the picture
            axes.step(*zip(*reach, strict=True), where="pre", color=PALETTE["green"], zorder=1)
            axes.set_xlabel("Clean accuracy")
            axes.set_ylabel("Certified accuracy")
            axes.set_title("Near the front" if panel else "All trials")
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_formatter(PercentFormatter(1.0, decimals=1))
                axis.set_major_locator(MaxNLocator(6))
        for number in best:
            axes.annotate(str(number), points[number][:2], (5, 5), textcoords="offset points")
        for limit, values in zip((axes.set_xlim, axes.set_ylim), zip(*line, strict=True), strict=True):
            room = max(0.02, 0.4 * (max(values) - min(values)))
            limit(min(values) - room, max(values) + room)
        svg = _svg(figure, key, alt)
    said = {str(number): escape(words) for number, (*_, words) in points.items()}
    mark = re.compile(rf'<g id="{key}-trial-\d-(\d+)">')
    return Markup(mark.sub(lambda found: f"{found[0]}<title>{said[found[1]]}</title>", svg))


def slices(
    columns: Mapping[str, Sequence[tuple[float, float, float]]],
    logarithmic: AbstractSet[str],
    key: str,
    alt: str,
) -> Markup:
    """Clean and certified accuracy of trials against each number that was searched, one panel each.

    Args:
        columns: for each number its value, clean and certified accuracy in every trial.
        logarithmic: the numbers that were searched by orders of magnitude.
        key: what the ids in the SVG begin with.
        alt: the plot in words.
    """
    with mpl.rc_context(_STYLE):
        across = min(3, len(columns))
        down = -(-len(columns) // across)
        figure = Figure(figsize=(_WIDTH, 2.6 * down), layout="constrained")
        for place, (name, rows) in enumerate(columns.items(), start=1):
            axes = figure.add_subplot(down, across, place)
            values, clean, certified = zip(*rows, strict=True)
            axes.scatter(values, clean, s=18, marker="s", color=PALETTE["green"], label="clean")
            axes.scatter(values, certified, s=18, color=PALETTE["blue"], label="certified")
            if name in logarithmic:
                axes.set_xscale("log")
                _plain_numbers(axes.xaxis, max(values) < 300 * min(values))
            axes.set_xlabel(name)
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        _legend(figure, *figure.axes)
        return _svg(figure, key, alt)


def radii(curves: Mapping[str, Mapping[str, Radii]], key: str, alt: str) -> Markup:
    """Certified accuracy against eps, one panel per norm and one line per file of radii.

    Args:
        curves: for each norm, as the page calls it, the radii by what the legend calls them.
        key: what the ids in the SVG begin with.
        alt: the plot in words.
    """
    names = list(dict.fromkeys(name for lines in curves.values() for name in lines))
    looks = dict(zip(names, _looks(), strict=False))
    with mpl.rc_context(_STYLE):
        figure, panels = _panels(len(curves), 3.2)
        for axes, (norm, lines) in zip(panels, curves.items(), strict=True):
            for place, (name, found) in enumerate(lines.items(), start=1):
                colour, dash = looks[name]
                width = min(1.2 + len(lines) - place, 4.2)  # where lines lie on each other, all are seen
                look: dict[str, Any] = {"color": PALETTE[colour], "linestyle": dash, "linewidth": width}
                axes.step(*_steps(found), where="pre", label=name, **look)
            axes.set_title(f"Certified accuracy in {norm}")
            axes.set_xlabel("eps")
            axes.xaxis.set_major_locator(MaxNLocator(6))
            axes.set_xlim(0, max(found.largest for found in lines.values()))
            axes.set_ylim(-0.02, 1.02)
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        if len(names) > 1:
            _legend(figure, *panels)
        return _svg(figure, key, alt)


def _steps(found: Radii) -> tuple[list[float], list[float]]:
    """The corners of the curve: a share holds at its eps and below it, down to the eps before."""
    proved = np.sort([one.radius for one in found if one.status != "misclassified"])
    eps = np.unique([0.0, *proved, found.largest])
    shares = (len(proved) - np.searchsorted(proved, eps)) / len(found)
    return eps.tolist(), shares.tolist()


def _panels(number: int, height: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    panels = [figure.add_subplot(1, number, place) for place in range(1, number + 1)]
    for axes in panels:
        axes.set_xlabel("Epoch")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return figure, panels


def _looks() -> cycle[tuple[str, object]]:
    """A colour and a dash for each next line: every colour solid first, then dashed, then dotted."""
    dashes = ("-", (0, (5, 2)), (0, (1.2, 1.6)))
    return cycle((colour, dash) for dash in dashes for colour in PALETTE)


def _line(axes: Axes, epochs: Sequence[Epoch], values: Sequence[float | None], **style: object) -> None:
    known = [
        (epoch["epoch"], value)
        for epoch, value in zip(epochs, values, strict=True)
        if value is not None and math.isfinite(value)
    ]
    if known:
        few = len(known) <= 12
        axes.plot(*zip(*known, strict=True), marker="o" if few else "", markersize=3.5, **style)  # type: ignore[arg-type]


def _note(epochs: Sequence[Epoch], name: str) -> list[float | None]:
    return [epoch.get("notes", {}).get(name) for epoch in epochs]


def _logarithmic(axes: Axes) -> None:
    """Use a logarithmic axis where the values span more than a decade."""
    values = np.concatenate([np.asarray(line.get_ydata(), float) for line in axes.lines] or [np.ones(1)])
    if values.min() <= 0 or values.max() < 10 * values.min():
        return
    axes.set_yscale("log")
    _plain_numbers(axes.yaxis, values.max() < 300 * values.min())


def _plain_numbers(axis: Axis, few: bool) -> None:
    """Label a logarithmic axis with numbers rather than powers; with more of them if it spans few decades."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if few else (1.0,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(FuncFormatter(lambda *_: ""))


def _legend(figure: Figure, *panels: Axes, columns: int = 4) -> None:
    entries: dict[str, Any] = {}
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    if entries:
        labels, handles = list(entries), list(entries.values())
        columns = columns if max(map(len, labels)) < 24 else 2
        figure.legend(handles, labels, loc="outside upper left", ncols=min(len(labels), columns))


def _names(tables: Iterable[Iterable[str]]) -> list[str]:
    return list(dict.fromkeys(name for table in tables for name in table))


def _svg(figure: Figure, key: str, alt: str) -> Markup:
    """Draw to an `<svg>` element whose ids start with `key`, so that many fit on one page."""
    stream = io.StringIO()
    figure.patch.set_visible(False)
    for axes in figure.axes:
        axes.patch.set_visible(False)
    FigureCanvasSVG(figure).print_svg(stream, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = stream.getvalue()
    body = svg[svg.index("<svg") :]
    opening, rest = body.split(">", 1)
    view = re.search(r'viewBox="[^"]*"', opening)
    assert view is not None
    rest = re.sub(r'\bid="', f'id="{key}-', rest)
    rest = re.sub(r'(url\(|xlink:href=")#', lambda match: f"{match[1].removeprefix('xlink:')}#{key}-", rest)
    rest = re.sub("|".join(_VARIABLES), lambda match: _VARIABLES[match[0]], rest)
    return Markup(f'<svg {view[0]} role="img" aria-label="{escape(alt)}">{rest.strip()}')

"""Put the page together: read the folders, and fill the template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from tightrope.errors import InputError
from tightrope.files import write_atomically
from tightrope.report.comparison import (
    Row,
    comparison,
    differences,
    held_out_compared,
    margins_compared,
    picture,
    sensitivity,
    stages_compared,
)
from tightrope.report.examples import Example, Load, examples, loader
from tightrope.report.facts import facts_of, recorded_of, summary_of, wide_facts_of
from tightrope.report.figures import STATUS_COLOURS, Plot
from tightrope.report.radii import RadiiView, radii_of_all, radii_view, with_names
from tightrope.report.read import Run, read_run
from tightrope.report.text import number_text
from tightrope.report.training import training_plots
from tightrope.report.verdicts import CertificateView, LayerRow, certificate_view, layer_rows


@dataclass(frozen=True)
class RunView:
    """A run as the page shows it."""

    anchor: str
    name: str
    facts: list[tuple[str, str]]
    wide_facts: list[tuple[str, str]]
    missing: list[str]
    recorded: list[tuple[str, str]]
    recipe: str
    certificates: list[CertificateView] = field(default_factory=list)
    radii: RadiiView | None = None
    attacks: int = 0
    examples: list[Example] = field(default_factory=list)
    no_examples: str = ""
    plots: list[Plot] = field(default_factory=list)
    layers: list[LayerRow] = field(default_factory=list)

    @property
    def summary(self) -> str:
        """Data, model, method and training eps in one line."""
        return summary_of(dict(self.facts))


def write_report(runs: Sequence[Path], out: Path) -> None:
    """Write one self-contained HTML page on one or several run or results folders.

    The page needs no network and no other file. Nothing is downloaded: where the data set of a successful
    attack is not at hand, the page says so. `out` is replaced only once the page is complete.

    Args:
        runs: the folders, in the order in which the page shows them.
        out: the HTML file to write; its folder is made if need be.

    Raises:
        InputError: no folder is given, one is not a run folder, a file in it is broken, or `out` cannot be
            written.

    Example:
        write_report([Path("runs/a"), Path("runs/b")], Path("report.html"))
    """
    read = _read(runs)
    load = loader()
    views = [
        _run(label, run, f"run{place}", load) for place, (label, run) in enumerate(read.items(), start=1)
    ]
    several = len(views) > 1
    title = "Comparison of robustness runs" if several else f"Robustness report: {views[0].name}"
    _write(out, title, read, views, compared=several)


def compare(runs: Sequence[Path], out: Path | None = None) -> list[Row]:
    """Run or results folders side by side: a line for every certify file, or for what `result.json` records.

    Args:
        runs: the folders, in the order in which they are shown.
        out: an HTML file for the table and one picture of it; None writes none.

    Raises:
        InputError: no folder is given, one is not a run folder, a file in it is broken, or `out` cannot be
            written.
    """
    read = _read(runs)
    if out is not None:
        _write(out, "Comparison of robustness runs", read, [], compared=True)
    return comparison(read)


def _read(runs: Sequence[Path]) -> dict[str, Run]:
    if not runs:
        raise InputError("no run folder was given; give at least one that `tightrope train --out` made")
    return dict(zip(_labels(runs), map(read_run, runs), strict=True))


def _labels(runs: Sequence[Path]) -> list[str]:
    """Folder names; whole paths where two folders have the same name."""
    names = [path.resolve().name for path in runs]
    labels = [
        name if names.count(name) == 1 else str(path.resolve())
        for name, path in zip(names, runs, strict=True)
    ]
    if len(set(labels)) < len(labels):
        raise InputError(f"a run folder was given twice among {', '.join(map(str, runs))}; give each once")
    return labels


def _write(
    out: Path, title: str, read: Mapping[str, Run], views: Sequence[RunView], *, compared: bool
) -> None:
    """Write the page: the comparison, if there is one, and what is said of each run."""
    rows = comparison(read) if compared else []
    render(
        out,
        "report.html.j2",
        title=title,
        runs=views,
        count=number_text(len(read), "run"),
        compared=compared,
        rows=rows,
        costs=any(row.cost for row in rows),
        unlike=differences(rows),
        picture=picture(rows) if any(row.setting for row in rows) else None,
        curves=held_out_compared(read) if compared else None,
        staged=stages_compared(read) if compared else None,
        sensitivity=sensitivity(list(read.values())),
        margins=list(margins_compared(read)),
        all_radii=radii_of_all(read) if compared else None,
        statuses=STATUS_COLOURS,
    )


def render(out: Path, template: str, **content: Any) -> None:
    """Fill a template of this folder, and write the page.

    Raises:
        InputError: if `out` cannot be written.
    """
    templates = Environment(
        loader=PackageLoader("tightrope.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = templates.get_template(template).render(content)
    write_atomically(out, page)


def _run(label: str, run: Run, anchor: str, load: Load) -> RunView:
    attacks = {verdict.index for one in run.certificates for verdict in one.verdicts if verdict.witness}
    drawn, why_none = examples(run.certificates, load)
    return RunView(
        anchor=anchor,
        name=label,
        facts=list(facts_of(run).items()),
        wide_facts=list(wide_facts_of(run)),
        missing=run.missing,
        recorded=list(recorded_of(run)),
        recipe=run.recipe_text,
        certificates=[
            certificate_view(one, f"{anchor}-certificate{place}")
            for place, one in enumerate(run.certificates)
        ],
        radii=radii_view(list(with_names(run.radii)), anchor) if run.radii else None,
        attacks=len(attacks),
        examples=drawn,
        no_examples=why_none,
        plots=list(training_plots(run.epochs, anchor)),
        layers=list(layer_rows(run)),
    )

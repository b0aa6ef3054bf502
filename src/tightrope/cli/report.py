"""`report` and `compare`: pages and tables on finished runs."""

from __future__ import annotations

from pathlib import Path

import click

from tightrope.cli.options import FILE, FOLDER, json_option
from tightrope.cli.tables import cell, print_table
from tightrope.errors import InputError
from tightrope.files import to_json
from tightrope.tune.found import read_search


@click.command("report")
@click.argument("runs", nargs=-1, required=True, type=FOLDER)
@click.option("--out", type=FILE, help="HTML file.  [default: report.html in the first run folder]")
def report_command(runs: tuple[Path, ...], out: Path | None) -> None:
    """Write one self-contained HTML page on one or several RUNS, or on one search of `tightrope tune`."""
    from tightrope.report import write_report, write_search  # matplotlib takes half a second to import

    out = out or runs[0] / "report.html"
    if len(runs) > 1:
        _refuse_searches(runs, "report on it alone")
    if _is_search(runs[0]):
        write_search(read_search(runs[0]), out)
    else:
        write_report(list(runs), out)
    click.echo(f"report: {out}")


def _is_search(folder: Path) -> bool:
    return (folder / "tune.json").is_file()


def _refuse_searches(runs: tuple[Path, ...], instead: str) -> None:
    """Raise an InputError if one of several folders holds a search, which is no run."""
    for folder in filter(_is_search, runs):
        raise InputError(f"{folder} is a search: {instead}, or name runs in {folder / 'trials'}")


@click.command("compare")
@click.argument("runs", nargs=-1, required=True, type=FOLDER)
@click.option("--out", type=FILE, help="HTML page with the table and a picture of it.")
@json_option
def compare_command(runs: tuple[Path, ...], out: Path | None, as_json: bool) -> None:
    """Put RUNS side by side: clean, attacked and certified accuracy, and cost where it is known.

    A run folder has a line for each of its certify files; a results folder without any has one for the
    means that it records.
    """
    from tightrope.report import compare, differences

    _refuse_searches(runs, "`tightrope report` shows its trials side by side")
    rows = compare(list(runs), out)
    columns = ("run", "method", "data", "eps", "verifier", "examples", "clean", "attacked", "certified")
    table = [[*columns, "cost"]]
    for row in rows:
        cells = {name: cell(row.facts[name], name) for name in columns}
        if row.facts["norm"] not in (None, "inf"):
            cells["eps"] += f" l_{row.facts['norm']}"
        table.append([*cells.values(), row.cost or "-"])
    print_table(table, left=5, err=as_json)
    if unlike := differences(rows):
        click.echo(f"warning: {unlike}", err=True)
    if out is not None:
        click.echo(f"comparison: {out}", err=True)
    if as_json:
        click.echo(to_json({"runs": [row.facts for row in rows]}))

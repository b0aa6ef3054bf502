"""Tables on the terminal."""

from __future__ import annotations

from typing import Any

import click


def print_table(table: list[list[str]], left: int, err: bool) -> None:
    """Print lines in columns, so many of them flush left."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        cells = [
            cell.ljust(width) if place < left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        click.echo("  ".join(cells).rstrip(), err=err)


def cell(value: Any, name: str) -> str:
    """A value of the column `name` as text."""
    if value is None:
        return "-"
    if name in ("clean", "attacked", "certified"):
        return f"{value:.2%}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)

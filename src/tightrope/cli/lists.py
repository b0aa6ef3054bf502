"""`list`: what can be named."""

from __future__ import annotations

from collections.abc import Callable

import click

from tightrope.data import names as data_names
from tightrope.files import to_json
from tightrope.models import describe
from tightrope.models import names as model_names
from tightrope.train import METHODS, MODIFIERS
from tightrope.verify import VERIFIERS


@click.command("list")
@click.argument("what", type=click.Choice(["methods", "modifiers", "models", "data", "verifiers"]))
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
def list_command(what: str, as_json: bool) -> None:
    """List what can be named."""
    listings: dict[str, Callable[[], dict[str, str]]] = {
        "methods": lambda: {name: _first_line(function) for name, function in METHODS.items()},
        "modifiers": lambda: {name: _first_line(function) for name, function in MODIFIERS.items()},
        "models": lambda: {name: describe(name) for name in model_names()},
        "data": lambda: dict.fromkeys(data_names(), ""),
        "verifiers": lambda: {
            name: " -> ".join(s.name for s in stages) or "attack only" for name, stages in VERIFIERS.items()
        },
    }
    listing = listings[what]()
    if as_json:
        click.echo(to_json(listing))
        return
    width = max(map(len, listing))
    for name, text in listing.items():
        click.echo(f"{name:{width}}  {text}".rstrip())
    if what == "models":
        click.echo("note: those without skip connections also go by NAME-bn: with BatchNorm", err=True)


def _first_line(function: Callable[..., object]) -> str:
    return (function.__doc__ or "").strip().split("\n")[0]

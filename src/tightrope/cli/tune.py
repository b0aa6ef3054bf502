"""`tune`: search the ranges of a recipe, and say what was found."""

from __future__ import annotations

from pathlib import Path

import click

from tightrope.cli.options import (
    COUNT,
    FILE,
    FOLDER,
    SEED,
    device_option,
    json_option,
    keeping,
    number,
    time,
    use_threads,
)
from tightrope.cli.tables import cell, print_table
from tightrope.errors import InputError, TightropeError
from tightrope.files import to_json, write_atomically
from tightrope.recipes import assign, read_recipe
from tightrope.train import Interrupted
from tightrope.tune import MARGIN, read_search, search


@click.command("tune")
@click.argument("recipe", required=False, type=FILE)
@click.option("--out", type=FOLDER, help="Folder of the search.  [default: runs/tune-RECIPE]")
@click.option(
    "--trials",
    type=COUNT,
    default=20,
    show_default=True,
    help="Trials in all, with those of a search that is resumed.",
)
@click.option(
    "--jobs",
    type=COUNT,
    default=1,
    show_default=True,
    help="Trials at once, each in a process of one thread.",
)
@click.option("--budget", type=time, help="Begin no trial that would not be done in this time: 90s, 15m, 2h.")
@click.option(
    "--epochs",
    type=COUNT,
    help="Passes over the data in each trial.  [default: the recipe's]",
)
@click.option("--seed", type=SEED, help="Seed of the trials and of the search.  [default: the recipe's]")
@click.option(
    "--prune-margin",
    type=number,
    default=MARGIN,
    show_default=True,
    help="Stop a trial behind its ramp once a finished one was better by this share of the held-out "
    "examples in both accuracies, above 0; 1 stops none.",
)
@device_option
@click.option(
    "--threads",
    type=COUNT,
    callback=use_threads,
    expose_value=False,
    help="Processor threads of a single job.  [default: all]",
)
@click.option("--resume", is_flag=True, help="Go on with the search in --out.")
@json_option
def tune_command(
    recipe: Path | None,
    out: Path | None,
    trials: int,
    jobs: int,
    budget: float | None,
    epochs: int | None,
    seed: int | None,
    prune_margin: float,
    device: str,
    resume: bool,
    as_json: bool,
) -> None:
    """Search the ranges that RECIPE declares in [tune]: clean against certified accuracy.

    Both are measured on held-out training examples, never on the test set. Each trial is a run folder in
    OUT/trials; those that no other beats in both are listed, and written to OUT/front.json and
    OUT/report.html.

    \b
    A search that was stopped goes on with:   tightrope tune --resume --out OUT
    A trial's recipe repeats its training:    tightrope train OUT/trials/0007/recipe.toml --out RUN
    """  # noqa: D301 -- \b, for click, is the character
    if recipe is None:
        if not resume or out is None:
            raise InputError("say what to search: a RECIPE with a section [tune], or --resume --out OUT")
        recipe = out / "recipe.toml"
        if not recipe.exists():
            raise InputError(f"{out} holds no search to resume: there is no {recipe}")
    out = out or Path("runs") / f"tune-{recipe.stem}"
    content = read_recipe(recipe)
    if seed is not None:
        content["seed"] = seed
    if epochs is not None:
        assign(content, "training.epochs", epochs)
    if not 0 < prune_margin <= 1:
        raise InputError(f"--prune-margin is a share above 0 and at most 1, got {prune_margin:g}")
    try:
        with keeping(out / "tune.json"):
            search(
                content,
                str(recipe),
                out,
                trials=trials,
                jobs=jobs,
                budget=budget,
                margin=prune_margin,
                device=device,
                resume=resume,
            )
    except Interrupted:
        _say_what_was_found(out, as_json)
        raise
    if not _say_what_was_found(out, as_json):
        if not any(out.glob("trials/*")):
            raise TightropeError("no trial was begun: the budget is too short for one")
        raise TightropeError(
            f"no trial was finished; why, say the files trial.json and train.log in {out}/trials"
        )


def _say_what_was_found(out: Path, as_json: bool) -> bool:
    """Print the front, and write it down; whether there is one."""
    from tightrope.report import write_search

    found = read_search(out)
    if not found.front:
        return False
    summary = found.summary()
    write_atomically(out / "front.json", to_json(summary, indent=2) + "\n")
    write_search(found, out / "report.html")
    keys = list(found.ranges)
    table = [["trial", "clean", "certified", *keys, "epochs", "seconds"]]
    for trial in summary["front"]:
        accuracies = [cell(trial[name], name) for name in ("clean", "certified")]
        values = [cell(trial["values"][key], key) for key in keys]
        table.append(
            [str(trial["trial"]), *accuracies, *values, str(trial["epochs"]), f"{trial['seconds']:.1f}"]
        )
    print_table(table, left=1, err=as_json)
    click.echo(
        f"{len(found.front)} of {summary['finished']} finished trials are beaten by none; "
        f"{summary['pruned']} pruned, {summary['failed']} failed; on {summary['held_out']} held-out training "
        f"examples, at eps {summary['test_eps']:.4g}",
        err=True,
    )
    click.echo(f"report: {out / 'report.html'}", err=True)
    if as_json:
        click.echo(to_json(summary))
    return True

"""The command line: `tightrope --help`."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import click
import torch

from tightrope.api import find_device, run_recipe
from tightrope.data import as_source, load
from tightrope.errors import InputError, TightropeError
from tightrope.models import build
from tightrope.recipes import override, parse_recipe, read_recipe
from tightrope.train import Interrupted
from tightrope.train.checkpoint import derive_seed


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="tightrope")
def cli() -> None:
    """Train neural networks that are provably robust, and prove it, input by input."""


@cli.command("train")
@click.argument("recipe", required=False, type=click.Path(path_type=Path))
@click.option("--data", help="Data set: digits, mnist, cifar10, or a .npz file.")
@click.option("--model", help="Network by name (tightrope list models), or package.module:factory.")
@click.option("--method", help="Training method (tightrope list methods).")
@click.option("--eps", help="Training radius in pixel units, such as 0.3 or 8/255.")
@click.option("--test-eps", help="Radius to be certified at.  [default: the training radius]")
@click.option("--epochs", type=int, help="Passes over the data; schedules keep their shape.")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Any key of the recipe.")
@click.option("--seed", type=int, help="One seed, one result on one machine.  [default: 0]")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, ...")
@click.option("--threads", type=click.IntRange(min=1), help="Processor threads.  [default: all]")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Run folder.  [default: runs/DATA-MODEL-METHOD-EPS]"
)
@click.option("--resume", is_flag=True, help="Go on from the run folder's checkpoint.")
def train_command(
    recipe: Path | None,
    data: str | None,
    model: str | None,
    method: str | None,
    eps: str | None,
    test_eps: str | None,
    epochs: int | None,
    assignments: tuple[str, ...],
    seed: int | None,
    device: str,
    threads: int | None,
    out: Path | None,
    resume: bool,
) -> None:
    """Train a network by a RECIPE file, or by --data, --model, --method and --eps."""
    if resume and recipe is None and out is not None and method is None:
        recipe = out / "recipe.toml"
    content = read_recipe(recipe) if recipe else {}
    options = {"data": data, "model": model, "seed": seed, "test_eps": test_eps}
    content.update({key: value for key, value in options.items() if value is not None})
    for table, key, value in (
        ("method", "name", method),
        ("method", "eps", eps),
        ("training", "epochs", epochs),
    ):
        if value is not None:
            content.setdefault(table, {})[key] = value
    override(content, assignments)
    for key in ("data", "model", "method"):
        if key not in content:
            raise InputError(
                f"say what to train: give a RECIPE, or --data, --model and --method ({key} is missing)"
            )
    parsed = parse_recipe(content, str(recipe or "the command line"))
    if threads:
        torch.set_num_threads(threads)
    built = parsed.build_method()
    parsed = parsed.with_test_eps(built)
    out = (
        out
        or Path("runs") / f"{Path(parsed.data or '').stem}-{parsed.model}-{built.name}-{parsed.test_eps:.4g}"
    )
    dataset = load(parsed.data or "")
    torch.manual_seed(derive_seed(parsed.seed, "network", 0))
    normalise = parsed.normalise.model_dump() if parsed.normalise else {}
    network = build(parsed.model or "", dataset.train.shape, dataset.classes, **normalise)
    run_recipe(parsed, built, network, as_source(dataset.train, find_device(device)), out=out, resume=resume)
    click.echo(f"trained: {out}", err=True)


def main() -> None:
    """Run the command line; turns errors into one clear line and an exit status."""
    warnings.showwarning = lambda message, *_args, **_kwargs: click.echo(f"warning: {message}", err=True)
    try:
        cli(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (Interrupted, click.Abort, KeyboardInterrupt):
        click.echo(
            "interrupted; everything up to the last completed step is kept: go on with --resume", err=True
        )
        sys.exit(130)
    except TightropeError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)

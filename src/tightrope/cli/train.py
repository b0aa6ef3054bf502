"""`train` and `quickstart`: from a recipe to a run folder."""

from __future__ import annotations

import tomllib
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

from tightrope.api import certify, find_device, make_network, prepare, resolve, run_recipe, warn_of_settings
from tightrope.cli.options import (
    COUNT,
    FILE,
    FOLDER,
    SEED,
    device_option,
    json_option,
    keeping,
    number,
    threads_option,
    time,
    unused,
)
from tightrope.data import as_source, load
from tightrope.errors import InputError, warn
from tightrope.files import to_json
from tightrope.progress import duration
from tightrope.recipes import Recipe, add_modifier, assign, override, parse_recipe, read_recipe
from tightrope.region import REGIONS
from tightrope.targets import load_target
from tightrope.train import METHODS
from tightrope.train.options import options_of
from tightrope.train.predict import predict_seconds


@click.command("train")
@click.argument("recipe", required=False, type=FILE)
@click.option(
    "--data", help="Data set (tightrope list data), or a .npz file with x_train, y_train, x_test, y_test."
)
@click.option("--model", help="Network by name (tightrope list models), or package.module:factory.")
@click.option("--method", help="Training method (tightrope list methods).")
@click.option("--eps", type=number, help="Training radius in pixel units, above 0, such as 0.3 or 8/255.")
@click.option(
    "--test-eps", type=number, help="Radius to be certified at.  [default: the recipe's; the training radius]"
)
@click.option(
    "--norm",
    type=click.Choice(list(REGIONS)),
    help="In which norm an input moves by at most eps.  [default: the recipe's; inf]",
)
@click.option(
    "--epochs",
    type=COUNT,
    help="Passes over the data; schedules keep their shape.  [default: the method's]",
)
@click.option(
    "--with",
    "modifiers",
    multiple=True,
    metavar="MODIFIER",
    help="Add to the method (tightrope list modifiers), as often as needed; --set modifiers.NAME.KEY=VALUE "
    "sets its options.",
)
@click.option(
    "--set",
    "assignments",
    multiple=True,
    metavar="KEY=VALUE",
    help="Set any key of the recipe, such as training.batch=256; as often as needed.",
)
@click.option("--budget", type=time, help="Choose the epochs so as to finish in this time: 90s, 15m, 2h.")
@click.option("--dry-run", is_flag=True, help="Print the whole recipe and the predicted time, and stop.")
@click.option("--seed", type=SEED, help="One seed, one result on one machine.  [default: the recipe's; 0]")
@device_option
@threads_option
@click.option("--out", type=FOLDER, help="Run folder.  [default: runs/DATA-MODEL-METHOD-TEST_EPS]")
@click.option("--resume", is_flag=True, help="Go on from the run folder's checkpoint.")
@json_option
def train_command(
    recipe: Path | None,
    data: str | None,
    model: str | None,
    method: str | None,
    eps: float | None,
    test_eps: float | None,
    norm: str | None,
    epochs: int | None,
    modifiers: tuple[str, ...],
    assignments: tuple[str, ...],
    budget: float | None,
    dry_run: bool,
    seed: int | None,
    device: str,
    out: Path | None,
    resume: bool,
    as_json: bool,
) -> None:
    """Train a network by a RECIPE file, or by --data, --model, --method and --eps.

    A run that was stopped goes on with: tightrope train --resume --out RUN
    """
    if resume and recipe is None and method is None:
        if out is None:
            raise InputError("say which run to resume: --out RUN")
        recipe = out / "recipe.toml"
        if not recipe.exists():
            raise InputError(f"{out} holds no run to resume: there is no {recipe}")
    content = read_recipe(recipe) if recipe else {}
    given: dict[str, Any] = {"data": data, "model": model, "seed": seed, "test_eps": test_eps, "norm": norm}
    given |= {"method.name": method, "method.eps": eps, "training.epochs": epochs}
    for key, value in given.items():
        if value is not None:
            assign(content, key, value)
    for name in modifiers:
        add_modifier(content, name)
    if eps is not None and method in METHODS and "eps" not in options_of(METHODS[method]).model_fields:
        raise InputError(f"{method} trains without a radius: say what to certify at with --test-eps instead")
    if recipe is None and method in METHODS and eps is None:
        needed = options_of(METHODS[method]).model_fields.get("eps")
        if needed and needed.is_required() and not any(part.startswith("method.eps") for part in assignments):
            raise InputError(f"{method} needs the radius to train at: --eps 0.3, or --eps 8/255")
    if epochs is not None and budget is not None:
        raise InputError("--budget chooses the epochs: give --epochs or --budget, not both")
    override(content, assignments)
    if "tune" in content:
        click.echo("note: [tune] is left out; `tightrope tune` searches what it declares", err=True)
    if content.keys() - Recipe.model_fields.keys() - {"tune"}:
        parse_recipe(content, str(recipe or "the command line"))  # names what is unknown
    for key in ("data", "model", "method"):
        if key not in content and resume and recipe is not None and out is not None and recipe.parent == out:
            if "method" not in content:
                raise InputError(f"{recipe} is damaged (method is missing): restore it")
            raise InputError(f"{out} was trained from Python: resume it there, by fit(..., resume=True)")
        if key not in content:
            raise InputError(
                f"say what to train: a RECIPE, or --data, --model and --method ({key} is missing)"
            )
    parsed = parse_recipe(content, str(recipe or "the command line"))
    _train(parsed, device, out, resume, budget=budget, dry_run=dry_run, as_json=as_json)


def _train(
    recipe: Recipe,
    device: str,
    out: Path | None,
    resume: bool = False,
    budget: float | None = None,
    dry_run: bool = False,
    as_json: bool = False,
) -> None:
    data, model = recipe.data, recipe.model
    assert data is not None
    assert model is not None
    method = recipe.build_method()
    dataset = load(data)
    source = as_source(dataset.train, find_device(device))
    recipe = resolve(recipe, method, source)
    parts = (Path(data).stem, model.replace(":", "-"), method.name, *method.modifiers)
    out = out or Path("runs") / f"{'-'.join(parts)}-{recipe.test_eps:.4g}"
    network = make_network(recipe, dataset)
    if budget is not None or dry_run:
        graph, index, held_out = prepare(recipe, method, network, source)
        seconds = predict_seconds(
            graph, method, recipe.training, len(index), held_out, recipe.test_eps or 0.0
        )
        if budget is not None:
            recipe, seconds = _within(budget, recipe, seconds)
        if dry_run:
            warn_of_settings(recipe, method)
            _print_plan(recipe, network, seconds, find_device(device), as_json)
            return
    with keeping(out / "checkpoint" / "last.safetensors"):
        run = run_recipe(recipe, method, network, source, out=out, resume=resume)
    try:
        last = run.metrics()[-1]
    except InputError as error:  # a finished run whose metrics were lost
        raise InputError(f"trained {out}, but {error}") from None
    where = "" if recipe.norm == "inf" else f" in l_{recipe.norm}"
    click.echo(
        f"trained {out} in {last['seconds']:.1f} s; held out: clean {last['held_out']['clean']:.2%}, "
        f"certified {last['held_out']['certified']:.2%} at eps {last['held_out']['eps']:.4g}{where}",
        err=as_json,
    )
    if as_json:
        facts = {key: last[key] for key in ("epoch", "seconds", "losses", "held_out")}
        click.echo(to_json({"run": str(out), **facts}))


def _within(budget: float, recipe: Recipe, seconds: float) -> tuple[Recipe, float]:
    """The recipe with as many epochs as `budget` has time for, and the seconds that they will take."""
    epoch = seconds / recipe.training.epochs
    epochs = max(1, int(budget / epoch))
    if epoch > budget:
        warn(f"a budget of {budget:.0f} s is less than one epoch takes, about {duration(epoch)}")
    click.echo(f"budget {budget:.0f} s: epochs {epochs}, of about {epoch:.2g} s each", err=True)
    training = recipe.training.model_copy(update={"epochs": epochs})
    return recipe.model_copy(update={"training": training}), epochs * epoch


def _print_plan(
    recipe: Recipe, network: nn.Module, seconds: float, device: torch.device, as_json: bool
) -> None:
    parameters = sum(p.numel() for p in network.parameters())
    click.echo(recipe.to_toml(), err=as_json)
    click.echo(f"# {parameters:,} parameters", err=as_json)
    click.echo(f"# about {duration(seconds)} on {device}", err=as_json)
    if as_json:
        settled = recipe.model_dump(exclude_none=True, mode="json")
        click.echo(to_json({"recipe": settled, "parameters": parameters, "seconds": seconds}))


@click.command("quickstart")
@click.option("--out", type=FOLDER, help="Run folder.  [default: runs/quickstart, or the next free name]")
def quickstart_command(out: Path | None) -> None:
    """Train a certifiably robust classifier of small digits, certify it, and write a report."""
    from tightrope.report import write_report

    with as_file(files("tightrope") / "quickstart.toml") as path:
        content = tomllib.loads(path.read_text())
    if out is not None and (out / "recipe.toml").exists():
        raise InputError(f"{out} holds a run already: choose another folder (--out)")
    out = out or unused(Path("runs/quickstart"))
    _train(parse_recipe(content, "the quickstart recipe"), "cpu", out)
    target = load_target(str(out))
    dataset = load(target.data or "")
    assert target.eps is not None
    result = certify(
        target.model,
        dataset.test,
        REGIONS["inf"](target.eps),
        out=out / f"certify-cascade-inf-{target.eps:.4g}.jsonl",
        name=dataset.name,
    )
    summary = result.summary()
    write_report([out], out / "report.html")
    click.echo(
        f"test set: {summary['examples']} digits, {summary['clean_accuracy']:.1%} classified correctly, "
        f"{summary['certified_accuracy']:.1%} certified: no change of at most {target.eps:g} in every pixel "
        "can change the answer"
    )
    click.echo(f"report: {out / 'report.html'}")

"""The command line: `tightrope --help`."""

from __future__ import annotations

import itertools
import re
import sys
import tomllib
import warnings
from collections.abc import Callable
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import click
import torch

from tightrope.api import certify, find_device, predict_seconds, prepare, run_recipe
from tightrope.attacks import Pgd
from tightrope.data import as_source, load
from tightrope.data import names as data_names
from tightrope.errors import InputError, TightropeError
from tightrope.files import to_json
from tightrope.models import build, describe
from tightrope.models import names as model_names
from tightrope.recipes import Recipe, override, parse_recipe, read_recipe
from tightrope.region import REGIONS
from tightrope.report import write_report
from tightrope.targets import Target, load_target, make_model
from tightrope.train import METHODS, Interrupted
from tightrope.train.checkpoint import derive_seed
from tightrope.train.schedules import parse_number
from tightrope.verify import CERTIFICATION_ATTACK, VERIFIERS, Certification


class Radius(click.ParamType[float]):
    """A number such as 0.3 or 8/255."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number that a text stands for."""
        try:
            return float(parse_number(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Duration(click.ParamType[float]):
    """A time such as 90s, 15m or 2h, in seconds."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The seconds that a text stands for."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", str(value))
        if match is None or float(match[1]) == 0:
            self.fail(f"expected a time such as 90s, 15m or 2h, got {value!r}", param, ctx)
        return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]


FOLDER = click.Path(path_type=Path)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="tightrope")
def cli() -> None:
    """Train neural networks that are provably robust, and prove it, input by input.

    Start with `tightrope quickstart`.
    """


# -------------------------------------------------------------------------------------------- train


@cli.command("train")
@click.argument("recipe", required=False, type=FOLDER)
@click.option("--data", help="Data set: digits, mnist, cifar10, or a .npz file.")
@click.option("--model", help="Network by name (tightrope list models), or package.module:factory.")
@click.option("--method", help="Training method (tightrope list methods).")
@click.option("--eps", type=Radius(), help="Training radius in pixel units, such as 0.3 or 8/255.")
@click.option("--test-eps", type=Radius(), help="Radius to be certified at.  [default: the training radius]")
@click.option(
    "--epochs", type=click.IntRange(min=1), help="Passes over the data; schedules keep their shape."
)
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Set any key of the recipe.")
@click.option(
    "--budget", type=Duration(), help="Choose the epochs so as to finish in this time: 90s, 15m, 2h."
)
@click.option("--dry-run", is_flag=True, help="Print the whole recipe and the predicted time, and stop.")
@click.option("--seed", type=int, help="One seed, one result on one machine.  [default: 0]")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, ...")
@click.option("--threads", type=click.IntRange(min=1), help="Processor threads.  [default: all]")
@click.option("--out", type=FOLDER, help="Run folder.  [default: runs/DATA-MODEL-METHOD-EPS]")
@click.option("--resume", is_flag=True, help="Go on from the run folder's checkpoint.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object as the last line.")
def train_command(
    recipe: Path | None,
    data: str | None,
    model: str | None,
    method: str | None,
    eps: float | None,
    test_eps: float | None,
    epochs: int | None,
    assignments: tuple[str, ...],
    budget: float | None,
    dry_run: bool,
    seed: int | None,
    device: str,
    threads: int | None,
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
    if threads:
        torch.set_num_threads(threads)
    content = read_recipe(recipe) if recipe else {}
    given = {"data": data, "model": model, "seed": seed, "test_eps": test_eps}
    content.update({key: value for key, value in given.items() if value is not None})
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
) -> Path:
    method = recipe.build_method()
    recipe = recipe.with_test_eps(method)
    name = f"{Path(recipe.data or '').stem}-{recipe.model}-{method.name}-{recipe.test_eps:.4g}"
    out = out or Path("runs") / name
    dataset = load(recipe.data or "")
    source = as_source(dataset.train, find_device(device))
    torch.manual_seed(derive_seed(recipe.seed, "network", 0))
    normalise = recipe.normalise.model_dump() if recipe.normalise else {}
    assert recipe.model is not None
    if ":" in recipe.model:
        network = make_model(recipe.model)
    else:
        network = build(recipe.model, dataset.train.shape, dataset.classes, **normalise)
    if budget is not None or dry_run:
        graph, index, held_out = prepare(recipe, network, source)
        seconds = predict_seconds(recipe, method, graph, index, held_out)
        if budget is not None:
            epochs = max(1, int(budget / (seconds / recipe.training.epochs)))
            training = recipe.training.model_copy(update={"epochs": epochs})
            seconds *= epochs / recipe.training.epochs
            recipe = recipe.model_copy(update={"training": training})
            click.echo(f"budget {budget:.0f} s: {epochs} epochs", err=True)
        if dry_run:
            click.echo(recipe.to_toml())
            click.echo(f"# {sum(p.numel() for p in network.parameters()):,} parameters")
            click.echo(f"# about {seconds:.0f} s on {find_device(device)}")
            return out
    run = run_recipe(recipe, method, network, source, out=out, resume=resume)
    last = run.metrics()[-1]
    click.echo(
        f"trained {out} in {last['seconds']:.0f} s; held out: clean {last['held_out']['clean']:.2%}, "
        f"certified {last['held_out']['certified']:.2%} at eps {last['held_out']['eps']:.4g}",
        err=as_json,
    )
    if as_json:
        facts = {key: last[key] for key in ("epoch", "seconds", "losses", "held_out")}
        click.echo(to_json({"run": str(out), **facts}))
    return out


# ------------------------------------------------------------------------------- certify and attack


def _judging(command: Callable[..., None]) -> Callable[..., None]:
    """The options that certify and attack share."""
    default = CERTIFICATION_ATTACK
    options = [
        click.argument("target"),
        click.option("--weights", type=FOLDER, help="Weights (.safetensors) of a factory target."),
        click.option("--data", help="Data set.  [default: what a run folder was trained on]"),
        click.option("--eps", type=Radius(), help="Radius in pixel units.  [default: the run's test eps]"),
        click.option("--norm", type=click.Choice(list(REGIONS)), default="inf", show_default=True),
        click.option("--first", type=click.IntRange(min=1), help="Only the first N test examples."),
        click.option("--attack-steps", type=click.IntRange(min=0), default=default.steps, show_default=True,
                     help="Gradient steps of the attack; 0 attacks not at all."),
        click.option("--attack-step", type=Radius(), default=default.step, show_default=True,
                     help="Length of a step, as a share of eps."),
        click.option("--attack-restarts", type=click.IntRange(1), default=default.restarts, show_default=True,
                     help="Random starts of the attack."),
        click.option("--seed", type=int, default=0, show_default=True, help="Seed of the random starts."),
        click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, ..."),
        click.option("--threads", type=click.IntRange(min=1), help="Processor threads.  [default: all]"),
        click.option("--out", type=FOLDER, help="File for the verdicts.  [default: in the run folder]"),
        click.option("--resume", is_flag=True, help="Go on with that file."),
        click.option("--json", "as_json", is_flag=True, help="Print a JSON object as the last line."),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


@cli.command("certify")
@_judging
@click.option("--verifier", default="cascade", show_default=True, help=f"One of {', '.join(VERIFIERS)}.")
def certify_command(target: str, verifier: str, **options: Any) -> None:
    """Prove or refute, input by input, that no perturbation within eps changes TARGET's answer.

    TARGET is a run folder, a results folder, or package.module:factory with --weights.
    """
    _judge(target, verifier, **options)


@cli.command("attack")
@_judging
def attack_command(target: str, **options: Any) -> None:
    """Look for perturbations within eps that change TARGET's answer."""
    _judge(target, "none", **options)


def _judge(
    target: str,
    verifier: str,
    weights: Path | None,
    data: str | None,
    eps: float | None,
    norm: str,
    first: int | None,
    attack_steps: int,
    attack_step: float,
    attack_restarts: int,
    seed: int,
    device: str,
    threads: int | None,
    out: Path | None,
    resume: bool,
    as_json: bool,
) -> Certification:
    if threads:
        torch.set_num_threads(threads)
    loaded = load_target(target, weights)
    data, eps = data or loaded.data, loaded.eps if eps is None else eps
    if data is None or eps is None:
        raise InputError(f"{target} does not say on what data or at which eps: give --data and --eps")
    attack = Pgd(attack_steps, attack_step, attack_restarts, loss="margin") if attack_steps else None
    dataset = load(data)
    out = out or _verdict_file(loaded, verifier, norm, eps, resume)
    result = certify(
        loaded.model,
        dataset.test,
        REGIONS[norm](eps),
        verifier=verifier,
        attack=attack,
        first=first,
        out=out,
        resume=resume,
        device=device,
        seed=seed,
        name=data,
    )
    summary = result.summary()
    attacked = (
        "not attacked" if attack is None else f"{summary['attacked_accuracy']:.2%} withstand the attack"
    )
    click.echo(
        f"{summary['examples']} examples, eps {eps:.4g} in l_{norm}: {summary['clean_accuracy']:.2%} correct, "
        f"{attacked}, {summary['certified_accuracy']:.2%} certified by {verifier} "
        f"({summary['undecided']} undecided; {summary['seconds']:.1f} s)",
        err=as_json,
    )
    if out is not None:
        click.echo(f"verdicts: {out}", err=True)
    if as_json:
        click.echo(to_json(summary))
    return result


def _verdict_file(target: Target, verifier: str, norm: str, eps: float, resume: bool) -> Path | None:
    """In a run folder, a file for these verdicts: the latest of its name to resume, else a new one."""
    if target.folder is None:
        return None
    path = target.folder / f"certify-{verifier}-{norm}-{eps:.4g}.jsonl"
    existing = [path, *sorted(target.folder.glob(f"{path.stem}-*.jsonl"), key=lambda p: p.stat().st_mtime)]
    return existing[-1] if resume else _free(path)


# ------------------------------------------------------------------------------------------- report


@cli.command("report")
@click.argument("runs", nargs=-1, required=True, type=FOLDER)
@click.option("--out", type=FOLDER, help="HTML file.  [default: report.html in the first run folder]")
def report_command(runs: tuple[Path, ...], out: Path | None) -> None:
    """Write one self-contained HTML page on one or several RUNS."""
    out = out or runs[0] / "report.html"
    write_report(list(runs), out)
    click.echo(f"report: {out}")


@cli.command("list")
@click.argument("what", type=click.Choice(["methods", "models", "data", "verifiers"]))
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
def list_command(what: str, as_json: bool) -> None:
    """List what can be named."""
    listings: dict[str, Callable[[], dict[str, str]]] = {
        "methods": lambda: {name: _first_line(function) for name, function in METHODS.items()},
        "models": lambda: {name: describe(name) for name in model_names()},
        "data": lambda: dict.fromkeys(data_names(), ""),
        "verifiers": lambda: {
            name: " -> ".join(s.name for s in stages) for name, stages in VERIFIERS.items()
        },
    }
    listing = listings[what]()
    if as_json:
        click.echo(to_json(listing))
        return
    width = max(map(len, listing))
    for name, text in listing.items():
        click.echo(f"{name:{width}}  {text}".rstrip())


def _first_line(function: Callable[..., object]) -> str:
    return (function.__doc__ or "").strip().split("\n")[0]


# --------------------------------------------------------------------------------------- quickstart


@cli.command("quickstart")
@click.option("--out", type=FOLDER, help="Run folder.  [default: runs/quickstart, or the next free name]")
def quickstart_command(out: Path | None) -> None:
    """Train a certifiably robust classifier of small digits, certify it, and write a report."""
    with as_file(files("tightrope") / "quickstart.toml") as path:
        content = tomllib.loads(path.read_text())
    out = out or _free(Path("runs/quickstart"))
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


def _free(path: Path) -> Path:
    """The path, or the first of PATH-2, PATH-3 ... that does not exist."""
    candidates = (path if n == 1 else path.with_stem(f"{path.stem}-{n}") for n in itertools.count(1))
    return next(candidate for candidate in candidates if not candidate.exists())


def main() -> None:
    """Run the command line; turns errors into one clear line and an exit status."""
    warnings.showwarning = lambda message, *_args, **_kwargs: click.echo(f"warning: {message}", err=True)
    try:
        cli(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (Interrupted, click.Abort, KeyboardInterrupt):
        click.echo("interrupted: what was done is kept; go on with --resume", err=True)
        sys.exit(130)
    except TightropeError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        click.echo(f"error: out of memory; lower training.batch, or take --device cpu ({error})", err=True)
        sys.exit(1)

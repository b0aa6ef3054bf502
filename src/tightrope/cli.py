"""The command line: `tightrope --help`."""

from __future__ import annotations

import errno
import itertools
import math
import re
import sys
import tomllib
import warnings
from collections.abc import Callable, Iterable
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, NoReturn

import click
import torch
from click.core import ParameterSource

from tightrope.api import (
    certify,
    find_device,
    latent_robustness,
    make_network,
    prepare,
    radius,
    resolve,
    run_recipe,
    warn_of_wide,
)
from tightrope.attacks import Pgd
from tightrope.checker import summary as summarise
from tightrope.data import Split, as_source, load
from tightrope.data import names as data_names
from tightrope.errors import InputError, SoundnessViolation, TightropeError
from tightrope.files import to_json, write_atomically
from tightrope.graph import trace
from tightrope.graph.onnx import write_onnx
from tightrope.models import describe
from tightrope.models import names as model_names
from tightrope.rechecking import recheck
from tightrope.recipes import Recipe, options_of, override, parse_recipe, read_recipe
from tightrope.region import REGIONS
from tightrope.targets import Target, load_target
from tightrope.train import METHODS, MODIFIERS, Interrupted
from tightrope.train.predict import predict_seconds
from tightrope.train.schedules import parse_number
from tightrope.tune import MARGIN, read_search, search
from tightrope.verify import (
    CERTIFICATION_ATTACK,
    LATENT_ATTACK,
    VERIFIERS,
    Certification,
    decide,
    read_vnnlib,
    write_robustness,
)
from tightrope.verify.pipeline import CHUNK
from tightrope.verify.radius import TIME_LIMIT


def number(text: str) -> float:
    """The number that an option such as 0.3 or 8/255 stands for."""
    try:
        return float(parse_number(text))
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def time(text: str) -> float:
    """The seconds that an option such as 90s, 15m or 2h stands for."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if match is None or float(match[1]) == 0:
        raise click.BadParameter(f"expected a time such as 90s, 15m or 2h, got {text!r}")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]


FILE = click.Path(dir_okay=False, path_type=Path)
FOLDER = click.Path(file_okay=False, path_type=Path)
SEED = click.IntRange(0, 2**32 - 1)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="tightrope")
def cli() -> None:
    """Train neural networks that are provably robust, and prove it, input by input.

    Start with `tightrope quickstart`.
    """


# -------------------------------------------------------------------------------------------- train


@cli.command("train")
@click.argument("recipe", required=False, type=FILE)
@click.option("--data", help="Data set (tightrope list data), or a .npz file.")
@click.option("--model", help="Network by name (tightrope list models), or package.module:factory.")
@click.option("--method", help="Training method (tightrope list methods).")
@click.option("--eps", type=number, help="Training radius in pixel units, above 0, such as 0.3 or 8/255.")
@click.option("--test-eps", type=number, help="Radius to be certified at.  [default: the training radius]")
@click.option(
    "--epochs",
    type=click.IntRange(min=1),
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
@click.option("--seed", type=SEED, help="One seed, one result on one machine.  [default: 0]")
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
    modifiers: tuple[str, ...],
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
        if not recipe.exists():
            raise InputError(f"{out} holds no run to resume: there is no {recipe}")
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
    for name in modifiers:
        content.setdefault("modifiers", {}).setdefault(name, {})
    if eps is not None and method in METHODS and "eps" not in options_of(METHODS[method]).model_fields:
        raise InputError(f"{method} trains without a radius: say what to certify at with --test-eps instead")
    override(content, assignments)
    if "tune" in content:
        click.echo("note: [tune] is left out; `tightrope tune` searches what it declares", err=True)
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
        graph, index, held_out = prepare(recipe, network, source)
        seconds = predict_seconds(
            graph, method, recipe.training, len(index), held_out, recipe.test_eps or 0.0
        )
        if budget is not None:
            epoch = seconds / recipe.training.epochs
            epochs = max(1, int(budget / epoch))
            training = recipe.training.model_copy(update={"epochs": epochs})
            recipe, seconds = recipe.model_copy(update={"training": training}), epochs * epoch
            click.echo(f"budget {budget:.0f} s: epochs {epochs}, of about {epoch:.2g} s each", err=True)
        if dry_run:
            parameters = sum(p.numel() for p in network.parameters())
            click.echo(recipe.to_toml(), err=as_json)
            click.echo(f"# {parameters:,} parameters", err=as_json)
            click.echo(f"# about {seconds:.0f} s on {find_device(device)}", err=as_json)
            if as_json:
                settled = recipe.model_dump(exclude_none=True, mode="json")
                click.echo(to_json({"recipe": settled, "parameters": parameters, "seconds": seconds}))
            return out
    run = run_recipe(recipe, method, network, source, out=out, resume=resume)
    last = run.metrics()[-1]
    click.echo(
        f"trained {out} in {last['seconds']:.1f} s; held out: clean {last['held_out']['clean']:.2%}, "
        f"certified {last['held_out']['certified']:.2%} at eps {last['held_out']['eps']:.4g}",
        err=as_json,
    )
    if as_json:
        facts = {key: last[key] for key in ("epoch", "seconds", "losses", "held_out")}
        click.echo(to_json({"run": str(out), **facts}))
    return out


# ----------------------------------------------------------------------- certify, attack and radius


_Option = Callable[[Callable[..., None]], Callable[..., None]]


def _asking(eps: str, *own: _Option) -> _Option:
    """The options of every command that looks at test examples; `own` are those of one command."""
    options: list[_Option] = [
        click.argument("target"),
        click.option("--weights", type=FILE, help="Weights (.safetensors) of a factory target."),
        click.option("--data", help="Data set, or a .npz file.  [default: what a run was trained on]"),
        click.option("--eps", type=number, help=eps),
        click.option("--norm", type=click.Choice(list(REGIONS)), default="inf", show_default=True,
                     help="In which norm an input moves by at most eps."),
        click.option("--first", type=click.IntRange(min=1),
                     help="Only the first N test examples.  [default: all]"),
        *own,
        click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, ..."),
        click.option("--threads", type=click.IntRange(min=1), help="Processor threads.  [default: all]"),
        click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True,
                     help="Processes, each of one thread, among which batches of examples are shared."),
        click.option("--ray", metavar="ADDRESS",
                     help="Share them among the processors of a Ray cluster instead: HOST:PORT, local (start "
                     "one here), or auto (the one that runs here, else local)."),
        click.option("--out", type=FILE, help="File for what is found.  [default: in the run folder]"),
        click.option("--resume", is_flag=True, help="Go on with that file."),
        click.option("--json", "as_json", is_flag=True, help="Print a JSON object as the last line."),
    ]  # fmt: skip

    def add(command: Callable[..., None]) -> Callable[..., None]:
        for option in reversed(options):
            command = option(command)
        return command

    return add


_judging = _asking(
    "Radius in pixel units, such as 0.3 or 8/255.  [default: the run's test eps]",
    click.option("--attack-steps", type=click.IntRange(min=0), default=CERTIFICATION_ATTACK.steps,
                 show_default=True, help="Gradient steps of the attack; 0 attacks not at all."),
    click.option("--attack-step", type=number, default=CERTIFICATION_ATTACK.step, show_default=True,
                 help="Length of a step, as a share of eps."),
    click.option("--attack-restarts", type=click.IntRange(1), default=CERTIFICATION_ATTACK.restarts,
                 show_default=True, help="Random starts of the attack."),
    click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of the random starts."),
)  # fmt: skip


def _verifier(names: Iterable[str], usual: str = "cascade") -> _Option:
    return click.option("--verifier", default=usual, show_default=True, help=f"One of {', '.join(names)}.")


@cli.command("certify")
@_judging
@_verifier(VERIFIERS)
@click.option(
    "--time-limit",
    type=number,
    default=60.0,
    show_default=True,
    help="Seconds that each example may take in each stage of the verifier, on average.",
)
@click.option(
    "--certificates",
    is_flag=True,
    help="Store what tightrope recheck needs to repeat the proofs, in a folder beside the verdicts.",
)
@click.option(
    "--vnnlib",
    "properties",
    type=FILE,
    help="Decide this property (VNN-LIB) instead of the robustness of test examples.",
)
def certify_command(target: str, verifier: str, properties: Path | None, **options: Any) -> None:
    """Prove or refute, input by input, that no perturbation within eps changes TARGET's answer.

    TARGET is a run folder, a results folder, an .onnx file, or package.module:factory with --weights.

    With --vnnlib FILE, the answer is unsat (the property is proved), sat (a counter-example follows), or
    unknown.
    """
    if properties is None:
        _judge(target, verifier, **options)
    else:
        _decide(target, verifier, properties, **options)


@cli.command("attack")
@_judging
@click.option(
    "--latent",
    metavar="NODE",
    help="Attack inside the latent region behind this activation instead (maar.txt, eq. 26).  "
    "[there: 150 steps of 0.01, where noise lies in -1 to 1]",
)
@click.pass_context
def attack_command(context: click.Context, /, target: str, latent: str | None, **options: Any) -> None:
    """Look for perturbations within eps that change TARGET's answer."""
    if latent is None:
        _judge(target, "none", **options)
        return
    usual = {"attack_steps": LATENT_ATTACK.steps, "attack_step": LATENT_ATTACK.step}
    unsaid = ParameterSource.DEFAULT
    options |= {k: v for k, v in usual.items() if context.get_parameter_source(k) is unsaid}
    _attack_latent(target, latent, **options)


def _attack_latent(
    target: str,
    node: str,
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
    jobs: int,
    ray: str | None,
    out: Path | None,
    resume: bool,
    as_json: bool,
) -> None:
    if threads:
        torch.set_num_threads(threads)
    if resume or jobs > 1 or ray is not None:
        raise InputError(
            "a latent attack runs in one process and is not resumed: leave --jobs, --ray and --resume out"
        )
    loaded, data, eps = _asked(target, weights, data, eps)
    attack = Pgd(attack_steps, attack_step, attack_restarts, loss="margin")
    test = load(data).test
    result = latent_robustness(
        loaded.taking(test.shape),
        test,
        REGIONS[norm](eps),
        node,
        attack=attack,
        first=first,
        device=device,
        seed=seed,
    )
    if out is None and loaded.folder is not None:
        out = loaded.folder / f"latent-{node}-{eps:.4g}.json"
    summary = result.summary()
    click.echo(
        f"{summary['examples']} examples, eps {eps:.4g}: {summary['latent_robustness']:.2%} are right and "
        f"withstand the attack behind {node}; {summary['seconds']:.1f} s",
        err=as_json,
    )
    if out is not None:
        record = {"format": "tightrope-latent/1", "identity": result.identity, "data": data, **summary}
        write_atomically(out, to_json(record, indent=2) + "\n")
        click.echo(f"written to {out}", err=True)
    if as_json:
        click.echo(to_json(summary))


@cli.command("radius")
@_asking(
    "Largest radius looked at, in pixel units.  [default: twice the run's test eps; in l_inf at most 1]",
    click.option("--tolerance", type=number, default=0.001, show_default=True,
                 help="A radius is at most this much below an eps at which the verifier fails."),
    click.option("--batch", type=click.IntRange(min=1), default=CHUNK, show_default=True,
                 help="Examples at once, and between two writes."),
    click.option("--time-limit", type=number, default=TIME_LIMIT, show_default=True,
                 help="Seconds that each example may take in each stage at each eps, on average."),
)  # fmt: skip
@_verifier((name for name, stages in VERIFIERS.items() if stages), usual="linear")
def radius_command(
    target: str,
    verifier: str,
    weights: Path | None,
    data: str | None,
    eps: float | None,
    norm: str,
    first: int | None,
    tolerance: float,
    batch: int,
    time_limit: float,
    device: str,
    threads: int | None,
    jobs: int,
    ray: str | None,
    out: Path | None,
    resume: bool,
    as_json: bool,
) -> None:
    """Find, input by input, the largest eps at which TARGET is certified, by bisection.

    TARGET is a run folder, a results folder, an .onnx file, or package.module:factory with --weights. A
    radius is always an eps that the verifier certified: the lower end of what bisection left, 0 if there is
    none.
    """
    if threads:
        torch.set_num_threads(threads)
    loaded = load_target(target, weights)
    data = data or loaded.data
    if eps is None and loaded.eps is not None:
        eps = min(2 * loaded.eps, 1.0) if norm == "inf" else 2 * loaded.eps
    if data is None or eps is None:
        raise InputError(f"{target} does not say on what data or up to which eps: give --data and --eps")
    if norm == "inf":
        warn_of_wide(eps)
    dataset = load(data)
    out = _file_for(f"radius-{verifier}-{norm}", target, loaded, out, resume)
    result = radius(
        loaded.taking(dataset.test.shape),
        dataset.test,
        REGIONS[norm](eps),
        tolerance=tolerance,
        verifier=verifier,
        first=first,
        batch=batch,
        time_limit=time_limit,
        out=out,
        resume=resume,
        device=device,
        jobs=jobs,
        ray=ray,
        name=data,
    )
    summary = result.summary()
    curve = [f"{point['certified_accuracy']:.2%} at {point['eps']:.4g}" for point in summary["curve"]]
    click.echo(
        f"{summary['examples']} examples, radius in l_{norm} certified by {verifier}: "
        f"mean {summary['mean_radius']:.4g}, median {summary['median_radius']:.4g} "
        f"({summary['at_largest']} at the largest eps, {eps:.4g}); {summary['seconds']:.1f} s\n"
        f"certified accuracy: {', '.join(curve)}",
        err=as_json,
    )
    if out is not None:
        click.echo(f"radii: {out}", err=True)
    if as_json:
        click.echo(to_json(summary))


def _asked(
    target: str, weights: Path | None, data: str | None, eps: float | None
) -> tuple[Target, str, float]:
    """The target, and on which data and at which eps to look at it, if it does not say so itself."""
    loaded = load_target(target, weights)
    data, eps = data or loaded.data, loaded.eps if eps is None else eps
    if data is None or eps is None:
        raise InputError(f"{target} does not say on what data or at which eps: give --data and --eps")
    return loaded, data, eps


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
    jobs: int,
    ray: str | None,
    out: Path | None,
    resume: bool,
    as_json: bool,
    time_limit: float = 60.0,
    certificates: bool = False,
) -> Certification:
    if threads:
        torch.set_num_threads(threads)
    loaded, data, eps = _asked(target, weights, data, eps)
    attack = _attack(attack_steps, attack_step, attack_restarts)
    if norm == "inf":
        warn_of_wide(eps)
    if eps == 0:
        warnings.warn("at eps 0 nothing moves, and robust means correct: say how far, --eps", stacklevel=2)
    dataset = load(data)
    out = _file_for(f"certify-{verifier}-{norm}-{eps:.4g}", target, loaded, out, resume)
    result = certify(
        loaded.taking(dataset.test.shape),
        dataset.test,
        REGIONS[norm](eps),
        verifier=verifier,
        attack=attack,
        first=first,
        time_limit=time_limit,
        out=out,
        resume=resume,
        device=device,
        seed=seed,
        jobs=jobs,
        ray=ray,
        certificates=certificates,
        name=data,
        target=target,
        weights=weights,
    )
    summary = result.summary()
    attacked = (
        "not attacked" if attack is None else f"{summary['attacked_accuracy']:.2%} withstand the attack"
    )
    certified = (
        f", {summary['certified_accuracy']:.2%} certified by {verifier} ({summary['undecided']} undecided)"
    )
    click.echo(
        f"{summary['examples']} examples, eps {eps:.4g} in l_{norm}: {summary['clean_accuracy']:.2%} correct"
        f", {attacked}{certified if VERIFIERS[verifier] else ''}; {summary['seconds']:.1f} s",
        err=as_json,
    )
    if out is not None:
        click.echo(f"verdicts: {out}", err=True)
    if certificates and out is not None:
        folder, missing = result.header["certificates"], summary["without_certificate"]
        where = out.parent / folder["folder"] if "folder" in folder else f"none ({folder['none']})"
        lacking = f"; {missing} robust verdicts have none" if missing else ""
        click.echo(f"certificates: {where}{lacking}", err=True)
    if as_json:
        click.echo(to_json(summary))
    return result


def _decide(
    target: str,
    verifier: str,
    properties: Path,
    weights: Path | None,
    attack_steps: int,
    attack_step: float,
    attack_restarts: int,
    seed: int,
    device: str,
    threads: int | None,
    as_json: bool,
    time_limit: float,
    **others: Any,
) -> None:
    given = click.get_current_context().get_parameter_source
    unread = [name for name in sorted(others) if given(name) is not ParameterSource.DEFAULT]
    if unread:
        names = ", ".join(f"--{name}" for name in unread)
        raise InputError(f"{properties} says what is to be proved: leave out {names}")
    if threads:
        torch.set_num_threads(threads)
    loaded = load_target(target, weights)
    if loaded.input_shape is None:
        raise InputError(
            f"{target} does not say what its inputs look like: give a run folder or an .onnx file"
        )
    where = find_device(device)
    graph = trace(loaded.model, loaded.input_shape)
    queries = read_vnnlib(properties, math.prod(loaded.input_shape), graph.classes)
    decision = decide(
        loaded.model,
        loaded.input_shape,
        queries,
        verifier=verifier,
        attack=_attack(attack_steps, attack_step, attack_restarts),
        time_limit=time_limit,
        seed=seed,
        device=where,
    )
    found = decision.counterexample
    values = {} if found is None else {"X": found.x.flatten().tolist(), "Y": found.y.tolist()}
    lines = [f"({kind}_{i} {value!r})" for kind, column in values.items() for i, value in enumerate(column)]
    click.echo(decision.result, err=as_json)
    if lines:
        click.echo("({})".format("\n".join(lines)), err=as_json)
    click.echo(f"boxes: {len(queries)}, undecided: {decision.undecided}; {decision.seconds:.1f} s", err=True)
    if as_json:
        facts: dict[str, Any] = {"result": decision.result, "boxes": len(queries)}
        facts |= {"undecided": decision.undecided, "counterexample": values or None, "verifier": verifier}
        click.echo(to_json({**facts, "seconds": round(decision.seconds, 3)}))


def _attack(steps: int, step: float, restarts: int) -> Pgd | None:
    return Pgd(steps, step, restarts, loss="margin") if steps else None


def _file_for(name: str, target: str, loaded: Target, out: Path | None, resume: bool) -> Path | None:
    """Where to write: `out`, or in a run folder the latest file of this name to resume, else a new one."""
    if out is not None:
        return out
    if loaded.folder is None:
        if resume:
            raise InputError(f"nothing is kept in {target}: say which file to go on with, --out FILE")
        return None
    path = loaded.folder / f"{name}.jsonl"
    existing = [path, *sorted(loaded.folder.glob(f"{name}-*.jsonl"), key=lambda p: p.stat().st_mtime)]
    return existing[-1] if resume else _free(path)


# ------------------------------------------------------------------------------------------ recheck


@cli.command("recheck")
@click.argument("file", type=FILE)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object as the last line.")
def recheck_command(file: Path, as_json: bool) -> None:
    """Check the verdicts in FILE by their certificates, with a program that shares no code with certify.

    The exit status is 0 if none is rejected, 3 if one is, 2 if FILE has no certificates.
    """
    result = recheck(file)
    report = result.summary()
    click.echo(summarise(report), err=as_json)
    for line in result.compared:
        click.echo(line, err=as_json)
    if as_json:
        click.echo(to_json(report))
    if result.rejected:
        sys.exit(SoundnessViolation.exit_code)


# ------------------------------------------------------------------------------------------- export


@cli.command("export")
@click.argument("target")
@click.option("--weights", type=FILE, help="Weights (.safetensors) of a factory target.")
@click.option("--onnx", "out", type=FILE, required=True, help="ONNX file to write.")
@click.option(
    "--vnnlib",
    "folder",
    type=FOLDER,
    help="Folder for properties (VNN-LIB 1.0), one per test example: its class is robust within eps.",
)
@click.option("--data", help="Data set, or a .npz file.  [default: what a run was trained on]")
@click.option("--eps", type=number, help="l_inf radius in pixel units.  [default: the run's test eps]")
@click.option("--first", type=click.IntRange(min=1), help="Only the first N test examples.  [default: all]")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object as the last line.")
def export_command(
    target: str,
    weights: Path | None,
    out: Path,
    folder: Path | None,
    data: str | None,
    eps: float | None,
    first: int | None,
    as_json: bool,
) -> None:
    """Write TARGET's network to an ONNX file, and what is to be proved of it to VNN-LIB files.

    TARGET is a run folder, a results folder, or package.module:factory with --weights. The ONNX file is read
    back and compared with the network, and with onnxruntime, before it is kept.
    """
    loaded = load_target(target, weights)
    data, eps = data or loaded.data, loaded.eps if eps is None else eps
    if data is None and (loaded.input_shape is None or folder is not None):
        raise InputError(f"{target} does not say on what data: give --data")
    if eps is None and folder is not None:
        raise InputError(f"{target} does not say at which eps: give --eps")
    # The data, where they are needed at all, before anything is written.
    examples = None if data is None or (loaded.input_shape and folder is None) else load(data).test
    shape = loaded.input_shape or (None if examples is None else examples.shape)
    assert shape is not None
    write_onnx(loaded.model, shape, out)
    click.echo(f"network: {out}", err=as_json)
    count = 0
    if folder is not None and examples is not None and eps is not None:
        count = _write_properties(folder, loaded.taking(examples.shape), examples, eps, first)
        click.echo(f"properties: {count} in {folder}", err=as_json)
    if as_json:
        click.echo(to_json({"onnx": str(out), "properties": count}))


def _write_properties(
    folder: Path, model: torch.nn.Module, examples: Split, eps: float, first: int | None
) -> int:
    """One VNN-LIB file per example; how many there are."""
    region, classes = REGIONS["inf"](eps), trace(model, examples.shape).classes
    warn_of_wide(eps)
    count = min(first or len(examples), len(examples))
    for i in range(count):
        lower, upper = region.corners(examples.images(torch.tensor([i])).double())
        label = int(examples.y[i])
        about = f"test example {i}, class {label}, l_inf eps {eps!r}; a tie is a counter-example"
        path = folder / f"{i:05d}-eps-{eps:.4g}.vnnlib"
        write_robustness(path, lower[0], upper[0], label, classes, about)
    return count


# --------------------------------------------------------------------------------------------- tune


@cli.command("tune")
@click.argument("recipe", required=False, type=FILE)
@click.option("--out", type=FOLDER, help="Folder of the search.  [default: runs/tune-RECIPE]")
@click.option(
    "--trials",
    type=click.IntRange(min=1),
    default=20,
    show_default=True,
    help="Trials in all, with those of a search that is resumed.",
)
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Trials at once, each in a process of one thread.",
)
@click.option("--budget", type=time, help="Begin no trial that would not be done in this time: 90s, 15m, 2h.")
@click.option(
    "--epochs",
    type=click.IntRange(min=1),
    help="Passes over the data in each trial.  [default: the recipe's]",
)
@click.option("--seed", type=SEED, help="Seed of the trials and of the search.  [default: the recipe's]")
@click.option(
    "--prune-margin",
    type=number,
    default=MARGIN,
    show_default=True,
    help="Stop a trial behind its ramp once a finished one was better by this share of the held-out "
    "examples in both accuracies; 1 stops none.",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, ...")
@click.option(
    "--threads", type=click.IntRange(min=1), help="Processor threads of a single job.  [default: all]"
)
@click.option("--resume", is_flag=True, help="Go on with the search in --out.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object as the last line.")
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
    threads: int | None,
    resume: bool,
    as_json: bool,
) -> None:
    r"""Search the ranges that RECIPE declares in [tune]: clean against certified accuracy.

    Both are measured on held-out training examples, never on the test set. Each trial is a run folder in
    OUT/trials; those that no other beats in both are listed, and written to OUT/front.json and
    OUT/report.html.

    \b
    A search that was stopped goes on with:   tightrope tune --resume --out OUT
    A trial's recipe repeats its training:    tightrope train OUT/trials/0007/recipe.toml --out RUN
    """
    if recipe is None:
        if not resume or out is None:
            raise InputError("say what to search: a RECIPE with a section [tune], or --resume --out OUT")
        recipe = out / "recipe.toml"
        if not recipe.exists():
            raise InputError(f"{out} holds no search to resume: there is no {recipe}")
    if threads:
        torch.set_num_threads(threads)
    out = out or Path("runs") / f"tune-{recipe.stem}"
    content = read_recipe(recipe)
    if seed is not None:
        content["seed"] = seed
    if epochs is not None:
        content.setdefault("training", {})["epochs"] = epochs
    if not 0 < prune_margin <= 1:
        raise InputError(f"--prune-margin is a share above 0 and at most 1, got {prune_margin:g}")
    try:
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
    except KeyboardInterrupt:
        if (out / "tune.json").exists():
            _say_what_was_found(out, as_json)
        raise
    if not _say_what_was_found(out, as_json):
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
        accuracies = [_cell(trial[name], name) for name in ("clean", "certified")]
        values = [_cell(trial["values"][key], key) for key in keys]
        table.append(
            [str(trial["trial"]), *accuracies, *values, str(trial["epochs"]), f"{trial['seconds']:.1f}"]
        )
    _print_table(table, left=1, err=as_json)
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


# ------------------------------------------------------------------------------------------- report


@cli.command("report")
@click.argument("runs", nargs=-1, required=True, type=FOLDER)
@click.option("--out", type=FILE, help="HTML file.  [default: report.html in the first run folder]")
def report_command(runs: tuple[Path, ...], out: Path | None) -> None:
    """Write one self-contained HTML page on one or several RUNS."""
    from tightrope.report import write_report  # matplotlib takes half a second to import

    out = out or runs[0] / "report.html"
    write_report(list(runs), out)
    click.echo(f"report: {out}")


@cli.command("compare")
@click.argument("runs", nargs=-1, required=True, type=FOLDER)
@click.option("--out", type=FILE, help="HTML page with the table and a picture of it.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object as the last line.")
def compare_command(runs: tuple[Path, ...], out: Path | None, as_json: bool) -> None:
    """Put RUNS side by side: clean, attacked and certified accuracy, and cost where it is known.

    A run folder has a line for each of its certify files; a results folder without any has one for the
    means that it records.
    """
    from tightrope.report import compare, differences

    rows = compare(list(runs), out)
    columns = ("run", "method", "data", "eps", "verifier", "examples", "clean", "attacked", "certified")
    table = [[*columns, "cost"]]
    table += [[*(_cell(row.facts[name], name) for name in columns), row.cost or "-"] for row in rows]
    _print_table(table, left=5, err=as_json)
    if unlike := differences(rows):
        click.echo(f"warning: {unlike}", err=True)
    if out is not None:
        click.echo(f"comparison: {out}", err=True)
    if as_json:
        click.echo(to_json({"runs": [row.facts for row in rows]}))


def _print_table(table: list[list[str]], left: int, err: bool) -> None:
    """Print lines in columns, so many of them flush left."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        cells = [
            cell.ljust(width) if place < left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        click.echo("  ".join(cells).rstrip(), err=err)


def _cell(value: Any, name: str) -> str:
    if value is None:
        return "-"
    if name in ("clean", "attacked", "certified"):
        return f"{value:.2%}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@cli.command("list")
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


def _first_line(function: Callable[..., object]) -> str:
    return (function.__doc__ or "").strip().split("\n")[0]


# --------------------------------------------------------------------------------------- quickstart


@cli.command("quickstart")
@click.option("--out", type=FOLDER, help="Run folder.  [default: runs/quickstart, or the next free name]")
def quickstart_command(out: Path | None) -> None:
    """Train a certifiably robust classifier of small digits, certify it, and write a report."""
    from tightrope.report import write_report

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
        cli(prog_name="tightrope", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(error.exit_code)
    except click.ClickException as error:
        command = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "tightrope"
        _fail(f"{error.format_message()} (see {command} --help)", error.exit_code)
    except (Interrupted, click.Abort, KeyboardInterrupt):
        click.echo("interrupted: what was done is kept; go on with --resume", err=True)
        sys.exit(130)
    except TightropeError as error:
        _fail(str(error), error.exit_code)
    except OSError as error:
        reason = ": ".join(str(part) for part in (error.filename, error.strerror or error) if part)
        _fail(f"{reason}; check the path, its permissions and the free space", 1 if _is_full(error) else 2)
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "can't allocate" not in str(error):
            raise
        _fail(f"out of memory; lower training.batch, or take --device cpu ({error})", 1)


def _fail(message: str, status: int) -> NoReturn:
    click.echo(f"error: {message}", err=True)
    sys.exit(status)


def _is_full(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT)

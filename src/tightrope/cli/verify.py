"""`certify`, `attack`, `radius` and `recheck`: what holds for test examples, and whether a file proves it."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from tightrope.api import certify, device_for, latent_robustness, radius
from tightrope.checker import summary as summarise
from tightrope.cli.options import COUNT, FILE, json_option, keeping, number, unused
from tightrope.cli.question import AttackQuestion, Question, asking, asking_with_attack, verifier_option
from tightrope.data import load
from tightrope.errors import InputError, SoundnessViolation, warn
from tightrope.files import to_json, write_atomically
from tightrope.graph import trace
from tightrope.parallel import Workers
from tightrope.rechecking import recheck
from tightrope.region import REGIONS, Region
from tightrope.targets import Target, load_target
from tightrope.verify import LATENT_ATTACK, VERIFIERS, decide, read_vnnlib
from tightrope.verify.pipeline import CHUNK
from tightrope.verify.radius import TIME_LIMIT

# ------------------------------------------------------------------------------- certify and attack


@click.command("certify")
@asking_with_attack
@verifier_option(VERIFIERS, usual="cascade")
@click.option(
    "--time-limit",
    type=number,
    default=60.0,
    show_default=True,
    help="Seconds that each example may take in each stage of the verifier, above 0.",
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
def certify_command(
    question: AttackQuestion, verifier: str, time_limit: float, certificates: bool, properties: Path | None
) -> None:
    """Prove or refute, input by input, that no perturbation within eps changes TARGET's answer.

    TARGET is a run folder, a results folder, an .onnx file, or package.module:factory with --weights.

    With --vnnlib FILE, the answer is unsat (the property is proved), sat (a counter-example follows), or
    unknown.
    """
    if properties is None:
        _judge(question, verifier, time_limit, certificates)
    else:
        _decide(question, verifier, time_limit, properties)


@click.command("attack")
@asking_with_attack
@click.option(
    "--latent",
    metavar="NODE",
    help="Attack inside the latent region behind this activation instead (maar.txt, eq. 26).  "
    "[there: 150 steps of 0.01, where noise lies in -1 to 1]",
)
def attack_command(question: AttackQuestion, latent: str | None) -> None:
    """Look for perturbations within eps that change TARGET's answer.

    TARGET is a run folder, a results folder, an .onnx file, or package.module:factory with --weights.
    """
    if question.attack_steps == 0:
        raise InputError("an attack takes at least one step, got --attack-steps 0")
    if latent is None:
        _judge(question, "none")
        return
    steps = question.attack_steps if _is_said("attack_steps") else LATENT_ATTACK.steps
    step = question.attack_step if _is_said("attack_step") else LATENT_ATTACK.step
    _attack_latent(replace(question, attack_steps=steps, attack_step=step), latent)


def _is_said(name: str) -> bool:
    """Whether an option of the running command was given, not left at its default."""
    return click.get_current_context().get_parameter_source(name) is not ParameterSource.DEFAULT


def _on_what(question: Question) -> tuple[Target, str, Region]:
    """The target, and on which data and over which region to look at it, if it does not say so itself."""
    target = load_target(question.target, question.weights)
    data = question.data or target.data
    eps = target.eps if question.eps is None else question.eps
    if data is None or eps is None:
        raise InputError(_missing(question.target, data, eps))
    norm = question.norm or target.norm
    if question.eps is None and norm != target.norm:
        warn(
            f"the run's test eps {eps:.4g} is one in l_{target.norm}, and is taken for l_{norm}: say --eps",
        )
    return target, data, REGIONS[norm](eps)


def _missing(target: str, data: str | None, eps: float | None) -> str:
    """What a target does not say, and which options do."""
    unsaid = {"on what data (--data)": data, "at which eps (--eps)": eps}
    return f"{target} does not say {' or '.join(words for words, value in unsaid.items() if value is None)}"


def _judge(
    question: AttackQuestion, verifier: str, time_limit: float = 60.0, certificates: bool = False
) -> None:
    target, data, region = _on_what(question)
    attack = question.attack() if question.attack_steps else None
    if region.eps == 0:
        warn("at eps 0 nothing moves, and robust means correct: say how far, --eps")
    dataset = load(data)
    out = question.file(f"certify-{verifier}-{region.norm}-{region.eps:.4g}", target)
    with keeping(out):
        result = certify(
            target.taking(dataset.test.shape),
            dataset.test,
            region,
            verifier=verifier,
            attack=attack,
            first=question.first,
            time_limit=time_limit,
            out=out,
            resume=question.resume,
            device=question.device,
            seed=question.seed,
            jobs=question.jobs,
            ray=question.ray,
            certificates=certificates,
            name=data,
            target=question.target,
            weights=question.weights,
        )
    click.echo(result, err=question.as_json)
    summary = result.summary()
    if out is not None:
        click.echo(f"verdicts: {out}", err=True)
    if certificates and out is not None:
        folder, missing = result.header["certificates"], summary["without_certificate"]
        where = out.parent / folder["folder"] if "folder" in folder else f"none ({folder['none']})"
        lacking = f"; {missing} robust verdicts have none" if missing else ""
        click.echo(f"certificates: {where}{lacking}", err=True)
    if question.as_json:
        click.echo(to_json(summary))


def _decide(question: AttackQuestion, verifier: str, time_limit: float, properties: Path) -> None:
    read = {
        *("target", "weights", "device", "attack_steps", "attack_step", "attack_restarts", "seed"),
        *("verifier", "time_limit", "properties", "as_json"),
    }
    unread = sorted(name for name in click.get_current_context().params.keys() - read if _is_said(name))
    if unread:
        names = ", ".join(f"--{name}" for name in unread)
        raise InputError(f"{properties} says what is to be proved: leave out {names}")
    target = load_target(question.target, question.weights)
    if target.input_shape is None:
        raise InputError(
            f"{question.target} does not say what its inputs look like: give a run folder or an .onnx file"
        )
    where = device_for(Workers(), question.device, verifier)
    graph = trace(target.model, target.input_shape)
    queries = read_vnnlib(properties, math.prod(target.input_shape), graph.classes)
    decision = decide(
        target.model,
        target.input_shape,
        queries,
        verifier=verifier,
        attack=question.attack() if question.attack_steps else None,
        time_limit=time_limit,
        seed=question.seed,
        device=where,
    )
    found = decision.counterexample
    values = {} if found is None else {"X": found.x.flatten().tolist(), "Y": found.y.tolist()}
    lines = [f"({kind}_{i} {value!r})" for kind, column in values.items() for i, value in enumerate(column)]
    click.echo(decision.result, err=question.as_json)
    if lines:
        click.echo("({})".format("\n".join(lines)), err=question.as_json)
    click.echo(f"boxes: {len(queries)}, undecided: {decision.undecided}; {decision.seconds:.1f} s", err=True)
    if question.as_json:
        facts: dict[str, Any] = {"result": decision.result, "boxes": len(queries)}
        facts |= {"undecided": decision.undecided, "counterexample": values or None, "verifier": verifier}
        click.echo(to_json({**facts, "seconds": round(decision.seconds, 3)}))


def _attack_latent(question: AttackQuestion, node: str) -> None:
    if question.resume or question.jobs > 1 or question.ray is not None:
        raise InputError(
            "a latent attack runs in one process and is not resumed: leave --jobs, --ray and --resume out"
        )
    target, data, region = _on_what(question)
    attack, eps, out = question.attack(), region.eps, question.out
    if out is not None and out.exists():
        raise InputError(f"{out} already exists: choose another --out")
    if out is None and target.folder is not None:
        out = unused(target.folder / f"latent-{node}-{eps:.4g}.json")
    test = load(data).test
    result = latent_robustness(
        target.taking(test.shape),
        test,
        region,
        node,
        attack=attack,
        first=question.first,
        device=question.device,
        seed=question.seed,
    )
    summary = result.summary()
    click.echo(
        f"{summary['examples']} examples, eps {eps:.4g}: {summary['latent_robustness']:.2%} are right and "
        f"withstand the attack behind {node}; {summary['seconds']:.1f} s",
        err=question.as_json,
    )
    if out is not None:
        record = {"format": "tightrope-latent/1", "identity": result.identity, "data": data, **summary}
        write_atomically(out, to_json(record, indent=2) + "\n")
        click.echo(f"written to {out}", err=True)
    if question.as_json:
        click.echo(to_json(summary))


# ------------------------------------------------------------------------------------------- radius


@click.command("radius")
@asking(
    Question,
    "Largest radius looked at, in pixel units, above 0.  [default: twice the run's test eps; in l_inf at "
    "most 1]",
    click.option("--tolerance", type=number, default=0.001, show_default=True,
                 help="A radius is at most this much (above 0) below an eps at which the verifier fails."),
    click.option("--batch", type=COUNT, default=CHUNK, show_default=True,
                 help="Examples at once, and between two writes."),
    click.option("--time-limit", type=number, default=TIME_LIMIT, show_default=True,
                 help="Seconds that each example may take in each stage at each eps, above 0."),
)  # fmt: skip
@verifier_option((name for name, stages in VERIFIERS.items() if stages), usual="linear")
def radius_command(
    question: Question, tolerance: float, batch: int, time_limit: float, verifier: str
) -> None:
    """Find, input by input, the largest eps at which TARGET is certified, by bisection.

    TARGET is a run folder, a results folder, an .onnx file, or package.module:factory with --weights. A
    radius is always an eps that the verifier certified: the lower end of what bisection left, 0 if there is
    none.
    """
    target = load_target(question.target, question.weights)
    data, eps, norm = question.data or target.data, question.eps, question.norm or target.norm
    if eps is None and target.eps is not None:
        eps = min(2 * target.eps, 1.0) if norm == "inf" else 2 * target.eps
    if data is None or eps is None:
        raise InputError(_missing(question.target, data, eps))
    dataset = load(data)
    out = question.file(f"radius-{verifier}-{norm}", target)
    with keeping(out):
        result = radius(
            target.taking(dataset.test.shape),
            dataset.test,
            REGIONS[norm](eps),
            tolerance=tolerance,
            verifier=verifier,
            first=question.first,
            batch=batch,
            time_limit=time_limit,
            out=out,
            resume=question.resume,
            device=question.device,
            jobs=question.jobs,
            ray=question.ray,
            name=data,
        )
    summary = result.summary()
    curve = [f"{point['certified_accuracy']:.2%} at {point['eps']:.4g}" for point in summary["curve"]]
    click.echo(
        f"{summary['examples']} examples, radius in l_{norm} certified by {verifier}: "
        f"mean {summary['mean_radius']:.4g}, median {summary['median_radius']:.4g} "
        f"({summary['at_largest']} at the largest eps, {eps:.4g}); {summary['seconds']:.1f} s\n"
        f"certified accuracy: {', '.join(curve)}",
        err=question.as_json,
    )
    if out is not None:
        click.echo(f"radii: {out}", err=True)
    if question.as_json:
        click.echo(to_json(summary))


# ------------------------------------------------------------------------------------------ recheck


@click.command("recheck")
@click.argument("file", type=FILE)
@json_option
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

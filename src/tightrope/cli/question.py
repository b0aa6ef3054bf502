"""The options that `certify`, `attack` and `radius` share, as one `Question`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import click

from tightrope.attacks import Pgd
from tightrope.cli.options import (
    COUNT,
    FILE,
    SEED,
    Option,
    data_option,
    device_option,
    first_option,
    json_option,
    number,
    threads_option,
    unused,
    weights_option,
)
from tightrope.errors import InputError
from tightrope.region import REGIONS
from tightrope.targets import Target
from tightrope.verify import CERTIFICATION_ATTACK


@dataclass(frozen=True)
class Question:
    """What is asked of a network about test examples; the fields are options of these names."""

    target: str
    weights: Path | None
    data: str | None
    eps: float | None
    norm: str | None
    first: int | None
    device: str
    jobs: int
    ray: str | None
    out: Path | None
    resume: bool
    as_json: bool

    def file(self, name: str, target: Target) -> Path | None:
        """Where to write: --out, or in a run folder the latest file of this name to resume, else a new one.

        Raises:
            InputError: if there is nothing to resume.
        """
        if self.out is not None:
            return self.out
        if target.folder is None:
            if self.resume:
                raise InputError(
                    f"nothing is kept in {self.target}: say which file to go on with, --out FILE"
                )
            return None
        path = target.folder / f"{name}.jsonl"
        existing = [path, *sorted(target.folder.glob(f"{name}-*.jsonl"), key=lambda p: p.stat().st_mtime)]
        return existing[-1] if self.resume else unused(path)


@dataclass(frozen=True)
class AttackQuestion(Question):
    """A question that an attack helps to answer."""

    attack_steps: int
    attack_step: float
    attack_restarts: int
    seed: int

    def attack(self) -> Pgd:
        """The attack that the options describe."""
        return Pgd(self.attack_steps, self.attack_step, self.attack_restarts, loss="margin")


def asking(kind: type[Question], eps: str, *own: Option) -> Option:
    """Add the shared options to a command, and hand it their values as one `kind`, its first argument.

    Args:
        kind: the question; those of `own` that are not among its fields are handed over by name.
        eps: the help of --eps.
        own: the command's own options that stand among the shared ones in its help.
    """
    options: list[Option] = [
        click.argument("target"),
        weights_option,
        data_option,
        click.option("--eps", type=number, help=eps),
        click.option("--norm", type=click.Choice(list(REGIONS)),
                     help="In which norm an input moves by at most eps.  [default: the run's; inf]"),
        first_option,
        *own,
        device_option,
        threads_option,
        click.option("--jobs", type=COUNT, default=1, show_default=True,
                     help="Processes, each of one thread, among which batches of examples are shared."),
        click.option("--ray", metavar="ADDRESS",
                     help="Share them among the processors of a Ray cluster instead: HOST:PORT, local (start "
                     "one here), or auto (the one that runs here, else local)."),
        click.option("--out", type=FILE, help="File for what is found.  [default: in the run folder]"),
        click.option("--resume", is_flag=True, help="Go on with that file."),
        json_option,
    ]  # fmt: skip
    names = [field.name for field in fields(kind)]

    def add(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def ask(**values: Any) -> None:
            command(kind(**{name: values.pop(name) for name in names}), **values)

        added: Callable[..., None] = ask
        for option in reversed(options):
            added = option(added)
        return added

    return add


asking_with_attack = asking(
    AttackQuestion,
    "Radius in pixel units, 0 or more, such as 0.3 or 8/255.  [default: the run's test eps]",
    click.option("--attack-steps", type=click.IntRange(min=0), default=CERTIFICATION_ATTACK.steps,
                 show_default=True, help="Gradient steps of the attack; 0 (none) is for `certify` alone."),
    click.option("--attack-step", type=number, default=CERTIFICATION_ATTACK.step, show_default=True,
                 help="Length of a step, as a share of eps, above 0."),
    click.option("--attack-restarts", type=COUNT, default=CERTIFICATION_ATTACK.restarts,
                 show_default=True, help="Random starts of the attack."),
    click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of the random starts."),
)  # fmt: skip


def verifier_option(names: Iterable[str], usual: str) -> Option:
    """The option --verifier: one of these names, and which if none is said."""
    return click.option("--verifier", default=usual, show_default=True, help=f"One of {', '.join(names)}.")

"""What an option's text stands for, and the options that several commands share."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import torch

from tightrope.train import Interrupted
from tightrope.train.schedules import parse_number

Option = Callable[[Callable[..., None]], Callable[..., None]]


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


def use_threads(_context: click.Context, _option: click.Parameter, threads: int | None) -> None:
    """Compute on so many processor threads from here on; on all of them if it is not said."""
    if threads is not None:
        torch.set_num_threads(threads)


FILE = click.Path(dir_okay=False, path_type=Path)
FOLDER = click.Path(file_okay=False, path_type=Path)
COUNT = click.IntRange(min=1)
SEED = click.IntRange(0, 2**32 - 1)

weights_option = click.option("--weights", type=FILE, help="Weights (.safetensors) of a factory target.")
data_option = click.option("--data", help="Data set, or a .npz file.  [default: what a run was trained on]")
first_option = click.option("--first", type=COUNT, help="Only the first N test examples.  [default: all]")
device_option = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, ...")
threads_option = click.option(
    "--threads",
    type=COUNT,
    callback=use_threads,
    expose_value=False,
    help="Processor threads.  [default: all]",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print a JSON object as the last line.")


@contextmanager
def keeping(path: Path | None) -> Iterator[None]:
    """Have an interruption say that what was done is kept, if it is: where this file was begun."""
    try:
        yield
    except KeyboardInterrupt:
        if path is None or not path.exists():
            raise
        raise Interrupted from None


def unused(path: Path) -> Path:
    """The path, or the first of PATH-2, PATH-3 ... that does not exist."""
    candidates = (path if n == 1 else path.with_stem(f"{path.stem}-{n}") for n in itertools.count(1))
    return next(candidate for candidate in candidates if not candidate.exists())

"""The command line: `tightrope --help`.

Each file holds a family of commands: it reads their options, asks the Python interface, and prints.
"""

from __future__ import annotations

import errno
import signal
import sys
import threading
import warnings
from typing import NoReturn

import click
import torch

from tightrope.cli.export import export_command
from tightrope.cli.lists import list_command
from tightrope.cli.report import compare_command, report_command
from tightrope.cli.train import quickstart_command, train_command
from tightrope.cli.tune import tune_command
from tightrope.cli.verify import attack_command, certify_command, radius_command, recheck_command
from tightrope.errors import TightropeError
from tightrope.train import Interrupted


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="tightrope")
def cli() -> None:
    """Train neural networks that are provably robust, and prove it, input by input.

    Start with `tightrope quickstart`.
    """


for command in (
    train_command,
    certify_command,
    attack_command,
    radius_command,
    recheck_command,
    export_command,
    tune_command,
    report_command,
    compare_command,
    list_command,
    quickstart_command,
):
    cli.add_command(command)

# What to do where a command runs out of memory.
_LESS = {
    "train": "lower training.batch",
    "tune": "lower training.batch",
    "certify": "take fewer --jobs, or a --verifier that needs less, such as crown-ibp",
    "attack": "take fewer --jobs, or free some memory",
    "radius": "lower --batch, or take fewer --jobs",
}


def main() -> None:
    """Run the command line; turns errors into one clear line and an exit status."""
    ignored = signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    if not ignored and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what is done is kept
    warnings.showwarning = lambda message, *_args, **_kwargs: click.echo(f"warning: {message}", err=True)
    try:
        cli(prog_name="tightrope", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(error.exit_code)
    except click.ClickException as error:
        command = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "tightrope"
        _fail(f"{error.format_message()} (see {command} --help)", error.exit_code)
    except (click.Abort, KeyboardInterrupt) as error:
        saved = isinstance(error.__cause__, Interrupted)  # click makes an Abort of it
        how = "train --resume --out RUN" if sys.argv[1:2] == ["quickstart"] else "--resume"
        kept = f": what was done is kept; go on with {how}" if saved else ""
        click.echo(f"interrupted{kept}", err=True)
        sys.exit(130)
    except TightropeError as error:
        _fail(str(error), error.exit_code)
    except OSError as error:
        reason = ": ".join(str(part) for part in (error.filename, error.strerror or error) if part)
        _fail(f"{reason}; check the path, its permissions and the free space", 1 if _is_full(error) else 2)
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "can't allocate" not in str(error):
            raise
        less = _LESS.get(sys.argv[1], "free some memory")
        # A processor's memory ends in one of the other errors.
        elsewhere = ", or take --device cpu" if isinstance(error, torch.OutOfMemoryError) else ""
        _fail(f"out of memory; {less}{elsewhere} ({str(error) or 'no memory left'})", 1)


def _fail(message: str, status: int) -> NoReturn:
    click.echo(f"error: {message}", err=True)
    sys.exit(status)


def _is_full(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT)

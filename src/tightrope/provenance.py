"""Where a result comes from: versions, commit, machine, date, command."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def environment(device: torch.device | str, seed: int | None = None) -> dict[str, Any]:
    """Everything one needs to say how a result was made, as plain JSON values."""
    return {
        "tightrope": version("tightrope"),
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": _machine(),
        "threads": torch.get_num_threads(),
        "device": str(device),
        "seed": seed,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": _command(),
    }


def _command() -> str:
    program = Path(sys.argv[0])
    started = ["python", "-m", program.parent.name] if program.name == "__main__.py" else [program.name]
    return shlex.join([*started, *sys.argv[1:]])


def _commit() -> str | None:
    """The commit of the checkout that runs, with "+" if it was changed since; None outside a checkout."""
    here = Path(__file__).resolve().parent
    try:
        _git(here, "ls-files", "--error-unmatch", __file__)  # an installed copy may lie in another repository
        commit = _git(here, "rev-parse", "HEAD")
        return commit + (
            "+" if _git(here, "status", "--porcelain", "--untracked-files=no", "--", str(here)) else ""
        )
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    result = subprocess.run(
        ["git", "-C", folder, *arguments], capture_output=True, text=True, check=True, timeout=10
    )
    return result.stdout.strip()


def _machine() -> str:
    processor = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass  # not Linux, or a processor that does not say its name
    return f"{platform.system()} {platform.machine()}, {processor}"

"""Packages that only some users need, and that come with an extra."""

from __future__ import annotations

import importlib
from typing import Any

from tightrope.errors import InputError


def require(module: str, extra: str, purpose: str) -> Any:
    """A module of an optional package.

    Args:
        module: its name.
        extra: the extra that brings it.
        purpose: what needs it, to begin the error with.

    Raises:
        InputError: if it is not installed; the message has the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"{purpose} needs an extra ({error}): pip install 'tightrope[{extra}]'") from None

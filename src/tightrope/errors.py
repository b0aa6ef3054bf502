"""Everything tightrope raises on purpose, and how it warns.

Every message says what was wrong, what was seen, and what to do about it. The command line turns
`exit_code` into the process's exit status and prints the message without a traceback.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import torch

_INSIDE = tuple(str(Path(file).parent) + os.sep for file in (__file__, torch.__file__))


class TightropeError(Exception):
    """Base of all errors raised on purpose; exit status 1."""

    exit_code = 1


class InputError(TightropeError, ValueError):
    """Something the caller gave cannot be used (shape, value, option, file); exit status 2."""

    exit_code = 2


class UnsupportedOperatorError(InputError):
    """The network holds operators that no engine can bound; the message lists all of them."""


class DataError(InputError):
    """A data set is missing, corrupt, or out of range."""


class RecipeError(InputError):
    """A recipe has an unknown key, a wrong type, or values that contradict each other."""


class FileError(InputError):
    """A file cannot be read or written, or does not hold what it should: no fault of what is asked for."""


class IdentityError(FileError):
    """A file to resume from or to reuse was made by something else than what is asked for now."""


class DivergedError(TightropeError):
    """A loss or gradient turned NaN or infinite; the last good state has been saved."""


class SoundnessViolation(TightropeError):
    """An example was certified and attacked at once: a bug, never to be ignored; exit status 3."""

    exit_code = 3


def warn(message: str) -> None:
    """Warn at the line that called: the last one that lies outside of tightrope and torch."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)

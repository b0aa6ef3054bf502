"""Numbers that a caller gives from Python, as plain ones: numpy's are taken, text and fractions are not."""

from __future__ import annotations

import math
import operator
from numbers import Real

from tightrope.errors import InputError


def whole(value: object, what: str, least: int = 0, most: float = math.inf) -> int:
    """A whole number in `[least, most]`.

    Args:
        value: what was given.
        what: what it is, for the message.
        least: the smallest one allowed.
        most: the largest one allowed.

    Raises:
        InputError: if it is none.

    Example:
        >>> import numpy as np
        >>> whole(np.int64(5), "the seed")
        5
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None or not least <= number <= most:
        allowed = f"from {least} up" if most == math.inf else f"from {least} to {most:.0f}"
        raise InputError(f"{what} must be a whole number {allowed}, got {value!r}")
    return number


def positive(value: object, what: str) -> float:
    """A finite number above 0; arguments and error as for `whole`."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) < math.inf:
        raise InputError(f"{what} must be a positive number, got {value!r}")
    return float(value)

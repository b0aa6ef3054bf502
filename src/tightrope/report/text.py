"""Numbers, times, dates and warnings as the pages write them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

NORMS = {"inf": "l∞", "2": "l2", "1": "l1"}  # in the order in which the pages show them


def commit_text(value: object) -> str:
    """A commit's first 12 characters, with the "+" that says that the checkout was changed since."""
    full = str(value or "")
    return full if len(full) <= 13 else full[:12] + ("+" if full.endswith("+") else "")


def date_text(value: object) -> str:
    """A date of ISO 8601 in UTC, to the minute; anything else as it is."""
    try:
        return f"{datetime.fromisoformat(str(value)).astimezone(UTC):%Y-%m-%d %H:%M} UTC"
    except ValueError:
        return str(value or "")


def number_text(count: int, noun: str) -> str:
    """A count with its noun: 1 run, 2 runs."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def duration_text(seconds: float) -> str:
    """A time in the unit that people would take."""
    if seconds < 0.1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 100:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def eps_text(eps: float) -> str:
    """Write eps as people do: 0.3 stays 0.3, and 0.031372549 is 8/255.

    Example:
        eps_text(2 / 255) == "2/255"
    """
    steps = eps * 255
    if not math.isclose(eps, round(eps, 4), abs_tol=1e-9) and math.isclose(steps, round(steps), abs_tol=1e-4):
        return f"{round(steps)}/255"
    return f"{eps:.4g}"


def norm_text(identity: Mapping[str, Any]) -> str:
    """The norm that a file's identity names."""
    return NORMS.get(identity["norm"], str(identity["norm"]))


def percent_text(count: int, total: int) -> str:
    """A share in per cent, to `decimals` digits."""
    return f"{100 * count / total:.{decimals(total)}f} %"


def decimals(total: int) -> int:
    """Digits that show a single example's share: 1 for up to a thousand examples, 2 for more."""
    return 1 if total <= 1000 else 2


def unlike_text(rows: Iterable[Mapping[str, Hashable]], what: str = "rows") -> str:
    """A warning if rows that stand side by side differ in what was asked; "" if they do not."""
    found: dict[str, set[Hashable]] = defaultdict(set)
    for row in rows:
        for name, value in row.items():
            found[name].add(value)
    unlike = [name for name, values in found.items() if len(values) > 1]
    if not unlike:
        return ""
    return f"The {what} differ in {' and '.join(unlike)}: compare only {what} that agree."

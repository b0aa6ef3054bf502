"""Counts, times and dates as the pages write them."""

from __future__ import annotations

from datetime import UTC, datetime


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

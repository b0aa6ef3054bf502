"""Engines by name, as Python users call them: `tightrope.engines.interval()`."""

from tightrope.bounds.interval import Interval as interval  # noqa: N813 (called like a function)

__all__ = ["interval"]

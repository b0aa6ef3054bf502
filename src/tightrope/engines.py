"""Engines by name, as Python users call them: `tightrope.engines.crown()`."""

from tightrope.bounds.interval import Interval as interval  # noqa: N813 (called like a function)
from tightrope.bounds.linear import crown, crown_ibp, fast_lin

__all__ = ["crown", "crown_ibp", "fast_lin", "interval"]

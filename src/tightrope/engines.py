"""Engines by name, as Python users call them: `tightrope.engines.crown()`."""

from tightrope.bounds.compose import Intersect as intersect  # noqa: N813 (called like a function)
from tightrope.bounds.compose import Mix as mix  # noqa: N813
from tightrope.bounds.interval import Interval as interval  # noqa: N813
from tightrope.bounds.linear import crown, crown_ibp, fast_lin

__all__ = ["crown", "crown_ibp", "fast_lin", "intersect", "interval", "mix"]

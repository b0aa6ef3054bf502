"""Engines: sound bounds of a network over a region."""

from tightrope.bounds.base import Bounds, Engine, Guarantee
from tightrope.bounds.compose import Intersect
from tightrope.bounds.interval import Interval
from tightrope.bounds.linear import Linear, crown, crown_ibp, fast_lin

__all__ = [
    "Bounds",
    "Engine",
    "Guarantee",
    "Intersect",
    "Interval",
    "Linear",
    "crown",
    "crown_ibp",
    "fast_lin",
]

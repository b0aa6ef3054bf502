"""Engines: sound bounds of a network over a region."""

from tightrope.bounds.base import Bounds, Engine, Guarantee
from tightrope.bounds.interval import Interval

__all__ = ["Bounds", "Engine", "Guarantee", "Interval"]

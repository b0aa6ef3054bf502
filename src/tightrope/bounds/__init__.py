"""Engines: sound bounds of a network over a region."""

from tightrope.bounds.alpha import Optimised, Optimum, alpha_crown, zonotope
from tightrope.bounds.base import Bounds, Engine, Estimate, Estimator, Guarantee, Problem
from tightrope.bounds.compose import Intersect, Mix
from tightrope.bounds.hull import Hull
from tightrope.bounds.hybrid import HybridZonotope
from tightrope.bounds.interval import Interval
from tightrope.bounds.latent import Latent
from tightrope.bounds.linear import Linear, crown, crown_ibp, fast_lin
from tightrope.bounds.projected import Projected
from tightrope.bounds.relaxed import Forward, RelaxedNetwork
from tightrope.bounds.rounding import entering_error, rounding_error

__all__ = [
    "Bounds",
    "Engine",
    "Estimate",
    "Estimator",
    "Forward",
    "Guarantee",
    "Hull",
    "HybridZonotope",
    "Intersect",
    "Interval",
    "Latent",
    "Linear",
    "Mix",
    "Optimised",
    "Optimum",
    "Problem",
    "Projected",
    "RelaxedNetwork",
    "alpha_crown",
    "crown",
    "crown_ibp",
    "entering_error",
    "fast_lin",
    "rounding_error",
    "zonotope",
]

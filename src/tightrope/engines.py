"""Engines by name, as Python users call them: `tightrope.engines.crown()`."""

from tightrope.bounds.alpha import alpha_crown, zonotope
from tightrope.bounds.compose import Intersect as intersect  # noqa: N813 (called like a function)
from tightrope.bounds.compose import Mix as mix  # noqa: N813
from tightrope.bounds.hybrid import HybridZonotope as hybrid_zonotope  # noqa: N813
from tightrope.bounds.interval import Interval as interval  # noqa: N813
from tightrope.bounds.linear import crown, crown_ibp, fast_lin
from tightrope.bounds.projected import Projected as projected  # noqa: N813
from tightrope.bounds.relaxed import Forward as forward  # noqa: N813

__all__ = [
    "alpha_crown",
    "crown",
    "crown_ibp",
    "fast_lin",
    "forward",
    "hybrid_zonotope",
    "intersect",
    "interval",
    "mix",
    "projected",
    "zonotope",
]

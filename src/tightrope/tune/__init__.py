"""A search over a recipe's declared ranges: clean against certified accuracy of held-out examples."""

from tightrope.tune.found import Found, read_search
from tightrope.tune.study import search
from tightrope.tune.trial import MARGIN, Point, Trial

__all__ = ["MARGIN", "Found", "Point", "Trial", "read_search", "search"]

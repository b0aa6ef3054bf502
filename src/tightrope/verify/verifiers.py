"""The verifiers by name: each is a row of stages, the cheapest first."""

from __future__ import annotations

import difflib

from tightrope.bounds import Intersect, Interval, Linear, Optimised
from tightrope.errors import InputError
from tightrope.verify.bab import BranchAndBound
from tightrope.verify.milp import Milp
from tightrope.verify.stages import CROWN, BoundStage, ClimbStage, Stage

_CROWN_IBP = Linear("adaptive", "interval", sides="lower")
_FAST_LIN = Linear("parallel", "linear", sides="lower")
_ALPHA_CROWN = ClimbStage("alpha-crown", Optimised("triangle", iterations=20, sides="lower"))
_ZONOTOPE = ClimbStage("zonotope", Optimised("parallel", iterations=100, sides="lower"))

IBP = BoundStage("ibp", Interval(), cheap=True, rule="ibp")

_LINEAR: tuple[Stage, ...] = (
    IBP,
    BoundStage("crown-ibp", Intersect(_CROWN_IBP, Interval()), cheap=True, rule="crown-ibp"),
    BoundStage("crown", Intersect(CROWN, Interval()), rule="crown"),
)

VERIFIERS: dict[str, tuple[Stage, ...]] = {
    "none": (),
    "ibp": (IBP,),
    "crown-ibp": (BoundStage("crown-ibp", _CROWN_IBP, cheap=True, rule="crown-ibp"),),
    "fast-lin": (BoundStage("fast-lin", _FAST_LIN, rule="fast-lin"),),
    "crown": (BoundStage("crown", CROWN, rule="crown"),),
    "zonotope": (_ZONOTOPE,),
    "alpha-crown": (_ALPHA_CROWN,),
    "linear": _LINEAR,
    "milp": (*_LINEAR, Milp()),
    "complete": (BranchAndBound(),),
    "cascade": (*_LINEAR, _ALPHA_CROWN, BranchAndBound(strict=False)),
}


def find_verifier(name: str) -> tuple[Stage, ...]:
    """The stages of a verifier by name.

    Raises:
        InputError: if there is no such verifier.
    """
    if not isinstance(name, str) or name not in VERIFIERS:
        nearest = difflib.get_close_matches(str(name), VERIFIERS, n=1)
        hint = f"did you mean {nearest[0]!r}? " if nearest else ""
        raise InputError(f"there is no verifier {name!r}: {hint}Choose {', '.join(VERIFIERS)}")
    return VERIFIERS[name]

"""The verifiers by name: each is a row of stages, the cheapest first."""

from __future__ import annotations

import difflib

from tightrope.bounds import Intersect, Interval, Linear
from tightrope.errors import InputError
from tightrope.verify.milp import Milp
from tightrope.verify.stages import BoundStage, Stage

_CROWN_IBP = Linear("adaptive", "interval", sides="lower")
_CROWN = Linear("adaptive", "linear", sides="lower")
_FAST_LIN = Linear("parallel", "linear", sides="lower")

IBP = BoundStage("ibp", Interval(), cheap=True)

_CASCADE: tuple[Stage, ...] = (
    IBP,
    BoundStage("crown-ibp", Intersect(_CROWN_IBP, Interval()), cheap=True),
    BoundStage("crown", Intersect(_CROWN, Interval())),
)

VERIFIERS: dict[str, tuple[Stage, ...]] = {
    "none": (),
    "ibp": (IBP,),
    "crown-ibp": (BoundStage("crown-ibp", _CROWN_IBP, cheap=True),),
    "fast-lin": (BoundStage("fast-lin", _FAST_LIN),),
    "crown": (BoundStage("crown", _CROWN),),
    "milp": (*_CASCADE, Milp()),
    "cascade": _CASCADE,
}


def find_verifier(name: str) -> tuple[Stage, ...]:
    """The stages of a verifier by name.

    Raises:
        InputError: if there is no such verifier.
    """
    if name not in VERIFIERS:
        nearest = difflib.get_close_matches(name, VERIFIERS, n=1)
        hint = f"did you mean {nearest[0]!r}? " if nearest else ""
        raise InputError(f"there is no verifier {name!r}: {hint}Choose {', '.join(VERIFIERS)}")
    return VERIFIERS[name]

"""Training methods by name, as Python users call them: `tightrope.methods.ibp(eps=0.3)`."""

from tightrope.train.methods import (
    advcrown_ibp,
    advibp,
    colt,
    crown_ibp,
    fgsm,
    ibp,
    maar,
    mat,
    pgd,
    shi_ibp,
    standard,
    wong_kolter,
)

__all__ = [
    "advcrown_ibp",
    "advibp",
    "colt",
    "crown_ibp",
    "fgsm",
    "ibp",
    "maar",
    "mat",
    "pgd",
    "shi_ibp",
    "standard",
    "wong_kolter",
]

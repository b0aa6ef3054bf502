"""Training methods: each a short composition of terms, weights, radii and schedules.

A method's options are its function's parameters; recipes, the command line and their checks are
derived from the signature. To add a method: one function in the file of its family, its name here, one
row in the tests, one recipe.
"""

from tightrope.train.methods.adversarial import fgsm, mart, pgd, relu_stability, standard, trades
from tightrope.train.methods.base import METHODS, MODIFIERS, Method, Modifier, Relaxation, published
from tightrope.train.methods.certified import crown_ibp, diffai, ibp, shi_ibp, shi_regularisers, wong_kolter
from tightrope.train.methods.joint import advcrown_ibp, advibp
from tightrope.train.methods.layerwise import LatentAttack, Penalty, colt, maar, mat
from tightrope.train.methods.mixed import cc_ibp, exp_ibp, mtl_ibp, sabr, staps, taps

__all__ = [
    "METHODS",
    "MODIFIERS",
    "LatentAttack",
    "Method",
    "Modifier",
    "Penalty",
    "Relaxation",
    "advcrown_ibp",
    "advibp",
    "cc_ibp",
    "colt",
    "crown_ibp",
    "diffai",
    "exp_ibp",
    "fgsm",
    "ibp",
    "maar",
    "mart",
    "mat",
    "mtl_ibp",
    "pgd",
    "published",
    "relu_stability",
    "sabr",
    "shi_ibp",
    "shi_regularisers",
    "standard",
    "staps",
    "taps",
    "trades",
    "wong_kolter",
]

"""Training methods by name, as Python users call them: `tightrope.methods.ibp(eps=0.3)`.

Example:
    >>> import tightrope as tr
    >>> tr.methods.ibp(eps=0.3).name
    'ibp'
    >>> method = tr.methods.crown_ibp(eps=0.4, fusion=True) | tr.reweight() | tr.l1(1e-5)
    >>> [loss.name for loss in method.losses]
    ['natural', 'robust', 'l1']
"""

from tightrope.train.methods import (
    advcrown_ibp,
    advibp,
    cc_ibp,
    colt,
    crown_ibp,
    diffai,
    exp_ibp,
    fgsm,
    ibp,
    maar,
    mart,
    mat,
    mtl_ibp,
    pgd,
    relu_stability,
    sabr,
    shi_ibp,
    standard,
    staps,
    taps,
    trades,
    wong_kolter,
)

__all__ = [
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
    "relu_stability",
    "sabr",
    "shi_ibp",
    "standard",
    "staps",
    "taps",
    "trades",
    "wong_kolter",
]

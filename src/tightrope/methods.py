"""Training methods by name, as Python users call them: `tightrope.methods.ibp(eps=0.3)`."""

from tightrope.train.methods import fgsm, ibp, pgd, shi_ibp, standard

__all__ = ["fgsm", "ibp", "pgd", "shi_ibp", "standard"]

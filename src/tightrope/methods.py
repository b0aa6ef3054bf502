"""Training methods by name, as Python users call them: `tightrope.methods.ibp(eps=0.3)`."""

from tightrope.train.methods import crown_ibp, fgsm, ibp, pgd, shi_ibp, standard, wong_kolter

__all__ = ["crown_ibp", "fgsm", "ibp", "pgd", "shi_ibp", "standard", "wong_kolter"]

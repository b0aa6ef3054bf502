"""Attacks: points of a region at which the network is weak."""

from tightrope.attacks.gradient import Pgd, fgsm

__all__ = ["Pgd", "fgsm"]

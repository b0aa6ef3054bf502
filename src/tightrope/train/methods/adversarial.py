"""Natural and adversarial training: methods that prove nothing by themselves."""

from __future__ import annotations

from tightrope.attacks import Pgd
from tightrope.attacks import fgsm as one_step
from tightrope.train import regularisers, terms
from tightrope.train.methods.base import METHODS, Method, published
from tightrope.train.objective import Loss
from tightrope.train.schedules import NotNegative, Number, Positive, Real, Whole


@published(METHODS)
def standard() -> Method:
    """Natural training: the cross-entropy of the clean inputs."""
    return Method("standard", 0.0, (Loss("natural", 1.0, terms.natural),))


@published(METHODS)
def fgsm(eps: Number, step: Real = 1.25) -> Method:
    """Adversarial training with one gradient step from a random start (Wong et al. 2020).

    Args:
        eps: radius, in pixel units.
        step: length of the step, as a share of eps.
    """
    return Method("fgsm", eps, (Loss("adversarial", 1.0, terms.adversarial(one_step(step))),))


@published(METHODS)
def pgd(eps: Number, steps: Whole = 7, step: Real = 0.3) -> Method:
    """Adversarial training with projected gradient ascent (Madry et al. 2018).

    Args:
        eps: radius, in pixel units.
        steps: gradient steps.
        step: length of one step, as a share of eps.
    """
    attack = Pgd(steps=steps, step=step, keep_best=False)
    return Method("pgd", eps, (Loss("adversarial", 1.0, terms.adversarial(attack)),))


@published(METHODS)
def trades(eps: Number, beta: NotNegative = 6.0, steps: Whole = 10, step: Positive = 0.25) -> Method:
    """TRADES (Zhang et al. 2019): `CE(p(x)) + beta KL(p(x) || p(x'))`, x' where the divergence is large.

    Args:
        eps: radius, in pixel units.
        beta: weight of the divergence, 1 / lambda in the paper.
        steps: gradient steps of the attack.
        step: length of one step, as a share of eps.
    """
    attack = Pgd(steps=steps, step=step, loss="divergence", keep_best=False)
    losses = (Loss("natural", 1.0, terms.natural), Loss("divergence", beta, terms.divergence(attack)))
    return Method("trades", eps, losses)


@published(METHODS)
def mart(eps: Number, lam: NotNegative = 5.0, steps: Whole = 10, step: Positive = 0.25) -> Method:
    """MART (Wang et al. 2020): adversarial training that looks harder at what is misclassified.

    Args:
        eps: radius, in pixel units.
        lam: weight of the divergence, lambda in the paper.
        steps: gradient steps of the attack.
        step: length of one step, as a share of eps.
    """
    attack = Pgd(steps=steps, step=step, keep_best=False)
    return Method("mart", eps, (Loss("adversarial", 1.0, terms.mart(attack, lam)),))


@published(METHODS)
def relu_stability(
    eps: Number, weight: NotNegative = 1e-5, l1: NotNegative = 1e-5, steps: Whole = 7, step: Positive = 0.3
) -> Method:
    """Adversarial training for networks that are quick to verify (Xiao et al. 2019).

    `CE(p(x')) - weight sum tanh(1 + l u) + l1 sum |W|`.

    Args:
        eps: radius, in pixel units.
        weight: of the stability of all ReLUs.
        l1: weight of the size of all weights.
        steps: gradient steps of the attack.
        step: length of one step, as a share of eps.
    """
    attack = Pgd(steps=steps, step=step, keep_best=False)
    losses = (
        Loss("adversarial", 1.0, terms.adversarial(attack, fixed=True)),
        Loss("stability", weight, regularisers.xiao_stability),
        Loss("l1", l1, regularisers.l1),
    )
    return Method("relu-stability", eps, losses)

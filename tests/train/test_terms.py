"""Losses per example, against their formulas and against every point of the region."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from tightrope.attacks import Pgd
from tightrope.attacks import fgsm as one_step
from tightrope.bounds import Interval, crown_ibp, fast_lin
from tightrope.bounds.pullback import Scheme
from tightrope.train import Ramp, terms

PIXELS = 5


def small_network(seed, norm):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [nn.Linear(PIXELS, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)]
        if norm:
            layers.insert(1, nn.BatchNorm1d(6))
        return nn.Sequential(*layers).double()


def examples(seed, count=7):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(count, PIXELS, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (count,), generator=generator)


def test_natural_is_the_cross_entropy_of_each_example(batch):
    module = small_network(0, norm=False)
    x, y = examples(0)
    logits = module(x).detach().numpy()
    expected = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(y)), y]
    np.testing.assert_allclose(terms.natural(batch(module, x=x, y=y)).detach(), expected, rtol=1e-12)


ROBUST = {
    "interval": terms.worst_case(terms.bounded(Interval())),
    "crown-ibp": terms.worst_case(terms.crown_ibp(1.0)),
    "crown-ibp, mixed": terms.worst_case(terms.crown_ibp(0.4)),
    "fused": terms.fused_crown_ibp(1.0),
    "fused, mixed": terms.fused_crown_ibp(0.4),
    "fast-lin": terms.worst_case(terms.relaxed(Scheme(fast_lin(), "parallel"))),
}
EVERY_BOUND = pytest.mark.parametrize("term", ROBUST.values(), ids=ROBUST)


@EVERY_BOUND
@given(st.integers(0, 10**6), st.floats(1e-3, 0.6), st.booleans())
@settings(max_examples=10, deadline=None)
def test_robust_is_never_below_the_loss_of_any_point_of_the_region(batch, term, seed, eps, norm):
    x, y = examples(seed)
    b = batch(small_network(seed, norm), eps=eps, x=x, y=y)
    bound = term(b)
    lower, upper = b.region.corners(x)
    generator = torch.Generator().manual_seed(seed)
    corners = (torch.tensor(c) for c in itertools.product((0.0, 1.0), repeat=PIXELS))
    inside = (torch.rand(x.shape, generator=generator, dtype=x.dtype) for _ in range(30))
    attack = Pgd(steps=5, step=0.5)(b.fixed, x, y, b.region, generator)
    points = [*(lower + share * (upper - lower) for share in (*corners, *inside)), attack]
    losses = torch.stack([F.cross_entropy(b.fixed.run(p)[0], y, reduction="none") for p in points])
    assert (losses <= bound + 1e-9).all()


def test_robust_bounds_the_function_that_the_clean_batch_normalised(batch):
    """With BatchNorm in training, a bound is about the clean batch's statistics, not the bound pass's."""
    x, y = examples(3)
    b = batch(small_network(3, norm=True), eps=1e-9, x=x, y=y)
    torch.testing.assert_close(
        terms.worst_case(terms.bounded(Interval()))(b), terms.natural(b), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("term", [*ROBUST.values(), terms.adversarial(one_step())])
@pytest.mark.parametrize("eps", [0.0, torch.zeros(7)], ids=["number", "per example"])
def test_a_worst_case_over_a_point_is_the_natural_loss(batch, term, eps):
    x, y = examples(1)
    b = batch(small_network(1, norm=True), eps=eps, x=x, y=y)
    assert torch.equal(term(b), terms.natural(b))


def test_robust_grows_with_eps(batch):
    x, y = examples(2)
    module = small_network(2, norm=False)
    losses = [
        terms.worst_case(terms.bounded(Interval()))(batch(module, eps=e, x=x, y=y))
        for e in (0.0, 0.01, 0.1, 0.5)
    ]
    assert all((after >= before).all() for before, after in itertools.pairwise(losses))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("term", [terms.natural, *ROBUST.values()], ids=["natural", *ROBUST])
def test_the_gradient_is_that_of_finite_differences(batch, term, norm):
    x, y = examples(4)
    module = small_network(4, norm)
    assert torch.autograd.gradcheck(
        lambda *_: term(batch(module, eps=0.1, x=x, y=y)).mean(), tuple(module.parameters())
    )


def test_crown_ibp_is_that_of_the_engine(batch):
    x, y = examples(10)
    b = batch(small_network(10, norm=False), eps=0.1, x=x, y=y)
    torch.testing.assert_close(terms.crown_ibp(1.0)(b), terms.bounded(crown_ibp())(b))


def test_a_mixture_without_its_first_engine_is_the_second(batch):
    x, y = examples(11)
    b = batch(small_network(11, norm=False), eps=0.1, x=x, y=y)
    expected = terms.worst_case(terms.bounded(Interval()))(b)
    for term in (terms.worst_case(terms.crown_ibp(0.0)), terms.fused_crown_ibp(0.0)):
        assert torch.equal(term(b), expected)


def test_a_mixture_follows_its_schedule(batch):
    x, y = examples(12)
    module, share = small_network(12, norm=False), Ramp(start=1.0, end=0.0, begin=0.2, finish=0.6)
    for progress, now in ((0.0, 1.0), (0.4, 0.5), (0.9, 0.0)):
        b = batch(module, eps=0.1, x=x, y=y, progress=progress)
        for moving, fixed in (
            (
                terms.crown_ibp(share),
                terms.crown_ibp(now),
            ),
            (terms.fused_crown_ibp(share), terms.fused_crown_ibp(now)),
        ):
            torch.testing.assert_close(moving(b), fixed(b))


def test_fusion_survives_bounds_whose_exponentials_overflow(batch):
    x, y = examples(13)
    module = small_network(13, norm=False)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(100)
    b = batch(module, eps=0.5, x=x, y=y)
    assert bool((terms.worst_case(terms.bounded(Interval()))(b) > 1e4).any())
    loss = terms.fused_crown_ibp(0.5)(b)
    assert torch.isfinite(loss).all()
    gradients = torch.autograd.grad(loss.sum(), list(module.parameters()))
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_adversarial_is_the_loss_at_the_attacked_point(batch):
    x, y = examples(5)
    b = batch(small_network(5, norm=False), eps=0.1, x=x, y=y)
    attack = one_step()
    losses = terms.adversarial(attack)(b)
    point = b.attacked(attack)
    assert (b.region.contains(x, point) == 0).all()
    assert torch.equal(losses, F.cross_entropy(b.graph.run(point)[0], y, reduction="none"))
    assert (losses <= terms.worst_case(terms.bounded(Interval()))(b)).all()


def test_an_attack_repeats_with_the_step_s_seed(batch):
    x, y = examples(6)
    module = small_network(6, norm=False)
    first, again, other = (batch(module, eps=0.1, x=x, y=y, seed=s).attacked(one_step()) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_an_attack_sees_running_statistics_and_leaves_them_alone(batch):
    x, y = examples(7)
    module = small_network(7, norm=True)
    before = module[1].running_mean.clone()
    b = batch(module, eps=0.1, x=x, y=y)
    b.attacked(one_step())
    assert torch.equal(module[1].running_mean, before)
    assert module.training


def test_radii_per_example_each_hold_for_their_own_example(batch):
    x, y = examples(8, count=3)
    module = small_network(8, norm=False)
    radii = torch.tensor([0.0, 0.1, 0.3])
    losses = terms.worst_case(terms.bounded(Interval()))(batch(module, eps=radii, x=x, y=y))
    for i, eps in enumerate(radii.double()):
        alone = terms.worst_case(terms.bounded(Interval()))(batch(module, eps=float(eps), x=x, y=y))[i]
        torch.testing.assert_close(losses[i], alone, atol=1e-6, rtol=0)


def test_terms_share_their_passes(batch):
    x, y = examples(9)
    b = batch(small_network(9, norm=False), eps=0.1, x=x, y=y)
    engine, attack = Interval(), one_step()
    assert b.logits is b.logits
    assert b.problem.bounds(engine) is b.problem.bounds(Interval())
    assert b.attacked(attack) is b.attacked(one_step())

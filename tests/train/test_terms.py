"""Losses per example, against their formulas and against every point of the region."""

import itertools
from collections import Counter
from dataclasses import dataclass, replace

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
from tightrope.graph import trace
from tightrope.train import Loss, Ramp, methods, terms
from tightrope.train.batch import Search
from tightrope.train.regularisers import relu_stability
from tightrope.train.stages import Layerwise

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
        lambda *_: term(batch(module, eps=0.1, x=x, y=y)).mean(), tuple(module.parameters()), fast_mode=True
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


def test_an_attack_looks_at_the_statistics_from_before_the_batch_whatever_is_asked_first(batch, network):
    points = []
    for ask_first in (False, True):
        b = batch(network(norm=True).train(), eps=0.1)
        if ask_first:
            _ = b.logits
        points.append(b.attacked(one_step()))
    assert torch.equal(*points)


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


class TestLatent:
    """KL, indicator and soft weight, by hand, on three examples: two right, one wrong."""

    SEARCH = Search(Pgd(2, 0.5, keep_best=False), Interval())
    CLEAN = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.5], [1.0, 0.0, 3.0]])
    MOVED = torch.tensor([[1.0, 0.5, 0.0], [0.5, 0.0, 0.5], [0.0, 0.0, 2.0]])
    Y = torch.tensor([0, 1, 1])

    def look(self, network, batch, predicted=False):
        asked = batch(network(), count=3, y=self.Y, x=torch.full((3, 1, 6, 6), 0.5))
        asked.__dict__["_clean"] = (self.CLEAN, asked.graph)
        search = replace(self.SEARCH, predicted=predicted)
        asked._inside[search, 0] = self.MOVED
        return asked, search

    def by_hand(self):
        p, q = self.CLEAN.exp(), self.MOVED.exp()
        p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
        divergence = torch.stack(
            [sum(p[i, k] * torch.log(p[i, k] / q[i, k]) for k in range(3)) for i in range(3)]
        )
        entropy = torch.stack([-torch.log(q[i, self.Y[i]]) for i in range(3)])
        return p, q, divergence, entropy

    def test_colt_goes_by_the_label(self, network, batch):
        asked, search = self.look(network, batch)
        torch.testing.assert_close(terms.latent(search)(asked), self.by_hand()[3])

    def test_mat_goes_by_the_networks_own_answer(self, network, batch):
        asked, search = self.look(network, batch, predicted=True)
        q = self.by_hand()[1]
        expected = -torch.log(torch.stack([q[0, 0], q[1, 1], q[2, 2]]))
        torch.testing.assert_close(terms.latent(search)(asked), expected)

    def test_maar_weighs_the_divergence_by_the_doubt(self, network, batch):
        asked, search = self.look(network, batch)
        p, _, divergence, entropy = self.by_hand()
        doubt = torch.stack([1 - p[0, 0], 1 - p[1, 1], 1 - p[2, 1]])
        torch.testing.assert_close(
            terms.consistent(search, 6.0, "soft")(asked), entropy + 6 * divergence * doubt
        )

    def test_its_hard_form_looks_at_the_misclassified_alone(self, network, batch):
        asked, search = self.look(network, batch)
        _, _, divergence, entropy = self.by_hand()
        expected = entropy + 6 * divergence * torch.tensor([0.0, 0.0, 1.0])
        torch.testing.assert_close(terms.consistent(search, 6.0, "hard")(asked), expected)

    def test_uniform_weights_look_at_all(self, network, batch):
        asked, search = self.look(network, batch)
        _, _, divergence, entropy = self.by_hand()
        torch.testing.assert_close(terms.consistent(search, 6.0, "uniform")(asked), entropy + 6 * divergence)

    def test_before_the_first_stage_there_is_the_input_itself(self, network, batch):
        asked, search = self.look(network, batch)
        for term in (terms.latent(search, before=True), terms.consistent(search, 6.0, "soft", before=True)):
            torch.testing.assert_close(term(asked), terms.natural(asked))

    def test_all_terms_of_a_batch_share_bounds_and_attacks(self, network, batch):
        calls = Counter()

        @dataclass(frozen=True)
        class Boxes:
            def __call__(self, problem):
                calls["boxes"] += 1
                return Interval()(problem)

        class Attack(Pgd):
            def __call__(self, *args):
                calls["attack"] += 1
                return super().__call__(*args)

        module = network()
        stage = Layerwise().of(trace(module, (1, 6, 6)))[1]
        asked = batch(module, stage=stage)
        search = Search(Attack(2, 0.5, keep_best=False), Boxes())
        relu_stability(search.boxes, 1.0)(asked)
        for before in (False, True):
            terms.latent(search, before)(asked)
            terms.consistent(search, 6.0, "soft", before)(asked)
        assert calls == {"boxes": 1, "attack": 2}


class TestModern:
    """Terms of TRADES, MART, SABR, CC-IBP, MTL-IBP and Exp-IBP, by hand."""

    ATTACK = Pgd(3, 0.5, keep_best=False)

    def look(self, network, batch):
        asked = batch(network(), eps=0.1)
        moved = asked.moved(self.ATTACK)
        return asked, moved, asked.problem.bounds(Interval()).lower

    def test_trades_measures_the_divergence(self, network, batch):
        asked, moved, _ = self.look(network, batch)
        expected = F.kl_div(moved.log_softmax(1), asked.logits.softmax(1), reduction="none").sum(1)
        torch.testing.assert_close(terms.divergence(self.ATTACK)(asked), expected)
        assert (expected >= 0).all()

    def test_an_attack_on_the_divergence_raises_it_whatever_the_label(self, network, batch):
        attack = Pgd(10, 0.3, loss="divergence", keep_best=False)
        asked = batch(network(), eps=0.2)
        other = batch(network(), eps=0.2, y=1 - asked.y.clamp(max=1), x=asked.x)
        found = terms.divergence(attack)(asked)
        weak = terms.divergence(Pgd(1, 1e-9, keep_best=False))(asked)
        assert found.mean() > 2 * weak.mean()
        torch.testing.assert_close(terms.divergence(attack)(other), found)

    def test_mart_boosts_the_runner_up_and_doubts(self, network, batch):
        asked, moved, _ = self.look(network, batch)
        p, q = asked.logits.softmax(1), moved.softmax(1)
        expected = []
        for i, y in enumerate(asked.y.tolist()):
            rival = max(q[i, t] for t in range(3) if t != y)
            distance = sum(p[i, t] * torch.log(p[i, t] / q[i, t]) for t in range(3))
            expected.append(-torch.log(q[i, y]) - torch.log(1.0001 - rival) + 5 * distance * (1 - p[i, y]))
        torch.testing.assert_close(terms.mart(self.ATTACK, 5.0)(asked), torch.stack(expected))

    def test_sabr_looks_at_a_box_inside_the_region(self, network, batch):
        asked, _, whole = self.look(network, batch)
        for share in (0.0, 0.3, 1.0):
            problem = asked.small(self.ATTACK, share)
            inner, outer = problem.region.corners(problem.x), asked.region.corners(asked.x)
            assert (inner[0] >= outer[0] - 1e-6).all()
            assert (inner[1] <= outer[1] + 1e-6).all()
            margins = terms.bounded(Interval(), terms.small(self.ATTACK, share))(asked)
            assert (margins >= whole - 1e-5).all()
        torch.testing.assert_close(margins, whole)  # a share of 1 is the whole region

    @pytest.mark.parametrize("share", [0.2, 0.4, 0.6, 0.9])
    def test_sabr_s_box_is_not_cut_where_the_region_has_room(self, network, batch, share):
        asked, _, _ = self.look(network, batch)
        asked = batch(
            network(), eps=0.1, x=(asked.x * 3 - 1).clamp(0, 1), y=asked.y
        )  # mostly black and white
        problem = asked.small(self.ATTACK, share)
        inner, outer = problem.region.corners(problem.x), asked.region.corners(asked.x)
        expected = (outer[1] - outer[0]).clamp(max=2 * share * 0.1)
        torch.testing.assert_close(inner[1] - inner[0], expected, atol=1e-6, rtol=0)
        assert (expected < 0.2).any()

    def test_a_small_box_of_no_size_is_the_attack(self, network, batch):
        asked, moved, _ = self.look(network, batch)
        found = terms.bounded(Interval(), terms.small(self.ATTACK, 0.0))(asked)
        torch.testing.assert_close(found, moved.gather(1, asked.y.unsqueeze(1)) - moved)

    @pytest.mark.parametrize("alpha", [0.01, 0.3, 1.0])
    def test_between_attack_and_bounds(self, network, batch, alpha):
        asked, moved, lower = self.look(network, batch)
        attacked = moved.gather(1, asked.y.unsqueeze(1)) - moved
        expected = alpha * lower + (1 - alpha) * attacked
        torch.testing.assert_close(terms.between(self.ATTACK, alpha)(asked), expected)
        weak = F.cross_entropy(moved, asked.y, reduction="none")
        robust = F.cross_entropy(-lower, asked.y, reduction="none")
        loss = methods.exp_ibp(eps=0.1, alpha=alpha, steps=self.ATTACK.steps, step=self.ATTACK.step).losses[0]
        expected = robust.mean() ** alpha * weak.mean() ** (1 - alpha)
        torch.testing.assert_close(loss.value(asked), expected)


class TestConnected:
    """TAPS: an attack in the interval box of a node."""

    ATTACK = Pgd(steps=8, step=0.25, loss="margin", keep_best=False)

    @pytest.mark.parametrize("norm", [False, True])
    @pytest.mark.parametrize("behind", [0, 1])
    def test_its_margins_lie_above_those_of_intervals(self, batch, behind, norm):
        x, y = examples(20)
        b = batch(small_network(20, norm), eps=0.2, x=x, y=y)
        found, interval = terms.connected(self.ATTACK, behind)(b), terms.bounded(Interval())(b)
        assert (found >= interval - 1e-9).all()
        assert (found.gather(1, y.unsqueeze(1)) == 0).all()
        assert bool((found > interval + 1e-6).any()) == (behind > 0)

    @pytest.mark.parametrize("norm", [False, True])
    def test_without_an_activation_behind_it_is_ibp_with_its_gradient(self, batch, norm):
        x, y = examples(21)
        module = small_network(21, norm)
        found, expected = (
            torch.autograd.grad(
                F.cross_entropy(-margins(batch(module, eps=0.2, x=x, y=y)), y), [*module.parameters()]
            )
            for margins in (terms.connected(self.ATTACK, 0), terms.bounded(Interval()))
        )
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)

    def test_each_class_has_a_point_of_its_own(self, batch):
        x, y = examples(22)
        module = small_network(22, norm=False)
        alone = terms.connected(self.ATTACK, 1)(batch(module, eps=0.2, x=x, y=y))
        with torch.no_grad():  # a class that is far away changes nothing for the others
            module[-1].weight[2], module[-1].bias[2] = 0.0, 50.0
        changed = terms.connected(self.ATTACK, 1)(batch(module, eps=0.2, x=x, y=y))
        others = (y != 2).unsqueeze(1) & (torch.arange(3) != 2)
        torch.testing.assert_close(changed[others], alone[others])

    @pytest.mark.parametrize("weight", [1.0, 4.0])
    def test_a_product_weighs_the_gradient_of_its_first_factor(self, batch, weight):
        x, y = examples(23)
        module = small_network(23, norm=False)
        first, second = terms.bounded(crown_ibp()), terms.bounded(Interval())

        def gradient(value):
            loss = value(batch(module, eps=0.1, x=x, y=y))
            return torch.autograd.grad(loss, [*module.parameters()])

        b, factors = batch(module, eps=0.1, x=x, y=y), [terms.worst_case(m) for m in (first, second)]
        loss = Loss("connected", 1.0, terms.both(*factors), second, join=terms.product(weight))
        one, two = (factor(b).mean() for factor in factors)
        torch.testing.assert_close(loss.value(b), one * two)
        expected = [
            weight * left + right
            for left, right in zip(
                gradient(lambda b: factors[0](b).mean() * two.detach()),
                gradient(lambda b: one.detach() * factors[1](b).mean()),
                strict=True,
            )
        ]
        for found, other in zip(gradient(loss.value), expected, strict=True):
            torch.testing.assert_close(found, other)
        weighed = replace(loss, weigh=lambda b, _: torch.arange(1.0, 1.0 + len(b.y)))
        w = torch.arange(1.0, 1.0 + len(y), dtype=x.dtype)
        w /= w.sum()
        torch.testing.assert_close(weighed.value(b), (w @ factors[0](b)) * (w @ factors[1](b)))

    def test_examples_that_do_not_move_are_trained_on_their_own_margins(self, batch):
        x, y = examples(24, count=3)
        radii = torch.tensor([0.0, 0.1, 0.3])
        module = small_network(24, norm=False)
        b = batch(module, eps=radii, x=x, y=y)
        found = terms.connected(self.ATTACK, 1)(b)[0]
        torch.testing.assert_close(found, b.margins[0])
        ours, clean = (
            torch.autograd.grad(m.sum(), [*module.parameters()], retain_graph=True)
            for m in (found, b.margins[0])
        )
        for one, other in zip(ours, clean, strict=True):
            torch.testing.assert_close(one, other)

    def test_a_box_inside_the_region_lies_anywhere_without_an_attack(self, batch):
        x, y = examples(25)
        b = batch(small_network(25, norm=False), eps=0.2, x=x, y=y, progress=0.5)
        problem = terms.small(None, Ramp(start=0.0, end=1.0, begin=0.0, finish=1.0))(b)
        inner, outer = problem.region.corners(problem.x), b.region.corners(x)
        assert problem.region.eps == pytest.approx(0.1)
        assert not torch.allclose(problem.x, x)
        assert (inner[0] >= outer[0] - 1e-9).all()
        assert (inner[1] <= outer[1] + 1e-9).all()

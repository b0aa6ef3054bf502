"""The regularisers d and r of tight_relaxation.txt, against their definitions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tightrope.bounds import Interval, fast_lin
from tightrope.bounds.pullback import Scheme
from tightrope.errors import InputError
from tightrope.train import regularisers
from tightrope.train.terms import CROWN_IBP

FAST_LIN = Scheme(fast_lin(), "parallel")
SCHEMES = {"fast-lin": FAST_LIN, "crown-ibp": CROWN_IBP, "zero": Scheme(Interval(), "zero")}
ON_EACH_SCHEME = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)


def network(seed: int, inputs: int = 4) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [nn.Linear(inputs, 6), nn.ReLU(), nn.Linear(6, 5), nn.LeakyReLU(0.1), nn.Linear(5, 3)]
        return nn.Sequential(*layers).double()


def make(batch, seed, eps, module=None):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(3, 4, generator=generator, dtype=torch.float64)
    return batch(module or network(seed), eps=eps, x=x, y=torch.randint(0, 3, (3,), generator=generator))


@ON_EACH_SCHEME
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), eps=st.floats(1e-3, 0.6))
def test_neither_is_ever_negative(batch, scheme, seed, eps):
    b = make(batch, seed, eps)
    assert (regularisers.tightness_d(scheme)(b) >= -1e-9).all()
    assert (regularisers.tightness_r(scheme)(b) >= 0).all()


@ON_EACH_SCHEME
@pytest.mark.parametrize("regulariser", [regularisers.tightness_d, regularisers.tightness_r])
def test_the_gradient_is_that_of_finite_differences(batch, scheme, regulariser):
    module = network(1)
    term = regulariser(scheme)
    assert torch.autograd.gradcheck(
        lambda *_: term(make(batch, 1, 0.2, module)),
        tuple(module.parameters()),
        eps=1e-7,
        atol=1e-5,
        fast_mode=True,
    )


@ON_EACH_SCHEME
def test_over_a_point_both_are_zero(batch, scheme):
    b = make(batch, 2, 0.0)
    for regulariser in (regularisers.tightness_d, regularisers.tightness_r):
        assert regulariser(scheme)(b).tolist() == [0, 0, 0]


def one_neuron(weight: float) -> nn.Sequential:
    """`(0, weight relu(x - 0.5))`: with eps 0.2 around x = 0.5, the neuron runs from -0.2 to 0.2."""
    net = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 2, bias=False)).double()
    net[0].weight.data.fill_(1.0)
    net[0].bias.data.fill_(-0.5)
    net[2].weight.data.copy_(torch.tensor([[0.0], [weight]]))
    return net


def on_one_neuron(batch, weight):
    x, y = torch.tensor([[0.5]], dtype=torch.float64), torch.tensor([0])
    return batch(one_neuron(weight), eps=0.2, x=x, y=y)


def test_where_r_is_zero_the_bound_is_attained(batch):
    """The margin is `-relu(z)`: its worst input is the upper end, where the chord meets the ReLU."""
    b = on_one_neuron(batch, 1.0)
    assert regularisers.tightness_r(FAST_LIN)(b).item() == pytest.approx(0, abs=1e-12)
    assert regularisers.tightness_d(FAST_LIN)(b).item() == pytest.approx(0, abs=1e-12)
    worst = b.worst(FAST_LIN)
    assert worst.bound.item() == pytest.approx(-0.2)
    assert worst.margins.item() == pytest.approx(-0.2)


def test_both_by_hand_where_the_bound_is_not_attained(batch):
    """The margin is `relu(z)`: Fast-Lin says `z / 2`, smallest at z = -0.2, where the ReLU itself is 0."""
    b = on_one_neuron(batch, -1.0)
    assert b.worst(FAST_LIN).bound.item() == pytest.approx(-0.1)
    assert regularisers.tightness_d(FAST_LIN)(b).item() == pytest.approx(0.1)
    assert regularisers.tightness_r(FAST_LIN)(b).item() == pytest.approx(0.2)


def test_a_lower_line_of_slope_zero_is_exact_left_of_the_kink(batch):
    b = on_one_neuron(batch, -1.0)
    assert regularisers.tightness_r(SCHEMES["zero"])(b).item() == 0
    assert regularisers.tightness_d(SCHEMES["zero"])(b).item() == pytest.approx(0, abs=1e-12)


@ON_EACH_SCHEME
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), eps=st.floats(0.01, 0.4))
def test_r_zero_means_d_zero_on_networks_of_one_input_that_only_fall(batch, scheme, seed, eps):
    """Increasing neurons, negative weights: the worst input is an upper end, where all chords are exact."""
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Linear(1, 5), nn.ReLU(), nn.Linear(5, 2, bias=False)).double()
    net[0].weight.data.copy_(torch.rand(5, 1, generator=generator, dtype=torch.float64) + 0.1)
    net[0].bias.data.copy_(-torch.rand(5, generator=generator, dtype=torch.float64))
    net[2].weight.data[0] = 0
    net[2].weight.data[1] = torch.rand(5, generator=generator, dtype=torch.float64)
    x = torch.rand(4, 1, generator=generator, dtype=torch.float64)
    b = batch(net, eps=eps, x=x, y=torch.zeros(4, dtype=torch.int64))
    torch.testing.assert_close(regularisers.tightness_r(scheme)(b), torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(regularisers.tightness_d(scheme)(b), torch.zeros(4, dtype=torch.float64))


def test_r_is_refused_where_an_activation_has_no_kink(batch):
    b = batch(
        nn.Sequential(nn.Linear(4, 3), nn.Sigmoid(), nn.Linear(3, 3)),
        x=torch.rand(2, 4),
        y=torch.tensor([0, 1]),
    )
    with pytest.raises(InputError, match="Sigmoid"):
        regularisers.tightness_r(CROWN_IBP)(b)


def test_both_share_the_backward_pass_of_the_robust_loss(batch, monkeypatch):
    from tightrope.train import batch as module
    from tightrope.train import terms

    calls = []
    honest = module.pull_back
    monkeypatch.setattr(module, "pull_back", lambda *a: calls.append(a) or honest(*a))
    b = make(batch, 3, 0.1)
    for term in (
        terms.worst_case(terms.crown_ibp(0.5)),
        regularisers.tightness_d(CROWN_IBP),
        regularisers.tightness_r(CROWN_IBP),
    ):
        term(b)
    assert len(calls) == 1


def test_distances_and_their_gradients_do_not_depend_on_how_images_lie_in_memory():
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    z, coefficients = numbers(2, 3, 4, 5, 6), numbers(2, 3, 4, 5, 6)
    ends = numbers(2, 4, 5, 6), numbers(2, 4, 5, 6).abs() + 1
    counted = (ends[0] < 0) & (ends[1] > 0)
    left, right = counted & (numbers(2, 4, 5, 6) > 0), counted
    found = []
    for lay in (torch.clone, lambda value: value.movedim(2, -1).contiguous().movedim(-1, 2)):
        given = [lay(z).requires_grad_(), *(end.clone().requires_grad_() for end in ends)]
        total = regularisers.distance(given[0], lay(coefficients), given[1], given[2], left, right)
        found.append((total, *torch.autograd.grad((total * torch.arange(6).view(2, 3)).sum(), given)))
    lower, upper, used = (value.unsqueeze(1) for value in (*ends, counted))
    to_end = torch.minimum((z - lower).abs(), (z - upper).abs())
    to_kink = right.unsqueeze(1) * z.clamp(min=0) + left.unsqueeze(1) * (-z).clamp(min=0)
    by_hand = (used * torch.where(coefficients < 0, to_end, to_kink)).flatten(2).sum(2)
    torch.testing.assert_close(found[0][0], by_hand)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)

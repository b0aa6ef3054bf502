"""Shi et al.'s regularisers against a second implementation of methods.md, section 4, in NumPy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

from tightrope.bounds import Interval
from tightrope.train.batch import SMALLEST_EPS
from tightrope.train.regularisers import l1, shi_relu, shi_tightness

TAU = 0.5


def network(seed, shift=0.0, scale=1.0):
    """An MLP in float64 with larger weights, and biases moved so that a side may stay empty."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = nn.Sequential(
            nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3)
        ).double()
    with torch.no_grad():
        module[0].weight *= scale
        module[2].weight *= scale
        module[0].bias += shift
    return module


def inputs(seed):
    x = torch.rand(9, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x, torch.arange(9) % 3


def boxes_by_hand(module, x, eps):
    """Input box and the boxes before each ReLU, in lower/upper form."""
    lower, upper = np.clip(x.numpy() - eps, 0, 1), np.clip(x.numpy() + eps, 0, 1)
    boxes = [(lower, upper)]
    for layer in (module[0], module[2]):
        w, b = layer.weight.detach().numpy().T, layer.bias.detach().numpy()
        up, down = np.maximum(w, 0), np.minimum(w, 0)
        lower, upper = lower @ up + upper @ down + b, upper @ up + lower @ down + b
        boxes.append((lower, upper))
        lower, upper = np.maximum(lower, 0), np.maximum(upper, 0)
    return boxes[0], boxes[1:]


def tightness_by_hand(box, boxes):
    def half(lower, upper):
        return np.mean((upper - lower) / 2)

    return np.mean([max(0, TAU - half(*box) / max(half(*layer), 1e-12)) / TAU for layer in boxes])


def relu_by_hand(boxes):
    total = 0.0
    for lower, upper in boxes:
        c = (lower + upper) / 2
        deviation = (c - c.mean()) ** 2
        for above, below in (
            (np.mean(c * (lower > 0)), -np.mean(c * (upper < 0))),
            (np.sum(deviation * (lower > 0)), np.sum(deviation * (upper < 0))),
        ):
            if above > 0 and below > 0:  # else the ratio is 0, infinite or NaN, and is skipped
                q = above / below
                total += max(0, TAU - min(q, 1 / q)) / TAU
    return total / len(boxes)


@given(st.integers(0, 10**6), st.floats(1e-3, 0.5), st.floats(-1.5, 1.5), st.floats(0.5, 8))
@settings(max_examples=60)
def test_both_are_their_formulas(batch, seed, eps, shift, scale):
    module = network(seed, shift, scale)
    x, y = inputs(seed)
    b = batch(module, eps=eps, x=x, y=y)
    box, boxes = boxes_by_hand(module, x, eps)
    assert shi_tightness(Interval())(b).item() == pytest.approx(tightness_by_hand(box, boxes), abs=1e-9)
    assert shi_relu(Interval())(b).item() == pytest.approx(relu_by_hand(boxes), abs=1e-9)


def test_the_random_networks_meet_both_cases():
    """Else the test above would hold for a function that is always 0, or blind to empty sides."""
    x, _ = inputs(0)
    found = [boxes_by_hand(network(seed, 0.0, 6.0), x, 0.01) for seed in range(20)]
    assert 0 < np.median([relu_by_hand(boxes) for _, boxes in found]) < 2
    assert 0 < np.median([tightness_by_hand(box, boxes) for box, boxes in found]) < 1
    assert relu_by_hand(boxes_by_hand(network(0, 50.0), x, 0.01)[1][:1]) == 0


@pytest.mark.parametrize("shift", [50.0, -50.0], ids=["all active", "all dead"])
def test_an_empty_side_contributes_nothing_and_keeps_the_gradient_finite(batch, shift):
    module = network(1, shift)
    x, y = inputs(1)
    b = batch(module, eps=0.1, x=x, y=y)
    (shi_relu(Interval())(b) + shi_tightness(Interval())(b)).backward()
    _, boxes = boxes_by_hand(module, x, 0.1)
    assert relu_by_hand(boxes) == shi_relu(Interval())(b).item()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in module.parameters())


@pytest.mark.parametrize("term", [shi_relu(Interval()), shi_tightness(Interval())])
def test_the_gradient_is_that_of_finite_differences(batch, term):
    module = network(3, scale=6.0)
    x, y = inputs(3)
    parameters = tuple(p for layer in (module[0], module[2]) for p in layer.parameters())
    assert term(batch(module, eps=0.01, x=x, y=y)).item() > 0
    assert torch.autograd.gradcheck(
        lambda *_: term(batch(module, eps=0.01, x=x, y=y)), parameters, fast_mode=True
    )


def test_while_eps_is_zero_boxes_are_compared_at_a_very_small_eps(batch):
    module = network(2)
    x, y = inputs(2)
    still = batch(module, eps=0.0, x=x, y=y)
    box, boxes = boxes_by_hand(module, x, SMALLEST_EPS)
    assert SMALLEST_EPS == 1e-6
    assert shi_tightness(Interval())(still).item() == pytest.approx(tightness_by_hand(box, boxes), abs=1e-6)
    assert shi_relu(Interval())(still).item() == pytest.approx(relu_by_hand(boxes), abs=1e-6)


def test_wide_boxes_cost_and_narrow_ones_do_not(batch):
    x, y = inputs(4)
    module = network(4)
    with torch.no_grad():
        module[0].weight.mul_(100)
    assert shi_tightness(Interval())(batch(module, eps=0.1, x=x, y=y)).item() > 0.9
    with torch.no_grad():
        module[0].weight.mul_(1e-4)
        module[2].weight.mul_(1e-4)
    assert shi_tightness(Interval())(batch(module, eps=0.1, x=x, y=y)).item() == 0


@pytest.mark.parametrize("term", [shi_relu(Interval()), shi_tightness(Interval())])
def test_a_network_without_activations_costs_nothing(batch, term):
    x, y = inputs(5)
    assert term(batch(nn.Sequential(nn.Linear(6, 3)).double(), eps=0.1, x=x, y=y)).item() == 0


def test_l1_of_a_network_of_which_only_biases_are_trained_is_0(batch, network):
    module = network()
    for parameter in module.parameters():
        parameter.requires_grad_(parameter.ndim == 1)
    assert l1(batch(module)).item() == 0


def test_l1_is_of_the_weights_that_the_network_reads(batch, network):
    module = network(norm=True)
    expected = sum(layer.weight.abs().sum() for layer in (module[0], module[4], module[7]))
    torch.testing.assert_close(l1(batch(module)), expected)
    module[7].weight.requires_grad_(False)
    torch.testing.assert_close(l1(batch(module)), expected - module[7].weight.abs().sum())
    module[7].weight.requires_grad_(True)
    parametrizations.weight_norm(module[4])  # the same function of two other parameters
    torch.testing.assert_close(l1(batch(module)), expected)
    module[4].parametrizations.weight.original1.data.mul_(3)
    torch.testing.assert_close(l1(batch(module)), expected)
    module[0].bias = nn.Parameter(torch.zeros(4))
    tied = nn.Sequential(layer := nn.Linear(3, 3), nn.ReLU(), layer)
    torch.testing.assert_close(
        l1(batch(tied, x=torch.rand(2, 3), y=torch.tensor([0, 1]))), layer.weight.abs().sum()
    )

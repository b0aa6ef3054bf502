"""Shi et al.'s initialisation: methods.md, section 4."""

import copy
import math

import pytest
import torch
from torch import nn

from tightrope.graph import trace
from tightrope.train.initialise import ibp_initialisation


def initialised(module, shape, seed=0):
    """A copy after `ibp_initialisation` with this seed."""
    changed = copy.deepcopy(module)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        ibp_initialisation(trace(changed, torch.Size(shape)))
    return changed


def wide():
    return nn.Sequential(
        nn.Conv2d(8, 64, 3, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Conv2d(64, 32, 4, stride=4, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 200),
        nn.ReLU(),
        nn.Linear(200, 10),
    )


@pytest.mark.parametrize(("layer", "fan_in"), [(0, 8 * 9), (3, 32 * 16), (6, 128)])
def test_weights_are_normal_with_deviation_sqrt_2_pi_by_fan_in(layer, fan_in):
    weight = initialised(wide(), (8, 8, 8))[layer].weight
    standard = weight.flatten() * fan_in / math.sqrt(2 * math.pi)
    error = 4 / math.sqrt(len(standard))  # four deviations of a sample mean or deviation
    assert standard.mean().item() == pytest.approx(0, abs=error)
    assert standard.std().item() == pytest.approx(1, abs=error)
    assert float((standard.abs() < 1).float().mean()) == pytest.approx(0.6827, abs=2 * error)


def test_everything_else_stays():
    before = wide()
    after = initialised(before, (8, 8, 8))
    weights = {"0.weight", "3.weight", "6.weight"}
    old, new = before.state_dict(), after.state_dict()
    assert {name for name in old if not torch.equal(old[name], new[name])} == weights
    assert all(p.requires_grad for p in after.parameters())


def test_the_seed_decides():
    module = wide()
    first, again, other = (initialised(module, (8, 8, 8), seed)[0].weight for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


class Residual(nn.Module):
    """Layers `a`, `b` and `skip` lead to a sum; `between` leads on to `c`."""

    def __init__(self, between, sums=True):
        super().__init__()
        self.a, self.b, self.skip = (nn.Conv2d(2, 2, 3, padding=1) for _ in range(3))
        self.between, self.sums = between, sums
        self.c = nn.Linear(2 * 16, 20)
        self.last = nn.Linear(20, 3)

    def forward(self, x):
        branch = self.b(torch.relu(self.a(x)))
        z = branch + self.skip(x) if self.sums else branch
        return self.last(torch.relu(self.c(torch.flatten(self.between(z), 1))))


@pytest.mark.parametrize(
    "between", [nn.ReLU(), nn.Identity(), nn.Sequential(nn.BatchNorm2d(2), nn.ReLU()), nn.LeakyReLU()]
)
def test_a_layer_that_a_residual_sum_feeds_gets_half(between):
    module = Residual(between)
    after = initialised(module, (2, 4, 4))
    # The same draws without the halving: the layers are set in the order they are computed in.
    fan_ins = {"a": 18, "b": 18, "skip": 18, "c": 32}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = {
            name: torch.empty_like(getattr(module, name).weight).normal_(std=math.sqrt(2 * math.pi) / fan_in)
            for name, fan_in in fan_ins.items()
        }
    for name, weight in drawn.items():
        halved = 0.5 if name == "c" else 1.0
        torch.testing.assert_close(getattr(after, name).weight.data, halved * weight)
    assert torch.equal(after.last.weight, module.last.weight)


def test_without_a_sum_nothing_is_halved():
    weight = initialised(Residual(nn.ReLU(), sums=False), (2, 4, 4)).c.weight
    assert weight.std().item() == pytest.approx(math.sqrt(2 * math.pi) / 32, rel=0.15)


def test_a_network_of_one_layer_stays():
    module = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    assert torch.equal(initialised(module, (1, 2, 2))[1].weight, module[1].weight)


def test_frozen_weights_stay():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    net[0].requires_grad_(False)
    changed = initialised(net, (4,))
    assert torch.equal(changed[0].weight, net[0].weight)
    assert not torch.equal(changed[2].weight, net[2].weight)


def test_a_weight_that_is_computed_gets_its_value_too():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(400, 300))
    net = nn.Sequential(layer, nn.ReLU(), nn.Linear(300, 2))
    weight = initialised(net, (400,))[0].weight
    assert weight.std().item() == pytest.approx(math.sqrt(2 * math.pi) / 400, rel=0.05)

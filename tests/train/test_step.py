"""One optimiser step: what moves, by how much, and what stays when something is NaN."""

import copy
import math

import pytest
import torch
from torch.nn.utils import parametrizations

from tightrope.errors import DivergedError
from tightrope.train import Loss, Method, Ramp, methods, terms
from tightrope.train.step import train_step


def flat(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def gradient(module, loss):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(module.parameters()))])


def sgd(module, lr=1.0):
    return torch.optim.SGD(module.parameters(), lr)


def a_method(**losses):
    """A method of these terms, each with weight 1 or `(weight, term)`."""
    pairs = {name: loss if isinstance(loss, tuple) else (1.0, loss) for name, loss in losses.items()}
    return Method("custom", 0.0, tuple(Loss(name, *pair) for name, pair in pairs.items()))


def half(batch):
    return 0.5 * terms.natural(batch)


def test_the_step_follows_the_weighted_sum_of_the_losses(network, batch):
    module = network()
    before, b = flat(module), batch(module)
    expected = gradient(module, 2.0 * terms.natural(b).mean() + 3.0 * b.logits.square().mean())
    method = a_method(natural=(2.0, terms.natural), size=(3.0, lambda b: b.logits.square().mean(1)))
    result = train_step(method, batch(module), sgd(module), clip=0.0)
    torch.testing.assert_close(before - flat(module), expected)
    assert result.losses == pytest.approx(
        {"natural": terms.natural(b).mean().item(), "size": b.logits.square().mean().item()}
    )
    assert result.gradient_norm == pytest.approx(expected.norm().item())


def test_weights_that_move_at_each_use_stay_the_same_for_a_step(network, batch):
    module = network()
    for layer in (module[0], module[3]):
        parametrizations.spectral_norm(layer)
    seen = []

    def look(b):
        seen.append(module[3].weight.detach().clone())
        return terms.natural(b) + 0 * module[3].weight.sum()

    before = module[3].parametrizations.weight[0]._u.clone()
    train_step(a_method(one=look, two=look), batch(module), sgd(module), 0.0)
    assert torch.equal(*seen)
    assert not torch.equal(before, module[3].parametrizations.weight[0]._u)  # once a step it moves
    assert all(part.training for part in module.modules())


def test_a_term_may_be_one_value_for_the_batch(network, batch):
    module = network()
    result = train_step(a_method(one=lambda b: b.logits.square().sum()), batch(module), sgd(module), 0.0)
    assert result.losses["one"] == pytest.approx(batch(network()).logits.square().sum().item())


@pytest.mark.parametrize("share", [0.1, 0.9, 1.1, 10.0])
def test_a_gradient_longer_than_clip_is_shortened_to_it(network, batch, share):
    module = network()
    whole = gradient(module, terms.natural(batch(module)).mean())
    clip, before = share * whole.norm().item(), flat(module)
    result = train_step(methods.standard(), batch(module), sgd(module), clip)
    assert result.gradient_norm == pytest.approx(whole.norm().item())
    torch.testing.assert_close(before - flat(module), min(1, share) * whole, atol=1e-6, rtol=1e-4)


def test_old_gradients_do_not_count(network, batch):
    module, fresh = network(), network()
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    for one in (module, fresh):
        train_step(methods.standard(), batch(one), sgd(one), 0.0)
    assert torch.equal(flat(module), flat(fresh))


def test_frozen_parameters_stay(network, batch):
    module = network()
    module[0].requires_grad_(False)
    frozen, moving = module[0].weight.clone(), module[-1].weight.clone()
    optimiser = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], 0.1, weight_decay=0.1)
    train_step(methods.standard(), batch(module), optimiser, clip=1.0)
    assert torch.equal(module[0].weight, frozen)
    assert not torch.equal(module[-1].weight, moving)


def test_weights_are_those_of_the_moment(network, batch):
    falling, rising = Ramp(start=1.0, end=0.0, begin=0, finish=1), Ramp(start=0.0, end=1.0, begin=0, finish=1)
    method = a_method(natural=(falling, terms.natural), half=(rising, half))
    module = network()
    before, whole = flat(module), gradient(module, terms.natural(batch(module)).mean())
    train_step(method, batch(module, progress=0.25), sgd(module), 0.0)
    torch.testing.assert_close(before - flat(module), (0.75 + 0.25 * 0.5) * whole)


# ------------------------------------------------------------------------------------- divergence


def nan_loss(batch):
    return terms.natural(batch) * math.nan


def infinite_loss(batch):
    return terms.natural(batch) / 0


def nan_gradient(batch):
    """0, with the gradient infinity times 0."""
    return (batch.logits.square().sum(1) * 0).sqrt()


def infinite_gradient(batch):
    """0, with the gradient infinity."""
    return (batch.logits[:, 0] - batch.logits[:, 0].detach()).clamp(min=0).sqrt()


BAD = [
    (nan_loss, "the loss `bad` is nan"),
    (infinite_loss, "the loss `bad` is inf"),
    (nan_gradient, "the gradient of good \\+ bad is nan"),
    (infinite_gradient, "the gradient of good \\+ bad is (nan|inf)"),
]


@pytest.mark.parametrize(("bad", "message"), BAD, ids=lambda value: getattr(value, "__name__", ""))
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_nan_stops_by_name_and_leaves_the_network_and_the_optimiser_as_they_were(
    network, batch, bad, message, clip
):
    module = network(norm=True)
    optimiser = torch.optim.Adam(module.parameters(), 0.01)
    train_step(a_method(good=terms.natural), batch(module), optimiser, clip)
    state, moments = copy.deepcopy(module.state_dict()), copy.deepcopy(optimiser.state_dict())
    with pytest.raises(DivergedError, match=message):
        train_step(a_method(good=terms.natural, bad=bad), batch(module), optimiser, clip)
    assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())
    for i, entries in optimiser.state_dict()["state"].items():
        assert all(torch.equal(value, moments["state"][i][key]) for key, value in entries.items())


def test_a_bad_term_with_weight_zero_does_no_harm(network, batch):
    module = network()
    method = a_method(good=terms.natural, bad=(0.0, nan_loss))
    assert set(train_step(method, batch(module), sgd(module), 0.0).losses) == {"good"}


def test_weights_that_are_infinite_already_are_found_in_the_loss(network, batch):
    module = network()
    b = batch(module)
    with torch.no_grad():
        module[-1].weight[0, 0] = math.inf
    with pytest.raises(DivergedError, match=r"`natural` is (nan|inf)"):
        train_step(methods.standard(), b, sgd(module), 0.0)

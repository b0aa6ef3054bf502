"""One gradient from two losses: AdvIBP's weights, against the paper's definition written out."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

import tightrope as tr
from tightrope.attacks import fgsm
from tightrope.errors import DivergedError, InputError
from tightrope.graph import trace
from tightrope.train import Loss, Method, Ramp, terms
from tightrope.train.combine import Bisector, Total, fosc
from tightrope.train.methods.base import MODIFIERS
from tightrope.train.schedules import at
from tightrope.train.step import train_step

ATTACK = fgsm()


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).double()


def points(seed: int, count: int = 4):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(count, 1, 2, 3, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (count,), generator=generator)


class Given:
    """Losses whose gradients are given vectors: `<vector, parameters>`, so that every case can be made."""

    def __init__(self, size: int, angle: float, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        first = torch.randn(size, generator=generator, dtype=torch.float64)
        other = torch.randn(size, generator=generator, dtype=torch.float64)
        other -= (other @ first) / (first @ first) * first
        self.vectors = [2 * first / first.norm(), None]
        self.vectors[1] = 3 * (
            math.cos(angle) * first / first.norm() + math.sin(angle) * other / other.norm()
        )

    def loss(self, name: str, number: int) -> Loss:
        def term(batch):
            flat = torch.cat([p.flatten() for p in batch.graph.module.parameters()])
            value = self.vectors[number] @ flat + 5.0
            # The adversarial loss depends on its points, as FOSC asks of it.
            return value + (
                0.1 * batch.attacked(ATTACK).flatten(1).sum(1) if number == 0 else 0.0
            ) * torch.ones(len(batch.y), dtype=torch.float64)

        return Loss(name, 1.0, term)


def steps(batch, given, bisector, count=1):
    """The gradients of some steps with a learning rate of 0, and what was noted."""
    module = network()
    losses = (given.loss("adversarial", 0), given.loss("robust", 1))
    method = Method("two", 0.1, losses, combiner=bisector)
    state, found = method.begin(trace(module, (1, 2, 3)), 4), []
    for i in range(count):
        x, y = points(i)
        b = batch(module, eps=0.1, x=x, y=y, state=state)
        result = train_step(method, b, torch.optim.SGD(module.parameters(), 0.0), clip=0.0)
        found.append((torch.cat([p.grad.flatten() for p in module.parameters()]), result))
    return found


SIZE = sum(p.numel() for p in network().parameters())


def test_the_first_step_adds_the_two_up(batch):
    given = Given(SIZE, 0.5)
    ((gradient, _),) = steps(batch, given, Bisector(ATTACK, 0.5))
    torch.testing.assert_close(gradient, sum(given.vectors))


@pytest.mark.parametrize("angle", [0.2, 1.0, 1.5])
def test_gradients_that_agree_are_bisected(batch, angle):
    given = Given(SIZE, angle)
    g1, g2 = given.vectors
    gradient, result = steps(batch, given, Bisector(ATTACK, 0.5), count=3)[-1]
    bisector = g1 / g1.norm() + g2 / g2.norm()
    gamma = 0.5 * (g1 + g2) @ bisector / (bisector @ bisector)
    torch.testing.assert_close(gradient, gamma * bisector)
    cosines = [gradient @ g / gradient.norm() / g.norm() for g in (g1, g2)]
    assert cosines[0].item() == pytest.approx(cosines[1].item())
    assert result.notes["agree"] == 1
    assert result.notes["cosine"] == pytest.approx(math.cos(angle))


@pytest.mark.parametrize("angle", [1.6, 2.5])
def test_a_strong_attack_has_priority_and_the_other_gradient_is_not_touched(batch, angle):
    given = Given(SIZE, angle)
    g1, g2 = given.vectors
    gradient, result = steps(batch, given, Bisector(ATTACK, 1e9), count=3)[-1]
    torch.testing.assert_close(gradient, g1 - (g1 @ g2) / (g2 @ g2) * g2)
    assert abs(gradient @ g2) < 1e-9
    assert result.notes["adversarial first"] == 1


@pytest.mark.parametrize("angle", [1.6, 2.5])
def test_against_a_weak_attack_the_bound_has_priority_and_its_square_is_a_regulariser(batch, angle):
    given = Given(SIZE, angle)
    g1, g2 = given.vectors
    gradient, result = steps(batch, given, Bisector(ATTACK, -1.0), count=3)[-1]
    projected = g2 - (g1 @ g2) / (g1 @ g1) * g1
    assert abs(projected @ g1) < 1e-9
    regulariser = 0.5 * 2 * result.losses["robust"] * g2
    torch.testing.assert_close(gradient, projected + regulariser)
    assert result.notes["robust first"] == 1


def test_moments_are_the_bias_corrected_averages_of_past_gradients():
    bisector = Bisector(ATTACK, 0.5, beta1=0.8, beta2=0.7)
    state = bisector.begin(trace(network(), (1, 2, 3)))
    generator = torch.Generator().manual_seed(0)
    past = torch.randn(5, 2, SIZE, generator=generator, dtype=torch.float64)
    for first, second in past:
        bisector._learn(state, first, second)
    averages, lengths, product = bisector._moments(state)
    for decay, values, found in ((0.8, past, averages), (0.7, past.norm(dim=2), torch.tensor(lengths))):
        weights = decay ** torch.arange(4, -1, -1, dtype=torch.float64)
        expected = torch.tensordot(weights / weights.sum(), values, 1)
        torch.testing.assert_close(found, expected.to(found))
    assert product == pytest.approx(float(averages[0] @ averages[1]))


def test_the_weights_do_not_depend_on_this_steps_gradients(batch):
    bisector, notes = Bisector(ATTACK, -1.0), []
    for angle in (0.3, 3.0):
        module, first = network(), Given(SIZE, 2.0)
        state = bisector.begin(trace(module, (1, 2, 3)))
        for given in (first, first, Given(SIZE, angle, seed=9)):
            x, y = points(0)
            losses = {name: (given.loss(name, i), 1.0) for i, name in enumerate(Bisector.pair)}
            found = bisector(losses, batch(module, eps=0.1, x=x, y=y, state=state), list(module.parameters()))
        notes.append((found.notes["adversarial weight"], found.notes["cosine"]))
    assert notes[0] == notes[1]


def test_while_one_loss_counts_its_gradient_is_the_step(batch):
    module, given = network(), Given(SIZE, 2.0)
    bisector = Bisector(ATTACK, 0.5)
    state = bisector.begin(trace(module, (1, 2, 3)))
    x, y = points(0)
    losses = {"adversarial": (given.loss("adversarial", 0), 1.0)}
    bisector(losses, batch(module, x=x, y=y, state=state), list(module.parameters()))
    torch.testing.assert_close(torch.cat([p.grad.flatten() for p in module.parameters()]), given.vectors[0])
    assert int(state["moments.steps"]) == 0


@pytest.mark.parametrize("angle", [0.5, 2.5])
def test_what_else_there_is_to_minimise_is_added_with_its_own_weight(batch, angle):
    given, module, vectors = Given(SIZE, angle), network(), torch.randn(2, SIZE, dtype=torch.float64)

    def of_parameters(vector):
        return lambda b: vector @ torch.cat([p.flatten() for p in b.graph.module.parameters()])

    def silent(b):  # as a regulariser is at eps 0
        return b.x.new_zeros(())

    alone = {name: (given.loss(name, i), 1.0) for i, name in enumerate(Bisector.pair)}
    added = {
        "one": (Loss("one", 0.3, of_parameters(vectors[0])), 0.3),
        "two": (Loss("two", 2.0, of_parameters(vectors[1])), 2.0),
        "silent": (Loss("silent", 1.0, silent), 1.0),
    }
    gradients = []
    for losses in (alone, alone | added, alone | {"silent": added["silent"]}):
        bisector = Bisector(ATTACK, 0.5)
        state = bisector.begin(trace(module, (1, 2, 3)))
        x, y = points(0)
        for _ in range(3):
            found = bisector(losses, batch(module, eps=0.1, x=x, y=y, state=state), list(module.parameters()))
        assert set(found.losses) == set(losses)
        gradients.append(torch.cat([p.grad.flatten() for p in module.parameters()]))
    torch.testing.assert_close(gradients[1], gradients[0] + 0.3 * vectors[0] + 2.0 * vectors[1])
    torch.testing.assert_close(gradients[2], gradients[0])


@pytest.mark.parametrize("modifier", ["l1", "shi-reg", "tightness-r"])
def test_a_regulariser_leaves_the_two_losses_of_advcrown_ibp_to_the_bisector(batch, modifier):
    method = tr.methods.advcrown_ibp(eps=0.1, clean=0.0, ramp={"begin": 0.0, "finish": 1.0})
    method = method | MODIFIERS[modifier]()
    module = network()
    x, y = points(0)
    state = method.begin(trace(module, (1, 2, 3)), 4)
    b = batch(module, eps=0.05, x=x, y=y, state=state, progress=0.5)
    result = train_step(method, b, torch.optim.SGD(module.parameters(), 0.0), clip=0.0)
    assert "adversarial weight" in result.notes


def test_fosc_is_the_best_step_to_a_corner_of_the_region(batch):
    x, y = points(1)
    x[0, 0, 0, 0], x[1, 0, 1, 2] = 0.01, 0.99  # the pixel box cuts in
    b = batch(network(), eps=0.1, x=x, y=y)
    point = b.attacked(ATTACK)
    gradient = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    lower, upper = b.region.corners(x)
    best = torch.full((len(x),), -torch.inf, dtype=torch.float64)
    for choice in itertools.product((0, 1), repeat=6):
        corner = torch.where(torch.tensor(choice).bool().view(1, 2, 3), upper, lower)
        best = torch.maximum(best, ((corner - point) * gradient).flatten(1).sum(1))
    assert fosc(b, ATTACK, gradient) == pytest.approx(best.mean().item())
    assert best.min() >= 0


def test_fosc_is_asked_with_the_gradient_of_each_examples_own_loss(batch):
    """The definition, with one backward pass per example."""
    bisector, module = Bisector(ATTACK, 0.5), network()
    robust = Given(SIZE, 0.0)
    losses = {
        "adversarial": (Loss("adversarial", 1.0, terms.adversarial(ATTACK)), 1.0),
        "robust": (robust.loss("robust", 1), 1.0),
    }
    state = bisector.begin(trace(module, (1, 2, 3)))
    x, y = points(2)
    robust.vectors[1] = -torch.autograd.grad(
        nn.functional.cross_entropy(module(x), y), list(module.parameters())
    )[0].new_ones(SIZE)
    for _ in range(2):
        b = batch(module, eps=0.1, x=x, y=y, state=state)
        adversarial = torch.autograd.grad(losses["adversarial"][0].value(b), list(module.parameters()))
        robust.vectors[1] = -torch.cat([part.flatten() for part in adversarial])
        b = batch(module, eps=0.1, x=x, y=y, state=state)
        found = bisector(losses, b, list(module.parameters()))
    point = b.attacked(ATTACK).detach().requires_grad_()
    each = nn.functional.cross_entropy(module(point), y, reduction="none")
    (gradient,) = torch.autograd.grad(each.sum(), point)
    assert found.notes["fosc"] == pytest.approx(fosc(b, ATTACK, gradient))


def test_a_step_that_fails_leaves_the_moments_as_they_were(batch):
    module, given = network(), Given(SIZE, 2.0)
    good = (given.loss("adversarial", 0), given.loss("robust", 1))
    method = Method("two", 0.1, good, combiner=Bisector(ATTACK, 0.5))
    state = method.begin(trace(module, (1, 2, 3)), 4)
    optimiser = torch.optim.SGD(module.parameters(), 0.01)
    x, y = points(0)
    train_step(method, batch(module, x=x, y=y, state=state), optimiser, 0.0)
    before = {name: tensor.clone() for name, tensor in state.items()}
    given.vectors[1] = given.vectors[1] * torch.inf
    with pytest.raises(DivergedError):
        train_step(method, batch(module, x=x, y=y, state=state), optimiser, 0.0)
    assert all(torch.equal(state[name], before[name]) for name in before)


def test_total_is_the_gradient_of_the_weighted_sum(batch):
    module, given = network(), Given(SIZE, 2.0)
    x, y = points(0)
    losses = {"a": (given.loss("a", 0), 0.5), "b": (given.loss("b", 1), 2.0)}
    found = Total()(losses, batch(module, x=x, y=y), list(module.parameters()))
    gradient = torch.cat([p.grad.flatten() for p in module.parameters()])
    torch.testing.assert_close(gradient, 0.5 * given.vectors[0] + 2 * given.vectors[1])
    assert (found.notes, set(found.losses)) == ({}, {"a", "b"})


def test_the_threshold_of_advibp_falls_from_the_end_of_the_ramp():
    method = tr.methods.advibp(eps=0.3, threshold=0.5)
    threshold = method.combiner.threshold
    assert isinstance(threshold, Ramp)
    assert [threshold(p) for p in (0.0, 0.3, 0.44, 0.58, 1.0)] == pytest.approx([0.5, 0.5, 0.25, 0, 0])


def test_advibp_warms_up_clean_then_adversarial_and_meets_the_bound_at_eps_0(batch):
    method = tr.methods.advibp(eps=0.3, clean=0.1, ramp=tr.Course(begin=0.2, finish=0.5))

    def counting(progress):
        return {loss.name for loss in method.losses if at(loss.weight, progress)}

    assert [counting(p) for p in (0.0, 0.15)] == [{"natural"}, {"adversarial"}]
    assert counting(0.2) == counting(1.0) == {"adversarial", "robust"}
    assert [at(method.eps, p) for p in (0.15, 0.2, 0.35, 0.5)] == pytest.approx([0, 0, 0.15, 0.3])
    adversarial = next(loss for loss in method.losses if loss.name == "adversarial")
    x, y = points(0)
    module = network()
    values = [
        adversarial.value(batch(module, eps=0.0, x=x, y=y, progress=p)).item() for p in (0.1, 0.15, 0.2)
    ]
    natural = nn.functional.cross_entropy(module(x), y).item()
    assert values[0] == pytest.approx(natural)  # the radius rises from 0
    assert values[1] > natural
    assert values[2] == pytest.approx(natural)  # from here on it is the region's
    with pytest.raises(InputError, match="clean training"):
        tr.methods.advibp(eps=0.3, clean=0.3)

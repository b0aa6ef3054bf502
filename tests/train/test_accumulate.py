"""A batch in parts: the step is that of the whole batch, and only a part is in memory at a time."""

from __future__ import annotations

import copy
import itertools
import os
import signal

import pytest
import torch
from torch import nn

from tightrope import fit, methods
from tightrope.attacks import Pgd
from tightrope.bounds import Interval
from tightrope.data import Augment, as_source
from tightrope.errors import DivergedError, InputError
from tightrope.files import load_tensors
from tightrope.recipes import parse_recipe
from tightrope.train import Course, Interrupted, Loss, Method, modifiers, terms
from tightrope.train.regularisers import shi_tightness
from tightrope.train.stages import WHOLE
from tightrope.train.step import train_step

EPS, COUNT = 0.1, 12
RAMP = Course(begin=0.1, finish=0.5)
IBP = methods.ibp(eps=EPS, ramp=RAMP)
METHODS = {
    "standard": methods.standard(),
    "ibp": IBP,
    "ibp, l1": IBP | modifiers.l1(1e-3),
    "crown-ibp": methods.crown_ibp(eps=EPS, beta=0.5, ramp=RAMP),
    "crown-ibp, fusion, tightness": methods.crown_ibp(eps=EPS, beta=0.5, fusion=True)
    | modifiers.tightness_d(),
    "wong-kolter": methods.wong_kolter(eps=EPS),
    "reweight": IBP | modifiers.reweight(),
    "reweight, robust alone": methods.ibp(eps=EPS, kappa=0.0, ramp=RAMP) | modifiers.reweight(),
    "auto-eps": IBP | modifiers.auto_eps(),
    "reweight, auto-eps": IBP | modifiers.reweight() | modifiers.auto_eps(),
}


@pytest.fixture
def step(network, batch, images):
    """One step of a method in parts of a size, in double precision: the network, the state, what was seen."""

    def go(method, part, progress=1.0, offsets=None):
        module = network().double()
        split = images(COUNT)
        index = torch.arange(COUNT) + 3
        state = method.begin(batch(module, x=split.x.double(), y=split.y).graph, COUNT + 5)
        if "eps.offsets" in state:
            state["eps.offsets"].copy_(torch.linspace(0, EPS, COUNT + 5) if offsets is None else offsets)
        region = method.region(WHOLE, progress, index, state)
        asked = batch(module, region.eps, progress, split.x.double(), split.y, index=index, state=state)
        return module, state, train_step(method, asked, torch.optim.SGD(module.parameters(), 1.0), 0.0, part)

    return go


def assert_equal(found, expected):
    (module, state, result), (whole, whole_state, whole_result) = found, expected
    for mine, its in zip(module.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(mine, its, rtol=0, atol=1e-12)
    assert result.losses == pytest.approx(whole_result.losses, rel=1e-12)
    assert result.notes == pytest.approx(whole_result.notes, rel=1e-12)
    assert result.gradient_norm == pytest.approx(whole_result.gradient_norm, rel=1e-12)
    assert set(state) == set(whole_state)
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, whole_state[name], rtol=0, atol=1e-7)  # kept in float32


@pytest.mark.parametrize("part", [3, 5, 11])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_step_in_parts_is_the_step_of_the_whole_batch(step, method, part):
    progress = 1.0 if method.name == "wong-kolter" else 0.4  # eps and all weights between start and end
    assert_equal(step(method, part, progress), step(method, None, progress))


def test_weights_of_parts_that_differ_much_are_those_of_the_whole_batch(step):
    """Were each part normalised for itself, the first would count as much as the others together."""

    def weigh(batch, _margins):
        return torch.where(batch.index < 6, 0.01, 10.0).double()

    losses = (terms.natural, terms.worst_case(terms.bounded(Interval())))
    method = Method(
        "mine",
        EPS,
        (
            Loss("natural", 0.5, losses[0]),
            Loss("robust", 0.5, losses[1], terms.bounded(Interval()), weigh),
        ),
    )
    assert_equal(step(method, 3), step(method, None))


def test_a_part_without_any_radius_learns_as_in_a_batch_that_has_some(step):
    offsets = torch.zeros(COUNT + 5)
    offsets[3:6] = 1.0  # the first part is trained at radius 0
    method = METHODS["auto-eps"]
    assert_equal(step(method, 3, 1.0, offsets), step(method, None, 1.0, offsets))
    assert (step(method, 3, 1.0, offsets)[1]["eps.offsets"][3:6] < 1).all()


def test_no_more_than_a_part_is_gone_through_at_once(step):
    sizes = []

    def term(batch):
        sizes.append(len(batch.y))
        return terms.natural(batch)

    step(Method("mine", 0.0, (Loss("natural", 1.0, term),)), 5)
    assert sizes == [4, 4, 4]


def test_every_part_draws_random_numbers_of_its_own(network, batch):
    drawn = []

    def term(b):
        drawn.append(b.attacked(Pgd(steps=1, step=0.5)).detach() - b.x)
        return terms.natural(b)

    method = Method("mine", EPS, (Loss("natural", 1.0, term),))
    for _ in range(2):
        module = network()
        train_step(method, batch(module, EPS), torch.optim.SGD(module.parameters(), 1.0), 0.0, 6)
    first, second, *again = drawn
    assert not torch.equal(first, second)
    assert all(torch.equal(mine, its) for mine, its in zip((first, second), again, strict=True))


def test_what_is_one_number_for_a_batch_is_averaged_over_its_parts(network, batch):
    """Shi's regularisers, as in their code."""
    regulariser = shi_tightness(Interval())
    losses = (Loss("natural", 1.0, terms.natural), Loss("tightness", 1.0, regulariser))
    method = Method("mine", EPS, losses)
    module = network()
    result = train_step(method, batch(module, EPS), torch.optim.SGD(module.parameters(), 0.0), 0.0, 5)
    parts = [regulariser(part) for part in batch(module, EPS).parts(5)]
    assert result.losses["tightness"] == pytest.approx(torch.stack(parts).mean().item())


def test_a_weight_that_no_loss_depends_on_stands_still(network, batch):
    module = network()
    module.unused = nn.Linear(2, 2)
    graph = batch(network()).graph
    asked = batch(network())
    asked.graph = graph
    parameters = [*graph.module.parameters(), *module.unused.parameters()]
    optimiser = torch.optim.SGD(parameters, 1.0, weight_decay=0.1)
    before = copy.deepcopy(module.unused.state_dict())
    train_step(methods.standard(), asked, optimiser, 0.0, 5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.unused.state_dict().items())


def test_nan_in_the_last_part_leaves_everything_as_it_was(network, batch, images):
    def bad(b):
        return terms.natural(b) * torch.where(b.index == COUNT - 1, torch.nan, 1.0)

    method = METHODS["auto-eps"]
    method = Method("mine", EPS, (*method.losses, Loss("bad", 1.0, bad)), radii=method.radii)
    module = network(norm=True)
    index, state = torch.arange(COUNT), method.begin(batch(module).graph, COUNT)
    before = copy.deepcopy((module.state_dict(), state))
    optimiser = torch.optim.Adam(module.parameters())
    region = method.region(WHOLE, 1.0, index, state)
    with pytest.raises(DivergedError, match="the loss `bad` is nan"):
        train_step(method, batch(module, region.eps, index=index, state=state), optimiser, 0.0, 4)
    for found, kept in zip((module.state_dict(), state), before, strict=True):
        assert all(torch.equal(tensor, kept[name]) for name, tensor in found.items())
    assert not optimiser.state


# ------------------------------------------------------------------------------------------- runs


class Stopped:
    """A source that stops the run before a step."""

    def __init__(self, source, stop):
        self.source, self.stop, self.shape = source, stop, source.shape
        self.labels, self.identity = source.labels, source.identity
        self.calls = self.steps = 0

    def __len__(self):
        return len(self.source)

    def batches(self, order):
        self.calls += 1  # the first call reads the held-out examples
        for batch in self.source.batches(order):
            self.steps += self.calls > 1
            if self.steps == self.stop:
                os.kill(os.getpid(), signal.SIGINT)
            yield batch


@pytest.fixture
def run(network, images):
    def train(out, method, stop=None, module=None, **options):
        module = module or network(norm=True, dropout=True)
        usual = {
            "epochs": 3,
            "batch": 16,
            "held_out": 12,
            "lr": 0.01,
            "device": "cpu",
            "checkpoint_seconds": 1e6,
        }
        usual |= {"augment": Augment(flip=True, pad=1)}
        fit(module, Stopped(as_source(images(63)), stop), method, out=out, **usual | options)
        return load_tensors(out / "model.safetensors")[0]

    return train


def test_a_run_in_parts_that_is_stopped_ends_as_one_never_stopped(run, network, tmp_path):
    """With everything that could break an exact resume, down to the state of single examples."""
    method = methods.mtl_ibp(eps=EPS) | modifiers.auto_eps() | modifiers.reweight()
    options = {"accumulate": 4, "clip": 0.5, "average": {"begin": 0.5}, "bn_statistics": "recompute"}
    expected = run(tmp_path / "whole", method, **options)
    for part in itertools.count():
        module = network(norm=True, dropout=True, seed=part)
        try:
            found = run(tmp_path / "parts", method, part + 3, module, resume=part > 0, **options)
            break
        except Interrupted:
            continue
    assert part > 1
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_a_run_in_parts_is_the_run_in_whole_batches(run, network, tmp_path):
    whole, parts = (
        run(tmp_path / str(n), IBP, module=network(), accumulate=n, optimiser="sgd") for n in (1, 4)
    )
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=0, atol=1e-5)


def test_a_combiner_that_needs_the_whole_batch_is_refused_by_name(run, tmp_path):
    with pytest.raises(InputError, match=r"training\.accumulate: advibp weighs the gradients"):
        run(tmp_path, methods.advibp(eps=EPS), accumulate=2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("accumulate", [0, 3, 32])
def test_parts_that_are_not_equal_are_refused(accumulate):
    content = {"method": {"name": "standard"}, "training": {"batch": 16, "accumulate": accumulate}}
    with pytest.raises(InputError, match="accumulate"):
        parse_recipe(content, "the recipe")


def test_a_part_of_one_example_is_refused_where_batch_norm_cannot_normalise_it(run, network, tmp_path):
    with pytest.raises(InputError, match=r"training\.accumulate leaves a single example .* batch of 16"):
        run(tmp_path / "a", methods.standard(), accumulate=16)
    with pytest.raises(InputError, match=r"single example .* batch of 3"):  # the last batch, in parts of 2
        run(tmp_path / "b", methods.standard(), accumulate=8)
    run(tmp_path / "c", methods.standard(), accumulate=16, module=network(), epochs=1)

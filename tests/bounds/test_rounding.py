"""The error bound against exact arithmetic, and against the same bounds computed with half the digits."""

from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from torch import nn

from tightrope.bounds import Interval, Problem, crown, crown_ibp, entering_error, fast_lin, rounding_error
from tightrope.bounds.alpha import Frame
from tightrope.graph import recast, trace
from tightrope.region import REGIONS, Box
from tightrope.spec import Spec

from .test_linear import NETWORKS


def net(name, seed, spread):
    """Random weights, some of them `10 ** spread` times as large as others."""
    generator = torch.Generator().manual_seed(seed)
    module = NETWORKS[name]().eval().requires_grad_(False)
    for parameter in module.parameters():
        scale = 10 ** (spread * (torch.rand(parameter.shape, generator=generator) - 0.5))
        fan = parameter[0].numel() if parameter.ndim > 1 else 1
        parameter.copy_(scale * torch.randn(parameter.shape, generator=generator) / fan**0.5)
    return trace(module, (1, 3, 3))


def at(graph, dtype, region, seed, batch=2):
    """The same problem in one arithmetic or another: the numbers themselves are those of float32."""
    x = torch.rand(batch, 1, 3, 3, generator=torch.Generator().manual_seed(seed)).to(dtype)
    y = torch.arange(batch) % 4
    return Problem(recast(graph, dtype), x, region, Spec.margins(y, 4, x))


CONTINUOUS = {"ibp": Interval(), "fast-lin": fast_lin()}
ENGINES = {**CONTINUOUS, "crown": crown(), "crown-ibp": crown_ibp()}


@pytest.mark.parametrize("engine", CONTINUOUS)
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("spread", [0, 4])
def test_float32_is_as_far_from_float64_as_it_says_at_most(name, engine, spread):
    for seed, norm in enumerate(REGIONS):
        graph, region = net(name, seed, spread), REGIONS[norm](0.1 * seed + 0.1)
        few, many = (at(graph, dtype, region, seed) for dtype in (torch.float32, torch.float64))
        found, exact = (problem.bounds(CONTINUOUS[engine]) for problem in (few, many))
        error = rounding_error(few).double()
        assert ((found.lower.double() - exact.lower).abs() <= error).all()
        assert ((found.upper.double() - exact.upper).abs() <= error).all()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", NETWORKS)
def test_no_point_lies_below_a_bound_in_float32_less_its_error(name, engine):
    for seed in range(2):
        graph, region = net(name, seed, spread=2), Box(0.002)  # so small that rounding matters
        few, many = (at(graph, dtype, region, seed) for dtype in (torch.float32, torch.float64))
        lower = few.bounds(ENGINES[engine]).lower.double() - rounding_error(few).double()
        low, high = region.corners(many.x)
        generator = torch.Generator().manual_seed(seed)
        coins = torch.rand(100, *low.shape, generator=generator) < 0.5
        logits = many.graph.run(torch.where(coins, low, high).flatten(0, 1))[0].view(100, len(low), 4)
        assert ((many.spec.rows @ logits.unsqueeze(3)).squeeze(3) >= lower).all()


@pytest.mark.parametrize("name", NETWORKS)
def test_neither_where_multiples_of_neurons_are_taken_off(name):
    """As branch and bound does with the neurons of a cell; they may be any neurons, and any multiples."""
    for seed in range(3):
        graph, region = (
            net(name, seed, spread=2),
            Box(1e-4),
        )  # hardly a neuron is unstable: the bound is tight
        few, many = (at(graph, dtype, region, seed) for dtype in (torch.float32, torch.float64))
        boxes, errors = few.bounds(crown()).boxes, entering_error(few)
        frame = Frame.over(few.graph, few.x, region, boxes, "triangle")
        all_of_them = torch.arange(frame.low.shape[1] - 1).expand(len(few.x), -1)
        frame = replace(frame, places=all_of_them)
        generator = torch.Generator().manual_seed(seed)
        push = 1e6 * torch.randn(all_of_them.shape, generator=generator)
        rows, reached = few.spec.rows[:, 2:3], {}
        bound = frame.bound(rows, frame.slopes(), push, reached).squeeze(1).double()

        point = region.project(many.x, region.minimiser(few.x, reached[0]).squeeze(1).double())
        logits, entering = many.graph.entering(point)
        nothing = push[:, :0]
        beside = torch.cat([nothing, *(entering[i].flatten(1) for i, _ in frame.slices())], 1)
        value = (rows.squeeze(1) * logits).sum(1) - (push * beside).sum(1)
        off = torch.cat([nothing, *(errors[i].flatten(1) for i, _ in frame.slices())], 1).double()
        assert (value >= bound - rounding_error(few)[:, 2].double() - (push.abs() * off).sum(1)).all()


def exact_lower(layers, x, eps, row):
    """The interval bound of `<row, f>` for a chain of linear layers with ReLU in between, in fractions."""
    lower = [max(Fraction(v) - Fraction(eps), Fraction(0)) for v in x]
    upper = [min(Fraction(v) + Fraction(eps), Fraction(1)) for v in x]
    *hidden, (W, b) = [
        (
            [[Fraction(w) for w in line] for line in layer.weight.tolist()],
            list(map(Fraction, layer.bias.tolist())),
        )
        for layer in layers
    ]
    merged = [sum(r * w for r, w in zip(row, column, strict=True)) for column in zip(*W, strict=True)]
    hidden.append(([merged], [sum(r * v for r, v in zip(row, b, strict=True))]))
    for k, (lines, offsets) in enumerate(hidden):
        if k:
            lower, upper = ([max(v, Fraction(0)) for v in side] for side in (lower, upper))
        sides = []
        for first, second in ((lower, upper), (upper, lower)):
            pairs = [zip(line, first, second, strict=True) for line in lines]
            sums = [sum(w * (a if w > 0 else c) for w, a, c in pair) for pair in pairs]
            sides.append([s + v for s, v in zip(sums, offsets, strict=True)])
        lower, upper = sides
    return lower[0]


@pytest.mark.parametrize("spread", [0, 4, 8, 16])
@pytest.mark.parametrize("seed", range(5))
def test_float64_is_as_far_from_fractions_as_it_says_at_most(spread, seed):
    problem = at(net("dense", seed, spread), torch.float64, Box(0.1), seed, batch=1)
    layers = [module for module in problem.graph.module if isinstance(module, nn.Linear)]
    found, error = problem.bounds(Interval()).lower[0], rounding_error(problem)[0]
    for t in range(1, 4):
        row = [int(v) for v in problem.spec.rows[0, t]]
        exact = exact_lower(layers, problem.x.flatten().tolist(), 0.1, row)
        assert abs(Fraction(found[t].item()) - exact) <= Fraction(error[t].item())


def test_the_error_is_small_where_numbers_are_of_one_size():
    problem = at(net("conv", 0, spread=0), torch.float64, Box(0.1), seed=0)
    assert (rounding_error(problem) < 1e-10).all()
    assert (rounding_error(problem)[:, 1:].amax(1) > 0).all()
    assert (rounding_error(problem).gather(1, torch.arange(2).unsqueeze(1)) == 0).all()  # e_y - e_y


def test_it_grows_with_the_box():
    graph = net("conv", 0, spread=0)
    small, large = (rounding_error(at(graph, torch.float64, Box(eps), 0)) for eps in (0.01, 0.3))
    assert (small <= large).all()


def test_what_underflows_is_not_taken_for_zero():
    """In float64 the neuron is -0.1 everywhere; it really is x - 0.1, and the margin 1 - 10 relu(x - 0.1)."""
    sizes = [1e-38] * 9 + [1e38] * 9
    layers = [nn.Linear(1, 1) for _ in sizes]
    net = nn.Sequential(*layers, nn.ReLU(), nn.Linear(1, 2)).double().requires_grad_(False)
    for layer, size in zip(layers, sizes, strict=True):
        layer.weight.fill_(size)
        layer.bias.zero_()
    layers[-1].bias.fill_(-0.1)
    net[-1].weight.copy_(torch.tensor([[-10.0], [0.0]]))
    net[-1].bias.copy_(torch.tensor([1.0, 0.0]))
    x = torch.full((1, 1), 0.5, dtype=torch.float64)
    problem = Problem(trace(net, (1,)), x, Box(0.1), Spec.margins(torch.tensor([0]), 2, x))
    assert problem.bounds(Interval()).lower[0, 1] == 1
    assert rounding_error(problem)[0, 1] > 4


def test_what_overflows_has_no_error_bound():
    problem = at(net("dense", 0, spread=0), torch.float64, Box(0.1), 0)
    for module in problem.graph.module:
        if isinstance(module, nn.Linear):
            module.weight.mul_(1e200)
    error = rounding_error(problem)[0, 1:]
    assert not error.isfinite().any()

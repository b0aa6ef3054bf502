"""Linear bounds: sound against sampling and corners, and ordered as theory says against exact referees."""

from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest
import torch
from scipy.optimize import Bounds as Limits
from scipy.optimize import LinearConstraint, milp
from torch import nn

from tightrope.bounds import Interval, Problem
from tightrope.bounds.backward import lower_bound, path
from tightrope.bounds.linear import Linear, crown, crown_ibp, fast_lin, path_over, relax_all
from tightrope.graph import trace
from tightrope.region import REGIONS, Box
from tightrope.spec import Spec

ENGINES = {
    "crown": crown(),
    "crown-ibp": crown_ibp(),
    "fast-lin": fast_lin(),
    "zero": Linear("zero"),
    "one": Linear("one", "interval"),
}


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 3, 3, padding=1)
        self.first = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.second = nn.Conv2d(3, 3, 1)
        self.last = nn.Linear(3 * 9, 4)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = torch.relu(self.second(torch.relu(self.norm(self.first(x)))) + x)
        return self.last(x.flatten(1))


def conv(activation: nn.Module) -> nn.Module:
    layers = [nn.Conv2d(1, 3, 2, stride=2, padding=1), activation, nn.Conv2d(3, 4, 2, groups=1), activation]
    return nn.Sequential(*layers, nn.AvgPool2d(1), nn.Flatten(), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4))


def dense(*widths: int) -> nn.Sequential:
    layers = itertools.chain.from_iterable(
        (nn.Linear(a, b), nn.ReLU()) for a, b in itertools.pairwise(widths)
    )
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(widths[-1], 4))


NETWORKS = {
    "dense": lambda: dense(9, 12, 10, 8),
    "conv": lambda: conv(nn.ReLU()),
    "leaky": lambda: conv(nn.LeakyReLU(0.2)),
    "sigmoid": lambda: conv(nn.Sigmoid()),
    "tanh": lambda: conv(nn.Tanh()),
    "residual": Residual,
    "pool": lambda: nn.Sequential(
        *(nn.Conv2d(1, 3, 2, padding=1), nn.MaxPool2d(2, stride=1), nn.ReLU(), nn.MaxPool2d(2, padding=1)),
        *(nn.Flatten(), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 4)),
    ),
    "affine": lambda: nn.Sequential(nn.Flatten(), nn.Linear(9, 6), nn.Linear(6, 4)),
}


def network(name: str, seed: int = 0):
    torch.manual_seed(seed)
    model = NETWORKS[name]().double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.weight)
    return trace(model.eval().requires_grad_(False), (1, 3, 3))


def problem(seed: int = 0, batch: int = 3):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(batch, 1, 3, 3, generator=generator, dtype=torch.float64)
    return x, torch.arange(batch) % 4


@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES.keys())
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("norm", REGIONS)
def test_no_point_of_the_region_leaves_the_bounds(engine, name, norm):
    x, y = problem()
    for seed, eps in ((0, 0.02), (1, 0.3), (2, 1.0)):
        graph, region, spec = network(name, seed), REGIONS[norm](eps), Spec.margins(y, 4, x)
        bounds = engine(Problem(graph, x, region, spec))
        assert bounds.guarantee == "sound"
        generator = torch.Generator().manual_seed(seed)
        points = [region.sample(x, generator) for _ in range(100)]
        if norm == "inf":  # corners are where a linear bound is tight
            lower, upper = region.corners(x)
            coins = [torch.rand(x.shape, generator=generator) < 0.5 for _ in range(100)]
            points += [torch.where(coin, lower, upper) for coin in coins]
        logits = graph.run(torch.cat(points))[0].unflatten(0, (len(points), len(x)))
        margins = (spec.rows @ logits.unsqueeze(3)).squeeze(3)
        assert (bounds.lower <= margins + 1e-9).all()
        assert (margins <= bounds.upper + 1e-9).all()


@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES.keys())
@pytest.mark.parametrize("name", NETWORKS)
def test_at_eps_0_the_bounds_are_the_output(engine, name):
    (x, y), graph = problem(), network(name)
    spec = Spec.margins(y, 4, x)
    bounds = engine(Problem(graph, x, Box(0.0), spec))
    margins = (spec.rows @ graph.run(x)[0].unsqueeze(2)).squeeze(2)
    torch.testing.assert_close(bounds.lower, margins, atol=1e-12, rtol=0)
    torch.testing.assert_close(bounds.upper, margins, atol=1e-12, rtol=0)


@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES.keys())
def test_each_example_is_bounded_as_if_it_were_alone_and_with_its_own_eps(engine):
    (x, y), graph = problem(), network("conv")
    eps = torch.tensor([0.0, 0.1, 0.3], dtype=torch.float64)
    together = engine(Problem(graph, x, Box(eps), Spec.margins(y, 4, x)))
    for i in range(len(x)):
        one = slice(i, i + 1)
        alone = engine(Problem(graph, x[one], Box(float(eps[i])), Spec.margins(y[one], 4, x)))
        torch.testing.assert_close(together.lower[one], alone.lower, atol=1e-12, rtol=0)
        torch.testing.assert_close(together.upper[one], alone.upper, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("norm", REGIONS)
def test_over_interval_boxes_the_path_through_their_middles_is_the_path_of_the_upper_bounds(name, norm):
    (x, y), graph, last = problem(), network(name), len(network(name).nodes) - 1
    asked = Problem(graph, x, REGIONS[norm](0.2), Spec.margins(y, 4, x))
    boxes = asked.bounds(Interval()).boxes
    for slope in ("parallel", "adaptive", "zero"):
        through_middles = path_over(asked, boxes, slope)
        whole, _ = path(graph, x, asked.region, last, relax_all(graph, boxes, slope))
        assert through_middles.steps.keys() == whole.steps.keys()
        torch.testing.assert_close(through_middles.end, whole.end, atol=1e-12, rtol=0)
        bounds = [
            lower_bound(graph, x, asked.region, last, asked.spec.rows, seen)
            for seen in (through_middles, whole)
        ]
        torch.testing.assert_close(bounds[0], bounds[1], atol=1e-12, rtol=0)


def test_the_lower_side_alone_is_the_same_lower_side():
    (x, y), graph = problem(), network("residual")
    spec = Spec.margins(y, 4, x)
    both = crown()(Problem(graph, x, Box(0.2), spec))
    lower = Linear("adaptive", "linear", sides="lower")(Problem(graph, x, Box(0.2), spec))
    torch.testing.assert_close(both.lower, lower.lower, atol=1e-12, rtol=0)
    assert (lower.upper >= both.lower).all()


def test_without_sides_the_same_boxes_are_found_and_nothing_else():
    (x, y), graph = problem(), network("residual")
    asked = Problem(graph, x, Box(0.2), Spec.margins(y, 4, x))
    boxes = asked.bounds(Linear("parallel", "linear", sides="none"))
    torch.testing.assert_close(boxes.boxes, asked.bounds(fast_lin()).boxes, atol=0, rtol=0)
    torch.testing.assert_close(boxes.lower, asked.bounds(Interval()).lower, atol=0, rtol=0)


@pytest.mark.parametrize("name", ["dense", "conv", "residual"])
@pytest.mark.parametrize("coefficients", [1, 100])
def test_chunks_of_neurons_change_nothing(name, coefficients, monkeypatch):
    (x, y), graph = problem(), network(name)
    spec = Spec.margins(y, 4, x)
    whole = crown()(Problem(graph, x, Box(0.3), spec))
    monkeypatch.setattr(sys.modules[Linear.__module__], "coefficients_at_once", lambda _: coefficients)
    pieces = crown()(Problem(graph, x, Box(0.3), spec))
    torch.testing.assert_close(vars(whole), vars(pieces), atol=1e-12, rtol=0)


@pytest.mark.parametrize("engine", [crown(), fast_lin()], ids=["crown", "fast-lin"])
def test_own_boxes_are_never_looser_than_intervals_and_hold_the_pre_activations(engine):
    (x, y), graph, region = problem(), network("residual"), Box(0.2)
    spec = Spec.margins(y, 4, x)
    asked = Problem(graph, x, region, spec)
    loose, tight = asked.bounds(Interval()).boxes, asked.bounds(engine).boxes
    assert loose.keys() == tight.keys()
    for i, (lower, upper) in tight.items():
        assert (lower >= loose[i][0] - 1e-12).all()
        assert (upper <= loose[i][1] + 1e-12).all()


def test_fast_lin_is_the_formula_of_wong_and_kolter():
    """p* of seeds.md, section 2, written out in NumPy for a chain of linear layers, on its own boxes."""
    graph = network("dense", seed=3)
    x, y = problem(batch=1)
    eps, spec = 0.1, Spec.margins(y, 4, x)
    bounds = fast_lin()(Problem(graph, x, Box(eps, domain=None), spec))
    layers = [m for m in graph.module if isinstance(m, nn.Linear)]
    weights = [(m.weight.detach().numpy(), m.bias.detach().numpy()) for m in layers]
    boxes = [(low[0].numpy(), up[0].numpy()) for low, up in (bounds.boxes[i] for i in sorted(bounds.boxes))]
    for t in range(4):
        nu, value = spec.rows[0, t].numpy(), 0.0
        for k in range(len(weights) - 1, -1, -1):
            W, b = weights[k]
            value, nu = value + nu @ b, nu @ W
            if k > 0:
                low, up = boxes[k - 1]
                unstable = (low < 0) & (up > 0)
                D = np.where(unstable, up / np.where(unstable, up - low, 1), low >= 0)
                gap = np.where(unstable, -up * low / np.where(unstable, up - low, 1), 0)
                value, nu = value + np.minimum(nu, 0) @ gap, nu * D
        value += nu @ x[0].flatten().numpy() - eps * np.abs(nu).sum()
        assert bounds.lower[0, t].item() == pytest.approx(value, abs=1e-12)


def exact_minimum(graph, x, eps, row, boxes, binary: bool) -> float:
    """Minimise a margin with HiGHS: the triangle relaxation, or (with binaries) the network itself."""
    layers = [m for m in graph.module if isinstance(m, nn.Linear)]
    weights = [(m.weight.detach().numpy(), m.bias.detach().numpy()) for m in layers]
    ordered = [(low.numpy(), up.numpy()) for low, up in (boxes[i] for i in sorted(boxes))]
    point = x.flatten().numpy()
    lows, ups = [np.maximum(point - eps, 0)], [np.minimum(point + eps, 1)]
    for low, up in ordered:  # z, then its activation a, then its switch s
        lows += [low, np.maximum(low, 0), np.zeros_like(low)]
        ups += [up, np.maximum(up, 0), np.ones_like(up)]
    sizes = [len(v) for v in lows]
    starts = np.concatenate([[0], np.cumsum(sizes)])
    n = int(starts[-1])
    rows, least, most, integer = [], [], [], np.zeros(n)

    def constrain(entries, low, up):
        line = np.zeros(n)
        for index, value in entries:
            line[index] += value
        rows.append(line), least.append(low), most.append(up)

    before = starts[0]
    for k, (low, up) in enumerate(ordered):
        W, b = weights[k]
        z, a, s = (int(starts[1 + 3 * k + j]) for j in range(3))
        for j in range(len(b)):
            constrain([(z + j, 1), *((before + i, -W[j, i]) for i in range(W.shape[1]))], b[j], b[j])
            if low[j] >= 0:
                constrain([(a + j, 1), (z + j, -1)], 0, 0)
            elif up[j] > 0:
                constrain([(a + j, 1), (z + j, -1)], 0, np.inf)
                constrain([(a + j, 1), (s + j, -up[j])], -np.inf, 0)
                constrain([(a + j, 1), (z + j, -1), (s + j, -low[j])], -np.inf, -low[j])
                integer[s + j] = binary
        before = a
    W, b = weights[-1]
    cost = np.zeros(n)
    cost[before : before + W.shape[1]] = row @ W
    found = milp(
        cost,
        constraints=LinearConstraint(np.array(rows), least, most),
        bounds=Limits(np.concatenate(lows), np.concatenate(ups)),
        integrality=integer,
    )
    assert found.success
    return float(found.fun + row @ b)


@pytest.mark.parametrize("seed", range(8))
def test_linear_bounds_are_below_the_triangle_lp_which_is_below_the_milp(seed):
    torch.manual_seed(seed)
    graph = trace(dense(9, 6, 6).double().eval(), (1, 3, 3))
    x, y = problem(seed, batch=1)
    spec = Spec.margins(y, 4, x)
    for engine in ENGINES.values():
        bounds = engine(Problem(graph, x, Box(0.2), spec))
        boxes = {i: (low[0].detach(), up[0].detach()) for i, (low, up) in bounds.boxes.items()}
        for t in range(1, 4):
            row = spec.rows[0, t].numpy()
            triangle = exact_minimum(graph, x, 0.2, row, boxes, binary=False)
            true = exact_minimum(graph, x, 0.2, row, boxes, binary=True)
            assert bounds.lower[0, t].item() <= triangle + 1e-6
            assert triangle <= true + 1e-6


@pytest.mark.parametrize("name", ["dense", "residual", "tanh"])
def test_gradients_are_those_of_finite_differences(name):
    graph = network(name)
    x, y = problem(batch=2)

    def lower(x):
        asked = Problem(graph, x, Box(0.1), Spec.margins(y, 4, x))
        return asked.bounds(Linear("parallel", "interval", sides="lower")).lower

    assert torch.autograd.gradcheck(lower, x.clamp(0.2, 0.8).requires_grad_())


@pytest.mark.parametrize("engine", [crown(), crown_ibp(), fast_lin()], ids=["crown", "crown-ibp", "fast-lin"])
def test_of_no_examples_there_are_no_bounds(engine):
    net = nn.Sequential(
        nn.Conv2d(1, 2, 2), nn.ReLU(), nn.Conv2d(2, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(2, 3)
    )
    graph, x = trace(net.double().eval(), (1, 3, 3)), torch.zeros(0, 1, 3, 3, dtype=torch.float64)
    bounds = engine(Problem(graph, x, Box(0.1), Spec.logits(0, 3, x)))
    assert bounds.lower.shape == bounds.upper.shape == (0, 3)


def test_inputs_may_lie_in_memory_in_any_order():
    graph, x = problem_of_channels()
    region, spec = Box(0.1), Spec.logits(len(x), 3, x)
    plain = crown()(Problem(graph, x, region, spec))
    turned = crown()(Problem(graph, x.contiguous(memory_format=torch.channels_last), region, spec))
    torch.testing.assert_close(turned.lower, plain.lower)


def problem_of_channels():
    """A network whose second layer is bounded by whole rows, and images of three channels."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 25, 3),
    )
    return trace(net.double().eval(), (3, 5, 5)), torch.rand(2, 3, 5, 5, dtype=torch.float64)

"""The relaxed linear network and the bounds pushed forward through it, held against the backward pass."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from tightrope.bounds import Bounds, Engine, Forward, Interval, Problem, RelaxedNetwork, crown, fast_lin
from tightrope.bounds.backward import lower_bound, path
from tightrope.errors import InputError
from tightrope.graph import trace
from tightrope.region import REGIONS, Box, L2Ball
from tightrope.spec import Spec

CLASSES = 4
EPS = [0.05, 0.3, torch.tensor([0.0, 0.1, 0.4], dtype=torch.float64)]


class Branches(nn.Module):
    """Paths that part and meet again; a path with an activation meets one without."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.stem, self.norm = nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.first, self.second = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1)
        self.middle = nn.Linear(54 if how == "beside" else 27, 8)
        self.last = nn.Linear(8, CLASSES)

    def forward(self, x):
        x = self.stem((x - 0.4) / 0.5)
        x = torch.relu(x) if self.how == "residual" else x
        z = self.second(torch.relu(self.norm(self.first(x))))
        if self.how == "residual":
            x = torch.relu(z + x)
        else:
            x = z - x if self.how == "difference" else torch.cat([x, torch.relu(z)], 1)
        return self.last(torch.relu(self.middle(x.flatten(1))))


def dense(*widths: int) -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten()]
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], CLASSES))


def conv(activation: nn.Module) -> nn.Module:
    layers = [nn.Conv2d(1, 3, 2, stride=2, padding=1), activation, nn.Conv2d(3, 4, 2), activation]
    return nn.Sequential(*layers, nn.AvgPool2d(1), nn.Flatten(), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4))


NETWORKS = {
    "growing": lambda: dense(9, 12, 14, 11),
    "narrow": lambda: dense(9, 6, 5, 4),
    "conv": lambda: conv(nn.ReLU()),
    "leaky": lambda: conv(nn.LeakyReLU(0.2)),
    "norm": lambda: nn.Sequential(  # one BatchNorm layer that is folded, and two that are not
        *(nn.BatchNorm2d(1), nn.ConstantPad2d(1, 0.7), nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU()),
        *(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(27, 6), nn.ReLU(), nn.Linear(6, CLASSES)),
    ),
    "residual": lambda: Branches("residual"),
    "difference": lambda: Branches("difference"),
    "beside": lambda: Branches("beside"),
}


def network(name: str, seed: int = 0):
    torch.manual_seed(seed)
    model = NETWORKS[name]().double().eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):  # so that no layer is all dead or all alive
            module.weight *= 2
            module.bias *= 0.3
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
            module.weight.uniform_(0.5, 2)
    return trace(model, (1, 3, 3))


def inputs(seed: int = 0, batch: int = 3):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(batch, 1, 3, 3, generator=generator, dtype=torch.float64)
    return x, torch.arange(batch) % CLASSES


@dataclass(frozen=True)
class Worst:
    """Where a relaxed network is smallest, for each row: its value there, inputs, and noise, -1 or 1."""

    lower: Tensor
    points: Tensor
    noise: dict[int, Tensor]


def worst_of(relaxed: RelaxedNetwork, asked: Problem, rows: Tensor, node: int | None = None) -> Worst:
    """The optimal perturbations: `run` with them yields the smallest `<row, value of the node>`.

    Source: tight_relaxation.txt, section 3.1. Where a coefficient is 0, any noise is optimal; this takes -1,
    which is the lower line (`delta* = 0`).
    """
    reached: dict[int, Tensor] = {}
    last = len(relaxed.graph.nodes) - 1 if node is None else node
    seen, _ = path(relaxed.graph, asked.x, asked.region, last, relaxed.lines)
    lower = lower_bound(relaxed.graph, asked.x, asked.region, last, rows, seen, reached)
    points = asked.region.minimiser(asked.x, reached.pop(0))
    return Worst(lower, points, {i: torch.where(A < 0, 1.0, -1.0).to(A) for i, A in reached.items()})


def problem(name: str, region, seed: int = 0):
    x, y = inputs(seed)
    return Problem(network(name, seed), x, region, Spec.margins(y, CLASSES, x))


def uniform(like: torch.Tensor, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(like.shape, generator=generator, dtype=like.dtype) * 2 - 1


def assert_equal(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def assert_agree_with_fast_lin(asked: Problem) -> None:
    ours, theirs = asked.bounds(Forward()), asked.bounds(fast_lin())
    assert_equal(ours.lower, theirs.lower)
    assert_equal(ours.upper, theirs.upper)
    assert ours.boxes.keys() == theirs.boxes.keys()
    for i, interval in asked.bounds(Interval()).boxes.items():
        open_sign = (interval[0] < 0) & (interval[1] > 0)  # fast_lin leaves the other boxes as they are
        for mine, other in zip(ours.boxes[i], theirs.boxes[i], strict=True):
            assert_equal(mine[open_sign], other[open_sign])
        assert (ours.boxes[i][0] >= interval[0]).all()
        assert (ours.boxes[i][1] <= interval[1]).all()


class TestForward:
    @pytest.mark.parametrize("name", NETWORKS)
    @pytest.mark.parametrize("norm", REGIONS)
    def test_it_agrees_with_the_backward_pass(self, name, norm):
        for seed, eps in enumerate(EPS):
            asked = problem(name, REGIONS[norm](eps), seed)
            assert_agree_with_fast_lin(asked)
            if seed == 1:
                assert_agree_with_fast_lin(problem(name, REGIONS[norm](eps, domain=None), seed))
                # Else this shows nothing.
                assert all(((low < 0) & (up > 0)).any() for low, up in asked.bounds(Forward()).boxes.values())

    def test_it_agrees_at_the_statistics_of_a_training_batch(self):
        graph, (x, y) = network("residual"), inputs()
        graph.module.train()
        fixed = graph.run(x)[1]
        assert_agree_with_fast_lin(Problem(fixed, x, Box(0.1), Spec.margins(y, CLASSES, x)))

    @pytest.mark.parametrize("name", NETWORKS)
    @pytest.mark.parametrize("norm", REGIONS)
    def test_no_point_of_the_region_leaves_bounds_or_boxes(self, name, norm):
        asked = problem(name, REGIONS[norm](0.3), seed=1)
        graph, x, region = asked.graph, asked.x, asked.region
        bounds = asked.bounds(Forward())
        assert isinstance(bounds, Bounds)
        generator = torch.Generator().manual_seed(0)
        points = [region.sample(x, generator) for _ in range(50)]
        if norm == "inf":
            coins = [torch.rand(x.shape, generator=generator) < 0.5 for _ in range(50)]
            points += [torch.where(coin, *region.corners(x)) for coin in coins]
        for point in points:
            logits, entering = graph.entering(point)
            margins = (asked.spec.rows @ logits.unsqueeze(2)).squeeze(2)
            assert (bounds.lower - 1e-9 <= margins).all()
            assert (margins <= bounds.upper + 1e-9).all()
            for i, (lower, upper) in bounds.boxes.items():
                assert (lower - 1e-9 <= entering[i]).all()
                assert (entering[i] <= upper + 1e-9).all()

    @pytest.mark.parametrize("name", ["narrow", "conv"])
    def test_gradients_are_those_of_finite_differences(self, name):
        asked = problem(name, Box(0.1))
        parameters = [p.requires_grad_() for p in asked.graph.module.parameters()]
        x = asked.x[:2].clamp(0.3, 0.7).requires_grad_()
        eps = torch.tensor([0.1, 0.2], dtype=torch.float64, requires_grad=True)

        def lower(x, eps, *_parameters):
            bounds = Problem(asked.graph, x, Box(eps), Spec(asked.spec.rows[:2])).bounds(Forward())
            return bounds.lower, *(side for box in bounds.boxes.values() for side in box)

        assert torch.autograd.gradcheck(lower, (x, eps, *parameters), fast_mode=True)

    def test_gradients_are_those_of_the_backward_pass(self):
        gradients = []
        for engine in (Forward(), fast_lin()):
            asked = problem("residual", L2Ball(0.3), seed=1)
            parameters = [p.requires_grad_() for p in asked.graph.module.parameters()]
            gradients.append(torch.autograd.grad(asked.bounds(engine).lower.square().sum(), parameters))
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, atol=1e-9, rtol=0)

    def test_each_example_is_bounded_as_if_it_were_alone(self):
        asked = problem("residual", Box(EPS[2]))
        together = asked.bounds(Forward())
        for i in range(len(asked.x)):
            one = slice(i, i + 1)
            alone = Problem(asked.graph, asked.x[one], Box(EPS[2][one]), Spec(asked.spec.rows[one]))
            assert_equal(alone.bounds(Forward()).lower, together.lower[one])
            assert_equal(alone.bounds(Forward()).upper, together.upper[one])

    @pytest.mark.parametrize("norm", REGIONS)
    def test_a_batch_may_be_empty(self, norm):
        graph, x = network("residual"), torch.zeros(0, 1, 3, 3, dtype=torch.float64)
        bounds = Forward()(Problem(graph, x, REGIONS[norm](0.1), Spec.logits(0, CLASSES, x)))
        assert bounds.lower.shape == bounds.upper.shape == (0, CLASSES)

    def test_a_network_without_activations_is_bounded_exactly(self):
        graph, (x, y) = trace(dense(9).double(), (1, 3, 3)), inputs()
        spec = Spec.margins(y, CLASSES, x)
        asked = Problem(graph, x, L2Ball(0.3), spec)
        assert_equal(asked.bounds(Forward()).lower, asked.bounds(Interval()).lower)
        assert_equal(asked.bounds(Forward()).upper, asked.bounds(Interval()).upper)

    def test_other_activations_are_refused(self):
        graph, (x, y) = trace(conv(nn.Sigmoid()).double(), (1, 3, 3)), inputs()
        with pytest.raises(
            InputError, match="this network has Sigmoid: use another engine, for example crown"
        ):
            Forward()(Problem(graph, x, Box(0.1), Spec.margins(y, CLASSES, x)))

    def test_it_is_an_engine(self):
        assert isinstance(Forward(), Engine)
        assert hash(Forward()) == hash(Forward())


class TestRelaxedNetwork:
    @pytest.mark.parametrize("name", NETWORKS)
    @pytest.mark.parametrize("norm", REGIONS)
    def test_its_optimal_perturbations_attain_the_bound(self, name, norm):
        asked = problem(name, REGIONS[norm](0.3, domain=None), seed=1)
        bounds = asked.bounds(fast_lin())
        relaxed = RelaxedNetwork.over(asked.graph, bounds.boxes)
        worst = worst_of(relaxed, asked, asked.spec.rows)
        assert_equal(worst.lower, bounds.lower)
        logits = relaxed.run(worst.points, worst.noise)
        assert_equal((asked.spec.rows * logits).sum(2), bounds.lower)
        for noise in worst.noise.values():
            assert (noise.abs() == 1).all()
        for k in range(CLASSES):
            assert (asked.region.contains(asked.x, worst.points[:, k]) < 1e-12).all()

    def test_the_optimum_at_a_hidden_layer_is_the_lower_side_of_its_box(self):
        asked = problem("narrow", Box(0.3), seed=1)
        bounds = asked.bounds(fast_lin())
        relaxed = RelaxedNetwork.over(asked.graph, bounds.boxes)
        last, node = (sorted(bounds.boxes)[-1], asked.graph.nodes[sorted(bounds.boxes)[-1]].inputs[0])
        size = asked.graph.nodes[node].shape.numel()
        rows = torch.eye(size, dtype=torch.float64).expand(len(asked.x), -1, -1)
        worst = worst_of(relaxed, asked, rows, node)
        value = relaxed.run(worst.points, worst.noise, until=node).diagonal(dim1=1, dim2=2)
        assert_equal(value, worst.lower)
        interval = asked.bounds(Interval()).boxes[last]
        open_sign = (interval[0] < 0) & (interval[1] > 0)
        assert open_sign.any()
        assert_equal(torch.maximum(value, interval[0])[open_sign], bounds.boxes[last][0][open_sign])

    @pytest.mark.parametrize("name", NETWORKS)
    @pytest.mark.parametrize("norm", REGIONS)
    def test_no_noise_leaves_the_bounds(self, name, norm):
        asked = problem(name, REGIONS[norm](0.3), seed=1)
        bounds = asked.bounds(Forward())
        relaxed = RelaxedNetwork.over(asked.graph, bounds.boxes)
        generator = torch.Generator().manual_seed(0)
        points = torch.stack([asked.region.sample(asked.x, generator) for _ in range(60)], 1)
        noise = {
            i: uniform(low.unsqueeze(1).expand(-1, 60, *low.shape[1:]), i)
            for i, (low, _) in bounds.boxes.items()
        }
        for e in (noise, {i: e.sign() for i, e in noise.items()}):
            margins = relaxed.run(points, e) @ asked.spec.rows.mT
            assert (bounds.lower.unsqueeze(1) - 1e-9 <= margins).all()
            assert (margins <= bounds.upper.unsqueeze(1) + 1e-9).all()

    @pytest.mark.parametrize("name", NETWORKS)
    def test_with_the_deltas_of_the_true_activations_it_is_the_true_network(self, name):
        asked = problem(name, Box(0.3), seed=1)
        relaxed = RelaxedNetwork.over(asked.graph, asked.bounds(Forward()).boxes)
        points = asked.region.sample(asked.x, torch.Generator().manual_seed(0))
        logits, entering = asked.graph.entering(points)
        noise = {}
        for i, lines in relaxed.lines.items():
            delta = asked.graph.nodes[i].op.apply(entering[i]) - lines.upper_slope * entering[i]
            half = lines.upper_offset / 2
            noise[i] = torch.where(half > 0, delta / torch.where(half > 0, half, 1) - 1, 0).unsqueeze(1)
            assert (noise[i].abs() <= 1 + 1e-9).all()
        assert_equal(relaxed.run(points.unsqueeze(1), noise).squeeze(1), logits)

    def test_missing_noise_is_zero_and_the_values_stop_where_asked(self):
        asked = problem("residual", Box(0.3), seed=1)
        relaxed = RelaxedNetwork.over(asked.graph, asked.bounds(Forward()).boxes)
        points = asked.x.unsqueeze(1)
        zero = {i: torch.zeros_like(lines.upper_slope).unsqueeze(1) for i, lines in relaxed.lines.items()}
        assert torch.equal(relaxed.run(points, {}), relaxed.run(points, zero))
        for i, node in enumerate(asked.graph.nodes):
            assert relaxed.run(points, {}, until=i).shape == (3, 1, *node.shape)
        assert torch.equal(relaxed.run(points, {}, until=0), points)

    def test_it_is_differentiable_in_points_and_noise(self):
        asked = problem("narrow", Box(0.3), seed=1)
        relaxed = RelaxedNetwork.over(asked.graph, asked.bounds(Forward()).boxes)
        first = min(relaxed.lines)
        e = uniform(relaxed.lines[first].upper_slope.unsqueeze(1)).requires_grad_()
        points = asked.x.unsqueeze(1).requires_grad_()
        assert torch.autograd.gradcheck(lambda p, e: relaxed.run(p, {first: e}), (points, e))

    def test_other_activations_are_refused(self):
        graph, (x, y) = trace(conv(nn.Tanh()).double(), (1, 3, 3)), inputs()
        boxes = crown()(Problem(graph, x, Box(0.1), Spec.margins(y, CLASSES, x))).boxes
        with pytest.raises(InputError, match="this network has Tanh"):
            RelaxedNetwork.over(graph, boxes)

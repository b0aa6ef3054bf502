"""Soundness by hostile sampling: every corner, points between, and attacks on each single bound."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tightrope.attacks import Pgd
from tightrope.bounds import Bounds, Engine, Interval, Problem
from tightrope.graph import Graph, trace
from tightrope.region import Box, L1Ball, L2Ball, Region
from tightrope.spec import Spec

ENGINE = Interval()
SLACK = 1e-10  # float64, values of order one to a hundred
REGIONS = [Box, L2Ball, L1Ball]
DUAL = {Box: 1, L2Ball: 2, L1Ball: math.inf}
CLASSES = 3


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Branch(nn.Module):
    """Two paths that meet: added, subtracted, or side by side."""

    def __init__(self, how: str, one: nn.Module, two: nn.Module) -> None:
        super().__init__()
        self.how, self.one, self.two = how, one, two

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "cat":
            return torch.cat([self.one(x), self.two(x)], 1)
        return self.one(x) + self.two(x) if self.how == "add" else self.one(x) - self.two(x)


ACTIVATIONS = {
    "relu": nn.ReLU,
    "leaky": lambda: nn.LeakyReLU(0.2),
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "none": nn.Identity,
}


@dataclass(frozen=True)
class Plan:
    """A random network: blocks of (kind, width, activation), then logits, then what `ends` names."""

    seed: int
    shape: tuple[int, ...]
    blocks: tuple[tuple[str, int, str], ...]
    ends: tuple[str, ...]

    def build(self) -> nn.Module:
        """The network in evaluation mode, with BatchNorm statistics and weights of all sizes and signs."""
        torch.manual_seed(self.seed)
        image, features, layers = len(self.shape) == 3, self.shape[0], []
        for kind, width, activation in self.blocks:
            act = ACTIVATIONS[activation]()
            if kind == "norm":
                layers.append(nn.BatchNorm2d(features) if image else nn.BatchNorm1d(features))
            elif kind == "pool" and image:
                layers.append(nn.MaxPool2d(2, 1, 1) if width % 2 else nn.AvgPool2d(3, 1, 1))
            elif kind in ("add", "subtract", "cat"):
                one = nn.Sequential(_layer(image, features, width), ACTIVATIONS[activation]())
                layers.append(Branch(kind, one, _layer(image, features, width)))
                features = 2 * width if kind == "cat" else width
            else:
                layers.append(_layer(image, features, width))
                features = width
            layers.append(act)
        body = nn.Sequential(*layers, nn.Flatten())
        size = body.eval()(torch.zeros(1, *self.shape)).shape[1]
        endings = [nn.BatchNorm1d(CLASSES) if end == "norm" else nn.ReLU() for end in self.ends]
        net = nn.Sequential(body, nn.Linear(size, CLASSES), *endings).double().eval().requires_grad_(False)
        with torch.no_grad():
            for m in net.modules():
                if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d):
                    m.running_mean.normal_()
                    m.running_var.uniform_(0.2, 2)
                    m.weight.normal_()
                    m.bias.normal_()
                elif isinstance(m, nn.Linear | nn.Conv2d):
                    m.weight.mul_(3)
        return net


def _layer(image: bool, before: int, after: int) -> nn.Module:
    return nn.Conv2d(before, after, 3, padding=1) if image else nn.Linear(before, after)


plans = st.builds(
    Plan,
    st.integers(0, 2**32 - 1),
    st.sampled_from([(1,), (3,), (8,), (1, 2, 4), (2, 2, 2), (1, 3, 2)]),
    st.lists(
        st.tuples(
            st.sampled_from(["layer", "norm", "pool", "add", "subtract", "cat"]),
            st.integers(1, 4),
            st.sampled_from(sorted(ACTIVATIONS)),
        ),
        max_size=3,
    ).map(tuple),
    st.sampled_from([(), ("norm",), ("relu",), ("norm", "relu")]),
)


@dataclass(frozen=True)
class Case:
    """Two inputs with many pixels at 0 or 1, a region with one radius or two, and what to bound."""

    plan: Plan
    pixels: tuple[float, ...]
    kind: type[Region]
    eps: float | tuple[float, float]
    domain: tuple[float, float] | None
    rows: str
    seed: int

    def build(self) -> tuple[Graph, Tensor, Region, Spec]:
        size = math.prod(self.plan.shape)
        x = torch.tensor(self.pixels[: 2 * size], dtype=torch.float64).view(2, *self.plan.shape)
        eps = torch.tensor(self.eps, dtype=torch.float64) if isinstance(self.eps, tuple) else self.eps
        specs = {
            "margins": Spec.margins(torch.tensor([self.seed % CLASSES, self.seed % 2]), CLASSES, x),
            "logits": Spec.logits(2, CLASSES, x),
            "random": Spec(numbers(2, 1 + self.seed % 4, CLASSES, seed=self.seed)),
        }
        return trace(self.plan.build(), self.plan.shape), x, self.kind(eps, self.domain), specs[self.rows]


def cases(*kinds: type[Region]) -> st.SearchStrategy[Case]:
    pixel = st.sampled_from([0.0, 1.0, 0.05, 0.5]) | st.floats(0, 1)
    radius = st.sampled_from([0.0, 1e-9, 0.1, 0.3, 2.0])
    return st.builds(
        Case,
        plans,
        st.tuples(*[pixel] * 16),
        st.sampled_from(kinds),
        radius | st.tuples(radius, radius),
        st.sampled_from([(0.0, 1.0), None]),
        st.sampled_from(["margins", "logits", "random"]),
        st.integers(0, 1000),
    )


@torch.no_grad()
def value(graph: Graph, points: Tensor, spec: Spec) -> Tensor:
    """`C f(x')` for a batch, or for many batches at once."""
    logits = graph.module(points.view(-1, *graph.input_shape)).view(
        *points.shape[: -len(graph.input_shape)], -1
    )
    return (spec.rows @ logits.unsqueeze(-1)).squeeze(-1)


def assert_holds(bounds: Bounds, found: Tensor) -> None:
    assert bool((bounds.lower - SLACK <= found).all()), (
        f"{(bounds.lower - found).max()} below the lower bound"
    )
    assert bool((found <= bounds.upper + SLACK).all()), (
        f"{(found - bounds.upper).max()} above the upper bound"
    )


def between(x: Tensor, region: Region, count: int) -> Tensor:
    """Random points of the region, `(count, batch, *shape)`."""
    return torch.stack([region.sample(x, torch.Generator().manual_seed(seed)) for seed in range(count)])


def corners(x: Tensor, box: Box) -> Tensor:
    """Every corner of the boxes around a batch of inputs, `(corners, batch, *shape)`."""
    lower, upper = (corner.flatten(1) for corner in box.corners(x))
    size = lower.shape[1]
    choices = torch.tensor([[i >> k & 1 for k in range(size)] for i in range(2**size)], dtype=torch.bool)
    return torch.where(choices.unsqueeze(1), upper, lower).view(-1, *x.shape)


def surface(x: Tensor, ball: Region) -> Tensor:
    """Points where a ball is thinnest and where it is widest, `(count, batch, *shape)`."""
    far = [x + 10 * numbers(*x.shape, seed=seed) for seed in range(20)]
    far += [x + ball.steepest(x, numbers(*x.shape, seed=seed)) for seed in range(10)]
    return torch.stack([ball.project(x, point) for point in far])


class TestSoundness:
    @settings(max_examples=100)
    @given(cases(Box))
    def test_no_corner_and_no_point_of_a_box_leaves_the_bounds(self, case):
        graph, x, region, spec = case.build()
        bounds = ENGINE(Problem(graph, x, region, spec))
        assert bounds.guarantee == "sound"
        assert_holds(bounds, value(graph, corners(x, region), spec))
        assert_holds(bounds, value(graph, between(x, region, 10), spec))

    @settings(max_examples=100)
    @given(cases(L2Ball, L1Ball))
    def test_no_point_of_a_ball_leaves_the_bounds(self, case):
        graph, x, region, spec = case.build()
        bounds = ENGINE(Problem(graph, x, region, spec))
        assert_holds(bounds, value(graph, surface(x, region), spec))
        assert_holds(bounds, value(graph, between(x, region, 10), spec))

    @settings(max_examples=20)
    @given(cases(*REGIONS))
    def test_no_attack_on_a_single_bound_succeeds(self, case):
        """Attacking class 0 of the logits (<row, f>, 0) lowers the row's value; with -row it raises it."""
        graph, x, region, spec = case.build()
        bounds = ENGINE(Problem(graph, x, region, spec))
        head = nn.Linear(CLASSES, 2, bias=False).double().requires_grad_(False)
        nn.init.zeros_(head.weight)
        target = trace(nn.Sequential(graph.module, head), graph.input_shape)
        attack = Pgd(steps=8, step=0.4, loss="margin")
        for example in range(len(x)):
            one = x[example : example + 1]
            eps = region.eps[example : example + 1] if isinstance(region.eps, Tensor) else region.eps
            for row, lower, upper in zip(
                spec.rows[example], bounds.lower[example], bounds.upper[example], strict=True
            ):
                found = []
                for sign in (1, -1):
                    head.weight[0] = sign * row
                    label = torch.zeros(1, dtype=torch.int64)
                    point = attack(target, one, label, region.with_eps(eps), torch.Generator().manual_seed(0))
                    found.append(sign * float(target.run(point)[0][0, 0]))
                assert lower - SLACK <= found[0] <= found[1] + SLACK <= upper + 2 * SLACK

    @settings(max_examples=50)
    @given(cases(*REGIONS))
    def test_the_boxes_hold_what_enters_each_activation(self, case):
        graph, x, region, spec = case.build()
        boxes = ENGINE(Problem(graph, x, region, spec)).boxes
        last = graph.merge(spec)[0]
        assert list(boxes) == [i for i, _ in graph.activations() if i <= last]
        for point in between(x, region, 10):
            values = [point]
            for node in graph.nodes[1:]:
                values.append(node.op.apply(*[values[j] for j in node.inputs]))
            for i, (lower, upper) in boxes.items():
                entering = values[graph.nodes[i].inputs[0]]
                assert lower.shape == entering.shape
                assert bool(((lower - SLACK <= entering) & (entering <= upper + SLACK)).all())


class TestTightness:
    @settings(max_examples=50)
    @given(cases(*REGIONS))
    def test_with_a_radius_of_zero_the_bounds_are_the_value(self, case):
        graph, x, region, spec = case.build()
        bounds = ENGINE(Problem(graph, x, region.with_eps(0.0), spec))
        expected = value(graph, x, spec)
        tolerance = 1e-12 * max(1.0, float(expected.abs().max()))
        assert torch.allclose(bounds.lower, expected, atol=tolerance, rtol=0)
        assert torch.allclose(bounds.upper, expected, atol=tolerance, rtol=0)

    @settings(max_examples=50)
    @given(cases(*REGIONS))
    def test_a_larger_region_has_looser_bounds(self, case):
        graph, x, region, spec = case.build()
        inner, outer = (
            ENGINE(Problem(graph, x, region, spec)),
            ENGINE(Problem(graph, x, region.with_eps(region.eps * 1.5 + 0.01), spec)),
        )
        assert bool((outer.lower <= inner.lower + SLACK).all())
        assert bool((inner.upper <= outer.upper + SLACK).all())

    @settings(max_examples=50)
    @given(cases(*REGIONS))
    def test_merging_the_last_layer_is_never_looser_than_bounding_logits_and_subtracting(self, case):
        graph, x, region, spec = case.build()
        merged, logits = (
            ENGINE(Problem(graph, x, region, spec)),
            ENGINE(Problem(graph, x, region, Spec.logits(len(x), CLASSES, x))),
        )
        lower, upper = logits.lower.unsqueeze(2), logits.upper.unsqueeze(2)
        positive, negative = spec.rows.clamp(min=0), spec.rows.clamp(max=0)
        assert bool((merged.lower >= (positive @ lower + negative @ upper).squeeze(2) - SLACK).all())
        assert bool((merged.upper <= (positive @ upper + negative @ lower).squeeze(2) + SLACK).all())

    def test_merging_is_tighter_where_the_logits_move_together(self):
        net = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 2)).double()
        for parameter in net.parameters():
            nn.init.ones_(parameter)
        x, y = torch.tensor([[0.5]], dtype=torch.float64), torch.tensor([0])
        bounds = ENGINE(Problem(trace(net, (1,)), x, Box(0.3), Spec.margins(y, 2, x)))
        assert torch.allclose(bounds.lower, torch.zeros(1, 2, dtype=torch.float64), atol=1e-15)

    @pytest.mark.parametrize("kind", REGIONS)
    def test_an_affine_network_is_bounded_exactly_in_every_norm(self, kind):
        torch.manual_seed(0)
        net = (
            nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 5), nn.Dropout(), nn.Linear(5, CLASSES))
            .double()
            .eval()
        )
        nn.init.normal_(net[0].weight)
        x, rows = numbers(3, 6), numbers(3, 4, CLASSES, seed=1)
        eps = torch.tensor([0.0, 0.1, 0.7], dtype=torch.float64)
        W = torch.func.jacrev(lambda z: net(z.unsqueeze(0))[0])(x[0])
        reach = eps[:, None] * torch.linalg.vector_norm(rows @ W, DUAL[kind], dim=2)
        graph = trace(net, (6,))
        bounds = ENGINE(Problem(graph, x, kind(eps, domain=None), Spec(rows)))
        assert torch.allclose(bounds.lower, value(graph, x, Spec(rows)) - reach, atol=1e-12, rtol=0)
        assert torch.allclose(bounds.upper, value(graph, x, Spec(rows)) + reach, atol=1e-12, rtol=0)

    def test_a_box_around_an_affine_network_is_exact_at_the_border_of_the_domain_too(self):
        torch.manual_seed(0)
        graph = trace(
            nn.Sequential(nn.Conv2d(1, 2, 2), nn.Flatten(), nn.Linear(6, CLASSES)).double(), (1, 2, 4)
        )
        x = torch.tensor([0.0, 1.0, 0.1, 0.9, 0.5, 0.0, 1.0, 0.3], dtype=torch.float64).view(1, 1, 2, 4)
        spec = Spec(numbers(1, 5, CLASSES))
        bounds = ENGINE(Problem(graph, x, Box(0.2), spec))
        found = value(graph, corners(x, Box(0.2)), spec)
        assert torch.allclose(bounds.lower, found.amin(0), atol=1e-12, rtol=0)
        assert torch.allclose(bounds.upper, found.amax(0), atol=1e-12, rtol=0)

    def test_one_hidden_layer_by_hand(self):
        """z = (x0 - x1, x0 + x1) in [-0.2, 0.2] x [0.8, 1.2]; relu; f = z0 - 2 z1."""
        net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1)).double()
        with torch.no_grad():
            net[0].weight.copy_(torch.tensor([[1.0, -1.0], [1.0, 1.0]]))
            net[2].weight.copy_(torch.tensor([[1.0, -2.0]]))
            net[2].bias.fill_(0.5)
        x = torch.tensor([[0.5, 0.5]], dtype=torch.float64)
        bounds = ENGINE(Problem(trace(net, (2,)), x, Box(0.1), Spec.logits(1, 1, x)))
        assert bounds.lower.item() == pytest.approx(0 - 2.4 + 0.5)
        assert bounds.upper.item() == pytest.approx(0.2 - 1.6 + 0.5)
        lower, upper = bounds.boxes[2]
        assert lower.tolist() == [pytest.approx([-0.2, 0.8])]
        assert upper.tolist() == [pytest.approx([0.2, 1.2])]


def smooth() -> nn.Module:
    """Every kind of operator, without kinks near the values met here."""
    return nn.Sequential(
        nn.Conv2d(1, 2, 2, padding=1),
        nn.BatchNorm2d(2),
        nn.Tanh(),
        nn.MaxPool2d(2, 1),
        Branch("add", nn.Sequential(nn.Conv2d(2, 2, 1), nn.LeakyReLU(0.1)), nn.Conv2d(2, 2, 3, padding=1)),
        nn.Sigmoid(),
        nn.Flatten(),
        nn.Linear(8, 4),
        nn.ReLU(),
        nn.Linear(4, CLASSES),
        nn.BatchNorm1d(CLASSES),
    )


class TestGradients:
    def setup(self) -> tuple[nn.Module, Graph, Tensor, Tensor, Spec]:
        torch.manual_seed(0)
        net = smooth().double().eval()
        x = torch.rand(2, 1, 2, 2, dtype=torch.float64) * 0.6 + 0.2
        eps = torch.tensor([0.05, 0.1], dtype=torch.float64)
        return net, trace(net, (1, 2, 2)), x, eps, Spec(numbers(2, 2, CLASSES))

    def test_they_are_right_for_inputs_and_radii(self):
        _, graph, x, eps, spec = self.setup()

        def bound(x: Tensor, eps: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
            bounds = ENGINE(Problem(graph, x, Box(eps), Spec(rows)))
            return bounds.lower, bounds.upper

        assert torch.autograd.gradcheck(
            bound, (x.requires_grad_(), eps.requires_grad_(), spec.rows.requires_grad_())
        )

    def test_they_are_right_for_every_parameter(self):
        net, graph, x, eps, spec = self.setup()

        def bound(*_parameters: Tensor) -> tuple[Tensor, Tensor]:
            bounds = ENGINE(Problem(graph, x, Box(eps), spec))
            return bounds.lower, bounds.upper

        assert torch.autograd.gradcheck(bound, tuple(net.parameters()), fast_mode=True)

    def test_they_are_right_through_the_statistics_of_a_training_batch(self):
        net, graph, x, eps, spec = self.setup()
        net.train()

        def bound(x: Tensor, *_parameters: Tensor) -> tuple[Tensor, Tensor]:
            bounds = ENGINE(Problem(graph.run(x)[1], x, Box(eps), spec))
            return bounds.lower, bounds.upper

        assert torch.autograd.gradcheck(bound, (x.requires_grad_(), *net.parameters()), fast_mode=True)

    @pytest.mark.parametrize("kind", REGIONS)
    def test_they_are_right_for_an_affine_network(self, kind):
        net = nn.Sequential(nn.Linear(4, CLASSES)).double()
        graph, spec, x = trace(net, (4,)), Spec(numbers(2, 2, CLASSES)), numbers(2, 4)
        eps = torch.tensor([0.1, 0.2], dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(
            lambda eps, *_parameters: ENGINE(Problem(graph, x, kind(eps, domain=None), spec)).lower,
            (eps, *net.parameters()),
        )

    def test_a_margin_of_a_class_over_itself_has_a_finite_gradient(self):
        net, graph, x, eps, _ = self.setup()
        ENGINE(
            Problem(graph, x, Box(eps), Spec.margins(torch.tensor([0, 1]), CLASSES, x))
        ).lower.sum().backward()
        assert all(bool(torch.isfinite(p.grad).all()) for p in net.parameters())


class TestUse:
    def test_it_is_an_engine(self):
        assert isinstance(ENGINE, Engine)

    @settings(max_examples=30)
    @given(cases(*REGIONS))
    def test_every_example_is_bounded_for_itself(self, case):
        graph, x, region, spec = case.build()
        together = ENGINE(Problem(graph, x, region, spec))
        for i in range(len(x)):
            eps = region.eps[i : i + 1] if isinstance(region.eps, Tensor) else region.eps
            alone = ENGINE(Problem(graph, x[i : i + 1], region.with_eps(eps), Spec(spec.rows[i : i + 1])))
            assert torch.allclose(alone.lower[0], together.lower[i], atol=SLACK, rtol=0)
            assert torch.allclose(alone.upper[0], together.upper[i], atol=SLACK, rtol=0)

    @pytest.mark.parametrize("net", [smooth(), nn.Sequential(nn.Flatten(), nn.Linear(4, CLASSES))])
    @pytest.mark.parametrize("kind", REGIONS)
    def test_a_batch_may_be_empty(self, kind, net):
        graph, x = trace(net.double().eval(), (1, 2, 2)), numbers(0, 1, 2, 2)
        bounds = ENGINE(Problem(graph, x, kind(0.1), Spec.logits(0, CLASSES, x)))
        assert bounds.lower.shape == bounds.upper.shape == (0, CLASSES)

    @settings(max_examples=40)
    @given(cases(*REGIONS))
    def test_single_precision_agrees_up_to_rounding(self, case):
        graph, x, region, spec = case.build()
        exact = ENGINE(Problem(graph, x, region, spec))
        single = ENGINE(
            Problem(
                trace(graph.module.float(), graph.input_shape), x.float(), region, Spec(spec.rows.float())
            )
        )
        tolerance = 1e-4 * max(1.0, float(exact.lower.abs().max()), float(exact.upper.abs().max()))
        assert torch.allclose(single.lower.double(), exact.lower, atol=tolerance, rtol=0)
        assert torch.allclose(single.upper.double(), exact.upper, atol=tolerance, rtol=0)

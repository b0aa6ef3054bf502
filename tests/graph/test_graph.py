from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize

from tightrope.bounds import Bounds, Interval, Problem
from tightrope.errors import InputError
from tightrope.files import fingerprint
from tightrope.graph import Graph, ops, recast, trace
from tightrope.region import Box
from tightrope.spec import Spec


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(18, 3))


def convolutional(**options: object) -> nn.Module:
    """BatchNorm after a convolution (folded), after an activation (not folded), and after a linear layer."""
    return nn.Sequential(
        nn.Conv2d(1, 3, 2, bias=False),
        nn.BatchNorm2d(3, **options),
        nn.ReLU(),
        nn.BatchNorm2d(3, **options),
        nn.Flatten(),
        nn.Linear(27, 4),
        nn.BatchNorm1d(4, **options),
        nn.ReLU(),
        nn.Linear(4, 3),
    )


class Shared(nn.Module):
    """One layer under two BatchNorms, one of them used twice: nothing may be folded into the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.flatten, self.first = nn.Flatten(), nn.Linear(16, 5)
        self.norm, self.other, self.last = nn.BatchNorm1d(5), nn.BatchNorm1d(5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.first(self.flatten(x))
        return self.last(torch.relu(self.norm(z)) + self.other(z) - self.norm(torch.tanh(z)))


class Sequence(nn.Module):
    """BatchNorm1d over (batch, channels, length), after a linear layer that works along the length."""

    def __init__(self) -> None:
        super().__init__()
        self.along, self.norm, self.last = nn.Linear(4, 5), nn.BatchNorm1d(4), nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.norm(self.along(x.squeeze(1)))).flatten(1))


NORMED = {
    "convolutional": convolutional,
    "momentum": lambda: convolutional(momentum=0.3, eps=0.01),
    "momentum None": lambda: convolutional(momentum=None),
    "not affine": lambda: convolutional(affine=False),
    "shared": Shared,
    "sequence": Sequence,
    "last": lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.BatchNorm1d(3)),
    "first": lambda: nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(16, 3)),
    "three dimensions": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 1)), nn.Conv3d(1, 2, (1, 2, 2)), nn.BatchNorm3d(2), nn.Flatten(), nn.Linear(18, 3)
    ),
}
each_normed = pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in NORMED.items()])


def build(make: Callable[[], nn.Module]) -> tuple[nn.Module, Graph]:
    """A network in training mode whose BatchNorms have seen data and have weights of both signs."""
    torch.manual_seed(0)
    net = make().double()
    with torch.no_grad():
        for m in net.modules():
            if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
                m.running_mean.normal_()
                m.running_var.uniform_(0.5, 2)
                if m.affine:
                    m.weight.normal_()
                    m.weight[0] = -1.0
                    m.bias.normal_()
    return net.train(), trace(net, (1, 4, 4))


def x_and_y() -> tuple[Tensor, Tensor]:
    x = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return x, torch.tensor([0, 1, 2, 0, 1, 2])


def bound(graph: Graph, x: Tensor, y: Tensor, eps: float = 0.0) -> Bounds:
    return Interval()(Problem(graph, x, Box(eps), Spec.margins(y, graph.classes, x)))


def margins(logits: Tensor, y: Tensor) -> Tensor:
    return logits.gather(1, y.unsqueeze(1)) - logits


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> bool:
    return a.shape == b.shape and bool(((a - b).abs() <= tolerance).all())


class TestRunInEvaluation:
    def test_it_gives_the_logits_and_the_graph_itself(self):
        net, graph = build(convolutional)
        net.eval()
        x, _ = x_and_y()
        logits, same = graph.run(x)
        assert close(logits, net(x))
        assert same is graph

    def test_it_does_not_touch_the_input(self):
        net = nn.Sequential(nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(16, 3)).double()
        x = numbers(2, 1, 4, 4)
        trace(net, (1, 4, 4)).run(x)
        assert torch.equal(x, numbers(2, 1, 4, 4))

    @pytest.mark.parametrize("shape", [(2, 4, 4), (2, 1, 4, 5), (1, 4, 4)])
    def test_it_says_what_shape_it_takes(self, shape):
        graph = trace(plain(), (1, 4, 4))
        with pytest.raises(InputError, match=r"inputs of shape \(batch, \*\(1, 4, 4\)\), got"):
            graph.check(torch.zeros(shape))

    def test_it_takes_no_integers(self):
        with pytest.raises(
            InputError, match=r"takes floating-point inputs .* got \(2, 1, 4, 4\) of torch.uint8"
        ):
            trace(plain(), (1, 4, 4)).check(torch.zeros(2, 1, 4, 4, dtype=torch.uint8))

    def test_bounding_checks_the_input_too(self):
        graph = trace(plain(), (1, 4, 4))
        with pytest.raises(InputError, match="takes floating-point inputs of shape"):
            bound(graph, torch.zeros(2, 4, 4), torch.tensor([0, 1]))


class TestBatchNormInTraining:
    @each_normed
    def test_a_pass_computes_and_counts_what_the_module_s_own_pass_does(self, make):
        net, graph = build(make)
        twin = copy.deepcopy(net)
        for step in range(3):
            x = numbers(5, 1, 4, 4, seed=step)
            assert close(graph.run(x)[0], twin(x))
        assert all(close(value, twin.state_dict()[name]) for name, value in net.state_dict().items())

    @each_normed
    def test_a_bound_is_one_of_the_function_just_computed(self, make):
        _, graph = build(make)
        x, y = x_and_y()
        logits, fixed = graph.run(x)
        for side in (bound(fixed, x, y).lower, bound(fixed, x, y).upper):
            assert close(side, margins(logits, y))
        assert close(fixed.run(x)[0], logits)
        assert close(fixed.run(x[:1])[0], logits[:1])  # one example alone has the same statistics

    @each_normed
    def test_the_bound_holds_for_every_point_of_the_box(self, make):
        _, graph = build(make)
        x, y = x_and_y()
        fixed = graph.run(x)[1]
        bounds = bound(fixed, x, y, eps=0.05)
        for seed in range(20):
            point = Box(0.05).sample(x, torch.Generator().manual_seed(seed))
            found = margins(fixed.run(point)[0], y)
            assert bool(((bounds.lower - 1e-12 <= found) & (found <= bounds.upper + 1e-12)).all())

    @each_normed
    def test_bounds_and_attacks_leave_the_running_statistics_alone(self, make):
        net, graph = build(make)
        x, y = x_and_y()
        fixed = graph.run(x)[1]
        before = copy.deepcopy(net.state_dict())
        bound(fixed, x, y, eps=0.1)
        fixed.run(x + 0.1)
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())

    @each_normed
    def test_gradients_flow_through_the_batch_s_statistics(self, make):
        net, graph = build(make)
        twin = copy.deepcopy(net)
        x, y = x_and_y()
        weights = numbers(6, 3)
        one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
        (margins(twin(one), y) * weights).sum().backward()
        fixed = graph.run(two)[1]
        (bound(fixed, two, y).lower * weights).sum().backward()
        assert close(one.grad, two.grad, 1e-10)
        for (name, expected), got in zip(twin.named_parameters(), net.parameters(), strict=True):
            assert got.grad is not None, name
            assert close(got.grad, expected.grad, 1e-10), name

    @each_normed
    def test_it_knows_that_it_depends_on_the_batch(self, make):
        net, graph = build(make)
        assert graph.has_batch_statistics()
        assert not graph.run(x_and_y()[0])[1].has_batch_statistics()
        assert not graph.frozen().has_batch_statistics()
        net.eval()
        assert not graph.has_batch_statistics()

    @each_normed
    def test_an_unfixed_graph_is_not_bounded(self, make):
        _, graph = build(make)
        with pytest.raises(InputError, match="statistics were not fixed by a clean pass"):
            bound(graph, *x_and_y())

    def test_a_layer_that_stays_in_evaluation_keeps_its_running_statistics(self):
        net, graph = build(convolutional)
        net[1].eval()
        twin = copy.deepcopy(net)
        x, y = x_and_y()
        logits, fixed = graph.run(x)
        assert close(logits, twin(x))
        assert close(bound(fixed, x, y).lower, margins(logits, y))

    def test_a_fixed_graph_still_shares_the_parameters(self):
        net, graph = build(convolutional)
        x, y = x_and_y()
        fixed = graph.run(x)[1]
        before = bound(fixed, x, y).lower
        with torch.no_grad():
            net[0].weight.mul_(2)
            net[1].bias.add_(1)
        after = bound(fixed, x, y).lower
        assert not close(before, after)
        assert close(after, margins(fixed.run(x)[0], y))

    @each_normed
    def test_folding_changes_no_bound(self, make):
        """Folding W and the scale s into one layer bounds |s W| r; apart they give |s| |W| r: the same."""
        net, graph = build(make)
        net.eval()
        x, y = x_and_y()
        apart, together = bound(graph, x, y, eps=0.1), bound(graph.frozen(), x, y, eps=0.1)
        assert close(apart.lower, together.lower)
        assert close(apart.upper, together.upper)


class TestFrozen:
    @each_normed
    def test_it_computes_what_the_module_computes_in_evaluation(self, make):
        net, graph = build(make)
        before = copy.deepcopy(net.state_dict())
        x, y = x_and_y()
        frozen = graph.frozen()
        logits, same = frozen.run(x)
        assert same is frozen
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
        assert close(bound(frozen, x, y).lower, margins(logits, y))
        assert close(logits, net.eval()(x))

    def test_it_follows_the_running_statistics(self):
        net, graph = build(convolutional)
        frozen = graph.frozen()
        x, _ = x_and_y()
        net(x)
        logits = frozen.run(x)[0]
        assert close(logits, net.eval()(x))

    def test_it_switches_dropout_off(self):
        net = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, 3)).double().train()
        graph = trace(net, (1, 4, 4))
        x, _ = x_and_y()
        frozen = graph.frozen()
        logits = frozen.run(x)[0]
        assert torch.equal(logits, frozen.run(x)[0])
        assert close(logits, net.eval()(x))


class TestDropout:
    def test_a_training_pass_drops_what_the_module_would_drop(self):
        net = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, 3)).double().train()
        graph = trace(net, (1, 4, 4))
        x, _ = x_and_y()
        torch.manual_seed(5)
        expected = net(x)
        torch.manual_seed(5)
        assert torch.equal(graph.run(x)[0], expected)

    def test_a_bound_drops_nothing(self):
        net = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, 3)).double().train()
        graph = trace(net, (1, 4, 4))
        x, y = x_and_y()
        lower = bound(graph, x, y).lower
        assert close(lower, margins(net.eval()(x), y))


class TestMerge:
    @pytest.mark.parametrize(
        ("net", "left"),
        [
            (nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.ReLU(), nn.Linear(5, 3)), "2"),
            (nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.ReLU(), nn.Linear(5, 4), nn.Linear(4, 3)), "2"),
            (nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.ReLU()), "2"),
            (nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten()), "1"),
            (nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.BatchNorm1d(5)), "input"),
            (nn.Identity(), "input"),
        ],
    )  # fmt: skip
    def test_the_affine_operators_that_end_the_network_go_into_the_specification(self, net, left):
        net = net.double().eval()
        shape = (3,) if isinstance(net, nn.Identity) else (1, 4, 4)
        graph = trace(net, shape)
        x = numbers(2, *shape)
        rows = numbers(2, 4, graph.classes)
        i, pulled, offset = graph.merge(Spec(rows))
        assert graph.nodes[i].name == left
        assert pulled.shape == (2, 4, *graph.nodes[i].shape)
        values = [x]
        for node in graph.nodes[1:]:
            values.append(node.op.apply(*[values[j] for j in node.inputs]))
        expected = (rows @ values[-1].unsqueeze(2)).squeeze(2)
        assert close((pulled.flatten(2) @ values[i].flatten(1).unsqueeze(2)).squeeze(2) + offset, expected)

    def test_it_stops_where_two_values_are_added(self):
        class Skip(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

            def forward(self, x: Tensor) -> Tensor:
                z = self.first(x)
                return self.second(z) + torch.relu(z)

        graph = trace(Skip().double(), (3,))
        i, _, _ = graph.merge(Spec.logits(1, 3, numbers(1)))
        assert isinstance(graph.nodes[i].op, ops.Add)


class TestTo:
    def test_it_is_a_copy_in_another_precision_for_evaluation(self):
        torch.manual_seed(0)
        net = convolutional().train()
        graph = trace(net, (1, 4, 4))
        copied = recast(graph, torch.float64)
        x, _ = x_and_y()
        expected = copied.run(x)[0]
        assert expected.dtype == torch.float64
        assert not expected.requires_grad
        assert net.training
        assert next(net.parameters()).dtype == torch.float32
        assert next(net.parameters()).requires_grad
        net.eval()
        assert torch.allclose(net(x.float()), expected.float(), atol=1e-5)
        with torch.no_grad():
            net[0].weight.zero_()
        assert torch.equal(copied.run(x)[0], expected)

    def test_parametrised_layers_are_copied_too(self):
        net = nn.Sequential(nn.Flatten(), parametrizations.weight_norm(nn.Linear(16, 3)))
        x, _ = x_and_y()
        assert torch.allclose(
            recast(trace(net, (1, 4, 4)), torch.float64).run(x)[0].float(), net(x.float()), atol=1e-5
        )


def test_the_structure_tells_networks_apart_by_all_but_their_weights():
    def structure(hidden=4, slope=0.1, eps=1e-5, seed=0):
        torch.manual_seed(seed)
        layers = [
            nn.Linear(3, hidden),
            nn.BatchNorm1d(hidden, eps=eps),
            nn.LeakyReLU(slope),
            nn.Linear(hidden, 2),
        ]
        return trace(nn.Sequential(*layers), (3,)).structure()

    assert structure() == structure(seed=1)
    assert len({structure(), structure(hidden=5), structure(slope=0.2), structure(eps=1e-3)}) == 4


class Pooling(nn.Module):
    """Average and maximum pooling as functions, and two layers in one order or the other."""

    def __init__(self, padded=True, window=3, swapped=False):
        super().__init__()
        self.padded, self.window, self.swapped = padded, window, swapped
        self.one, self.two = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        x = functional.avg_pool2d(x, 3, 1, 1, count_include_pad=self.padded)
        x = functional.max_pool2d(x, self.window, 1, self.window // 2).flatten(1)
        one, two = (self.two, self.one) if self.swapped else (self.one, self.two)
        return two(torch.relu(one(x)))


def test_the_structure_tells_settings_and_the_order_of_equal_layers():
    made = [Pooling(), Pooling(padded=False), Pooling(window=1), Pooling(swapped=True)]
    for padded in (True, False):
        pool = nn.AvgPool2d(3, 1, 1, count_include_pad=padded)
        made.append(nn.Sequential(pool, nn.Flatten(), nn.Linear(16, 16)))
    assert len({trace(net, (1, 4, 4)).structure() for net in made}) == 6


def test_its_tensors_are_all_that_its_function_depends_on():
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)
            self.register_buffer("mean", torch.zeros(2), persistent=False)
            self.plain = torch.ones(2)

        def forward(self, x):
            return self.layer((x - self.mean) / self.plain)

    graph = trace(nn.Sequential(Shifted()), (2,))
    assert set(graph.tensors()) == {"0.layer.weight", "0.layer.bias", "0.mean", "0.plain"}
    graph = trace(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), (2,))
    assert fingerprint(graph.tensors()) == fingerprint(graph.module.state_dict())


def test_weights_that_are_computed_are_told_apart_by_what_computes_them():
    class Times(nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.factor = factor

        def forward(self, weight):
            return self.factor * weight

    graphs = []
    for factor in (1.0, 0.01):
        layer = nn.Linear(2, 2)
        with torch.no_grad():
            layer.weight.fill_(1.0)
        parametrize.register_parametrization(layer, "weight", Times(factor))
        graphs.append(trace(nn.Sequential(layer), (2,)))
    first, second = graphs
    assert first.structure() != second.structure()
    assert fingerprint(first.tensors()) != fingerprint(second.tensors())
    assert torch.equal(first.tensors()["0.weight (computed)"], torch.ones(2, 2))


def test_what_enters_each_activation_is_what_its_predecessor_yields():
    torch.manual_seed(0)
    module, x = (
        nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)),
        torch.rand(5, 3),
    )
    logits, entering = trace(module, (3,)).entering(x)
    assert torch.equal(logits, module(x))
    assert [torch.equal(entering[2], module[0](x)), torch.equal(entering[4], module[:3](x))] == [True, True]


class TestSplitting:
    @pytest.fixture
    def graph(self) -> Graph:
        torch.manual_seed(0)
        return trace(convolutional().double().eval(), (1, 4, 4))

    def test_what_lies_in_front_and_behind_is_the_whole(self, graph: Graph) -> None:
        x = numbers(3, 1, 4, 4)
        for node in graph.separators():
            value = graph.upto(node).run(x)[0].view(3, *graph.nodes[node].shape)
            torch.testing.assert_close(graph.since(node).run(value)[0], graph.run(x)[0])

    def test_a_chain_can_be_split_anywhere(self, graph: Graph) -> None:
        assert graph.separators() == list(range(len(graph.nodes)))

    def test_a_path_around_a_node_is_noticed(self) -> None:
        graph = trace(Shared().double().eval(), (1, 4, 4))
        separators = graph.separators()
        assert [graph.nodes[i].name for i in separators] == ["input", "flatten", "first", "sub", "last"]
        for node in set(range(len(graph.nodes))) - set(separators):
            with pytest.raises(InputError, match="a path goes around it"):
                graph.since(node)


def test_the_structure_tells_settings_given_as_lists_and_how_sizes_are_computed():
    class Convolution(nn.Module):
        def __init__(self, dilation):
            super().__init__()
            self.weight, self.dilation = nn.Parameter(torch.zeros(2, 1, 1, 1)), dilation

        def forward(self, x):
            return nn.functional.conv2d(x, self.weight, None, [1, 1], [0, 0], [self.dilation] * 2).flatten(1)

    first, second = (trace(Convolution(dilation), (1, 4, 4)).structure() for dilation in (1, 2))
    assert first != second
    resized = [
        nn.Sequential(
            nn.Upsample(scale_factor=1.6, mode="bilinear", recompute_scale_factor=how), nn.Flatten()
        )
        for how in (None, True)
    ]
    first, second = (trace(net, (1, 4, 4)).structure() for net in resized)
    assert first != second


def test_dropout_in_place_leaves_its_input_to_the_bounds():
    graph = trace(nn.Sequential(nn.Dropout(inplace=True), nn.Linear(4, 3)), (4,))
    graph.module.train()
    x = torch.ones(2, 4)
    graph.run(x)
    assert torch.equal(x, torch.ones(2, 4))

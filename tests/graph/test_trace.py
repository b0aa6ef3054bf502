from __future__ import annotations

import copy
import math
import operator
import random
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

from tightrope.errors import InputError, UnsupportedOperatorError
from tightrope.graph import Graph, check_training_mode, ops, trace


class Fn(nn.Module):
    """A module whose forward is a function of itself and its input."""

    def __init__(self, function: Callable[[Fn, Tensor], Tensor], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, nn.Parameter | nn.Module):
                setattr(self, name, part)
            else:
                self.register_buffer(name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


class Residual(nn.Module):
    """Everything that people write in a forward and that is not a module."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.4, 0.6]).view(2, 1, 1))
        self.first = nn.Conv2d(2, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.second = nn.Conv2d(3, 3, 3, padding=1)
        self.skip = nn.Conv2d(2, 3, 1)
        self.act = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = (x - self.mean) / 0.25
        deep = self.second(F.relu(self.norm(self.first(x))))
        deep += self.skip(x)
        pooled = F.avg_pool2d(self.act(deep), 2)
        flat = pooled.view(pooled.size(0), -1)
        return self.head(self.drop(flat)) - 1.0


def _add(value: Tensor, overwrite: Callable[[Tensor], Tensor]) -> Tensor:
    return value + overwrite(value)


def _overwrite_a_part(value: Tensor) -> Tensor:
    parts = value.chunk(3, 1)
    parts[0].relu_()
    return parts[0] + parts[1]


def _drop_result(value: Tensor, overwrite: Callable[[Tensor], Tensor]) -> Tensor:
    overwrite(value)
    return value


def _says(ask: Callable[[], Tensor]) -> bool:
    """What a value says, if it can be asked."""
    try:
        return bool(ask())
    except Exception:
        return False


def chain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))


def batch(*shape: int) -> Tensor:
    return torch.randn(5, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def assert_traced(module: nn.Module, shape: tuple[int, ...]) -> Graph:
    module = module.double().eval()
    graph = trace(module, shape)
    x = batch(*shape)
    assert torch.allclose(graph.run(x)[0], module(x), atol=1e-12, rtol=0)
    return graph


def refusal(module: nn.Module, shape: tuple[int, ...]) -> str:
    with pytest.raises(UnsupportedOperatorError) as refused:
        trace(module, shape)
    return str(refused.value)


class TestWhatIsTraced:
    def test_a_sequential(self):
        graph = assert_traced(chain(), (4,))
        assert [node.name for node in graph.nodes] == ["input", "0", "1", "2"]
        assert [node.inputs for node in graph.nodes] == [(), (0,), (1,), (2,)]
        assert graph.input_shape == (4,)
        assert graph.classes == 3

    def test_a_residual_network_with_functions(self):
        graph = assert_traced(Residual(), (2, 4, 4))
        kinds = [type(node.op) for node in graph.nodes]
        assert kinds.count(ops.Add) == 1
        assert kinds.count(ops.ReLU) == 2
        assert [node.name for _, node in graph.activations()] == ["relu", "act"]

    def test_a_nested_network_has_paths_for_names(self):
        net = nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(4, 3), Fn(lambda s, x: torch.relu(x))))
        assert [node.name for node in assert_traced(net, (2, 2)).nodes] == ["input", "0", "1.0", "1.1.relu"]

    def test_an_activation_used_twice(self):
        act = nn.ReLU()
        graph = assert_traced(nn.Sequential(nn.Linear(4, 4), act, nn.Linear(4, 4), act), (4,))
        assert len(list(graph.activations())) == 2

    def test_a_layer_used_twice(self):
        layer = nn.Linear(4, 4)
        graph = assert_traced(nn.Sequential(layer, nn.ReLU(), layer), (4,))
        with torch.no_grad():
            layer.weight.mul_(2)
        assert torch.allclose(graph.run(batch(4))[0], graph.module(batch(4)))

    def test_one_value_read_by_many(self):
        net = Fn(lambda s, x: s.b(torch.relu(s.a(x))) + s.a(x) + x, a=nn.Linear(4, 4), b=nn.Linear(4, 4))
        assert_traced(net, (4,))

    def test_a_parametrised_layer_follows_its_parameters(self):
        net = chain().double()
        parametrizations.weight_norm(net[0])
        graph = assert_traced(net, (4,))
        before = graph.run(batch(4))[0]
        with torch.no_grad():
            net[0].parametrizations.weight.original0.mul_(3)
        after = graph.run(batch(4))[0]
        assert not torch.allclose(before, after)
        assert torch.allclose(after, net(batch(4)), atol=1e-12, rtol=0)

    def test_a_constant_minus_a_value_is_two_operators(self):
        net = nn.Sequential(Fn(lambda s, x: 1 - x), nn.Linear(4, 3))
        graph = assert_traced(net, (4,))
        assert [node.name for node in graph.nodes] == ["input", "0.sub.Scale", "0.sub", "1"]
        assert_traced(Fn(lambda s, x: torch.sub(s.mean, x), mean=torch.rand(4)), (4,))
        wider = Fn(lambda s, x: (s.mean - s.a(x)).flatten(1), mean=torch.rand(3, 4), a=nn.Linear(4, 4))
        assert_traced(wider, (1, 4))

    def test_a_value_in_another_shape(self):
        net = Fn(lambda s, x: s.head(torch.unflatten(x, 1, (2, 2)).unflatten(-1, (1, 2)).flatten(1)))
        net.head = nn.Linear(4, 3)
        assert_traced(net, (4,))

    def test_identities_leave_no_operator(self):
        net = nn.Sequential(nn.Identity(), nn.Linear(4, 3), nn.Identity(), Fn(lambda s, x: x.contiguous()))
        assert [node.name for node in assert_traced(net, (4,)).nodes] == ["input", "1"]

    def test_dropout_is_the_identity(self):
        assert_traced(nn.Sequential(nn.Linear(4, 50), nn.Dropout(0.9), nn.Linear(50, 3)), (4,))

    @pytest.mark.parametrize("net", [nn.Identity(), nn.Linear(4, 3), Fn(lambda s, x: x)])
    def test_a_network_of_one_layer_or_none(self, net):
        assert_traced(net, (4,))

    def test_modules_called_with_a_keyword(self):
        assert_traced(Fn(lambda s, x: s.layer(input=x), layer=nn.Linear(4, 3)), (4,))

    def test_a_subclass_of_a_known_layer(self):
        class Doubled(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(2 * x)

        assert_traced(nn.Sequential(Doubled(4, 3)), (4,))

    def test_layers_in_a_list(self):
        layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])

        def forward(s: Fn, x: Tensor) -> Tensor:
            for layer in s.layers:
                x = torch.tanh(layer(x))
            return x

        assert len(assert_traced(Fn(forward, layers=layers), (4,)).nodes) == 7

    def test_operators_that_the_output_does_not_need(self):
        def forward(s: Fn, x: Tensor) -> Tensor:
            logits = s.head(torch.relu(s.body(x)))
            s.aside(logits)
            torch.relu(s.aside(x))
            return logits

        net = Fn(forward, body=nn.Linear(4, 5), head=nn.Linear(5, 3), aside=nn.Linear(3, 2))
        net.aside = Fn(lambda s, x: x * 2 + x)
        graph = assert_traced(net, (4,))
        assert graph.nodes[-1].name == "head"
        assert graph.classes == 3

    def test_a_batch_of_another_size_than_the_probe(self):
        graph = trace(Residual().eval(), (2, 4, 4))
        for size in (0, 1, 2, 7):
            assert graph.run(torch.rand(size, 2, 4, 4))[0].shape == (size, 4)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_the_network_s_own_precision_is_used(self, dtype):
        assert trace(chain().to(dtype), (4,)).run(torch.rand(2, 4, dtype=dtype))[0].dtype == dtype

    @pytest.mark.parametrize(
        "forward",
        [
            lambda s, x: s.layer(x.flatten(1) if x.dim() == 4 else x),
            lambda s, x: s.layer(x.view(x.size(0), -1)) if x.shape[1:] == (1, 2, 2) else x.flatten(1),
            lambda s, x: s.layer(x.view(-1, math.prod(x.shape[1:]))),
            lambda s, x: s.layer(x.reshape(*x.shape[:1], -1)) if len(x.shape) > 2 else x.flatten(1),
            lambda s, x: (
                s.layer(s.norm(x).flatten(1)) if s.norm(x).size(-1) > 1 and x.ndim > 2 else x.flatten(1)
            ),
        ],
    )
    def test_control_flow_on_shapes(self, forward):
        def checked(s: Fn, x: Tensor) -> Tensor:
            assert x.ndim == 4
            if x.shape[1] != 1 or x.numel() < 4:
                raise ValueError("one channel, please")
            return forward(s, x)

        net = Fn(checked, layer=nn.Linear(4, 3), norm=nn.BatchNorm2d(1)).train()
        graph = assert_traced(net, (1, 2, 2))
        assert "Linear" in [type(node.op).__name__ for node in graph.nodes]
        before = net.norm.running_mean.clone()
        check_training_mode(net, (1, 2, 2))
        assert torch.equal(net.norm.running_mean, before)
        with pytest.raises(UnsupportedOperatorError, match="one channel, please"):
            trace(net, (3, 2, 2))

    @pytest.mark.parametrize(
        ("forward", "weight"),
        [
            (lambda s, x: F.linear(x, s.w * s.mask), (3, 4)),
            (lambda s, x: F.linear(x, s.mask - 2 * s.w), (3, 4)),
            (lambda s, x: F.linear(x, s.w.t()), (4, 3)),
            (lambda s, x: F.linear(x, -s.w[:, 1:5:1]), (3, 6)),
            (lambda s, x: x @ s.w, (4, 3)),
            (lambda s, x: torch.matmul(x, torch.exp(s.w.T)), (3, 4)),
            (lambda s, x: x - s.w.view(1, 4), (4,)),
            (lambda s, x: x / s.w[None, :].to(x.device), (4,)),
            (lambda s, x: (x - s.mask[0].to(x)) / s.w.type_as(x).view(1, -1).abs(), (4,)),
        ],
    )
    def test_what_is_computed_of_parameters_is_computed_anew_at_each_use(self, forward, weight):
        net = Fn(
            forward,
            w=nn.Parameter(torch.rand(weight) + 1),
            mask=torch.tensor([1.0, 0.0, 1.0, 1.0]).expand(3, 4),
        )
        graph = assert_traced(net, (4,))
        x = batch(4)
        with torch.no_grad():
            net.w.mul_(2)
        value = graph.run(x)[0]
        assert torch.allclose(value, net(x), atol=1e-12, rtol=0)
        assert torch.allclose(
            *(torch.autograd.grad(out.square().sum(), net.w)[0] for out in (value, net(x))), atol=1e-12
        )

    def test_networks_that_compute_something_else_of_their_parameters_are_told_apart(self):
        forwards = [
            lambda s, x: x - s.w.view(1, 4),
            lambda s, x: x - s.w.view(1, 4).abs(),
            lambda s, x: x - s.w.view(1, 4) * s.w,
            lambda s, x: x - (s.w * 2),
            lambda s, x: x - (s.w * 3),
            lambda s, x: x.unsqueeze(1).sum(1) - s.w,
            lambda s, x: x.unsqueeze(1).mean(1) - s.w,
            lambda s, x: x[:, :] - s.w,
        ]
        nets = [Fn(forward, w=nn.Parameter(torch.ones(4))) for forward in forwards]
        assert len({trace(net, (4,)).structure() for net in nets}) == len(nets)

    @pytest.mark.parametrize(
        ("limit", "count"),
        [
            (lambda x: x.clamp(min=0), 1),
            (lambda x: torch.clamp(x, -0.5, 0.25), 2),
            (lambda x: x.clip(max=0.1), 1),
            (lambda x: F.hardtanh(x, -0.2, 0.3), 2),
            (F.hardtanh, 2),
            (lambda x: F.relu6(3 * x), 2),
        ],
    )
    def test_limits_are_relus(self, limit, count):
        net = Fn(lambda s, x: limit(4 * s.layer(x)), layer=nn.Linear(4, 9))
        graph = assert_traced(net, (4,))
        assert [type(node.op) for node in graph.nodes].count(ops.ReLU) == count
        assert len({node.name for node in graph.nodes}) == len(graph.nodes)

    def test_functional_dropout_is_the_identity_in_evaluation_but_is_not_for_training(self):
        net = Fn(lambda s, x: F.dropout(s.layer(x), 0.5, training=s.training), layer=nn.Linear(4, 3))
        assert [node.name for node in assert_traced(net, (4,)).nodes] == ["input", "layer"]
        with pytest.raises(InputError, match=r"other operators in training mode .* nn\.Dropout"):
            check_training_mode(net, (4,))


class TestWhatTracingLeavesAlone:
    @pytest.mark.parametrize("training", [True, False])
    def test_every_module_keeps_its_mode(self, training):
        net = Residual().train(training)
        net.norm.train(not training)
        trace(net, (2, 4, 4))
        modes = {name: m.training for name, m in net.named_modules()}
        assert modes == {name: training if name != "norm" else not training for name in modes}

    def test_modes_are_kept_when_the_network_is_refused(self):
        net = nn.Sequential(nn.Linear(4, 4), nn.Softmax(1)).train()
        refusal(net, (4,))
        assert all(m.training for m in net.modules())

    def test_parameters_buffers_and_attributes_do_not_change(self):
        net = Residual().train()
        state, attributes = copy.deepcopy(net.state_dict()), set(vars(net))
        trace(net, (2, 4, 4))
        assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
        assert set(vars(net)) == attributes
        assert all(p.grad is None for p in net.parameters())

    def test_the_random_state_does_not_change(self):
        net = Residual()
        before = torch.get_rng_state()
        trace(net, (2, 4, 4))
        assert torch.equal(torch.get_rng_state(), before)


class TestUnsupportedOperators:
    def test_all_are_reported_at_once_with_their_paths(self):
        inner = nn.Sequential(nn.Linear(4, 4), nn.GELU(), Fn(lambda s, x: torch.cumsum(x, 1)))
        message = refusal(nn.Sequential(nn.Softmax(1), inner, nn.ReLU(), nn.LayerNorm(4)), (4,))
        for part in ("0 (Softmax)", "1.1 (GELU)", "cumsum in 1.2", "3 (LayerNorm)"):
            assert part in message
        assert "1.0" not in message
        assert "ReLU" not in message

    @pytest.mark.parametrize(
        "net",
        [
            Fn(lambda s, x: x.softmax(1)),
            Fn(lambda s, x: torch.softmax(x, 1)),
            Fn(lambda s, x: x + x.mean()),
            Fn(lambda s, x: x - x.mean(0)),
            Fn(lambda s, x: x - x.mean(0, keepdim=True)),
            Fn(lambda s, x: x - x.mean(1, keepdim=True)),
            Fn(lambda s, x: x * x),
            Fn(lambda s, x: x * torch.sigmoid(x)),
            Fn(lambda s, x: 1 / (x + 2)),
            Fn(lambda s, x: x / (x + 2)),
            Fn(lambda s, x: x**2),
            Fn(lambda s, x: x.abs()),
            Fn(lambda s, x: x.clamp(s.low), low=torch.zeros(4)),
            Fn(lambda s, x: x[:, [1, 0, 2, 3]]),
            Fn(lambda s, x: x[:, s.order], order=torch.tensor([1, 0, 2, 3])),
            Fn(lambda s, x: x[[1, 0]]),
            Fn(lambda s, x: x + x[0]),
            Fn(lambda s, x: x + x[:1]),
            Fn(lambda s, x: x + x[None, 0]),
            Fn(lambda s, x: x.t()),
            Fn(lambda s, x: x.permute(1, 0)),
            Fn(lambda s, x: x.transpose(-1, 0)),
            Fn(lambda s, x: s.w @ x, w=torch.ones(2, 2)),
            Fn(lambda s, x: x @ s.w, w=torch.ones(4)),
            Fn(lambda s, x: x @ x.t()),
            Fn(lambda s, x: x.chunk(2)[0]),
            Fn(lambda s, x: x + x.unbind()[0]),
            Fn(lambda s, x: torch.cat(x.chunk(2, 1), 1)),
            Fn(lambda s, x: torch.cat(x.chunk(2, 1)[::-1], 1)),
            Fn(lambda s, x: s.w.chunk(2)[0] + x, w=torch.ones(8)),
            Fn(lambda s, x: x.tensor_split(2, 1)[0]),
            Fn(lambda s, x: x.flip(1)),
            Fn(lambda s, x: x.flip(0)),
            Fn(lambda s, x: torch.roll(x, 1, 0)),
            Fn(lambda s, x: torch.where(x > 0, x, 0)),
            Fn(lambda s, x: x.detach()),
            Fn(lambda s, x: x.float()),
            Fn(lambda s, x: torch.add(x, x, alpha=2)),
            Fn(lambda s, x: x.add(x, alpha=-1)),
            Fn(lambda s, x: torch.div(x, 2, rounding_mode="floor")),
            Fn(lambda s, x: F.gelu(x)),
            Fn(lambda s, x: F.pad(x.unsqueeze(1), (1, 1), mode="reflect").flatten(1)),
            Fn(lambda s, x: F.batch_norm(x, s.mean, s.var), mean=torch.zeros(4), var=torch.ones(4)),
            nn.Sequential(nn.PReLU()),
            nn.Sequential(nn.LeakyReLU(-0.5)),
            nn.Sequential(nn.LeakyReLU(1.5)),
            nn.Sequential(nn.Linear(4, 4), nn.LogSoftmax(1)),
            nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False)),
            nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.AvgPool2d(2, divisor_override=-3), nn.Flatten()),
            nn.Sequential(
                nn.Unflatten(1, (1, 2, 2)), nn.Upsample(scale_factor=2, mode="bicubic"), nn.Flatten()
            ),
        ],
    )
    def test_what_no_operator_stands_for_is_refused(self, net):
        assert "cannot bound" in refusal(net, (4,))

    def test_a_value_broadcast_against_another_is_refused(self):
        net = Fn(lambda s, x: s.one(x) + x, one=nn.Linear(4, 1))
        assert "broadcasts values of shapes [(1,), (4,)]" in refusal(net, (4,))

    @pytest.mark.parametrize(
        "pool",
        [
            nn.MaxPool2d(2, return_indices=True),
            Fn(lambda s, x: F.max_pool2d(x, 2, return_indices=True)),
        ],
    )
    def test_max_pooling_that_returns_indices_is_refused(self, pool):
        net = Fn(lambda s, x: s.pool(x)[0].flatten(1), pool=pool)
        assert "cannot bound" in refusal(net, (1, 4, 4))

    def test_an_operator_with_several_results_is_named(self):
        assert "std_mean (function std_mean): it yields several tensors" in refusal(
            Fn(lambda s, x: torch.std_mean(x, 1)[0]), (4,)
        )

    @pytest.mark.parametrize("where", ["forward", "before"])
    def test_forward_hooks_are_refused(self, where):
        net = chain()
        if where == "forward":
            net[0].register_forward_hook(lambda m, inputs, output: output)
        else:
            net[0].register_forward_pre_hook(lambda m, inputs: None)
        message = refusal(net, (4,))
        assert "0 (Linear)" in message
        assert "hooks" in message

    @pytest.mark.parametrize("far", [0.0, 1e6])
    def test_a_hook_on_the_network_itself_is_refused(self, far):
        """Even where random inputs show no difference."""
        net = chain()
        net.register_forward_hook(lambda m, inputs, output: torch.where(output > far, -output, output))
        assert "the network itself has forward hooks" in refusal(net, (4,))

    @pytest.mark.parametrize(
        "net",
        [
            Fn(lambda s, x: x + torch.ones(4)),
            Fn(lambda s, x: x + torch.ones(x.size(0), 4)),
            Fn(lambda s, x: x + s.w.repeat(x.size(0), 1), w=nn.Parameter(torch.ones(4))),
            Fn(lambda s, x: x + torch.randn_like(s.w), w=nn.Parameter(torch.ones(4))),
            Fn(lambda s, x: x + s.w.bernoulli(), w=nn.Parameter(torch.ones(4))),
            Fn(lambda s, x: x + s.n.add_(1), n=torch.ones(4)),
            Fn(lambda s, x: x + s.w.to(torch.float16), w=nn.Parameter(torch.ones(4))),
            Fn(lambda s, x: F.linear(x, x)),
        ],
    )
    def test_weights_that_are_not_the_same_at_each_call_or_whose_making_is_not_known_are_refused(self, net):
        attributes = set(vars(net))
        refusal(net, (4,))
        assert set(vars(net)) == attributes

    def test_a_parametrised_module_of_one_s_own_is_refused(self):
        net = Fn(lambda s, x: F.linear(x, s.w), w=nn.Parameter(torch.ones(3, 4)))
        parametrize.register_parametrization(net, "w", nn.Tanh())
        refusal(net, (4,))
        refusal(nn.Sequential(net), (4,))

    @pytest.mark.parametrize(
        "net",
        [
            Fn(lambda s, x: x if x.sum() > 0 else -x),
            Fn(lambda s, x: x * float(x[0, 0])),
            Fn(lambda s, x: x if bool((x > 0).all()) else 2 * x),
            Fn(lambda s, x: x * s.scale if s.scale > 0 else x, scale=torch.tensor(1.0)),
        ],
    )
    def test_control_flow_on_values_is_refused(self, net):
        assert "cannot be traced" in refusal(net, (4,))

    @pytest.mark.parametrize(
        "net",
        [
            Fn(lambda s, x: -x if x.shape[0] == 1 else x),
            Fn(lambda s, x: torch.cat([x, x], 1) if len([n for n in x.shape if n > 2]) > 1 else x),
            Fn(lambda s, x: x if x.size(0) % 2 else 2 * x),
            Fn(lambda s, x: x if x.shape[0] > x.shape[1:].numel() / 2 else 2 * x),
        ],
    )
    def test_control_flow_on_the_size_of_a_batch_is_refused(self, net):
        assert "how many examples a batch has" in refusal(net, (4,))

    @pytest.mark.parametrize(
        "net",
        [
            Fn(lambda s, x: x if x.sum().item() > 0 else 2 * x),
            Fn(lambda s, x: x if x.dtype == torch.float32 else 2 * x),  # verdicts are found in float64
            Fn(lambda s, x: x if len(x.nonzero()) > 9 else 2 * x),
            Fn(lambda s, x: x if torch.rand(x.shape[1]).sum() > -1 else 2 * x),
            Fn(lambda s, x: x if x[x > 0.9].numel() > 9 else 2 * x),
            Fn(lambda s, x: x if x[:, x.shape[1] - 1] > 0 else 2 * x),
            Fn(lambda s, x: torch.cat([row.unsqueeze(0) for row in x])),
            Fn(lambda s, x: x if int(x.sum()) > x.shape[1] else 2 * x),
        ],
    )
    def test_what_is_no_shape_decides_nothing(self, net):
        refusal(net, (4,))


class TestWhatTracingCannotSee:
    @pytest.mark.parametrize(
        "net",
        [
            Fn(lambda s, x: F.dropout(x, 0.5, training=True)),
            Fn(lambda s, x: F.dropout(x)),
            Fn(lambda s, x: x + torch.randn(4)),
            Fn(lambda s, x: x + 0.1 * torch.randn_like(x)),
            Fn(lambda s, x: x + torch.rand(1)),
            Fn(lambda s, x: x * random.random()),
            Fn(lambda s, x: x.bernoulli()),
        ],
    )
    def test_randomness_is_refused(self, net):
        refusal(net, (4,))

    def test_a_value_read_as_a_number_is_refused(self):
        refusal(Fn(lambda s, x: x + x.tolist()[0][0]), (4,))

    @pytest.mark.parametrize(
        "forward",
        [
            lambda s, x: _add(s.layer(x), torch.relu_),
            lambda s, x: _add(s.layer(x), lambda h: F.relu(h, inplace=True)),
            lambda s, x: _add(s.layer(x), s.act),
            lambda s, x: _add(s.layer(x), lambda h: h.view(-1, 3).relu_()),
            lambda s, x: _drop_result(s.layer(x), torch.relu_),
            lambda s, x: _drop_result(x, torch.relu_),
            lambda s, x: _overwrite_a_part(s.layer(x)),
        ],
    )
    def test_reading_a_value_after_it_was_overwritten_is_refused(self, forward):
        layer = nn.Linear(4, 3)
        nn.init.constant_(layer.weight, 1.0)  # all positive: running the network shows no difference
        nn.init.constant_(layer.bias, 1.0)
        assert "overwrote in place" in refusal(Fn(forward, layer=layer, act=nn.ReLU(inplace=True)), (4,))

    @pytest.mark.parametrize(
        "change",
        [operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ipow, operator.imatmul],
    )
    def test_what_an_operator_in_place_does_to_other_names_is_refused(self, change):
        def forward(s: Fn, x: Tensor) -> Tensor:
            hidden = s.layer(x)
            skip = hidden
            hidden = change(hidden, s.other)
            return hidden + skip

        # One: the operators change nothing, so that running the network shows no difference.
        other = torch.eye(3) if change is operator.imatmul else torch.ones(3)
        other = torch.zeros(3) if change in (operator.iadd, operator.isub) else other
        message = refusal(Fn(forward, layer=nn.Linear(4, 3), other=other), (4,))
        assert "overwrote in place" in message or "not supported" in message

    def test_a_residual_branch_that_starts_at_zero_is_seen_in_what_it_is_added_to(self):
        def forward(s: Fn, x: Tensor) -> Tensor:
            hidden = s.layer(x)
            skip = hidden
            hidden += s.branch(x)
            return hidden + skip

        branch = nn.Linear(4, 3)
        nn.init.zeros_(branch.weight)
        nn.init.zeros_(branch.bias)
        assert "overwrote in place" in refusal(Fn(forward, layer=nn.Linear(4, 3), branch=branch), (4,))

    @pytest.mark.parametrize(
        "forward",
        [
            lambda s, x: s.layer(x) + F.relu(s.rare(x)) if isinstance(x, Tensor) else s.layer(x),
            lambda s, x: s.layer(x) + F.relu(s.rare(x)) if torch.is_tensor(x) else s.layer(x),
            lambda s, x: s.layer(x / 9 if torch.is_tensor(x) and x.max() > 1e6 else x),
            lambda s, x: s.layer(x) + (F.relu(s.rare(x)) if torch.is_grad_enabled() else 0.0),
            lambda s, x: s.layer(x if _says(lambda: x.sum() < 99) else x + F.relu(x - 2)),
        ],
    )
    def test_a_forward_that_looks_at_what_tracing_changes_is_refused(self, forward):
        layer, rare = nn.Linear(4, 3), nn.Linear(4, 3)
        with torch.no_grad():
            rare.bias.fill_(-1e4)  # what it adds is zero wherever anyone looks
        refusal(Fn(forward, layer=layer, rare=rare), (4,))

    def test_a_call_that_does_more_than_the_forward_is_refused(self):
        class Clipped(nn.Linear):
            def __call__(self, x: Tensor) -> Tensor:
                return super().__call__(x).clamp(-1e6, 1e6)

        class Inner(nn.Sequential):
            def __call__(self, x: Tensor) -> Tensor:
                return super().__call__(x).clamp(-1e3, 1e3)

        assert "something else when it is called" in refusal(Clipped(4, 3), (4,))
        assert_traced(nn.Sequential(Inner(nn.Linear(4, 3))), (4,))  # tracing follows that one

    @pytest.mark.parametrize(
        "forward",
        [
            lambda s, x: x / s.k.item(),
            lambda s, x: x * math.exp(s.k),
            lambda s, x: x.clamp(max=s.k.item()),
            lambda s, x: x + s.k.tolist(),
            lambda s, x: x * torch.equal(x, torch.relu(x)),
            lambda s, x: x * torch.allclose(x, s.k),
            lambda s, x: x[:, : s.k.int().item()],
        ],
    )
    def test_a_number_that_is_read_from_a_tensor_is_refused(self, forward):
        assert "reads a value as a number" in refusal(Fn(forward, k=torch.tensor(2.0)), (4,))

    def test_what_is_done_to_the_data_of_a_value_is_refused(self):
        def forward(s: Fn, x: Tensor) -> Tensor:
            hidden = s.layer(x)
            hidden.data.clamp_(-9, 9)
            return hidden

        assert "reads `.data`" in refusal(Fn(forward, layer=nn.Linear(4, 3)), (4,))

    def test_a_condition_on_a_shape_that_a_value_decides_is_refused(self):
        net = Fn(lambda s, x: x if x[:, s.mask].shape[1] > 2 else 2 * x, mask=torch.tensor([1, 1, 1, 0]) > 0)
        assert "branches on values" in refusal(net, (4,))

    def test_overwriting_a_value_that_is_not_read_again_is_allowed(self):
        def forward(s: Fn, x: Tensor) -> Tensor:
            hidden = s.layer(x)
            before = torch.tanh(hidden)
            hidden += 1
            return before + hidden.relu_()

        assert_traced(Fn(forward, layer=nn.Linear(4, 3)), (4,))

    def test_a_network_that_overwrites_its_own_input_is_a_function_of_it_all_the_same(self):
        net = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 3)).double()
        graph, x = trace(net, (4,)), batch(4)
        assert torch.equal(graph.run(x)[0], net(x.clone()))
        assert torch.equal(x, batch(4))

    def test_tracing_works_in_inference_mode(self):
        with torch.inference_mode():
            trace(Residual(), (2, 4, 4))

    def test_a_forward_replaced_on_the_instance_is_refused(self):
        net = chain()
        net[1].forward = lambda x: x.clamp(0, 1e6)  # random inputs show no difference
        assert "1 (ReLU)" in refusal(net, (4,))

    def test_a_forward_replaced_on_the_network_itself_is_refused(self):
        net = chain()
        layers = nn.Sequential(*net)
        net.forward = lambda x: layers(x).clamp(-1e6, 1e6)
        assert "a forward that is not its class's" in refusal(net, (4,))

    def test_a_forward_that_counts_its_calls_is_refused(self):
        def forward(s: Fn, x: Tensor) -> Tensor:
            s.calls = getattr(s, "calls", 0) + 1
            return x * s.calls

        refusal(Fn(forward), (4,))


class TestExamplesMustNotMix:
    @pytest.mark.parametrize(
        ("net", "shape"),
        [
            (Fn(lambda s, x: x.view(-1, 2)), (4,)),
            (Fn(lambda s, x: x.flatten(0)), (4,)),
            (Fn(lambda s, x: x.reshape(-1)), (4,)),
            (Fn(lambda s, x: x.unsqueeze(0).flatten(1)), (4,)),
            (nn.Sequential(nn.Flatten(0)), (4,)),
            (Fn(lambda s, x: torch.cat([x, x])), (4,)),
            (Fn(lambda s, x: torch.cat([x, x], -2)), (4,)),
            (Fn(lambda s, x: F.pad(x, (0, 0, 1, 1))), (4,)),
            (Fn(lambda s, x: F.pad(x, (0, 0, 1, -1))), (4,)),
            (nn.Sequential(nn.ConstantPad2d((0, 0, 1, -1), 0.0)), (4,)),
        ],
    )
    def test_an_operator_that_loses_the_batch_is_named(self, net, shape):
        message = refusal(net, shape)
        assert "batch" in message
        assert "cannot bound" in message

    @pytest.mark.parametrize(
        ("net", "shape"),
        [
            (nn.Sequential(nn.Conv1d(2, 2, 3, padding=1)), (4,)),  # reads the batch as channels
            (nn.Sequential(nn.Conv2d(2, 2, 1), nn.Flatten()), (3, 3)),
            (Fn(lambda s, x: x.view(2, -1)), (4,)),
            (Fn(lambda s, x: x.view(x.size(1), -1)), (2, 2)),
            (Fn(lambda s, x: x.reshape(x.shape[1], 6).view(-1, 6)), (2, 3)),
            (Fn(lambda s, x: x / x.size(0)), (4,)),
            (Fn(lambda s, x: x * x.numel()), (4,)),
            (Fn(lambda s, x: x + s.table, table=torch.rand(2, 4)), (4,)),
            (Fn(lambda s, x: (x * s.table).flatten(1), table=torch.rand(2, 1, 4)), (4,)),
            (Fn(lambda s, x: x.sum(0)), (2, 4)),
            (Fn(lambda s, x: s.a(torch.relu(s.a(x)).mean(0)), a=nn.Linear(4, 4)), (2, 4)),
            (Fn(lambda s, x: (x * s.table).sum(1), table=torch.rand(2, 1, 4)), (4,)),
            (Fn(lambda s, x: x.sum(1) + s.table, table=torch.rand(2, 1)), (4,)),
            (Fn(lambda s, x: s.a(x.squeeze().mean(0)).view(x.shape[0], -1), a=nn.Linear(4, 4)), (1, 4)),
        ],
    )
    def test_what_works_for_one_size_of_batch_only_is_refused(self, net, shape):
        refusal(net, shape)

    def test_squeezing_may_take_the_batch_of_one_example_with_it(self):
        net = Fn(lambda s, x: s.layer(x.squeeze()), layer=nn.Linear(4, 3))
        assert_traced(net, (1, 4))
        assert net(torch.rand(1, 1, 4).double()).shape == (3,)


class TestBadInput:
    @pytest.mark.parametrize(
        ("wrap", "inside"),
        [(nn.DataParallel, r"model\.module"), (partial(torch.compile, backend="eager"), r"model\._orig_mod")],
    )
    def test_a_wrapped_network(self, wrap, inside):
        with pytest.raises(InputError, match=rf"is wrapped in .*: give what is inside, {inside}"):
            trace(wrap(chain()), (4,))

    def test_the_input_s_shape_must_fit(self):
        with pytest.raises(InputError, match=r"does not take inputs of shape \(7,\)"):
            trace(chain(), (7,))

    @pytest.mark.parametrize("shape", [(4, 4), (), (1, 28, 28)])
    @pytest.mark.parametrize(
        "net",
        [
            nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(8, 2)),
            Fn(lambda s, x: x.flatten(5)),
            nn.Sequential(nn.Unflatten(1, (3, 5))),
        ],
    )
    def test_whatever_the_network_raises_about_it(self, net, shape):
        with pytest.raises(InputError, match="does not take inputs of shape"):
            trace(net, shape)

    @pytest.mark.parametrize(
        ("net", "got"),
        [
            (nn.Sequential(nn.Conv2d(1, 1, 1)), r"\(2, 1, 4, 4\)"),
            (Fn(lambda s, x: (x, x)), "tuple"),
            (Fn(lambda s, x: [x]), "list"),
            (Fn(lambda s, x: {"logits": x}), "dict"),
            (Fn(lambda s, x: None), "NoneType"),
            (Fn(lambda s, x: x.size(0)), "int"),
            (Fn(lambda s, x: s.table, table=torch.zeros(2, 3)), r"\(2, 3\)"),
        ],
    )
    def test_the_output_must_be_logits(self, net, got):
        with pytest.raises(InputError, match=rf"logits of shape \(batch, classes\), got .*{got}"):
            trace(net, (1, 4, 4))

    def test_a_head_that_is_not_returned_is_left_out(self):
        class Heads(nn.Module):
            def __init__(self):
                super().__init__()
                self.body, self.aside, self.head = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 3)

            def forward(self, x):
                z = torch.relu(self.body(x))
                _ = torch.sin(torch.relu(self.aside(z)))  # which could not be bounded
                return self.head(z)

        graph = trace(Heads(), (4,))
        assert [node.name for node in graph.nodes] == ["input", "body", "relu", "head"]

    def test_a_network_that_does_something_else_in_training_mode_is_not_for_training(self):
        class Branch(nn.Module):
            def __init__(self):
                super().__init__()
                self.body, self.drop = nn.Linear(4, 4), nn.Dropout(0.5)

            def forward(self, x):
                z = self.body(x)
                return self.drop(z) if self.training else z

        network = Branch()
        trace(network, (4,))
        with pytest.raises(InputError, match=r"other operators in training mode .* self\.training"):
            check_training_mode(network, (4,))
        assert all(module.training for module in network.modules())

    def test_a_value_that_is_read_for_its_shape_alone_is_not_part_of_the_network(self):
        class Shaped(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

            def forward(self, x):
                logits = self.second(self.first(x).relu())
                like = logits.relu()
                return logits.view(like.shape[0], -1)

        graph = trace(Shaped(), (4,))
        assert [type(node.op).__name__ for node in graph.nodes[1:]] == ["Linear", "ReLU", "Linear", "Reshape"]

    @pytest.mark.parametrize("mean", [lambda _, x: x.mean() + x, lambda _, x: x.mean(0, keepdim=True) + x])
    def test_a_mean_over_the_batch_is_refused(self, mean):
        assert "lost the batch dimension" in refusal(Fn(mean), (4,))

    def test_a_network_that_holds_gradients_back_is_not_for_training(self):
        class Frozen(nn.Module):
            def __init__(self):
                super().__init__()
                self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

            def forward(self, x):
                with torch.no_grad():
                    z = self.body(x).relu()
                return self.head(z)

        trace(Frozen(), (4,))
        with torch.no_grad(), pytest.raises(InputError, match=r"torch\.no_grad\(\) .* requires_grad_"):
            check_training_mode(Frozen(), (4,))

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_weights_must_be_finite(self, value):
        net = chain()
        with torch.no_grad():
            net[2].weight[1, 2] = value
        with pytest.raises(InputError, match=r"`2\.weight` holds NaN or Inf"):
            trace(net, (4,))

    def test_buffers_must_be_finite(self):
        net = nn.Sequential(nn.BatchNorm1d(4))
        net[0].running_var[0] = float("nan")
        with pytest.raises(InputError, match=r"`0\.running_var` holds NaN or Inf"):
            trace(net, (4,))

    def test_there_must_be_one_input(self):
        class Two(nn.Module):
            def forward(self, x: Tensor, y: Tensor) -> Tensor:
                return x + y

        assert "exactly one input" in refusal(Two(), (4,))

    def test_what_else_a_forward_can_be_told_stays_as_it_is_by_default(self):
        class Told(nn.Linear):
            def forward(
                self, x: Tensor, mask: Tensor | None = None, *rest: int, twice: bool = False
            ) -> Tensor:
                z = super().forward(x if mask is None else x * mask)
                return 2 * z if twice or rest else z

        class Anything(nn.Linear):
            def forward(self, *inputs: Tensor) -> Tensor:
                return super().forward(inputs[0])

        class Keyword(nn.Linear):
            def forward(self, *, x: Tensor) -> Tensor:
                return super().forward(x)

        assert_traced(Told(4, 3), (4,))
        assert_traced(Anything(4, 3), (4,))
        check_training_mode(Told(4, 3), (4,))
        assert "exactly one input" in refusal(Keyword(4, 3), (4,))

    def test_a_module_may_have_the_name_of_what_cuts_values(self):
        assert_traced(Fn(lambda s, x: s.split(x)[:, :2], split=nn.Linear(4, 3)), (4,))

    def test_relu6_may_be_told_to_work_in_place(self):
        assert_traced(Fn(lambda s, x: F.relu6(3 * s.layer(x), True), layer=nn.Linear(4, 3)), (4,))

    def test_a_value_may_be_cut_into_parts(self):
        def forward(s: Fn, x: Tensor) -> Tensor:
            left, right = s.layer(x).chunk(2, dim=1)
            total = sum(part.sum(1, keepdim=True) for part in x.split([1, 3], 1))
            return torch.cat([right, left.relu(), total, x[:, : len(x.split(3, 1))]], 1)

        assert_traced(Fn(forward, layer=nn.Linear(4, 6)), (4,))

    def test_shapes_may_be_counted_to(self):
        def forward(s: Fn, x: Tensor) -> Tensor:
            total = sum(x[:, i : i + 1] for i in range(x.shape[1]))
            return s.layer(torch.cat([total, x[:, : int(x.shape[1] / 2)]], 1)) / np.float32(2)

        assert_traced(Fn(forward, layer=nn.Linear(3, 3)), (4,))
        assert "how many examples" in refusal(Fn(lambda s, x: x * float(x.shape[0])), (4,))
        assert "how many examples" in refusal(Fn(lambda s, x: x.split(x.shape[0], 1)[0]), (4,))
        assert "NumPy array" in refusal(Fn(lambda s, x: x - np.ones(4)), (4,))

    @pytest.mark.parametrize(
        "forward",
        [
            lambda s, x: F.leaky_relu(x, s.k),
            lambda s, x: F.hardtanh(x, -1.0, s.k),
            lambda s, x: F.pad(x, (1, 1), value=s.k),
            lambda s, x: torch.cat([x, x], s.k),
            lambda s, x: x.mean(s.k),
            lambda s, x: x.clamp(min=s.k),
        ],
    )
    def test_a_tensor_where_a_number_belongs_is_named(self, forward):
        assert "it must be a number" in refusal(Fn(forward, k=torch.tensor(1)), (4,))

    def test_an_index_that_is_a_tensor_is_refused(self):
        assert "slices between numbers" in refusal(Fn(lambda s, x: x[:, : s.k], k=torch.tensor(3)), (4,))

    def test_one_number_for_each_example_has_no_activation(self):
        net = Fn(lambda s, x: s.layer(torch.relu(x.sum(1)).unsqueeze(1)), layer=nn.Linear(1, 3))
        assert "keep a dimension" in refusal(net, (4,))
        assert_traced(Fn(lambda s, x: s.layer(torch.relu(x.sum(1, True))), layer=nn.Linear(1, 3)), (4,))
        assert "must be a matrix" in refusal(Fn(lambda s, x: F.linear(x, s.w), w=torch.rand(4)), (4,))

    def test_bytes_are_computed_with_as_the_network_does(self):
        for forward in (lambda s, x: x - s.mean, lambda s, x: x - s.mean.to(x) * 3):
            net = Fn(forward, mean=torch.zeros(4, dtype=torch.uint8)).double()
            graph = trace(net, (4,))
            net.mean.copy_(torch.tensor([1, 100, 200, 255]))
            assert torch.equal(graph.run(batch(4))[0], net(batch(4)))

    def test_a_tensor_of_the_network_s_own_that_is_no_buffer_is_read(self):
        net = Fn(lambda s, x: s.layer(x - s.mean), layer=nn.Linear(4, 3))
        net.mean = torch.rand(4)
        assert len(assert_traced(net, (4,)).read()) == 3

    def test_what_is_written_into_a_layer_s_own_tensors_is_refused(self):
        def adapt(s: Fn, x: Tensor) -> Tensor:
            with torch.no_grad():
                s.norm.running_mean.copy_(x.mean(0))
            return s.norm(x)

        def shift(s: Fn, x: Tensor) -> Tensor:
            s.layer.bias.copy_(x[0])
            return s.layer(x)

        nets = (Fn(adapt, norm=nn.BatchNorm1d(4)), Fn(shift, layer=nn.Linear(4, 4).requires_grad_(False)))
        for net in nets:
            assert "changes parameters or buffers that it reads" in refusal(net, (4,))

    @pytest.mark.parametrize(
        "write",
        [
            lambda h: h.detach().numpy().fill(0.0),
            lambda h: h.untyped_storage().fill_(0),
            lambda h: h.__array__().fill(0.0),
        ],
    )
    def test_memory_that_is_given_away_is_refused(self, write):
        def forward(s: Fn, x: Tensor) -> Tensor:
            hidden = torch.relu(x)
            write(hidden)
            return s.layer(hidden)

        assert "goes unseen" in refusal(Fn(forward, layer=nn.Linear(4, 3)), (4,))

    def test_dropout_in_place_is_not_for_training_where_something_else_reads_its_input(self):
        def forward(s: Fn, x: Tensor) -> Tensor:
            hidden = s.layer(x)
            return s.drop(hidden) + hidden

        layers = {"layer": nn.Linear(4, 3), "drop": nn.Dropout(inplace=True)}
        with pytest.raises(InputError, match="without inplace=True"):
            check_training_mode(Fn(forward, **layers), (4,))
        check_training_mode(Fn(lambda s, x: s.drop(s.layer(x)), **layers), (4,))

    def test_what_torch_jit_compiled_is_refused(self):
        class ScriptModule(nn.Linear):  # torch.jit is deprecated: its name is enough
            pass

        with pytest.raises(InputError, match=r"compiled by torch\.jit"):
            trace(ScriptModule(4, 3), (4,))

    def test_division_by_zero_is_refused(self):
        refusal(Fn(lambda s, x: x / s.std, std=torch.zeros(4)), (4,))

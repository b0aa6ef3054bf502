"""One table, one row per way to write an operator: what holds for one of them holds for all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tightrope.errors import InputError
from tightrope.graph import Graph, Node, ops, trace


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


@dataclass(frozen=True)
class Row:
    op: type[ops.Operator]
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    tight: bool = True  # whether `absolute` is `|W| r`, and not only an upper bound of it


def norm(layer: nn.Module) -> nn.Module:
    """A BatchNorm layer as training leaves it: no statistic is 0 or 1, some weights are negative."""
    layer.running_mean.copy_(torch.randn(layer.num_features))
    layer.running_var.copy_(torch.rand(layer.num_features) + 0.2)
    if layer.affine:
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
        with torch.no_grad():
            layer.weight[0] = -1.5
    return layer


def numbers(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape))


AFFINE = {
    "Linear": Row(ops.Linear, lambda: nn.Linear(5, 3), (5,)),
    "Linear, no bias": Row(ops.Linear, lambda: nn.Linear(5, 3, bias=False), (5,)),
    "Linear on the last of three dimensions": Row(ops.Linear, lambda: nn.Linear(4, 3), (2, 3, 4)),
    "F.linear": Row(
        ops.Linear, lambda: Fn(lambda s, x: F.linear(x, s.w, s.b), w=numbers(3, 5), b=numbers(3)), (5,)
    ),
    "F.linear, no bias": Row(ops.Linear, lambda: Fn(lambda s, x: F.linear(x, s.w), w=numbers(3, 5)), (5,)),
    "F.linear, by name": Row(
        ops.Linear,
        lambda: Fn(lambda s, x: F.linear(input=x, weight=s.w, bias=s.b), w=numbers(3, 5), b=numbers(3)),
        (5,),
    ),
    "F.linear with a buffer": Row(
        ops.Linear, lambda: Fn(lambda s, x: F.linear(x, s.w), w=torch.randn(3, 5)), (5,)
    ),
    "Conv1d": Row(ops.Conv, lambda: nn.Conv1d(2, 3, 3), (2, 6)),
    "Conv1d, everything": Row(
        ops.Conv, lambda: nn.Conv1d(2, 4, 3, stride=2, padding=2, dilation=2, groups=2, bias=False), (2, 7)
    ),
    "Conv1d, same": Row(ops.Conv, lambda: nn.Conv1d(2, 3, 3, padding="same"), (2, 5)),
    "Conv1d, circular": Row(ops.Conv, lambda: nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular"), (2, 5)),
    "Conv2d": Row(ops.Conv, lambda: nn.Conv2d(2, 3, 3), (2, 4, 5)),
    "mean over the image": Row(ops.NonNegative, lambda: Fn(lambda _, x: x.mean((2, 3))), (2, 3, 4)),
    "mean over the image, by name": Row(
        ops.NonNegative, lambda: Fn(lambda _, x: torch.mean(input=x, dim=[-2, -1], keepdim=True)), (2, 3, 4)
    ),
    "mean over the channels": Row(ops.NonNegative, lambda: Fn(lambda _, x: torch.mean(x, 1)), (2, 3, 4)),
    "sum over the image": Row(ops.NonNegative, lambda: Fn(lambda _, x: x.sum((2, 3))), (2, 3, 4)),
    "permute": Row(ops.NonNegative, lambda: Fn(lambda _, x: x.permute(0, 2, -1, 1)), (2, 3, 4)),
    "torch.permute": Row(ops.NonNegative, lambda: Fn(lambda _, x: torch.permute(x, (0, 3, 1, 2))), (2, 3, 4)),
    "transpose": Row(ops.NonNegative, lambda: Fn(lambda _, x: x.transpose(1, -1)), (2, 3, 4)),
    "a pixel": Row(ops.NonNegative, lambda: Fn(lambda _, x: x[:, :, 0, -1]), (2, 3, 4)),
    "a slice": Row(ops.NonNegative, lambda: Fn(lambda _, x: x[:, None, 1:, ::2]), (2, 3, 4)),
    "half of the channels": Row(ops.NonNegative, lambda: Fn(lambda _, x: x[:, : x.size(1) // 2]), (4, 3)),
    "a chunk": Row(ops.NonNegative, lambda: Fn(lambda _, x: x.chunk(2, 1)[-1]), (5, 3)),
    "a part by name": Row(
        ops.NonNegative, lambda: Fn(lambda _, x: torch.split(x, [1, 3], dim=-2)[1]), (2, 4, 3)
    ),
    "one of all columns": Row(ops.NonNegative, lambda: Fn(lambda _, x: x.unbind(-1)[1]), (2, 3)),
    "the last column": Row(ops.NonNegative, lambda: Fn(lambda _, x: x[..., -1]), (2, 3, 4)),
    "Upsample": Row(ops.NonNegative, lambda: nn.Upsample(scale_factor=2), (2, 2, 3)),
    "Upsample, bilinear": Row(
        ops.NonNegative, lambda: nn.Upsample((5, 4), mode="bilinear", align_corners=True), (1, 2, 3)
    ),
    "F.interpolate": Row(ops.NonNegative, lambda: Fn(lambda _, x: F.interpolate(x, scale_factor=2)), (2, 3)),
    "@": Row(ops.Linear, lambda: Fn(lambda s, x: x @ s.w + s.b, w=numbers(5, 3), b=numbers(3)), (5,)),
    "torch.matmul": Row(ops.Linear, lambda: Fn(lambda s, x: torch.matmul(x, s.w), w=numbers(5, 3)), (2, 5)),
    "a mean for each channel": Row(
        ops.Shift, lambda: Fn(lambda s, x: x - s.b[None, :, None, None], b=numbers(2)), (2, 3, 2)
    ),
    "Conv2d, tuples of one": Row(ops.Conv, lambda: nn.Conv2d(2, 3, 3, stride=(2,), padding=(1,)), (2, 5, 4)),
    "Conv2d, taps that read nothing but padding": Row(
        ops.Conv, lambda: nn.Conv2d(2, 3, 2, stride=9, padding=4), (2, 2, 2)
    ),
    "Conv2d, the same of one channel": Row(
        ops.Conv, lambda: nn.Conv2d(1, 3, 2, stride=9, padding=4), (1, 2, 2)
    ),
    "Conv2d, one channel": Row(ops.Conv, lambda: nn.Conv2d(1, 3, (2, 3), (2, 1), padding=1), (1, 5, 4)),
    "Conv2d, no bias": Row(ops.Conv, lambda: nn.Conv2d(2, 3, 3, bias=False), (2, 4, 5)),
    "Conv2d, padding": Row(ops.Conv, lambda: nn.Conv2d(2, 3, 3, padding=(1, 2)), (2, 3, 4)),
    "Conv2d, stride": Row(ops.Conv, lambda: nn.Conv2d(2, 3, (2, 3), stride=(2, 1)), (2, 5, 5)),
    "Conv2d, dilation": Row(ops.Conv, lambda: nn.Conv2d(1, 2, 2, dilation=(2, 3)), (1, 5, 6)),
    "Conv2d, groups": Row(ops.Conv, lambda: nn.Conv2d(4, 6, 2, groups=2), (4, 3, 3)),
    "Conv2d, depthwise": Row(ops.Conv, lambda: nn.Conv2d(3, 3, 2, groups=3), (3, 3, 3)),
    "Conv2d, same": Row(ops.Conv, lambda: nn.Conv2d(2, 3, 3, padding="same", dilation=2), (2, 4, 4)),
    "Conv2d, valid": Row(ops.Conv, lambda: nn.Conv2d(2, 3, 3, padding="valid"), (2, 4, 4)),
    "Conv2d, reflect": Row(
        ops.Conv, lambda: nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="reflect"), (2, 4, 4), tight=False
    ),
    "Conv2d, replicate": Row(
        ops.Conv, lambda: nn.Conv2d(2, 3, 3, padding=(2, 1), padding_mode="replicate"), (2, 3, 4), tight=False
    ),
    "Conv2d, circular": Row(
        ops.Conv, lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular", stride=2), (2, 4, 4)
    ),
    "Conv2d, same and reflect": Row(
        ops.Conv,
        lambda: nn.Conv2d(2, 3, 3, padding="same", padding_mode="reflect", groups=1),
        (2, 4, 4),
        tight=False,
    ),
    "Conv2d, everything": Row(
        ops.Conv,
        lambda: nn.Conv2d(4, 4, 2, stride=2, padding=1, dilation=2, groups=2, padding_mode="reflect"),
        (4, 5, 5),
        tight=False,
    ),
    "Conv3d": Row(ops.Conv, lambda: nn.Conv3d(1, 2, 2, stride=(1, 2, 1), padding=(0, 1, 1)), (1, 3, 3, 2)),
    "Conv3d, replicate": Row(
        ops.Conv, lambda: nn.Conv3d(1, 2, 3, padding=1, padding_mode="replicate"), (1, 2, 3, 2), tight=False
    ),
    "F.conv1d": Row(
        ops.Conv,
        lambda: Fn(lambda s, x: F.conv1d(x, s.w, s.b, 2, 1), w=numbers(3, 2, 3), b=numbers(3)),
        (2, 5),
    ),
    "F.conv2d": Row(
        ops.Conv,
        lambda: Fn(
            lambda s, x: F.conv2d(x, s.w, stride=2, padding=1, dilation=2, groups=2), w=numbers(4, 1, 2, 2)
        ),
        (2, 5, 5),
    ),
    "F.conv2d, same": Row(
        ops.Conv, lambda: Fn(lambda s, x: F.conv2d(x, s.w, padding="same"), w=numbers(2, 2, 3, 3)), (2, 3, 3)
    ),
    "F.conv3d": Row(
        ops.Conv,
        lambda: Fn(lambda s, x: F.conv3d(x, s.w, s.b), w=numbers(2, 1, 2, 2, 2), b=numbers(2)),
        (1, 3, 2, 3),
    ),
    "BatchNorm1d on vectors": Row(ops.BatchNorm, lambda: norm(nn.BatchNorm1d(5)), (5,)),
    "BatchNorm1d on sequences": Row(ops.BatchNorm, lambda: norm(nn.BatchNorm1d(3, eps=0.1)), (3, 4)),
    "BatchNorm2d": Row(ops.BatchNorm, lambda: norm(nn.BatchNorm2d(3)), (3, 2, 4)),
    "BatchNorm2d, not affine": Row(ops.BatchNorm, lambda: norm(nn.BatchNorm2d(3, affine=False)), (3, 2, 2)),
    "BatchNorm3d": Row(ops.BatchNorm, lambda: norm(nn.BatchNorm3d(2)), (2, 2, 3, 2)),
    "AvgPool1d": Row(ops.NonNegative, lambda: nn.AvgPool1d(3, stride=2, padding=1), (2, 6)),
    "AvgPool2d": Row(ops.NonNegative, lambda: nn.AvgPool2d(2), (2, 4, 5)),
    "AvgPool2d, padding counts": Row(
        ops.NonNegative, lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True), (1, 4, 6)
    ),
    "AvgPool2d, padding does not count": Row(
        ops.NonNegative, lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False), (1, 4, 6)
    ),
    "AvgPool2d, own divisor": Row(ops.NonNegative, lambda: nn.AvgPool2d(2, divisor_override=3), (1, 4, 4)),
    "AvgPool3d": Row(ops.NonNegative, lambda: nn.AvgPool3d((1, 2, 2)), (1, 2, 4, 4)),
    "AdaptiveAvgPool1d": Row(ops.NonNegative, lambda: nn.AdaptiveAvgPool1d(3), (2, 5)),
    "AdaptiveAvgPool2d": Row(ops.NonNegative, lambda: nn.AdaptiveAvgPool2d((None, 2)), (2, 3, 5)),
    "AdaptiveAvgPool3d": Row(ops.NonNegative, lambda: nn.AdaptiveAvgPool3d(1), (2, 3, 2, 2)),
    "F.avg_pool1d": Row(ops.NonNegative, lambda: Fn(lambda s, x: F.avg_pool1d(x, 2)), (2, 4)),
    "F.avg_pool2d": Row(
        ops.NonNegative,
        lambda: Fn(lambda s, x: F.avg_pool2d(x, 3, 2, 1, True, count_include_pad=False)),
        (1, 4, 6),
    ),
    "F.avg_pool2d, own divisor": Row(
        ops.NonNegative, lambda: Fn(lambda s, x: F.avg_pool2d(x, 2, divisor_override=5)), (1, 4, 4)
    ),
    "F.avg_pool3d": Row(
        ops.NonNegative, lambda: Fn(lambda s, x: F.avg_pool3d(x, kernel_size=2)), (1, 2, 2, 4)
    ),
    "F.adaptive_avg_pool1d": Row(
        ops.NonNegative, lambda: Fn(lambda s, x: F.adaptive_avg_pool1d(x, 2)), (1, 5)
    ),
    "F.adaptive_avg_pool2d": Row(
        ops.NonNegative, lambda: Fn(lambda s, x: F.adaptive_avg_pool2d(x, (1, 2))), (1, 3, 5)
    ),
    "F.adaptive_avg_pool3d": Row(
        ops.NonNegative, lambda: Fn(lambda s, x: F.adaptive_avg_pool3d(x, 1)), (1, 2, 2, 2)
    ),
    "ConstantPad1d": Row(ops.Pad, lambda: nn.ConstantPad1d((1, 2), 0.7), (2, 3)),
    "ConstantPad2d": Row(ops.Pad, lambda: nn.ConstantPad2d((1, 0, 2, 1), -0.7), (2, 2, 3)),
    "ConstantPad2d that crops": Row(ops.Pad, lambda: nn.ConstantPad2d((-1, 1, 0, -1), 2.0), (2, 3, 3)),
    "ConstantPad3d": Row(ops.Pad, lambda: nn.ConstantPad3d(1, 0.5), (1, 2, 1, 2)),
    "ZeroPad1d": Row(ops.Pad, lambda: nn.ZeroPad1d((1, 2)), (2, 3)),
    "ZeroPad2d": Row(ops.Pad, lambda: nn.ZeroPad2d(1), (2, 2, 3)),
    "ZeroPad3d": Row(ops.Pad, lambda: nn.ZeroPad3d(1), (1, 2, 1, 2)),
    "F.pad": Row(ops.Pad, lambda: Fn(lambda s, x: F.pad(x, (1, 2, 0, 1))), (2, 2, 3)),
    "F.pad, value": Row(ops.Pad, lambda: Fn(lambda s, x: F.pad(x, pad=(1, 2), value=0.3)), (4,)),
    "Flatten": Row(ops.Reshape, nn.Flatten, (2, 3, 2)),
    "Flatten, some dimensions": Row(ops.Reshape, lambda: nn.Flatten(2), (2, 3, 2)),
    "Unflatten": Row(ops.Reshape, lambda: nn.Unflatten(1, (2, 3)), (6,)),
    "torch.flatten": Row(ops.Reshape, lambda: Fn(lambda s, x: torch.flatten(x, 1)), (2, 3)),
    "flatten": Row(ops.Reshape, lambda: Fn(lambda s, x: x.flatten(start_dim=1)), (2, 3)),
    "view": Row(ops.Reshape, lambda: Fn(lambda s, x: x.view(x.size(0), -1)), (2, 3)),
    "view, shape": Row(ops.Reshape, lambda: Fn(lambda s, x: x.view(x.shape[0], -1)), (2, 3)),
    "reshape": Row(ops.Reshape, lambda: Fn(lambda s, x: x.reshape(-1, 3, 2)), (2, 3)),
    "torch.reshape": Row(ops.Reshape, lambda: Fn(lambda s, x: torch.reshape(x, (-1, 6))), (2, 3)),
    "squeeze": Row(ops.Reshape, lambda: Fn(lambda s, x: x.squeeze(2)), (3, 1)),
    "torch.squeeze": Row(ops.Reshape, lambda: Fn(lambda s, x: torch.squeeze(x, dim=1)), (1, 3)),
    "unsqueeze": Row(ops.Reshape, lambda: Fn(lambda s, x: x.unsqueeze(1)), (3,)),
    "torch.unsqueeze": Row(ops.Reshape, lambda: Fn(lambda s, x: torch.unsqueeze(x, -1)), (3,)),
    "+": Row(ops.Add, lambda: Fn(lambda s, x: x + torch.relu(x)), (2, 3)),
    "+ of a value and itself": Row(ops.Add, lambda: Fn(lambda s, x: x + x), (2, 3)),
    "+=": Row(ops.Add, lambda: Fn(lambda s, x: _in_place(torch.tanh(x), x)), (3,)),
    "torch.add": Row(ops.Add, lambda: Fn(lambda s, x: torch.add(x, torch.relu(x))), (3,)),
    "add": Row(ops.Add, lambda: Fn(lambda s, x: x.add(torch.relu(x))), (3,)),
    "-": Row(ops.Add, lambda: Fn(lambda s, x: torch.relu(x) - x), (2, 3)),
    "- of a value and itself": Row(ops.Add, lambda: Fn(lambda s, x: x - x), (2, 3)),
    "torch.sub": Row(ops.Add, lambda: Fn(lambda s, x: torch.sub(x, torch.relu(x))), (3,)),
    "torch.cat": Row(ops.Concatenate, lambda: Fn(lambda s, x: torch.cat([x, torch.relu(x)], 1)), (3,)),
    "torch.cat, last dimension": Row(
        ops.Concatenate, lambda: Fn(lambda s, x: torch.cat((x, torch.relu(x), x), dim=-1)), (2, 3)
    ),
    "number + value": Row(ops.Shift, lambda: Fn(lambda s, x: 2 + x), (3,)),
    "value - number": Row(ops.Shift, lambda: Fn(lambda s, x: x - 0.5), (3,)),
    "value + parameter": Row(ops.Shift, lambda: Fn(lambda s, x: x + s.b, b=numbers(2, 1)), (2, 3)),
    "buffer + value": Row(ops.Shift, lambda: Fn(lambda s, x: s.b + x, b=torch.randn(3)), (2, 3)),
    "value - buffer": Row(
        ops.Shift, lambda: Fn(lambda s, x: x - s.mean, mean=torch.randn(2, 1, 1)), (2, 2, 3)
    ),
    "value + a larger buffer": Row(ops.Shift, lambda: Fn(lambda s, x: x + s.b, b=torch.randn(4)), (1,)),
    "value - a larger buffer": Row(
        ops.Shift, lambda: Fn(lambda s, x: x - s.b, b=torch.randn(1, 2, 3, 2)), (2, 1, 1)
    ),
    "value * number": Row(ops.Scale, lambda: Fn(lambda s, x: x * -2), (3,)),
    "number * value": Row(ops.Scale, lambda: Fn(lambda s, x: 0.3 * x), (3,)),
    "value / number": Row(ops.Scale, lambda: Fn(lambda s, x: x / -0.3), (3,)),
    "-value": Row(ops.Scale, lambda: Fn(lambda s, x: -x), (3,)),
    "neg": Row(ops.Scale, lambda: Fn(lambda s, x: torch.neg(x)), (3,)),
    "value * parameter": Row(ops.Scale, lambda: Fn(lambda s, x: x * s.w, w=numbers(2, 1)), (2, 3)),
    "parameter * value": Row(ops.Scale, lambda: Fn(lambda s, x: s.w * x, w=numbers(3)), (2, 3)),
    "value * a larger buffer": Row(ops.Scale, lambda: Fn(lambda s, x: x * s.w, w=torch.randn(2, 3)), (2, 1)),
    "value / buffer": Row(ops.Scale, lambda: Fn(lambda s, x: x / s.std, std=torch.randn(2, 1, 1)), (2, 2, 3)),
    "torch.div": Row(ops.Scale, lambda: Fn(lambda s, x: torch.div(x, s.std), std=torch.randn(3)), (3,)),
    "Dropout": Row(ops.Dropout, nn.Dropout, (3,)),
    "Dropout1d": Row(ops.Dropout, nn.Dropout1d, (2, 3)),
    "Dropout2d": Row(ops.Dropout, nn.Dropout2d, (2, 3, 3)),
    "Dropout3d": Row(ops.Dropout, nn.Dropout3d, (2, 2, 2, 2)),
}

ACTIVATIONS = {
    "ReLU": Row(ops.ReLU, nn.ReLU, (4,)),
    "ReLU in place": Row(ops.ReLU, lambda: Fn(lambda s, x: s.relu(2 * x), relu=nn.ReLU(inplace=True)), (4,)),
    "torch.relu": Row(ops.ReLU, lambda: Fn(lambda s, x: torch.relu(x)), (4,)),
    "torch.relu, by name": Row(ops.ReLU, lambda: Fn(lambda s, x: torch.relu(input=x)), (4,)),
    "F.relu": Row(ops.ReLU, lambda: Fn(lambda s, x: F.relu(x)), (4,)),
    "F.relu in place": Row(ops.ReLU, lambda: Fn(lambda s, x: F.relu(2 * x, inplace=True)), (4,)),
    "relu": Row(ops.ReLU, lambda: Fn(lambda s, x: x.relu()), (4,)),
    "relu_": Row(ops.ReLU, lambda: Fn(lambda s, x: (2 * x).relu_()), (4,)),
    "LeakyReLU": Row(ops.LeakyReLU, lambda: nn.LeakyReLU(0.3), (4,)),
    "LeakyReLU with slope 0": Row(ops.LeakyReLU, lambda: nn.LeakyReLU(0.0), (4,)),
    "F.leaky_relu": Row(ops.LeakyReLU, lambda: Fn(lambda s, x: F.leaky_relu(x)), (4,)),
    "F.leaky_relu with a slope": Row(ops.LeakyReLU, lambda: Fn(lambda s, x: F.leaky_relu(x, 0.4)), (4,)),
    "ReLU6": Row(ops.ReLU, nn.ReLU6, (4,)),
    "Hardtanh": Row(ops.ReLU, lambda: nn.Hardtanh(-0.2, 0.3), (4,)),
    "Sigmoid": Row(ops.Sigmoid, nn.Sigmoid, (4,)),
    "torch.sigmoid": Row(ops.Sigmoid, lambda: Fn(lambda s, x: torch.sigmoid(x)), (4,)),
    "sigmoid": Row(ops.Sigmoid, lambda: Fn(lambda s, x: x.sigmoid()), (4,)),
    "Tanh": Row(ops.Tanh, nn.Tanh, (4,)),
    "torch.tanh": Row(ops.Tanh, lambda: Fn(lambda s, x: torch.tanh(x)), (4,)),
    "MaxPool1d": Row(ops.MaxPool, lambda: nn.MaxPool1d(2), (2, 5)),
    "MaxPool2d": Row(ops.MaxPool, lambda: nn.MaxPool2d(2), (2, 4, 5)),
    "MaxPool2d, everything": Row(
        ops.MaxPool, lambda: nn.MaxPool2d(3, stride=2, padding=1, dilation=2, ceil_mode=True), (1, 6, 7)
    ),
    "MaxPool3d": Row(ops.MaxPool, lambda: nn.MaxPool3d(2), (1, 2, 4, 2)),
    "F.max_pool1d": Row(ops.MaxPool, lambda: Fn(lambda s, x: F.max_pool1d(x, 2)), (2, 4)),
    "F.max_pool2d": Row(ops.MaxPool, lambda: Fn(lambda s, x: F.max_pool2d(x, 2)), (2, 4, 4)),
    "F.max_pool2d, everything": Row(
        ops.MaxPool,
        lambda: Fn(lambda s, x: F.max_pool2d(x, 3, 2, padding=1, dilation=2, ceil_mode=True)),
        (1, 6, 7),
    ),
    "F.max_pool3d": Row(ops.MaxPool, lambda: Fn(lambda s, x: F.max_pool3d(x, 2)), (1, 2, 2, 4)),
}


def _in_place(value: Tensor, other: Tensor) -> Tensor:
    value += other
    return value


def build(row: Row) -> tuple[nn.Module, Graph]:
    torch.manual_seed(0)
    module = nn.Sequential(row.make(), nn.Flatten()).double().eval()
    return module, trace(module, row.shape)


def operator_of(row: Row, graph: Graph) -> tuple[Node, list[torch.Size]]:
    node = next(node for node in graph.nodes if isinstance(node.op, row.op))
    return node, [graph.nodes[i].shape for i in node.inputs]


def inputs(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def explicit(op: ops.Operator, shapes: list[torch.Size]) -> tuple[list[Tensor], Tensor]:
    """`W` for each input, as a matrix, and `b`: by pushing the identity through the operator."""
    bias = op.apply(*[torch.zeros(1, *shape, dtype=torch.float64) for shape in shapes]).flatten(1)
    weights = []
    for i, shape in enumerate(shapes):
        size = shape.numel()
        pushed = [torch.zeros(size, *other, dtype=torch.float64) for other in shapes]
        pushed[i] = torch.eye(size, dtype=torch.float64).view(size, *shape)
        weights.append((op.apply(*pushed).flatten(1) - bias).T)
    return weights, bias[0]


def close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a - b).abs() <= 1e-12).all())


def assert_absolute_is_explicit(row: Row, op: ops.Affine, shapes: list[torch.Size]) -> None:
    weights, _ = explicit(op, shapes)
    radii = [inputs(3, *shape, seed=i).abs() for i, shape in enumerate(shapes)]
    expected = sum(r.flatten(1) @ W.abs().T for r, W in zip(radii, weights, strict=True))
    got = op.absolute(*radii).flatten(1)
    assert close(got, expected) if row.tight else bool((got >= expected - 1e-12).all())


each_operator = pytest.mark.parametrize(
    "row", [pytest.param(row, id=name) for name, row in (AFFINE | ACTIVATIONS).items()]
)
each_affine = pytest.mark.parametrize("row", [pytest.param(row, id=name) for name, row in AFFINE.items()])
each_activation = pytest.mark.parametrize(
    "row", [pytest.param(row, id=name) for name, row in ACTIVATIONS.items()]
)


@each_operator
def test_the_graph_computes_what_the_module_computes(row):
    module, graph = build(row)
    x = inputs(5, *row.shape)
    assert close(graph.run(x.clone())[0], module(x.clone()))


@each_operator
def test_the_graph_says_what_shape_each_value_has(row):
    _, graph = build(row)
    values = [inputs(2, *row.shape)]
    for node in graph.nodes[1:]:
        values.append(node.op.apply(*[values[i] for i in node.inputs]))
    assert [value.shape[1:] for value in values] == [node.shape for node in graph.nodes]


@each_affine
def test_the_absolute_value_is_that_of_the_explicit_matrix(row):
    node, shapes = operator_of(row, build(row)[1])
    assert_absolute_is_explicit(row, node.op, shapes)


@each_affine
def test_the_transpose_is_that_of_the_explicit_matrix(row):
    node, shapes = operator_of(row, build(row)[1])
    weights, _ = explicit(node.op, shapes)
    rows = inputs(2, 3, *node.shape)
    pulled = node.op.transpose(rows, shapes)
    for part, shape, W in zip(pulled, shapes, weights, strict=True):
        assert part.shape == (2, 3, *shape)
        assert close(part.flatten(2), rows.flatten(2) @ W)


@each_affine
def test_the_transpose_is_differentiated_by_rows_and_parameters(row):
    module, graph = build(row)
    node, shapes = operator_of(row, graph)
    rows, parameters = inputs(1, 2, *node.shape).requires_grad_(), [*module.parameters()]
    assert torch.autograd.gradcheck(lambda *_: node.op.transpose(rows, shapes), (rows, *parameters))


@each_affine
def test_the_transpose_of_no_rows_is_no_rows(row):
    node, shapes = operator_of(row, build(row)[1])
    for batch, count in ((0, 3), (2, 0)):
        pulled = node.op.transpose(inputs(batch, count, *node.shape), shapes)
        assert [part.shape for part in pulled] == [(batch, count, *shape) for shape in shapes]


@each_affine
def test_parameters_and_buffers_are_live(row):
    module, graph = build(row)
    node, shapes = operator_of(row, graph)
    before = node.op.apply(*[inputs(2, *shape) for shape in shapes])
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(-1.3).add_(0.1)
        for buffer in module.buffers():
            buffer.copy_(buffer * 1.3)
    x = inputs(5, *row.shape)
    assert close(graph.run(x)[0], module(x))
    assert_absolute_is_explicit(row, node.op, shapes)
    if len(module.state_dict()):
        assert not close(node.op.apply(*[inputs(2, *shape) for shape in shapes]), before)


@each_activation
def test_an_activation_increases_in_every_coordinate(row):
    node, (shape,) = operator_of(row, build(row)[1])
    lower = inputs(50, *shape)
    upper = lower + inputs(50, *shape, seed=2).clamp(min=0)
    assert bool((node.op.apply(lower) <= node.op.apply(upper)).all())


@each_operator
def test_in_evaluation_an_operator_runs_as_it_is_applied(row):
    _, graph = build(row)
    node, shapes = operator_of(row, graph)
    values = [inputs(2, *shape) for shape in shapes]
    value, after = node.op.run(*[v.clone() for v in values])
    assert close(value, node.op.apply(*values))
    assert after is node.op


@pytest.mark.parametrize("divide", [False, True])
def test_the_least_number_of_an_integer_type_has_an_absolute_value(divide):
    forward = (lambda s, x: x / s.q) if divide else (lambda s, x: x * s.q)
    graph = trace(Fn(forward, q=torch.tensor([-128, 127], dtype=torch.int8)), (2,))
    radius = graph.nodes[1].op.absolute(torch.ones(1, 2))
    assert radius[0].tolist() == pytest.approx([1 / 128, 1 / 127] if divide else [128.0, 127.0])


def test_a_mask_of_truth_values_is_its_own_absolute_value():
    graph = trace(Fn(lambda s, x: x * s.mask, mask=torch.tensor([True, False])), (2,))
    assert graph.nodes[1].op.absolute(torch.ones(1, 2)).tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize("slope", [-0.1, 1.1, float("nan")])
def test_a_leaky_relu_must_increase_and_be_convex(slope):
    with pytest.raises(InputError, match=r"negative slope in \[0, 1\]"):
        ops.LeakyReLU(slope)

"""The operators a network is made of: affine maps and monotone activations.

An operator refers to the live parameters of the user's module, so a bound after an optimiser step
is a bound of the network after that step. Values carry a leading batch dimension.

To add an operator: one class here, one row in `rules.py`, one row in the tests.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.fx.node import map_aggregate
from torch.nn import functional as F

from tightrope.errors import InputError

Statistics = tuple[Float[Tensor, "channels"], Float[Tensor, "channels"]]
Parameter = Callable[[], Tensor]
"""A parameter, looked up or computed at each use, so that it is never out of date."""


@dataclass(frozen=True)
class Live:
    """A parameter or buffer of the user's module, looked up at each use."""

    owner: nn.Module
    name: str

    def __call__(self) -> Tensor:
        """The tensor as it is now."""
        value = getattr(self.owner, self.name)
        assert isinstance(value, Tensor)
        return value


@dataclass(frozen=True)
class Computed:
    """What the network computes of its parameters and buffers alone, at each use.

    Args:
        function: a function, or the name of a method of its first argument.
        args: arguments, among them what it is computed of.
        kwargs: likewise, by name.
    """

    function: Callable[..., Tensor] | str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self) -> Tensor:
        """The tensor as it is now."""
        args, kwargs = self._with(lambda source: source())
        if isinstance(self.function, str):
            result: Tensor = getattr(args[0], self.function)(*args[1:], **kwargs)
            return result
        return self.function(*args, **kwargs)

    def sources(self) -> list[Live]:
        """The parameters and buffers that it is computed of, in order."""
        found: list[Live] = []
        self._with(lambda source: found.extend([source] if isinstance(source, Live) else source.sources()))
        return found

    def code(self) -> str:
        """What is computed of them, in words."""
        name = self.function if isinstance(self.function, str) else self.function.__name__
        return f"{name}{self._with(lambda source: 'it' if isinstance(source, Live) else source.code())}"

    def _with(self, change: Callable[[Live | Computed], Any]) -> tuple[Any, Any]:
        """The arguments, those that are computed of changed."""
        found: tuple[Any, Any] = replaced((self.args, self.kwargs), (Live, Computed), change)
        return found


def replaced(arguments: Any, kind: type | tuple[type, ...], change: Callable[[Any], Any]) -> Any:
    """Arguments of a call, however deep they lie in lists, slices and tables, those of a kind changed."""
    return map_aggregate(arguments, lambda value: change(value) if isinstance(value, kind) else value)


Operand = Live | Computed | float


def _value(operand: Operand) -> Tensor | float:
    return operand if isinstance(operand, float) else operand()


class Operator(ABC):
    """A function of one or more values; `apply` is what the network computes in evaluation."""

    @abstractmethod
    def apply(self, *inputs: Tensor) -> Tensor:
        """The operator's value."""

    def run(self, *inputs: Tensor) -> tuple[Tensor, Operator]:
        """The value in the module's present mode, and the operator with what this pass fixed."""
        return self.apply(*inputs), self

    def frozen(self) -> Operator:
        """The operator as it is in evaluation, whatever the module's mode."""
        return self


class Affine(Operator):
    """`z -> W z + b`, of one or more inputs."""

    @abstractmethod
    def absolute(self, *radii: Tensor) -> Tensor:
        """`|W| r`: the radius of the smallest box that holds the image of a box of radius `r`."""

    def transpose(
        self, rows: Float[Tensor, "batch rows *out"], shapes: Sequence[torch.Size]
    ) -> tuple[Tensor, ...]:
        """Pull linear functions of the output back to the inputs: `rows W`.

        Args:
            rows: coefficients of the output.
            shapes: shape of each input, without the batch dimension.
        """
        batch, count = rows.shape[:2]
        zeros = [rows.new_zeros(batch * count, *shape) for shape in shapes]
        pulled: tuple[Tensor, ...] = torch.func.vjp(self.apply, *zeros)[1](rows.flatten(0, 1))
        return tuple(part.unflatten(0, (batch, count)) for part in pulled)


class Activation(Operator):
    """A function that increases in every coordinate of its one input, so boxes map corner to corner."""


# ------------------------------------------------------------------------------------------ affine


@dataclass(frozen=True)
class Linear(Affine):
    """`nn.Linear`."""

    weight: Parameter
    bias: Parameter | None

    def apply(self, *inputs: Tensor) -> Tensor:
        return F.linear(inputs[0], self.weight(), self.bias() if self.bias else None)

    def absolute(self, *radii: Tensor) -> Tensor:
        return F.linear(radii[0], self.weight().abs())

    def transpose(
        self, rows: Float[Tensor, "batch rows *out"], shapes: Sequence[torch.Size]
    ) -> tuple[Tensor, ...]:
        return (rows @ self.weight(),)


_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
_TRANSPOSED: dict[int, Callable[..., Tensor]] = {
    3: F.conv_transpose1d,
    4: F.conv_transpose2d,
    5: F.conv_transpose3d,
}


@dataclass(frozen=True)
class Conv(Affine):
    """`nn.Conv1d`, `2d` and `3d` with every attribute.

    `padding` is what the convolution itself pads with zeros. Any other padding is done before, by
    `F.pad(mode=pad_mode, pad=pad)`: it only copies entries, so it is its own absolute value. Where one
    window reads an entry and its copy, `absolute` counts both: sound, but larger than `|W| r` there.
    """

    weight: Parameter
    bias: Parameter | None
    stride: Any
    padding: Any
    dilation: Any
    groups: int
    pad: tuple[int, ...] = ()
    pad_mode: str = "constant"

    def _convolve(self, z: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.pad:
            z = F.pad(z, self.pad, mode=self.pad_mode)
        convolution = _CONVOLUTIONS[weight.ndim]
        return convolution(z, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def apply(self, *inputs: Tensor) -> Tensor:
        return self._convolve(inputs[0], self.weight(), self.bias() if self.bias else None)

    def absolute(self, *radii: Tensor) -> Tensor:
        return self._convolve(radii[0], self.weight().abs(), None)

    def transpose(
        self, rows: Float[Tensor, "batch rows *out"], shapes: Sequence[torch.Size]
    ) -> tuple[Tensor, ...]:
        if self.pad or isinstance(self.padding, str):  # the derivative of `apply` knows what to add up
            return super().transpose(rows, shapes)
        weight, flat, geometry = self.weight(), rows.flatten(0, 1), self.geometry()
        stride, padding, dilation = geometry
        reach = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        within = all(p <= r for p, r in zip(padding, reach, strict=True))  # no tap reads nothing but padding
        # To one channel `conv_transpose2d` takes two to three times as long; from three on it is faster.
        if weight.ndim == 4 and weight.shape[1] == 1 and self.groups == 1 and within:
            pulled = spread(flat.permute(0, 2, 3, 1), weight, stride, dilation).permute(0, 3, 1, 2)
            (top, left), (height, width) = padding, shapes[0][1:]
            edges = (-left, width + left - pulled.shape[3], -top, height + top - pulled.shape[2])
            pulled = F.pad(pulled, edges)
        else:
            if weight.ndim == 4:  # with a stride twice as fast, and what comes before reads it faster too
                flat = flat.contiguous(memory_format=torch.channels_last)
            size = zip(shapes[0][1:], rows.shape[3:], weight.shape[2:], *geometry, strict=True)
            missed = [i - (o - 1) * s + 2 * p - d * (k - 1) - 1 for i, o, k, s, p, d in size]
            pulled = _TRANSPOSED[weight.ndim](
                flat, weight, None, self.stride, self.padding, missed, self.groups, self.dilation
            )
        return (pulled.unflatten(0, rows.shape[:2]),)

    def geometry(self) -> tuple[tuple[int, ...], ...]:
        """Stride, padding and dilation, each per dimension."""
        dimensions = self.weight().ndim - 2
        given = (self.stride, self.padding, self.dilation)
        tuples = ((value,) if isinstance(value, int) else tuple(value) for value in given)
        return tuple(value * dimensions if len(value) == 1 else value for value in tuples)


def spread(
    rows: Float[Tensor, "rows height width channels"],
    weight: Float[Tensor, "channels less tall wide"],
    stride: Sequence[int],
    dilation: Sequence[int],
) -> Float[Tensor, "rows taller wider less"]:
    """A transposed convolution as one matrix product, whose parts are added up with the rows innermost.

    The rows stay innermost in memory: turning them around would cost more than all of this.
    """
    spread_out: Tensor = _Spread.apply(rows, weight, tuple(stride), tuple(dilation))
    return spread_out


class _Spread(torch.autograd.Function):
    """Its derivatives are convolutions: that is five times as fast as going back over every sum of parts."""

    @staticmethod
    def forward(rows: Tensor, weight: Tensor, stride: Sequence[int], dilation: Sequence[int]) -> Tensor:
        count, height, width, _ = rows.shape
        parts = torch.bmm(
            weight.flatten(1).T.expand(height * width, -1, -1), rows.permute(1, 2, 3, 0).flatten(0, 1)
        )
        parts = parts.view(height, width, *weight.shape[1:], count)
        parts = _overlap(parts, 0, 3, stride[0], dilation[0])
        total = _overlap(parts, 1, 3, stride[1], dilation[1])
        return total.permute(3, 0, 1, 2)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        rows, weight, *ctx.geometry = inputs
        ctx.save_for_backward(rows, weight)

    @staticmethod
    def backward(ctx: Any, total: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        stride, dilation = ctx.geometry
        channels_first = (value.permute(0, 3, 1, 2) for value in (total, rows))
        zero, needed = (0, 0), (*ctx.needs_input_grad[:2], False)
        for_rows, for_weight, _ = torch.ops.aten.convolution_backward(
            *channels_first, weight, None, stride, zero, dilation, True, zero, 1, needed
        )
        return None if for_rows is None else for_rows.permute(0, 2, 3, 1), for_weight, None, None


def _overlap(parts: Tensor, dim: int, taps: int, stride: int, dilation: int) -> Tensor:
    """Adds up what the entries of `dim` send to their `taps`, along that dimension."""
    reach = stride * (parts.shape[dim] - 1) + 1
    shape = list(parts.shape)
    shape[dim] = reach + dilation * (shape.pop(taps) - 1)
    total = parts.new_zeros(shape)
    for i, part in enumerate(parts.unbind(taps)):
        at = [slice(None)] * dim + [slice(i * dilation, i * dilation + reach, stride)]
        total[tuple(at)] += part
    return total


def _channel_mean(z: Float[Tensor, "batch channels *rest"]) -> Float[Tensor, "channels"]:
    return z.mean(0) if z.ndim == 2 else z.flatten(2).mean(2).mean(0)


@dataclass(frozen=True)
class BatchNorm(Affine):
    """`nn.BatchNorm1d`, `2d` and `3d` at given statistics.

    In training mode the statistics are those of the batch that `run` saw: the operator that `run`
    hands back holds them, and a bound may only be asked of that one. A bound never uses the
    statistics of a bound pass.
    """

    module: nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d
    statistics: Statistics | None = None

    def frozen(self) -> BatchNorm:
        """The operator at the module's running statistics, whatever its mode."""
        mean, var = self.module.running_mean, self.module.running_var
        if mean is None or var is None:
            raise InputError(
                "a BatchNorm layer keeps no running statistics (track_running_stats=False), so its "
                "evaluation depends on the rest of the batch and cannot be bounded"
            )
        return replace(self, statistics=(mean, var))

    def copied(self) -> BatchNorm:
        """The operator at its present statistics, which will not move."""
        mean, var = self._fixed()
        return replace(self, statistics=(mean.clone(), var.clone()))

    def _fixed(self) -> Statistics:
        if self.statistics is not None:
            return self.statistics
        if self.module.training:
            raise InputError(
                "a BatchNorm layer is in training mode and its statistics were not fixed by a clean pass: "
                "call model.eval(), or bound the graph that Graph.run returns"
            )
        fixed = self.frozen().statistics
        assert fixed is not None
        return fixed

    def _scale(self, var: Tensor) -> Tensor:
        scale = torch.rsqrt(var + self.module.eps)
        return scale if self.module.weight is None else scale * self.module.weight

    def run(self, *inputs: Tensor) -> tuple[Tensor, Operator]:
        if not self.module.training or self.statistics is not None:
            return self.apply(*inputs), self
        (z,) = inputs
        # Reducing the innermost dimensions first is twice as fast as all at once.
        per_channel = (-1, *[1] * (z.ndim - 2))
        mean = _channel_mean(z)
        var = _channel_mean((z - mean.view(per_channel)).square())
        return self.module(z), replace(self, statistics=(mean, var))

    def fold(self, weight: Parameter, bias: Parameter | None) -> tuple[Parameter, Parameter]:
        """Weight and bias of the layer before this one and this one together, computed at each use."""

        def folded_weight() -> Tensor:
            w = weight()
            return w * self._scale(self._fixed()[1]).view(-1, *[1] * (w.ndim - 1))

        def folded_bias() -> Tensor:
            mean, var = self._fixed()
            scaled = ((bias() if bias else 0) - mean) * self._scale(var)
            return scaled if self.module.bias is None else scaled + self.module.bias

        return folded_weight, folded_bias

    def apply(self, *inputs: Tensor) -> Tensor:
        (z,) = inputs
        mean, var = self._fixed()
        scale = self._scale(var)
        shift = -mean * scale if self.module.bias is None else self.module.bias - mean * scale
        per_channel = (-1, *[1] * (z.ndim - 2))
        return z * scale.view(per_channel) + shift.view(per_channel)

    def absolute(self, *radii: Tensor) -> Tensor:
        (r,) = radii
        return r * self._scale(self._fixed()[1]).abs().view(-1, *[1] * (r.ndim - 2))


@dataclass(frozen=True)
class Identity(Affine):
    """Where an operator was, that another one has taken over."""

    def apply(self, *inputs: Tensor) -> Tensor:
        return inputs[0]

    absolute = apply

    def transpose(
        self, rows: Float[Tensor, "batch rows *out"], shapes: Sequence[torch.Size]
    ) -> tuple[Tensor, ...]:
        return (rows,)


@dataclass(frozen=True)
class NonNegative(Affine):
    """A map with non-negative coefficients and no bias, so `|W| = W`: pooling, sums, slices, other orders."""

    function: Callable[[Tensor], Tensor]

    def apply(self, *inputs: Tensor) -> Tensor:
        return self.function(inputs[0])

    def absolute(self, *radii: Tensor) -> Tensor:
        return self.function(radii[0])


@dataclass(frozen=True)
class Reshape(Affine):
    """Flatten, view, reshape, squeeze: the same entries in another shape (without the batch)."""

    shape: torch.Size

    def apply(self, *inputs: Tensor) -> Tensor:
        return inputs[0].reshape(inputs[0].shape[0], *self.shape)

    absolute = apply

    def transpose(
        self, rows: Float[Tensor, "batch rows *out"], shapes: Sequence[torch.Size]
    ) -> tuple[Tensor, ...]:
        return (rows.reshape(*rows.shape[:2], *shapes[0]),)


@dataclass(frozen=True)
class Pad(Affine):
    """Padding with a constant."""

    pad: tuple[int, ...]
    value: float

    def apply(self, *inputs: Tensor) -> Tensor:
        return F.pad(inputs[0], self.pad, value=self.value)

    def absolute(self, *radii: Tensor) -> Tensor:
        return F.pad(radii[0], self.pad)


@dataclass(frozen=True)
class Add(Affine):
    """The sum of two values (`sign = 1`), or their difference (`sign = -1`)."""

    sign: int = 1

    def apply(self, *inputs: Tensor) -> Tensor:
        first, second = inputs
        return first + second if self.sign > 0 else first - second

    def absolute(self, *radii: Tensor) -> Tensor:
        return radii[0] + radii[1]


@dataclass(frozen=True)
class Concatenate(Affine):
    """Values side by side along `dim`, which is not the batch."""

    dim: int

    def apply(self, *inputs: Tensor) -> Tensor:
        return torch.cat(inputs, self.dim)

    absolute = apply


@dataclass(frozen=True)
class Scale(Affine):
    """`z * factor` or `z / factor`, element by element."""

    factor: Operand
    divide: bool = False

    def apply(self, *inputs: Tensor) -> Tensor:
        factor = _value(self.factor)
        return inputs[0] / factor if self.divide else inputs[0] * factor

    def absolute(self, *radii: Tensor) -> Tensor:
        factor = _value(self.factor)
        if isinstance(factor, Tensor) and not factor.is_floating_point():
            factor = factor.to(radii[0])  # a mask has no absolute value, and that of -128 in int8 is -128
        size = factor.abs() if isinstance(factor, Tensor) else abs(factor)
        return radii[0] / size if self.divide else radii[0] * size


@dataclass(frozen=True)
class Shift(Affine):
    """`z + offset` (`sign = 1`) or `z - offset` (`sign = -1`), element by element."""

    offset: Operand
    sign: int = 1

    def apply(self, *inputs: Tensor) -> Tensor:
        offset = _value(self.offset)
        return inputs[0] + offset if self.sign > 0 else inputs[0] - offset  # a byte has no negative

    def absolute(self, *radii: Tensor) -> Tensor:
        # Adding a tensor may broadcast the input to a larger shape; its radius must follow.
        offset = _value(self.offset)
        return radii[0] + torch.zeros_like(offset) if isinstance(offset, Tensor) else radii[0]


@dataclass(frozen=True)
class Dropout(Affine):
    """Dropout: the identity in evaluation and in every bound, random in a training pass."""

    module: nn.Module
    active: bool = True

    def apply(self, *inputs: Tensor) -> Tensor:
        return inputs[0]

    absolute = apply

    def run(self, *inputs: Tensor) -> tuple[Tensor, Operator]:
        (z,) = inputs
        if getattr(self.module, "inplace", False):
            z = z.clone()  # bounds and attacks read it, too
        value = self.module(z) if self.active else z
        assert isinstance(value, Tensor)
        return value, self

    def frozen(self) -> Dropout:
        """The identity."""
        return replace(self, active=False)


# -------------------------------------------------------------------------------------- activations


@dataclass(frozen=True)
class ReLU(Activation):
    """`max(z, 0)`."""

    slope: ClassVar[float] = 0.0  # left of 0

    def apply(self, *inputs: Tensor) -> Tensor:
        return F.relu(inputs[0])


@dataclass(frozen=True)
class LeakyReLU(Activation):
    """`max(z, slope z)` with `0 <= slope <= 1`."""

    slope: float

    def __post_init__(self) -> None:
        if not 0 <= self.slope <= 1:
            raise InputError(f"LeakyReLU needs a negative slope in [0, 1], got {self.slope}")

    def apply(self, *inputs: Tensor) -> Tensor:
        return F.leaky_relu(inputs[0], self.slope)


Kinked = ReLU | LeakyReLU
"""Activations of two lines that meet in 0: `max(z, slope z)`."""


@dataclass(frozen=True)
class Sigmoid(Activation):
    """`1 / (1 + exp(-z))`."""

    def apply(self, *inputs: Tensor) -> Tensor:
        return torch.sigmoid(inputs[0])


@dataclass(frozen=True)
class Tanh(Activation):
    """`tanh(z)`."""

    def apply(self, *inputs: Tensor) -> Tensor:
        return torch.tanh(inputs[0])


@dataclass(frozen=True)
class MaxPool(Activation):
    """Maximum pooling: not element by element, but increasing in every coordinate all the same."""

    function: Callable[[Tensor], Tensor]

    def apply(self, *inputs: Tensor) -> Tensor:
        return self.function(inputs[0])

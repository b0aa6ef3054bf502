"""What an ONNX operator becomes: the table at the end says which can be read."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Shape = tuple[int, ...]
Value = Any  # a tensor, or what stands for one while a network is traced

BOUNDLESS = 1e38  # a limit beyond is none: exporters write the largest float32
FLOATS = {1: torch.float32, 11: torch.float64}  # by onnx.TensorProto.DataType


class Unsupported(Exception):
    """Why one node cannot be read."""


@dataclass(frozen=True)
class Known:
    """What is known of a value that depends on the input.

    Args:
        shape: its shape in the file, for one example.
        lead: 1 if the first of these dimensions is the batch, else 0.
        name: the value that a step of the network computes; operators that do nothing pass it on.
    """

    shape: Shape
    lead: int
    name: str

    @property
    def example(self) -> Shape:
        """Its shape in the module, without the batch dimension."""
        return self.shape[self.lead :]


def lead_of(shape: Shape) -> int:
    """The `lead` of a value of this shape, for one example."""
    return int(len(shape) > 1 and shape[0] == 1)


class Call:
    """One node, with a uniform way to read what it is given."""

    def __init__(self, node: Any, constants: dict[str, np.ndarray], values: dict[str, Known | None]) -> None:
        from onnx import helper

        self.op_type: str = node.op_type
        self.results = sum(map(bool, node.output))
        self._given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        self._names, self._constants, self._values = list(node.input), constants, values

    def get(self, name: str, default: Any) -> Any:
        """An attribute; text as text."""
        found = self._given.get(name, default)
        return found.decode() if isinstance(found, bytes) else found

    def has(self, position: int) -> bool:
        """Whether there is such an input."""
        return position < len(self._names) and bool(self._names[position])

    @property
    def count(self) -> int:
        """How many inputs there are."""
        return len(self._names)

    def is_constant(self, position: int) -> bool:
        """Whether that input does not depend on the network's."""
        return self.has(position) and self._names[position] in self._constants

    def constant(self, position: int, what: str) -> np.ndarray:
        """A constant input."""
        if not self.is_constant(position):
            raise Unsupported(f"its {what} must be constant")
        return self._constants[self._names[position]]

    def list(self, attribute: str, position: int) -> list[int] | None:
        """Whole numbers that older files give as an attribute, newer ones as an input."""
        if self.has(position):
            return [int(i) for i in self.constant(position, attribute).ravel()]
        given: list[int] | None = self.get(attribute, None)
        return given

    def tensor(self, position: int, what: str) -> Tensor:
        """A constant input as a tensor of its own, in float64, where a product of two float32 is exact."""
        return torch.from_numpy(np.array(self.constant(position, what))).double()

    def value(self, position: int) -> Known:
        """An input that depends on the network's."""
        if not self.has(position) or self.is_constant(position):
            raise Unsupported("it does not read the network's input where it should")
        value = self._values[self._names[position]]
        assert value is not None
        return value

    def inputs(self) -> tuple[Known, ...]:
        """All such inputs, in order."""
        return tuple(
            self.value(i) for i in range(len(self._names)) if self.has(i) and not self.is_constant(i)
        )


# ------------------------------------------------------------------------------------------ modules


class View(nn.Module):
    """The same entries in another shape; `written` is the shape in the file, for one example."""

    def __init__(self, written: Shape) -> None:
        super().__init__()
        self.written = written

    def forward(self, x: Value) -> Value:
        """The value, reshaped."""
        return x.reshape(x.shape[0], *self.written[lead_of(self.written) :])


class _Of(nn.Module):
    """A function of values, and of a constant if there is one."""

    def __init__(self, function: Callable[..., Value], constant: Tensor | None = None) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("constant", constant)

    def forward(self, *values: Value) -> Value:
        return self.function(*values) if self.constant is None else self.function(*values, self.constant)


class Grown(nn.Sequential):
    """A function of a value, and the view that its shape in the file becomes."""

    @property
    def written(self) -> Shape:
        """That shape, for one example."""
        view = self[-1]
        assert isinstance(view, View)
        return view.written


class _Joined(nn.Module):
    """Values side by side."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, *values: Value) -> Value:
        return torch.cat(values, self.dim)


def _taken_from(value: Value, constant: Value) -> Value:
    return -value + constant


def _filled(module: nn.Module, **tensors: Tensor | None) -> nn.Module:
    """The module with these parameters and buffers."""
    for name, tensor in tensors.items():
        if tensor is not None:
            old = getattr(module, name)
            setattr(module, name, nn.Parameter(tensor) if isinstance(old, nn.Parameter) else tensor)
    return module


def _linear(weight: Tensor, bias: Tensor | None = None) -> nn.Module:
    empty = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    return _filled(empty, weight=weight.contiguous(), bias=bias)


# -------------------------------------------------------------------------------------------- rules

Rule = Callable[[Call], nn.Module | list[nn.Module] | None]
"""A module for the one output, or one for each; None where the input is passed on."""


def _plain(module: type[nn.Module]) -> Rule:
    return lambda _call: module()


def _nothing(_call: Call) -> None:
    return None


def _gemm(call: Call) -> nn.Module:
    if call.get("transA", 0) or len(call.value(0).shape) != 2:
        raise Unsupported("its first argument must be a matrix with an example in each row")
    weight = call.tensor(1, "second argument") * call.get("alpha", 1.0)
    weight = weight if call.get("transB", 0) else weight.T
    if not call.has(2):
        return _linear(weight)
    bias = call.tensor(2, "bias") * call.get("beta", 1.0)
    if bias.numel() not in (1, len(weight)) or (bias.ndim > 1 and len(bias) > 1):
        raise Unsupported("its bias must be one number per output")
    return _linear(weight, bias.flatten().expand(len(weight)).clone())


def _matmul(call: Call) -> nn.Module:
    left = call.is_constant(0)
    weight = call.tensor(0 if left else 1, "second factor (a product of two values is not affine)")
    if weight.ndim > max(2, len(call.value(int(left)).shape)):
        raise Unsupported(f"its constant of shape {tuple(weight.shape)} adds dimensions")
    while weight.ndim > 2 and len(weight) == 1:
        weight = weight.squeeze(0)
    if weight.ndim != 2:
        raise Unsupported(f"its constant must be a matrix, got shape {tuple(weight.shape)}")
    if not left:
        return _linear(weight.T)
    example = call.value(1).example
    if len(example) == 1:
        return _linear(weight)
    if len(example) != 2 or example[1] != 1:
        raise Unsupported("a constant times a matrix is not supported, only times a column")
    column = nn.Unflatten(1, (len(weight), 1))
    return nn.Sequential(nn.Flatten(), _linear(weight), column)


_PADS: list[Callable[..., nn.Module]] = [nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d]
_CONVOLUTIONS: list[type[nn.Module]] = [nn.Conv1d, nn.Conv2d, nn.Conv3d]
_NORMS: list[type[nn.Module]] = [nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d]
_MAXIMA: list[Callable[..., nn.Module]] = [nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d]
_AVERAGES: list[Callable[..., nn.Module]] = [nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d]
_GLOBAL: list[Callable[..., nn.Module]] = [
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d,
]


def _of_dimension(kinds: Sequence[Callable[..., nn.Module]], dimensions: int) -> Callable[..., nn.Module]:
    if not 1 <= dimensions <= len(kinds):
        raise Unsupported(f"{dimensions} dimensions are not supported")
    return kinds[dimensions - 1]


@dataclass(frozen=True)
class _Window:
    """How a convolution or a pooling moves over its input; `before` and `after` say the padding."""

    kernel: Shape
    stride: Shape
    dilation: Shape
    before: Shape
    after: Shape

    @property
    def padding(self) -> Shape | None:
        """The padding, if it is the same on both sides."""
        return self.before if self.before == self.after else None

    def padded(self) -> nn.Module:
        """A layer that pads with zeros."""
        ends = zip(reversed(self.before), reversed(self.after), strict=True)
        return _of_dimension(_PADS, len(self.before))(tuple(end for pair in ends for end in pair), 0.0)


def _window(call: Call, kernel: Sequence[int]) -> _Window:
    example, count = call.value(0).example, len(kernel)
    if len(example) != count + 1:
        raise Unsupported(f"its input must have a batch, channels and {count} more dimensions")
    stride = tuple(call.get("strides", [1] * count))
    dilation = tuple(call.get("dilations", [1] * count))
    automatic = call.get("auto_pad", "NOTSET")
    pads = list(call.get("pads", [0] * (2 * count)))
    if automatic in ("SAME_UPPER", "SAME_LOWER"):
        sizes = zip(example[1:], kernel, stride, dilation, strict=True)
        total = [max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0) for n, k, s, d in sizes]
        less, more = [t // 2 for t in total], [t - t // 2 for t in total]
        pads = less + more if automatic == "SAME_UPPER" else more + less
    elif automatic == "VALID":
        pads = [0] * (2 * count)
    return _Window(tuple(kernel), stride, dilation, tuple(pads[:count]), tuple(pads[count:]))


def _conv(call: Call) -> nn.Module:
    weight = call.tensor(1, "weight")
    bias = call.tensor(2, "bias") if call.has(2) else None
    window = _window(call, weight.shape[2:])
    groups = call.get("group", 1)
    convolution = _of_dimension(_CONVOLUTIONS, weight.ndim - 2)(
        weight.shape[1] * groups,
        weight.shape[0],
        window.kernel,
        stride=window.stride,
        padding=window.padding or 0,
        dilation=window.dilation,
        groups=groups,
        bias=bias is not None,
        device="meta",
    )
    filled = _filled(convolution, weight=weight, bias=bias)
    return filled if window.padding is not None else nn.Sequential(window.padded(), filled)


def _batch_norm(call: Call) -> nn.Module:
    if call.get("training_mode", 0) or call.results > 1:  # as older files say it
        raise Unsupported("it is in training mode, where it depends on the rest of the batch")
    if not call.get("spatial", 1):
        raise Unsupported("its statistics must be one number per channel")
    scale, bias, mean, variance = (call.tensor(i, "statistics") for i in range(1, 5))
    norm = _of_dimension(_NORMS, len(_batched(call).example))(len(scale), eps=call.get("epsilon", 1e-5))
    return _filled(norm, weight=scale, bias=bias, running_mean=mean, running_var=variance)


def _leaky_relu(call: Call) -> nn.Module:
    return nn.LeakyReLU(call.get("alpha", 0.01))


def _max_pool(call: Call) -> nn.Module:
    window = _window(call, call.get("kernel_shape", []))
    if window.padding is None:
        raise Unsupported("its padding must be the same on both sides")
    make = _of_dimension(_MAXIMA, len(window.kernel))
    return make(
        window.kernel,
        window.stride,
        window.padding,
        window.dilation,
        ceil_mode=bool(call.get("ceil_mode", 0)),
    )


def _average_pool(call: Call) -> nn.Module:
    window = _window(call, call.get("kernel_shape", []))
    if set(window.dilation) != {1}:
        raise Unsupported("dilation is not supported here")
    counted = bool(call.get("count_include_pad", 0))
    ceil = bool(call.get("ceil_mode", 0))
    make = _of_dimension(_AVERAGES, len(window.kernel))
    if window.padding is not None:
        return make(window.kernel, window.stride, window.padding, ceil, counted)
    if not counted or ceil:
        raise Unsupported("its padding must be the same on both sides")
    return nn.Sequential(window.padded(), make(window.kernel, window.stride))


def _global_average(call: Call) -> nn.Module:
    return _of_dimension(_GLOBAL, len(_batched(call).example) - 1)(1)


def _batched(call: Call) -> Known:
    """The first input, which has channels behind a batch dimension."""
    value = call.value(0)
    if not value.lead:
        raise Unsupported(f"its input of shape {value.shape} has lost the batch dimension")
    return value


def _over(function: Callable[..., Tensor]) -> Rule:
    """A sum or mean over some dimensions."""

    def rule(call: Call) -> nn.Module:
        value, axes = call.value(0), call.list("axes", 1)
        if not axes:
            raise Unsupported("it takes in the whole batch")
        dims = tuple(_dim(value, axis) for axis in axes)
        return _Of(partial(function, dim=dims, keepdim=bool(call.get("keepdims", 1))))

    return rule


def _dim(value: Known, axis: int) -> int:
    """A dimension of the file, in the module."""
    axis = axis + len(value.shape) if axis < 0 else axis
    if axis < value.lead:
        raise Unsupported("it takes in the whole batch")
    return axis - value.lead + 1


def _flatten(call: Call) -> nn.Module:
    shape, axis = call.value(0).shape, call.get("axis", 1)
    axis = axis + len(shape) if axis < 0 else axis
    return View((int(np.prod(shape[:axis])), int(np.prod(shape[axis:]))))


def _reshape(call: Call) -> nn.Module:
    shape, target = call.value(0).shape, call.list("shape", 1)
    if target is None or (call.get("allowzero", 0) and 0 in target):
        raise Unsupported("its shape is missing or empty")
    sizes = [shape[i] if size == 0 else size for i, size in enumerate(target)]
    try:
        return View(tuple(torch.empty(shape, device="meta").reshape(sizes).shape))
    except RuntimeError:
        raise Unsupported(f"it cannot give {shape} the shape {tuple(target)}") from None


def _squeeze(call: Call) -> nn.Module:
    shape, axes = call.value(0).shape, call.list("axes", 1)
    gone = {i for i, n in enumerate(shape) if n == 1} if axes is None else {a % len(shape) for a in axes}
    left = tuple(n for i, n in enumerate(shape) if i not in gone)
    return View(left or (1,))


def _unsqueeze(call: Call) -> nn.Module:
    axes = call.list("axes", 1) or []
    shape = list(call.value(0).shape)
    rank = len(shape) + len(axes)
    for axis in sorted(a % rank for a in axes):
        shape.insert(axis, 1)
    return View(tuple(shape))


def _transpose(call: Call) -> nn.Module:
    shape = call.value(0).shape
    order = call.get("perm", list(reversed(range(len(shape)))))
    moved = [i for i in order if shape[i] != 1]
    written = tuple(shape[i] for i in order)
    if moved == sorted(moved):
        return View(written)
    lead = call.value(0).lead
    if order[:lead] != [0] * lead or lead_of(written) != lead:
        raise Unsupported("it moves the batch dimension")
    return _Of(partial(torch.permute, dims=(0, *(i - lead + 1 for i in order[lead:]))))


def _clip(call: Call) -> nn.Module:
    def limit(name: str, position: int) -> float | None:
        given = call.constant(position, name).item() if call.has(position) else call.get(name, None)
        return None if given is None or abs(given) > BOUNDLESS else float(given)

    low, high = limit("min", 1), limit("max", 2)
    return nn.Identity() if low is high is None else _Of(partial(torch.clamp, min=low, max=high))


def _slice(call: Call) -> nn.Module:
    value, starts, ends = call.value(0), call.list("starts", 1), call.list("ends", 2)
    steps = call.list("steps", 4) if call.has(4) else None
    if starts is None or ends is None or (steps is not None and min(steps) < 1):
        raise Unsupported("only forward slices are supported")
    axes = call.list("axes", 3) or list(range(len(starts)))
    index = [slice(None)] * (len(value.example) + 1)
    for i, axis in enumerate(axes):
        index[_dim(value, axis)] = slice(starts[i], ends[i], steps[i] if steps else 1)
    return _Of(partial(_part, index=tuple(index)))


def _split(call: Call) -> list[nn.Module]:
    value, sizes = call.value(0), call.list("split", 1)
    dim = _dim(value, call.get("axis", 0))
    if sizes is None:
        size = -(-value.example[dim - 1] // call.results)  # of all but the last, which may be smaller
        sizes = [size] * call.results
    if len(sizes) != call.results:
        raise Unsupported(f"it has {len(sizes)} sizes for {call.results} outputs")
    ends = np.cumsum(sizes).tolist()
    before = [slice(None)] * dim
    return [
        _Of(partial(_part, index=(*before, slice(end - size, end))))
        for size, end in zip(sizes, ends, strict=True)
    ]


def _part(value: Value, index: tuple[slice, ...]) -> Value:
    return value[index]


def _cast(call: Call) -> None:
    if call.get("to", 0) not in FLOATS:
        raise Unsupported("it rounds: only casts to float32 and float64 are supported")


def _dropout(call: Call) -> None:
    if call.has(2) and bool(call.constant(2, "mode")):
        raise Unsupported("it is in training mode")


def _arithmetic(function: Callable[..., Value]) -> Rule:
    """`+`, `-`, `*` or `/` of a value with a constant, or of two values where that is affine."""

    def rule(call: Call) -> nn.Module:
        affine = function in (operator.add, operator.sub)
        if not (call.is_constant(0) or call.is_constant(1)):
            if not affine:
                raise Unsupported("of two values it is not affine")
            if call.value(0).example != call.value(1).example:
                raise Unsupported("it broadcasts one value to the shape of another")
            return _Of(function)
        first = call.is_constant(0)
        if first and function is operator.truediv:
            raise Unsupported("a constant divided by a value is not affine")
        constant, value = call.tensor(int(not first), "argument"), call.value(int(first))
        more = (1,) * (constant.ndim - len(value.shape))  # dimensions that the value gets in the file
        done = _Of(
            _taken_from if first and function is operator.sub else function, _beside(constant, value.example)
        )
        return Grown(done, View(more + value.shape)) if more else done

    return rule


def _beside(constant: Tensor, example: Shape) -> Tensor:
    """The constant as it stands beside every example of a batch."""
    while constant.ndim > len(example) and len(constant) == 1:
        constant = constant.squeeze(0)
    fits = constant.ndim <= len(example) and all(
        c in (1, n) for c, n in zip(reversed(constant.shape), reversed(example), strict=False)
    )
    if not fits:
        raise Unsupported(f"it broadcasts a value of shape {example} to that of a constant")
    return constant


def _concatenate(call: Call) -> nn.Module:
    values = call.inputs()
    axis = call.get("axis", 0)
    axis = axis + len(values[0].shape) if axis < 0 else axis
    if len({value.lead for value in values}) > 1 or axis < values[0].lead:
        raise Unsupported("it joins along the batch")
    if len(values) < call.count:
        raise Unsupported("it joins constants")
    return _Joined(axis - values[0].lead + 1)


def _pad(call: Call) -> nn.Module:
    value, pads = call.value(0), call.list("pads", 1)
    rank = len(value.shape)
    axes = call.list("axes", 3) if call.has(3) else None
    amount = float(call.constant(2, "value")) if call.has(2) else float(call.get("value", 0.0))
    if call.get("mode", "constant") != "constant" or not np.isfinite(amount) or pads is None:
        raise Unsupported("only padding with a finite constant is supported")
    ends = [(0, 0)] * rank
    count = len(pads) // 2
    for i, axis in enumerate(range(rank) if axes is None else axes):
        ends[axis % rank] = (pads[i], pads[i + count])
    if ends[: value.lead] != [(0, 0)] * value.lead:
        raise Unsupported("it pads the batch dimension")
    ends = ends[value.lead :]
    while len(ends) > 1 and ends[0] == (0, 0):
        ends.pop(0)
    return _of_dimension(_PADS, len(ends))(tuple(e for pair in reversed(ends) for e in pair), amount)


HINTS = {
    name: f"not supported; {name} does not change which class wins: export the network without it"
    for name in ("Softmax", "LogSoftmax")
}

RULES: dict[str, Rule] = {
    "Add": _arithmetic(operator.add),
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Cast": _cast,
    "Clip": _clip,
    "Concat": _concatenate,
    "Conv": _conv,
    "Div": _arithmetic(operator.truediv),
    "Dropout": _dropout,
    "Flatten": _flatten,
    "Gemm": _gemm,
    "GlobalAveragePool": _global_average,
    "Identity": _nothing,
    "LeakyRelu": _leaky_relu,
    "MatMul": _matmul,
    "MaxPool": _max_pool,
    "Mul": _arithmetic(operator.mul),
    "Neg": lambda _call: _Of(operator.neg),
    "Pad": _pad,
    "ReduceMean": _over(torch.mean),
    "ReduceSum": _over(torch.sum),
    "Relu": _plain(nn.ReLU),
    "Reshape": _reshape,
    "Sigmoid": _plain(nn.Sigmoid),
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Sub": _arithmetic(operator.sub),
    "Tanh": _plain(nn.Tanh),
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}

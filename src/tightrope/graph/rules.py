"""What modules, functions and methods become in a graph: the tables say which can be bounded."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from tightrope.graph import ops


class Unsupported(Exception):
    """Why one operator cannot be used."""


Constant = ops.Live | ops.Computed
"""A parameter or buffer, or what is computed of some."""


class Call:
    """One call in the traced network, with a uniform way to read its arguments.

    Args:
        node: the call.
        values: what every node of the trace yielded in the probing pass.
        constants: the nodes that stand for parameters and buffers, or for what is computed of some.
        sizes: the nodes whose value follows from the input's shape.
    """

    def __init__(
        self,
        node: fx.Node,
        values: dict[fx.Node, Any],
        constants: dict[fx.Node, Constant],
        sizes: set[fx.Node],
    ) -> None:
        self.node, self.values, self.constants, self.sizes = node, values, constants, sizes

    @property
    def shape(self) -> torch.Size:
        """Of what the call yields, without the batch dimension."""
        shape: torch.Size = self.values[self.node].shape
        return shape[1:]

    def get(self, position: int, name: str, default: Any = None) -> Any:
        """An argument by position or name; sizes that the probing pass computed become numbers."""
        args, kwargs = self.node.args, self.node.kwargs
        value = args[position] if position < len(args) else kwargs.get(name, default)
        return fx.node.map_arg(value, self._known)

    def _known(self, n: fx.Node) -> Any:
        if isinstance(self.values[n], Tensor) or is_cut(n):
            return n
        if n not in self.sizes:
            raise Unsupported(
                "it reads a value as a number, which would stay as it is; use the tensor itself"
            )
        return self.values[n]

    def told(self, position: int, name: str, default: Any = None) -> Any:
        """An argument that says how, not on what: numbers and words, not tensors."""
        value = self.get(position, name, default)
        read: list[fx.Node] = []
        fx.node.map_arg(value, read.append)
        if read:
            raise Unsupported(f"its `{name}` is a tensor; it must be a number")
        return value

    def input(self) -> fx.Node:
        """The value that a call of one value reads."""
        argument = self.get(0, "input")
        if not self.is_input(argument):
            raise Unsupported("its first argument is not computed from the network's input")
        assert isinstance(argument, fx.Node)
        return argument

    def refuse_others(self, positions: int, *names: str) -> None:
        """Refuse arguments beyond these: an option that is not read may not be dropped in silence."""
        if len(self.node.args) > positions or set(self.node.kwargs) - set(names):
            raise Unsupported("an argument of this call is not supported")

    def is_input(self, argument: Any) -> bool:
        """Whether an argument is computed from the network's input."""
        return isinstance(argument, fx.Node) and argument not in self.constants

    def live(self, argument: Any) -> Constant:
        """A parameter or buffer that the call reads, or what is computed of some."""
        if argument not in self.constants:
            raise Unsupported("its weights depend on the network's input; use parameters or parametrizations")
        return self.constants[argument]

    def operand(self, argument: Any) -> ops.Operand:
        """A number, or what `live` returns."""
        return float(argument) if isinstance(argument, int | float) else self.live(argument)


def is_cut(n: fx.Node) -> bool:
    """Whether a node cuts a value into a tuple of parts: a module may have such a name, too."""
    return n.op in ("call_function", "call_method") and n.target in CUTS


def about_shapes(graph: fx.Graph) -> set[fx.Node]:
    """The nodes whose value follows from shapes: what tensors say of theirs, and what is reckoned of that."""
    found = set[fx.Node]()
    for n in graph.nodes:
        if n.op not in ("call_function", "call_method"):
            continue
        reads_shape = n.target in _SHAPES or (n.target is getattr and n.args[1] in _SHAPES)
        reckons = n.op == "call_method" or n.target in _ARITHMETIC  # not torch.rand(x.shape[1])
        if reads_shape or (reckons and n.all_input_nodes and found.issuperset(n.all_input_nodes)):
            found.add(n)
    return found


def constant_of(n: fx.Node, constants: dict[fx.Node, Constant]) -> Constant | None:
    """What a call computes of parameters and buffers alone, if it does so by functions known to be steady."""
    read, known = n.all_input_nodes, constants.keys()
    if n.op not in ("call_function", "call_method") or not read or read[0] not in known:
        return None
    if n.target in ("to", "type_as") and len(read) > 1 and not known & set(read[1:]):
        given = (*n.args[1:], *n.kwargs.values())  # `mean.to(x)`: where the network is, its parameters are
        constant = constants[read[0]]
        if not constant().is_floating_point():  # bytes do not compute as numbers do
            constant = ops.Computed("to", (constant, torch.get_default_dtype()), {})
        return constant if all(isinstance(one, fx.Node) for one in given) else None
    steady = n.target in _STEADY or (n.target is getattr and n.args[1] in _STEADY)
    if not steady or not known >= set(read):
        return None
    args, kwargs = ops.replaced((n.args, n.kwargs), fx.Node, constants.__getitem__)
    return ops.Computed(n.target, args, kwargs)


# ------------------------------------------------------------------------------------------ modules

ModuleRule = Callable[[Any, Call], ops.Operator | list[ops.Operator] | None]


def _linear(m: nn.Linear, _call: Call) -> ops.Operator:
    return ops.Linear(ops.Live(m, "weight"), ops.Live(m, "bias") if m.bias is not None else None)


def _conv(m: nn.Conv1d | nn.Conv2d | nn.Conv3d, _call: Call) -> ops.Operator:
    zeros = m.padding_mode == "zeros"
    return ops.Conv(
        weight=ops.Live(m, "weight"),
        bias=ops.Live(m, "bias") if m.bias is not None else None,
        stride=m.stride,
        padding=m.padding if zeros else 0,
        dilation=m.dilation,
        groups=m.groups,
        pad=() if zeros else tuple(m._reversed_padding_repeated_twice),
        pad_mode="constant" if zeros else m.padding_mode,
    )


def _batch_norm(m: nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d, _call: Call) -> ops.Operator:
    norm = ops.BatchNorm(m)
    norm.frozen()  # refuses a layer without running statistics
    return norm


def _average(function: Callable[[Tensor], Tensor], divisor: int | None) -> ops.Operator:
    if divisor is not None and divisor < 0:
        raise Unsupported(f"its divisor is negative ({divisor})")
    return ops.NonNegative(function)


def _pool(m: nn.Module, _call: Call) -> ops.Operator:
    return _average(m, getattr(m, "divisor_override", None))


def _max_pool(m: nn.MaxPool1d | nn.MaxPool2d | nn.MaxPool3d, _call: Call) -> ops.Operator:
    return ops.MaxPool(m)


def _pad(pad: Sequence[int], value: float, call: Call) -> ops.Operator:
    if len(pad) // 2 > len(call.shape):
        raise Unsupported("it pads the batch dimension")
    return ops.Pad(tuple(int(p) for p in pad), value)


def _constant_pad(m: Any, call: Call) -> ops.Operator:
    return _pad(m.padding, float(m.value), call)


def _reshape(_m: nn.Module, call: Call) -> ops.Operator:
    return ops.Reshape(call.shape)


def _resize(m: nn.Upsample, _call: Call) -> ops.Operator:
    return _interpolation(m, m.mode)


def _interpolation(function: Callable[[Tensor], Tensor], mode: str) -> ops.Operator:
    if mode == "bicubic":
        raise Unsupported("bicubic interpolation is not supported, bilinear is")
    return ops.NonNegative(function)


def _between(low: float | None, high: float | None) -> list[ops.Operator]:
    """`min(max(z, low), high)`, by one ReLU for each of the two: `max(z, l) = l + relu(z - l)`."""
    chain: list[ops.Operator] = []
    if low is not None:
        chain += [ops.Shift(-float(low)), ops.ReLU(), ops.Shift(float(low))]
    if high is not None:
        chain += [
            ops.Scale(-1.0),
            ops.Shift(float(high)),
            ops.ReLU(),
            ops.Scale(-1.0),
            ops.Shift(float(high)),
        ]
    return [op for op in chain if op != ops.Shift(0.0)]


MODULES: dict[type[nn.Module], ModuleRule] = {
    nn.Linear: _linear,
    nn.Conv1d: _conv,
    nn.Conv2d: _conv,
    nn.Conv3d: _conv,
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.BatchNorm3d: _batch_norm,
    nn.AvgPool1d: _pool,
    nn.AvgPool2d: _pool,
    nn.AvgPool3d: _pool,
    nn.AdaptiveAvgPool1d: _pool,
    nn.AdaptiveAvgPool2d: _pool,
    nn.AdaptiveAvgPool3d: _pool,
    nn.MaxPool1d: _max_pool,
    nn.MaxPool2d: _max_pool,
    nn.MaxPool3d: _max_pool,
    nn.ConstantPad1d: _constant_pad,
    nn.ConstantPad2d: _constant_pad,
    nn.ConstantPad3d: _constant_pad,
    nn.ZeroPad1d: _constant_pad,
    nn.ZeroPad2d: _constant_pad,
    nn.ZeroPad3d: _constant_pad,
    nn.Flatten: _reshape,
    nn.Unflatten: _reshape,
    nn.Identity: lambda _m, _call: None,
    nn.Dropout: lambda m, _call: ops.Dropout(m),
    nn.Dropout1d: lambda m, _call: ops.Dropout(m),
    nn.Dropout2d: lambda m, _call: ops.Dropout(m),
    nn.Dropout3d: lambda m, _call: ops.Dropout(m),
    nn.ReLU: lambda _m, _call: ops.ReLU(),
    nn.LeakyReLU: lambda m, _call: ops.LeakyReLU(m.negative_slope),
    nn.Sigmoid: lambda _m, _call: ops.Sigmoid(),
    nn.Tanh: lambda _m, _call: ops.Tanh(),
    nn.ReLU6: lambda m, _call: _between(m.min_val, m.max_val),
    nn.Hardtanh: lambda m, _call: _between(m.min_val, m.max_val),
    nn.Upsample: _resize,
}

# ---------------------------------------------------------------------------------------- functions

Made = ops.Operator | list[ops.Operator] | None | tuple[ops.Operator | list[ops.Operator], list[fx.Node]]
CallRule = Callable[[Call], Made]


def _elementwise(op: ops.Operator) -> CallRule:
    return lambda _call: op


def _leaky(call: Call) -> Made:
    return ops.LeakyReLU(float(call.told(1, "negative_slope", 0.01)))


def _flatten_call(call: Call) -> Made:
    return ops.Reshape(call.shape)


def _bind(function: Callable[..., Tensor], *names: str) -> Callable[[Call], partial[Tensor]]:
    """A pooling function with the call's own options bound."""

    def rule(call: Call) -> partial[Tensor]:
        call.refuse_others(1 + len(names), "input", *names)
        given = {name: call.told(i, name) for i, name in enumerate(names, start=1)}
        return partial(function, **{name: value for name, value in given.items() if value is not None})

    return rule


def _averaging(function: Callable[..., Tensor], *names: str) -> CallRule:
    bind = _bind(function, *names)

    def rule(call: Call) -> ops.Operator:
        bound = bind(call)
        return _average(bound, bound.keywords.get("divisor_override"))

    return rule


def _over(function: Callable[..., Tensor]) -> CallRule:
    """A sum or mean over dimensions."""

    def rule(call: Call) -> Made:
        call.refuse_others(3, "input", "dim", "axis", "keepdim")
        dim = call.told(1, "axis" if "axis" in call.node.kwargs else "dim")
        return ops.NonNegative(partial(function, dim=dim, keepdim=bool(call.told(2, "keepdim", False))))

    return rule


def _interpolate(call: Call) -> Made:
    names = ("size", "scale_factor", "mode", "align_corners", "recompute_scale_factor", "antialias")
    bound = _bind(F.interpolate, *names)(call)
    return _interpolation(bound, bound.keywords.get("mode", "nearest"))


def _permute(call: Call) -> Made:
    first = call.told(1, "dims")
    dims: tuple[Any, ...] = tuple(first) if isinstance(first, tuple | list) else tuple(call.node.args[1:])
    return _moved(tuple(dim % len(dims) for dim in dims))


def _transpose(call: Call) -> Made:
    call.refuse_others(3, "input", "dim0", "dim1")
    dims = list(range(len(call.shape) + 1))
    a, b = (int(call.told(i, f"dim{i - 1}")) for i in (1, 2))
    dims[a], dims[b] = dims[b], dims[a]
    return _moved(tuple(dims))


def _moved(dims: tuple[int, ...]) -> Made:
    if dims[0] != 0:
        raise Unsupported("it moves the batch dimension")
    return ops.NonNegative(partial(torch.permute, dims=dims))


def _slice(call: Call) -> Made:
    value, index = call.input(), call.get(1, "")
    if is_cut(value):
        return _part(Call(value, call.values, call.constants, call.sizes), index)
    index = index if isinstance(index, tuple) else (index,)
    if not index:
        return None
    parts = [
        number
        for part in index
        for number in ([part.start, part.stop, part.step] if isinstance(part, slice) else [part])
    ]
    if not all(isinstance(part, int | None | type(...)) for part in parts):
        raise Unsupported("only numbers and slices between numbers are supported as indices")
    taken = sum(part is not None and part is not ... for part in index)
    whole = index[0] == slice(None) or (index[0] is ... and taken < call.values[value].ndim)
    if not whole:
        raise Unsupported("it picks examples of the batch")
    return ops.NonNegative(partial(_pick, index=index))


def _part(cut: Call, number: int) -> Made:
    """One of the parts of a value that was cut along a dimension."""
    value, parts = cut.input(), cut.values[cut.node]
    dim = int(cut.told(CUTS[cut.node.target], "dim", 0)) % cut.values[value].ndim
    if dim == 0:
        raise Unsupported("it picks examples of the batch")
    number %= len(parts)
    index: int | slice = number
    if parts[number].ndim == cut.values[value].ndim:
        begin = sum(part.shape[dim] for part in parts[:number])
        index = slice(begin, begin + parts[number].shape[dim])
    return ops.NonNegative(partial(_pick, index=(*[slice(None)] * dim, index))), [value]


def _pick(value: Tensor, index: tuple[Any, ...]) -> Tensor:
    return value[index]


def _clamp(call: Call) -> Made:
    call.refuse_others(3, "input", "min", "max")
    return _between(call.told(1, "min"), call.told(2, "max"))


def _clamp_to(end: str) -> CallRule:
    """`clamp_min` or `clamp_max`."""

    def rule(call: Call) -> Made:
        limit = call.told(1, end)
        return _between(limit, None) if end == "min" else _between(None, limit)

    return rule


def _hardtanh(low: float, high: float) -> CallRule:
    return lambda call: _between(call.told(1, "min_val", low), call.told(2, "max_val", high))


def _dropout(call: Call) -> Made:
    if call.told(2, "training", True):
        raise Unsupported(
            "it is random in evaluation mode too: say training=self.training, or use nn.Dropout"
        )
    return None


def _matmul(call: Call) -> Made:
    call.refuse_others(2, "input", "other")
    value, factor = call.input(), call.get(1, "other")
    weight = call.live(factor)
    if call.values[factor].ndim != 2:
        raise Unsupported("its second factor must be a matrix")
    return ops.Linear(ops.Computed(torch.t, (weight,), {}), None), [value]


def _maximum(function: Callable[..., Tensor]) -> CallRule:
    bind = _bind(function, "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
    return lambda call: ops.MaxPool(bind(call))


def _pad_call(call: Call) -> Made:
    call.refuse_others(4, "input", "pad", "mode", "value")
    if call.told(2, "mode", "constant") != "constant":
        raise Unsupported("only constant padding is supported here; use the convolution's padding_mode")
    return _pad(call.told(1, "pad"), float(call.told(3, "value") or 0.0), call)


def _linear_call(call: Call) -> Made:
    weight, bias = call.get(1, "weight"), call.get(2, "bias")
    made = ops.Linear(call.live(weight), None if bias is None else call.live(bias))
    if call.values[weight].ndim != 2:
        raise Unsupported("its weight must be a matrix")
    return made


def _conv_call(call: Call) -> Made:
    bias = call.get(2, "bias")
    return ops.Conv(
        weight=call.live(call.get(1, "weight")),
        bias=None if bias is None else call.live(bias),
        stride=call.told(3, "stride", 1),
        padding=call.told(4, "padding", 0),
        dilation=call.told(5, "dilation", 1),
        groups=call.told(6, "groups", 1),
    )


def _sum(sign: int) -> CallRule:
    def rule(call: Call) -> Made:
        call.refuse_others(2, "input", "other")
        first, second = call.get(0, "input"), call.get(1, "other")
        if call.is_input(first) and call.is_input(second):
            shapes = {call.values[n].shape[1:] for n in (first, second)}
            if shapes != {call.shape}:
                raise Unsupported(f"it broadcasts values of shapes {sorted(map(tuple, shapes))}")
            return ops.Add(sign), [first, second]
        if call.is_input(first):
            return ops.Shift(call.operand(second), sign), [first]
        shift = ops.Shift(call.operand(first))
        return (shift if sign > 0 else [ops.Scale(-1.0), shift]), [second]

    return rule


def _product(call: Call) -> Made:
    call.refuse_others(2, "input", "other")
    first, second = call.get(0, "input"), call.get(1, "other")
    if call.is_input(first) and call.is_input(second):
        raise Unsupported("a product of two values is not affine")
    value, factor = (first, second) if call.is_input(first) else (second, first)
    return ops.Scale(call.operand(factor)), [value]


def _quotient(call: Call) -> Made:
    call.refuse_others(2, "input", "other")
    value, divisor = call.get(0, "input"), call.get(1, "other")
    if not call.is_input(value) or call.is_input(divisor):
        raise Unsupported("only division by a constant is affine")
    return ops.Scale(call.operand(divisor), divide=True), [value]


def _negative(_call: Call) -> Made:
    return ops.Scale(-1.0)


def _concatenate(call: Call) -> Made:
    call.refuse_others(2, "tensors", "dim")
    parts, dim = call.get(0, "tensors"), int(call.told(1, "dim", 0))
    dim = dim + len(call.shape) + 1 if dim < 0 else dim
    if not isinstance(parts, tuple | list):
        raise Unsupported("it joins parts that are not named one by one")
    if dim == 0 or not all(call.is_input(p) for p in parts):
        raise Unsupported("it joins along the batch, or joins constants")
    return ops.Concatenate(dim), list(parts)


_POOL = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")

FUNCTIONS: dict[Any, CallRule] = {
    torch.relu: _elementwise(ops.ReLU()),
    torch.relu_: _elementwise(ops.ReLU()),
    F.relu: _elementwise(ops.ReLU()),
    F.relu_: _elementwise(ops.ReLU()),
    F.leaky_relu: _leaky,
    torch.sigmoid: _elementwise(ops.Sigmoid()),
    F.sigmoid: _elementwise(ops.Sigmoid()),
    torch.tanh: _elementwise(ops.Tanh()),
    F.tanh: _elementwise(ops.Tanh()),
    torch.flatten: _flatten_call,
    torch.reshape: _flatten_call,
    torch.squeeze: _flatten_call,
    torch.unsqueeze: _flatten_call,
    torch.unflatten: _flatten_call,
    F.linear: _linear_call,
    F.conv1d: _conv_call,
    F.conv2d: _conv_call,
    F.conv3d: _conv_call,
    F.avg_pool1d: _averaging(F.avg_pool1d, *_POOL),
    F.avg_pool2d: _averaging(F.avg_pool2d, *_POOL, "divisor_override"),
    F.avg_pool3d: _averaging(F.avg_pool3d, *_POOL, "divisor_override"),
    F.adaptive_avg_pool1d: _averaging(F.adaptive_avg_pool1d, "output_size"),
    F.adaptive_avg_pool2d: _averaging(F.adaptive_avg_pool2d, "output_size"),
    F.adaptive_avg_pool3d: _averaging(F.adaptive_avg_pool3d, "output_size"),
    F.max_pool1d: _maximum(F.max_pool1d),
    F.max_pool2d: _maximum(F.max_pool2d),
    F.max_pool3d: _maximum(F.max_pool3d),
    F.pad: _pad_call,
    F.interpolate: _interpolate,
    operator.add: _sum(1),
    operator.iadd: _sum(1),
    torch.add: _sum(1),
    operator.sub: _sum(-1),
    operator.isub: _sum(-1),
    torch.sub: _sum(-1),
    operator.mul: _product,
    operator.imul: _product,
    torch.mul: _product,
    operator.truediv: _quotient,
    operator.itruediv: _quotient,
    torch.div: _quotient,
    operator.neg: _negative,
    torch.neg: _negative,
    torch.cat: _concatenate,
    torch.concat: _concatenate,
    torch.concatenate: _concatenate,
    torch.mean: _over(torch.mean),
    torch.sum: _over(torch.sum),
    torch.permute: _permute,
    torch.transpose: _transpose,
    torch.swapaxes: _transpose,
    operator.getitem: _slice,
    operator.matmul: _matmul,
    torch.matmul: _matmul,
    torch.mm: _matmul,
    torch.clamp: _clamp,
    torch.clip: _clamp,
    torch.clamp_min: _clamp_to("min"),
    torch.clamp_max: _clamp_to("max"),
    torch.clone: lambda _call: None,
    F.relu6: lambda _call: _between(0.0, 6.0),
    F.hardtanh: _hardtanh(-1.0, 1.0),
    F.dropout: _dropout,
    F.dropout1d: _dropout,
    F.dropout2d: _dropout,
    F.dropout3d: _dropout,
}

METHODS: dict[str, CallRule] = {
    "relu": _elementwise(ops.ReLU()),
    "relu_": _elementwise(ops.ReLU()),
    "sigmoid": _elementwise(ops.Sigmoid()),
    "tanh": _elementwise(ops.Tanh()),
    "flatten": _flatten_call,
    "view": _flatten_call,
    "reshape": _flatten_call,
    "squeeze": _flatten_call,
    "unsqueeze": _flatten_call,
    "unflatten": _flatten_call,
    "contiguous": lambda _call: None,
    "clone": lambda _call: None,
    "add": _sum(1),
    "add_": _sum(1),
    "sub": _sum(-1),
    "sub_": _sum(-1),
    "mul": _product,
    "mul_": _product,
    "div": _quotient,
    "div_": _quotient,
    "neg": _negative,
    "mean": _over(torch.mean),
    "sum": _over(torch.sum),
    "permute": _permute,
    "transpose": _transpose,
    "matmul": _matmul,
    "clamp": _clamp,
    "clamp_": _clamp,
    "clip": _clamp,
    "clamp_min": _clamp_to("min"),
    "clamp_max": _clamp_to("max"),
}

CUTS: dict[Any, int] = {torch.chunk: 2, torch.split: 2, torch.unbind: 1, "chunk": 2, "split": 2, "unbind": 1}
"""What cuts a value into a tuple of parts, and which argument says along which dimension."""

_LOSS = "it changes no answer: return the logits that it is given, and leave it to the loss"
ADVICE = dict.fromkeys(("Softmax", "LogSoftmax", "softmax", "log_softmax"), _LOSS)

# What may be done with parameters and buffers on the way: the same every time, and nothing is overwritten.
_STEADY: set[Any] = {
    *(operator.add, operator.sub, operator.mul, operator.truediv, operator.neg, operator.pow),
    *(operator.getitem, torch.reshape, torch.flatten, torch.squeeze, torch.unsqueeze, torch.permute),
    *(torch.transpose, torch.t, torch.add, torch.sub, torch.mul, torch.div, torch.neg, torch.exp, torch.sqrt),
    *(torch.abs, torch.square, torch.relu, torch.tanh, torch.sigmoid, F.relu, F.softplus),
    *("view", "reshape", "flatten", "squeeze", "unsqueeze", "permute", "transpose", "t", "T", "mT"),
    *("contiguous", "add", "sub", "mul", "div", "neg", "exp", "sqrt", "abs", "square", "pow"),
    *("relu", "tanh", "sigmoid"),
}

# What a tensor says of its shape, and what may be reckoned from that.
_SHAPES = frozenset(["shape", "ndim", "size", "dim", "ndimension", "numel", "nelement"])
_ARITHMETIC = frozenset(f for module in (operator, math) for f in vars(module).values() if callable(f))

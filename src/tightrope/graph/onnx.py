"""Networks from ONNX files and back.

A file becomes an `nn.Module`, which is traced and bounded like any other. What is read is run against
onnxruntime on random inputs, so that a difference between this reader and the standard is an error, not a
wrong verdict. The table at the end says which operators can be read.
"""

from __future__ import annotations

import copy
import logging
import operator
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tightrope.errors import InputError, UnsupportedOperatorError
from tightrope.extras import require
from tightrope.files import write_atomically

Shape = tuple[int, ...]
Value = Any  # a tensor, or what stands for one while a network is traced

TOLERANCE = 1e-4  # of outputs in float32, relative to the largest
_TRIES = 16  # random inputs that a network is compared on
_FLOATS = {1: torch.float32, 11: torch.float64}  # by onnx.TensorProto.DataType


class OnnxNetwork(nn.Module):
    """A feed-forward network as an ONNX file describes it, on batches of examples.

    Args:
        input_shape: shape of one input, without the batch dimension.
        layers: names, modules, what each reads and what it yields, in order.
        source: what the input is called there.
        result: which value is the output.
    """

    def __init__(
        self,
        input_shape: Shape,
        layers: Sequence[tuple[str, nn.Module, tuple[str, ...], str]],
        source: str,
        result: str,
    ) -> None:
        super().__init__()
        self.input_shape, self.source, self.result = input_shape, source, result
        self.layers = nn.ModuleDict({name: module for name, module, _, _ in layers})
        self.wiring = [(name, inputs, output) for name, _, inputs, output in layers]

    def forward(self, x: Value) -> Value:
        """The logits."""
        values = {self.source: x}
        for name, inputs, output in self.wiring:
            values[output] = self.layers[name](*(values[i] for i in inputs))
        return values[self.result]


def read_onnx(path: Path) -> OnnxNetwork:
    """The network in an ONNX file, in evaluation mode, without gradients.

    The input may have a batch dimension, of any size or of one, or none. What only depends on constants is
    computed when it is read. Where onnxruntime is installed, the network is compared with it on random
    inputs.

    Args:
        path: the file.

    Raises:
        UnsupportedOperatorError: names every operator that cannot be read, with its node.
        InputError: if the file is missing or broken, its network is not one from a floating-point input to
            logits, it computes something else than onnxruntime, or the package onnx is not installed.
    """
    onnx = require("onnx", "onnx", "reading an ONNX file")
    if not path.is_file():
        raise InputError(f"{path} is missing")
    try:
        model = onnx.load(path)
        onnx.checker.check_model(model)
    except Exception as error:  # protobuf's, onnx's and the system's
        reason = " ".join(str(error).split())[:400]
        raise InputError(f"{path} is not a valid ONNX file ({reason}); export it again") from None
    return _read(model, str(path))


def write_onnx(module: nn.Module, input_shape: Sequence[int], path: Path) -> None:
    """Write a network in float32 to an ONNX file, whose batch may have any size.

    It is read back first, and what was read compared with the network and with onnxruntime.

    Args:
        module: a network that `trace` takes; it is exported in evaluation mode, whatever mode it is in.
        input_shape: shape of one input, without the batch dimension.
        path: the file.

    Raises:
        InputError: if the network cannot be exported, what is read back computes something else, the file
            cannot be written, or the packages that it takes are not installed.
    """
    purpose = "writing an ONNX file"
    require("onnx", "onnx", purpose)
    require("onnxscript", "onnx", purpose)
    network = copy.deepcopy(module).to("cpu", torch.float32).eval().requires_grad_(False)
    x = torch.rand(_TRIES, *input_shape, generator=torch.Generator().manual_seed(0))
    model = _export(network, x[:2])
    _agree(_read(model, str(path)), network, x, f"{path}: what was exported and the network")
    write_atomically(path, model.SerializeToString())


def _export(network: nn.Module, x: Tensor) -> Any:
    """The network as an `onnx.ModelProto`."""
    batch = torch.export.Dim("batch")
    try:
        with warnings.catch_warnings(), _quiet("torch.onnx._internal.exporter._registration"):
            warnings.simplefilter("ignore")  # the exporter's own, on itself
            program = torch.onnx.export(
                network,
                (x,),
                dynamo=True,
                verbose=False,
                input_names=["x"],
                output_names=["logits"],
                dynamic_shapes=({0: batch},),
            )
    except Exception as error:
        reason = " ".join(str(error).split())[:400]
        raise InputError(f"PyTorch cannot export the network to ONNX: {reason}") from error
    assert program is not None
    model = program.model_proto
    # The exporter notes every line of Python that it came by, with its path on this machine.
    for part in (model.graph, *model.graph.node, *model.graph.input, *model.graph.output):
        part.ClearField("metadata_props")
    model.graph.ClearField("value_info")
    return model


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Without a logger's warnings: the exporter's, on packages that the network does not use."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


@torch.no_grad()
def _agree(network: nn.Module, other: Callable[[Tensor], Tensor], x: Tensor, what: str) -> None:
    """Raise an InputError unless both yield the same logits, up to rounding in float32."""
    mine, theirs = network(x), other(x)
    if mine.shape == theirs.shape:
        difference = float((mine - theirs).abs().max())
        if difference <= TOLERANCE * max(1.0, float(theirs.abs().max())):
            return
        seen = f"the largest difference of {len(x)} random inputs' logits is {difference:.3g}"
    else:
        seen = f"their logits have shapes {tuple(mine.shape)} and {tuple(theirs.shape)}"
    raise InputError(f"{what} do not agree: {seen}. Nothing can be said about such a network; report it")


class _Unsupported(Exception):
    """Why one node cannot be read."""


@dataclass(frozen=True)
class _Value:
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


def _lead(shape: Shape) -> int:
    return int(len(shape) > 1 and shape[0] == 1)


def _read(model: Any, where: str) -> OnnxNetwork:
    reader = _Reader(model, where)
    network = reader.network().eval().requires_grad_(False)
    _compare_with_runtime(network, model, reader.input.shape, where)
    return network


def _compare_with_runtime(network: OnnxNetwork, model: Any, shape: Shape, where: str) -> None:
    try:
        import onnxruntime
    except ImportError:
        warnings.warn(
            f"{where} was read but not compared with onnxruntime, which is not installed: "
            "pip install 'tightrope[onnx]'",
            stacklevel=5,
        )
        return
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    dtype = next((t.dtype for t in network.state_dict().values()), torch.float32)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(_TRIES, *network.input_shape, generator=generator).to(dtype)
    x[::2] = torch.randn(x[::2].shape, generator=generator).to(dtype)  # beyond images too

    def runtime(x: Tensor) -> Tensor:
        found = [session.run(None, {name: one.reshape(shape).numpy()})[0] for one in x]
        return torch.from_numpy(np.stack(found)).flatten(1)

    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        runtime(x[:1])
    except Exception as error:
        reason = " ".join(str(error).split())[:400]
        raise InputError(f"onnxruntime cannot run {where}, so it cannot be checked: {reason}") from error
    _agree(network, runtime, x, f"{where}: what was read and onnxruntime")


class _Reader:
    """Goes through an ONNX graph once."""

    def __init__(self, model: Any, where: str) -> None:
        from onnx import numpy_helper

        self.model, self.where = model, where
        graph = model.graph
        self.constants: dict[str, np.ndarray] = {
            tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer
        }
        inputs = [i for i in graph.input if i.name not in self.constants]
        if len(inputs) != 1 or len(graph.output) != 1:
            raise InputError(
                f"{where} has {len(inputs)} inputs and {len(graph.output)} outputs; tightrope takes networks "
                "with one of each"
            )
        self.dtype, self.input = self._input(inputs[0])
        self.values: dict[str, _Value | None] = {self.input.name: self.input}  # None: behind a problem
        self.layers: list[tuple[str, nn.Module, tuple[str, ...], str]] = []
        self.problems: list[str] = []

    def _input(self, info: Any) -> tuple[torch.dtype, _Value]:
        tensor = info.type.tensor_type
        if tensor.elem_type not in _FLOATS:
            raise InputError(
                f"{self.where}: the input {info.name!r} is not of type float32 or float64; export it as such"
            )
        sizes = [d.dim_value if d.HasField("dim_value") else 0 for d in tensor.shape.dim]
        if not sizes or any(size < 1 for size in sizes[1:]):
            raise InputError(
                f"{self.where}: the input {info.name!r} has no fixed shape; export it with one (the size of "
                "the batch may be left open)"
            )
        shape = (sizes[0] or 1, *sizes[1:])
        return _FLOATS[tensor.elem_type], _Value(shape, _lead(shape), info.name)

    def network(self) -> OnnxNetwork:
        """The network, once every node has been read."""
        for place, node in enumerate(self.model.graph.node):
            self._node(node, f"{place}_{re.sub(r'[^A-Za-z0-9_]', '_', node.name or node.op_type)}")
        if self.problems:
            raise UnsupportedOperatorError(
                f"tightrope cannot read these operators of {self.where}:\n" + "\n".join(self.problems) + "\n"
                "Replace them (docs/onnx.md lists what is supported), or ask for them in an issue."
            )
        result = self.values.get(self.model.graph.output[0].name)
        if result is None:
            raise InputError(f"{self.where}: the output does not depend on the input")
        if len(result.example) != 1:
            result = self._add("logits", _View((int(np.prod(result.example)),)), (result,), "logits")
        return OnnxNetwork(self.input.example, self.layers, self.input.name, result.name)

    def _add(self, name: str, module: nn.Module, inputs: tuple[_Value, ...], output: str) -> _Value:
        """Append a step; its output's shape is found by running it on zeros."""
        module = module.to(self.dtype).eval()
        try:
            with torch.no_grad():
                found = module(*(torch.zeros(1, *value.example, dtype=self.dtype) for value in inputs))
        except Exception as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise _Unsupported(f"it does not fit its input: {reason}") from error
        self.layers.append((name, module, tuple(value.name for value in inputs), output))
        example = tuple(found.shape[1:])
        if isinstance(module, _View):
            return _Value(module.written, _lead(module.written), output)
        return _Value((1,) * inputs[0].lead + example, inputs[0].lead, output)

    def _node(self, node: Any, name: str) -> None:
        label = f"  {node.name or '(without a name)'} ({node.op_type})"
        domain = "" if node.domain in ("", "ai.onnx") else node.domain
        wanted = [i for i in node.input if i]
        try:
            if all(i in self.constants for i in wanted):
                self._fold(node)
                return
            rule = None if domain else _RULES.get(node.op_type)
            if node.op_type == "Shape" and not domain:
                self._shape(node)
                return
            if rule is None:
                raise _Unsupported(_HINTS.get(node.op_type, "not supported"))
            if any(self.values.get(i, self.input) is None for i in wanted):
                self.values.update(dict.fromkeys(node.output))
                return
            self._step(node, name, rule)
        except _Unsupported as reason:
            self.problems.append(f"{label}: {reason}")
            self.values.update(dict.fromkeys(node.output))

    def _step(self, node: Any, name: str, rule: Rule) -> None:
        call = _Call(node, self.constants, self.values)
        module, output = rule(call), node.output[0]
        extra = [o for o in node.output[1:] if o]
        if extra and any(o in n.input for n in self.model.graph.node for o in extra):
            raise _Unsupported("only its first output is supported")
        if module is None:
            self.values[output] = call.value(0)
        else:
            self.values[output] = self._add(name, module, call.inputs(), output)

    def _shape(self, node: Any) -> None:
        value = self.values[node.input[0]]
        if value is None:
            self.values.update(dict.fromkeys(node.output))
            return
        given = {a.name: a.i for a in node.attribute}
        shape = value.shape[given.get("start", 0) : given.get("end", len(value.shape))]
        self.constants[node.output[0]] = np.array(shape, dtype=np.int64)

    def _fold(self, node: Any) -> None:
        """Compute what depends on constants alone."""
        from onnx import helper
        from onnx.reference import ReferenceEvaluator

        if node.op_type.startswith(("Random", "Bernoulli", "Multinomial")):
            raise _Unsupported("it is random")
        names = list(dict.fromkeys(i for i in node.input if i))
        nothing = helper.make_empty_tensor_value_info
        graph = helper.make_graph([node], "fold", list(map(nothing, names)), list(map(nothing, node.output)))
        one = helper.make_model(graph, opset_imports=self.model.opset_import)
        try:
            found = ReferenceEvaluator(one).run(None, {name: self.constants[name] for name in names})
        except Exception as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise _Unsupported(f"it cannot be computed from its constants: {reason}") from error
        self.constants.update(zip(node.output, map(np.asarray, found), strict=True))


class _Call:
    """One node, with a uniform way to read what it is given."""

    def __init__(self, node: Any, constants: dict[str, np.ndarray], values: dict[str, _Value | None]) -> None:
        from onnx import helper

        self.op_type: str = node.op_type
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
            raise _Unsupported(f"its {what} must be constant")
        return self._constants[self._names[position]]

    def list(self, attribute: str, position: int) -> list[int] | None:
        """Whole numbers that older files give as an attribute, newer ones as an input."""
        if self.has(position):
            return [int(i) for i in self.constant(position, attribute).ravel()]
        given: list[int] | None = self.get(attribute, None)
        return given

    def tensor(self, position: int, what: str) -> Tensor:
        """A constant input as a tensor of its own."""
        tensor = torch.from_numpy(np.array(self.constant(position, what)))
        return tensor if tensor.is_floating_point() else tensor.float()

    def value(self, position: int) -> _Value:
        """An input that depends on the network's."""
        if not self.has(position) or self.is_constant(position):
            raise _Unsupported("it does not read the network's input where it should")
        value = self._values[self._names[position]]
        assert value is not None
        return value

    def inputs(self) -> tuple[_Value, ...]:
        """All such inputs, in order."""
        return tuple(
            self.value(i) for i in range(len(self._names)) if self.has(i) and not self.is_constant(i)
        )


# ------------------------------------------------------------------------------------------ modules


class _View(nn.Module):
    """The same entries in another shape; `written` is the shape in the file, for one example."""

    def __init__(self, written: Shape) -> None:
        super().__init__()
        self.written = written

    def forward(self, x: Value) -> Value:
        return x.reshape(x.shape[0], *self.written[_lead(self.written) :])


class _Of(nn.Module):
    """A function of values, and of a constant if there is one."""

    def __init__(self, function: Callable[..., Value], constant: Tensor | None = None) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("constant", constant)

    def forward(self, *values: Value) -> Value:
        return self.function(*values) if self.constant is None else self.function(*values, self.constant)


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

Rule = Callable[[_Call], nn.Module | None]


def _plain(module: type[nn.Module]) -> Rule:
    return lambda _call: module()


def _nothing(_call: _Call) -> None:
    return None


def _gemm(call: _Call) -> nn.Module:
    if call.get("transA", 0) or len(call.value(0).shape) != 2:
        raise _Unsupported("its first argument must be a matrix with an example in each row")
    weight = call.tensor(1, "second argument") * call.get("alpha", 1.0)
    weight = weight if call.get("transB", 0) else weight.T
    if not call.has(2):
        return _linear(weight)
    bias = call.tensor(2, "bias") * call.get("beta", 1.0)
    if bias.numel() not in (1, len(weight)):
        raise _Unsupported("its bias must be one number per output")
    return _linear(weight, bias.flatten().expand(len(weight)).clone())


def _matmul(call: _Call) -> nn.Module:
    left = call.is_constant(0)
    weight = call.tensor(0 if left else 1, "second factor (a product of two values is not affine)")
    while weight.ndim > 2 and len(weight) == 1:
        weight = weight.squeeze(0)
    if weight.ndim != 2:
        raise _Unsupported(f"its constant must be a matrix, got shape {tuple(weight.shape)}")
    if not left:
        return _linear(weight.T)
    example = call.value(1).example
    if len(example) == 1:
        return _linear(weight)
    if len(example) != 2 or example[1] != 1:
        raise _Unsupported("a constant times a matrix is not supported, only times a column")
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
        raise _Unsupported(f"{dimensions} dimensions are not supported")
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


def _window(call: _Call, kernel: Sequence[int]) -> _Window:
    example, count = call.value(0).example, len(kernel)
    if len(example) != count + 1:
        raise _Unsupported(f"its input must have a batch, channels and {count} more dimensions")
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


def _conv(call: _Call) -> nn.Module:
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


def _batch_norm(call: _Call) -> nn.Module:
    if call.get("training_mode", 0):
        raise _Unsupported("it is in training mode, where it depends on the rest of the batch")
    scale, bias, mean, variance = (call.tensor(i, "statistics") for i in range(1, 5))
    norm = _of_dimension(_NORMS, len(call.value(0).example))(len(scale), eps=call.get("epsilon", 1e-5))
    return _filled(norm, weight=scale, bias=bias, running_mean=mean, running_var=variance)


def _leaky_relu(call: _Call) -> nn.Module:
    return nn.LeakyReLU(call.get("alpha", 0.01))


def _max_pool(call: _Call) -> nn.Module:
    window = _window(call, call.get("kernel_shape", []))
    if window.padding is None:
        raise _Unsupported("its padding must be the same on both sides")
    make = _of_dimension(_MAXIMA, len(window.kernel))
    return make(
        window.kernel,
        window.stride,
        window.padding,
        window.dilation,
        ceil_mode=bool(call.get("ceil_mode", 0)),
    )


def _average_pool(call: _Call) -> nn.Module:
    window = _window(call, call.get("kernel_shape", []))
    if set(window.dilation) != {1}:
        raise _Unsupported("dilation is not supported here")
    counted = bool(call.get("count_include_pad", 0))
    ceil = bool(call.get("ceil_mode", 0))
    make = _of_dimension(_AVERAGES, len(window.kernel))
    if window.padding is not None:
        return make(window.kernel, window.stride, window.padding, ceil, counted)
    if not counted or ceil:
        raise _Unsupported("its padding must be the same on both sides")
    return nn.Sequential(window.padded(), make(window.kernel, window.stride))


def _global_average(call: _Call) -> nn.Module:
    return _of_dimension(_GLOBAL, len(call.value(0).example) - 1)(1)


def _mean(call: _Call) -> nn.Module:
    value, axes = call.value(0), call.list("axes", 1)
    shape = value.shape
    wanted = list(range(2, len(shape)))
    if not axes or value.lead != 1 or sorted(a % len(shape) for a in axes) != wanted:
        raise _Unsupported("only a mean over all dimensions but batch and channels is supported")
    if call.get("keepdims", 1):
        return _global_average(call)
    return nn.Sequential(_global_average(call), nn.Flatten())


def _flatten(call: _Call) -> nn.Module:
    shape, axis = call.value(0).shape, call.get("axis", 1)
    axis = axis + len(shape) if axis < 0 else axis
    return _View((int(np.prod(shape[:axis])), int(np.prod(shape[axis:]))))


def _reshape(call: _Call) -> nn.Module:
    shape, target = call.value(0).shape, call.list("shape", 1)
    if target is None or (call.get("allowzero", 0) and 0 in target):
        raise _Unsupported("its shape is missing or empty")
    sizes = [shape[i] if size == 0 else size for i, size in enumerate(target)]
    try:
        return _View(tuple(torch.empty(shape, device="meta").reshape(sizes).shape))
    except RuntimeError:
        raise _Unsupported(f"it cannot give {shape} the shape {tuple(target)}") from None


def _squeeze(call: _Call) -> nn.Module:
    shape, axes = call.value(0).shape, call.list("axes", 1)
    gone = {i for i, n in enumerate(shape) if n == 1} if axes is None else {a % len(shape) for a in axes}
    left = tuple(n for i, n in enumerate(shape) if i not in gone)
    return _View(left or (1,))


def _unsqueeze(call: _Call) -> nn.Module:
    axes = call.list("axes", 1) or []
    shape = list(call.value(0).shape)
    rank = len(shape) + len(axes)
    for axis in sorted(a % rank for a in axes):
        shape.insert(axis, 1)
    return _View(tuple(shape))


def _transpose(call: _Call) -> nn.Module:
    shape = call.value(0).shape
    order = call.get("perm", list(reversed(range(len(shape)))))
    moved = [i for i in order if shape[i] != 1]
    if moved != sorted(moved):
        raise _Unsupported("it is not only a reshape: export the network with channels first")
    return _View(tuple(shape[i] for i in order))


def _cast(call: _Call) -> None:
    if call.get("to", 0) not in _FLOATS:
        raise _Unsupported("it rounds: only casts to float32 and float64 are supported")


def _dropout(call: _Call) -> None:
    if call.has(2) and bool(call.constant(2, "mode")):
        raise _Unsupported("it is in training mode")


def _arithmetic(function: Callable[..., Value]) -> Rule:
    """`+`, `-`, `*` or `/` of a value with a constant, or of two values where that is affine."""

    def rule(call: _Call) -> nn.Module:
        affine = function in (operator.add, operator.sub)
        if not (call.is_constant(0) or call.is_constant(1)):
            if not affine:
                raise _Unsupported("of two values it is not affine")
            if call.value(0).example != call.value(1).example:
                raise _Unsupported("it broadcasts one value to the shape of another")
            return _Of(function)
        first = call.is_constant(0)
        if first and function is operator.truediv:
            raise _Unsupported("a constant divided by a value is not affine")
        constant = _beside(call.tensor(int(not first), "argument"), call.value(int(first)).example)
        return _Of(_taken_from if first and function is operator.sub else function, constant)

    return rule


def _beside(constant: Tensor, example: Shape) -> Tensor:
    """The constant as it stands beside every example of a batch."""
    while constant.ndim > len(example) and len(constant) == 1:
        constant = constant.squeeze(0)
    fits = constant.ndim <= len(example) and all(
        c in (1, n) for c, n in zip(reversed(constant.shape), reversed(example), strict=False)
    )
    if not fits:
        raise _Unsupported(f"it broadcasts a value of shape {example} to that of a constant")
    return constant


def _concatenate(call: _Call) -> nn.Module:
    values = call.inputs()
    axis = call.get("axis", 0)
    axis = axis + len(values[0].shape) if axis < 0 else axis
    if len({value.lead for value in values}) > 1 or axis < values[0].lead:
        raise _Unsupported("it joins along the batch")
    if len(values) < call.count:
        raise _Unsupported("it joins constants")
    return _Joined(axis - values[0].lead + 1)


def _pad(call: _Call) -> nn.Module:
    value, pads = call.value(0), call.list("pads", 1)
    rank = len(value.shape)
    axes = call.list("axes", 3) if call.has(3) else None
    amount = float(call.constant(2, "value")) if call.has(2) else float(call.get("value", 0.0))
    if call.get("mode", "constant") != "constant" or not np.isfinite(amount) or pads is None:
        raise _Unsupported("only padding with a finite constant is supported")
    ends = [(0, 0)] * rank
    count = len(pads) // 2
    for i, axis in enumerate(range(rank) if axes is None else axes):
        ends[axis % rank] = (pads[i], pads[i + count])
    if ends[: value.lead] != [(0, 0)] * value.lead:
        raise _Unsupported("it pads the batch dimension")
    ends = ends[value.lead :]
    while len(ends) > 1 and ends[0] == (0, 0):
        ends.pop(0)
    return _of_dimension(_PADS, len(ends))(tuple(e for pair in reversed(ends) for e in pair), amount)


_HINTS = {
    name: f"not supported; {name} does not change which class wins: export the network without it"
    for name in ("Softmax", "LogSoftmax")
}

_RULES: dict[str, Rule] = {
    "Add": _arithmetic(operator.add),
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Cast": _cast,
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
    "ReduceMean": _mean,
    "Relu": _plain(nn.ReLU),
    "Reshape": _reshape,
    "Sigmoid": _plain(nn.Sigmoid),
    "Squeeze": _squeeze,
    "Sub": _arithmetic(operator.sub),
    "Tanh": _plain(nn.Tanh),
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}

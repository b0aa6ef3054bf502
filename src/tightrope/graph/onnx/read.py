"""Networks from ONNX files.

A file becomes an `nn.Module`, which is traced and bounded like any other. What is read is run against
onnxruntime on random inputs, so that a difference between this reader and the standard is an error, not a
wrong verdict.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tightrope.errors import InputError, UnsupportedOperatorError, warn
from tightrope.extras import require
from tightrope.graph.onnx.rules import (
    FLOATS,
    HINTS,
    RULES,
    Call,
    Grown,
    Known,
    Rule,
    Shape,
    Unsupported,
    Value,
    View,
    lead_of,
)

OLDEST = 7  # opset; before, operators broadcast by attributes
TOLERANCE = 1e-4  # of an output in float32, relative to how much it varies
ABSOLUTE = 1e-7  # by how much runtimes are off in sigmoid and tanh, even near 0
TRIES = 16  # random inputs that a network is compared on


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
    computed when it is read, in the file's own precision. Weights and constants are those of the file: the
    network is in float32 if the input is and these are exact in it, else in float64. Where onnxruntime is
    installed, the network is compared with it on random inputs.

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
    except PermissionError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; check its permissions") from None
    except Exception as error:  # protobuf's, onnx's and the system's
        reason = " ".join(str(error).split())[:400]
        raise InputError(f"{path} is not a valid ONNX file ({reason}); export it again") from None
    return read(model, str(path))


def read(model: Any, where: str) -> OnnxNetwork:
    """The network that an `onnx.ModelProto` describes; `where` says where it is from. See `read_onnx`."""
    reader = _Reader(model, where)
    network = reader.network().eval().requires_grad_(False)
    _compare_with_runtime(network, model, reader, where)
    return network


def _compare_with_runtime(network: OnnxNetwork, model: Any, reader: _Reader, where: str) -> None:
    try:
        import onnxruntime
    except ImportError:
        warn(
            f"{where} was read but not compared with onnxruntime, which is not installed: "
            "pip install 'tightrope[onnx]'",
        )
        return
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(TRIES, *network.input_shape, generator=generator)
    x[::2] = torch.randn(x[::2].shape, generator=generator)  # beyond images too
    x = x.to(next((t.dtype for t in network.state_dict().values()), torch.float32))

    def runtime(x: Tensor) -> Tensor:
        rows = x.to(reader.dtype).reshape(-1, *reader.input.shape)
        found = [session.run(None, {name: one.numpy()})[0] for one in rows]
        return torch.from_numpy(np.stack(found)).flatten(1)

    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        runtime(x[:1])
    except Exception as error:
        reason = " ".join(str(error).split())[:400]
        raise InputError(f"onnxruntime cannot run {where}, so it cannot be checked: {reason}") from error
    agree(network, runtime, x, f"{where}: what was read and onnxruntime")


class _Reader:
    """Goes through an ONNX graph once."""

    def __init__(self, model: Any, where: str) -> None:
        from onnx import numpy_helper

        self.model, self.where = model, where
        graph = model.graph
        opset = max((one.version for one in model.opset_import if one.domain in ("", "ai.onnx")), default=0)
        if opset < OLDEST or graph.sparse_initializer:
            found = "sparse constants" if graph.sparse_initializer else f"opset {opset}"
            raise InputError(
                f"{where} has {found}; tightrope reads dense constants and operators from opset {OLDEST} on: "
                "export it again (or convert it with onnx.version_converter)"
            )
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
        self.values: dict[str, Known | None] = {self.input.name: self.input}  # None: behind a problem
        self.layers: list[tuple[str, nn.Module, tuple[str, ...], str]] = []
        self.problems: list[str] = []

    def _input(self, info: Any) -> tuple[torch.dtype, Known]:
        tensor = info.type.tensor_type
        if tensor.elem_type not in FLOATS:
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
        return FLOATS[tensor.elem_type], Known(shape, lead_of(shape), info.name)

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
            result = self._add("logits", View((int(np.prod(result.example)),)), (result,), "logits")
        network = OnnxNetwork(self.input.example, self.layers, self.input.name, result.name)
        numbers = [n for n in network.state_dict().values() if n.is_floating_point()]
        exact = all(torch.equal(n.to(self.dtype).to(n), n) for n in numbers)
        return network.to(self.dtype) if exact else network

    def _add(self, name: str, module: nn.Module, inputs: tuple[Known, ...], output: str) -> Known:
        """Append a step; its output's shape is found by running it on zeros."""
        module = module.to(torch.float64).eval()
        try:
            with torch.no_grad():
                found = module(*(torch.zeros(1, *value.example, dtype=torch.float64) for value in inputs))
        except Exception as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise Unsupported(f"it does not fit its input: {reason}") from error
        self.layers.append((name, module, tuple(value.name for value in inputs), output))
        example = tuple(found.shape[1:])
        if isinstance(module, View | Grown):
            return Known(module.written, lead_of(module.written), output)
        return Known((1,) * inputs[0].lead + example, inputs[0].lead, output)

    def _node(self, node: Any, name: str) -> None:
        label = f"  {node.name or '(without a name)'} ({node.op_type})"
        domain = "" if node.domain in ("", "ai.onnx") else node.domain
        wanted = [i for i in node.input if i]
        try:
            if all(i in self.constants for i in wanted):
                self._fold(node)
                return
            rule = None if domain else RULES.get(node.op_type)
            if node.op_type == "Shape" and not domain:
                self._shape(node)
                return
            if rule is None:
                raise Unsupported(HINTS.get(node.op_type, "not supported"))
            if any(self.values.get(i, self.input) is None for i in wanted):
                self.values.update(dict.fromkeys(node.output))
                return
            self._step(node, name, rule)
        except Unsupported as reason:
            self.problems.append(f"{label}: {reason}")
            self.values.update(dict.fromkeys(node.output))

    def _step(self, node: Any, name: str, rule: Rule) -> None:
        call = Call(node, self.constants, self.values)
        module, output = rule(call), node.output[0]
        if isinstance(module, list):
            for i, (part, each) in enumerate(zip(module, node.output, strict=True)):
                self.values[each] = self._add(f"{name}_{i}", part, call.inputs(), each)
            return
        extra = [o for o in node.output[1:] if o]
        if extra and any(o in n.input for n in self.model.graph.node for o in extra):
            raise Unsupported("only its first output is supported")
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
            raise Unsupported("it is random")
        names = list(dict.fromkeys(i for i in node.input if i))
        nothing = helper.make_empty_tensor_value_info
        graph = helper.make_graph([node], "fold", list(map(nothing, names)), list(map(nothing, node.output)))
        one = helper.make_model(graph, opset_imports=self.model.opset_import)
        try:
            found = ReferenceEvaluator(one).run(None, {name: self.constants[name] for name in names})
        except Exception as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise Unsupported(f"it cannot be computed from its constants: {reason}") from error
        self.constants.update(zip(node.output, map(np.asarray, found), strict=True))


@torch.no_grad()
def agree(network: nn.Module, other: Callable[[Tensor], Tensor], x: Tensor, what: str) -> None:
    """Raise an InputError unless both yield the same logits, up to rounding in float32.

    Each logit is compared on its own scale: a class that is masked with a large number hides no other one.
    """
    mine, theirs = network(x), other(x)
    if mine.shape == theirs.shape:
        rounding = 1e-6 * theirs.abs() + 10 * _off_by(network, x, theirs.dtype)
        allowed = TOLERANCE * (theirs - theirs.mean(0)).abs().amax(0) + rounding.amax(0)
        difference = (mine - theirs).abs().amax(0)
        if bool((theirs.isfinite().all(0) & (difference <= allowed)).all()):
            return
        worst = float(difference.nan_to_num(torch.inf).max())
        seen = f"the largest difference of {len(x)} random inputs' logits is {worst:.3g}"
    else:
        seen = f"their logits have shapes {tuple(mine.shape)} and {tuple(theirs.shape)}"
    raise InputError(f"{what} do not agree: {seen}. Nothing can be said about such a network; report it")


def _off_by(network: nn.Module, x: Tensor, dtype: torch.dtype) -> Tensor:
    """How far logits may be off where they are computed in this precision, as it turns out here."""
    exact, rounded, shaken = (copy.deepcopy(network).double() for _ in range(3))
    generator = torch.Generator().manual_seed(0)

    def shake(_module: nn.Module, _inputs: Any, value: Tensor) -> Tensor:
        return value + ABSOLUTE * (torch.rand(value.shape, generator=generator) - 0.5).sign().to(value)

    for module in shaken.modules():
        if isinstance(module, nn.Sigmoid | nn.Tanh):
            module.register_forward_hook(shake)
    logits: Tensor = exact(x.double())
    off: Tensor = (shaken(x.double()) - logits).abs()
    if dtype == torch.float32:
        off = off + (rounded.float()(x.float()) - logits).abs()
    return off.nan_to_num(0.0, 0.0, 0.0)  # what overflows allows nothing

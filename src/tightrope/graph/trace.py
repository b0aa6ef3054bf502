"""From the user's `nn.Module` to a `Graph`, by symbolic tracing (torch.fx).

The tables at the end say which modules, functions and methods tightrope knows. Anything else is
reported, all at once, with its place in the network.
"""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import type_before_parametrizations

from tightrope.errors import InputError, UnsupportedOperatorError
from tightrope.graph import ops
from tightrope.graph.graph import Graph, Node, evaluation

_WRAPPERS = {"DataParallel": "module", "DistributedDataParallel": "module", "OptimizedModule": "_orig_mod"}
_SHAPES = {
    "shape",
    "ndim",
    "size",
    "dim",
    "ndimension",
    "numel",
    "nelement",
}  # what a tensor says of its shape
_CALL = nn.Module.__call__  # fx puts another one in its place while it traces
_BATCH = 2  # examples in the probing pass; more than one, so that a lost batch dimension shows


class _Unsupported(Exception):
    """Why one operator cannot be used."""


def trace(module: nn.Module, input_shape: Sequence[int]) -> Graph:
    """Trace a network into operators that share its live parameters.

    Args:
        module: any `nn.Module` from one batch of inputs to logits `(batch, classes)`, built of the
            operators in this file's tables. Its control flow may depend on shapes, not on values.
        input_shape: shape of one input, without the batch dimension.

    Raises:
        UnsupportedOperatorError: names every operator that cannot be bounded, with its module path.
        InputError: if the network does not take such inputs, is wrapped (`torch.compile`, `DataParallel`), or
            its parameters are not finite.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3), torch.nn.ReLU())
        >>> [node.name for node in trace(net, (1, 2, 2)).nodes]
        ['input', '0', '1', '2']
    """
    _check_finite(module)
    inside = [name for kind, name in _WRAPPERS.items() if type(module).__name__ == kind]
    if inside:
        raise InputError(
            f"the network is wrapped in {type(module).__name__}: give what is inside, model.{inside[0]}, "
            "which shares its parameters"
        )
    if _is_altered(module):
        raise UnsupportedOperatorError(
            "the network itself has forward hooks, or a forward that is not its class's, which a bound would "
            "not see: put it inside another module that does this in its forward"
        )
    with evaluation(module):
        try:
            fx_graph = _Tracer(input_shape).trace(module)
        except Exception as error:
            raise UnsupportedOperatorError(
                f"the network cannot be traced: {_reason(error)}. Its forward may branch on shapes, not on "
                "values; see docs/architecture.md for what a network may contain"
            ) from error
        values, stale = _probe(module, fx_graph, torch.Size(input_shape))
        graph = _translate(module, fx_graph, values, stale)
        _check_same(module, graph)
    return graph


def check_training_mode(module: nn.Module, input_shape: Sequence[int]) -> None:
    """Refuse a network whose forward calls other operators in training mode than in evaluation mode.

    Or one that holds gradients back by `torch.no_grad()`, which tracing does not see.

    What is trained is what was traced, and that is the network in evaluation mode: a branch on
    `self.training` would be left out in silence. `nn.Dropout` and BatchNorm are operators that know both.

    Raises:
        InputError: if its forward does.

    Example:
        >>> check_training_mode(torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Dropout()), (4,))
    """
    calls: list[list[tuple[Any, ...]]] = []
    with evaluation(module), torch.enable_grad():
        for mode in (False, True):
            module.train(mode)
            tracer = _Tracer(input_shape)
            nodes = tracer.trace(module).nodes
            calls.append([(n.op, n.target, str(n.args), str(n.kwargs)) for n in nodes])
            if tracer.without_gradients:
                raise InputError(
                    "the network computes under torch.no_grad() in its forward, and tightrope would train "
                    "that part all the same: freeze its parameters instead, by requires_grad_(False)"
                )
    if calls[0] != calls[1]:
        raise InputError(
            "the network's forward calls other operators in training mode than in evaluation mode (a branch "
            "on self.training?), and tightrope trains what it does in evaluation mode: use modules that know "
            "both modes, such as nn.Dropout and BatchNorm, and leave out heads that only training has"
        )


def recast(graph: Graph, dtype: torch.dtype) -> Graph:
    """A copy in evaluation mode with its own parameters, in another precision, without gradients."""
    module = copy.deepcopy(graph.module).to(dtype).eval().requires_grad_(False)
    return trace(module, graph.input_shape)


class _Shaped(fx.Proxy):
    """A proxy whose shape can be asked for while tracing."""

    tracer: _Tracer

    def __len__(self) -> int:
        return len(self.tracer.about_shapes(self, _BATCH))

    def __getattr__(self, name: str) -> fx.proxy.Attribute:
        return _Attribute(self, name)


class _Attribute(_Shaped, fx.proxy.Attribute):
    """An attribute of a proxy: its shape, or a method that is about to be called."""


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True  # so that nothing is computed from a buffer once and for all
    without_gradients = False  # whether something was computed without them

    def __init__(self, input_shape: Sequence[int]) -> None:
        super().__init__()
        self.input_shape = input_shape

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        self.without_gradients |= not torch.is_grad_enabled()
        return super().create_node(*args, **kwargs)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor):
            owned = (*self.root.parameters(), *self.root.buffers(), *self.tensor_attrs)
            if not any(a is tensor for tensor in owned):
                raise _Unsupported("it makes a tensor in its forward; register that as a buffer instead")
        return super().create_arg(a)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        known = type_before_parametrizations(m) in _MODULES
        return known or super().is_leaf_module(m, module_qualified_name)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Shaped(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """A condition on shapes holds for every batch of such inputs, or for none."""
        answers = {bool(self.about_shapes(obj, batch)) for batch in (1, _BATCH, _BATCH + 1)}
        if len(answers) > 1:
            raise _Unsupported("it branches on how many examples a batch has")
        return answers.pop()

    def iter(self, obj: fx.Proxy) -> Iterator[fx.Proxy]:
        """The entries of a shape."""
        return (operator.getitem(obj, i) for i in range(len(self.about_shapes(obj, _BATCH))))

    def about_shapes(self, obj: fx.Proxy, batch: int) -> Any:
        """What a proxy stands for in a batch of so many examples, if their shape determines it."""
        rests_on, shapes = {obj.node}, set[fx.Node]()
        for n in reversed(self.graph.nodes):
            rests_on.update(n.all_input_nodes if n in rests_on else ())
        for n in self.graph.nodes:
            if n not in rests_on or n.op not in ("call_function", "call_method"):
                continue
            reads_shape = n.target in _SHAPES or (n.target is getattr and n.args[1] in _SHAPES)
            if reads_shape or (n.all_input_nodes and shapes.issuperset(n.all_input_nodes)):
                shapes.add(n)
            elif n.target not in _FUNCTIONS and n.target not in _METHODS:
                break  # the shape of what this yields may depend on values
        else:
            if obj.node in shapes:
                return self._value(obj.node, batch)
        raise _Unsupported("it branches on values, or iterates over them")

    def _value(self, node: fx.Node, batch: int) -> Any:
        """What a node yields for zeros."""
        graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
        graph.graph_copy(self.graph, copies)
        graph.output(copies[node])
        root = copy.deepcopy(self.root).eval()  # a pass in training mode would move statistics
        like = _like(root)
        x = torch.zeros(batch, *self.input_shape, dtype=like.dtype, device=like.device)
        tracing = nn.Module.__call__
        nn.Module.__call__ = _CALL  # type: ignore[method-assign]
        try:
            with torch.inference_mode(False), torch.no_grad():
                return fx.Interpreter(fx.GraphModule(root, graph)).run(x)
        finally:
            nn.Module.__call__ = tracing  # type: ignore[method-assign]


def _is_altered(module: nn.Module) -> bool:
    """Whether a call does something else than the forward of the module's class."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _like(module: nn.Module) -> Tensor:
    """A tensor with the dtype and device of the network's parameters."""
    tensors = (t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point())
    return next(tensors, torch.empty(0))


def _check_finite(module: nn.Module) -> None:
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if is_lazy(tensor):
            raise InputError(f"the network's `{name}` has no shape yet: call the network once, on a batch")
        if tensor.is_floating_point() and not tensor.is_meta and not bool(torch.isfinite(tensor).all()):
            raise InputError(
                f"the network's `{name}` holds NaN or Inf in {tensor.dtype}; nothing can be said about such "
                "a network"
            )


@torch.inference_mode(False)
@torch.no_grad()
def _probe(module: nn.Module, graph: fx.Graph, shape: torch.Size) -> tuple[dict[fx.Node, Any], set[fx.Node]]:
    """Run the network once, on zeros.

    Returns:
        What every fx node yields, and the nodes that read a value which was overwritten in place.
    """
    values: dict[fx.Node, Any] = {}
    versions: dict[fx.Node, int] = {}
    stale: set[fx.Node] = set()

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            if any(values[i]._version != versions[i] for i in n.all_input_nodes if i in versions):
                stale.add(n)
            values[n] = super().run_node(n)
            if isinstance(values[n], Tensor) and not values[n].is_inference():
                versions[n] = values[n]._version
            return values[n]

    if len([n for n in graph.nodes if n.op == "placeholder"]) != 1:
        raise UnsupportedOperatorError("the network must take exactly one input tensor")
    like = _like(module)
    x = torch.zeros(_BATCH, *shape, dtype=like.dtype, device=like.device)
    try:
        Recorder(fx.GraphModule(module, graph)).run(x)
    except Exception as error:
        raise InputError(
            f"the network does not take inputs of shape {tuple(shape)}: {_reason(error)}"
        ) from error
    return values, stale


def _reason(error: Exception) -> str:
    """The first line of an error's message."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def _translate(module: nn.Module, graph: fx.Graph, values: dict[fx.Node, Any], stale: set[fx.Node]) -> Graph:
    nodes: list[Node] = []
    index: dict[fx.Node, int] = {}
    constants: dict[fx.Node, Constant] = {}
    problems: list[str] = []
    needed = _needed(graph)
    for n in graph.nodes:
        if n not in needed:
            continue
        value = values[n]
        if n in stale:
            problems.append(f"  {n.name}: it reads a value that an operator before it overwrote in place")
        if n.op == "get_attr":
            path, _, attribute = str(n.target).rpartition(".")
            constants[n] = ops.Live(module.get_submodule(path), attribute)
        if n.op in ("get_attr", "output") or not _holds_tensors(value):
            continue
        if n.op == "placeholder":
            index[n] = 0
            nodes.append(Node("input", None, (), value.shape[1:]))
            continue
        name, label = _names(module, n)
        if constant := _constant(n, constants):
            constants[n] = constant
            continue
        try:
            if not any(i in index for i in n.all_input_nodes):
                raise _Unsupported("it does not read the input; use parameters, buffers or parametrizations")
            if not isinstance(value, Tensor):
                raise _Unsupported("it yields several tensors")
            if value.shape[:1] != (_BATCH,):
                raise _Unsupported(f"its result of shape {tuple(value.shape)} lost the batch dimension")
            chain, inputs = _operators(module, n, values, constants)
        except (_Unsupported, InputError) as reason:
            problems.append(f"  {label}: {reason}")
            index[n] = 0  # keep going, to report every problem at once
            continue
        sources = tuple(index[i] for i in inputs)
        for i, op in enumerate(chain[:-1]):  # they work on one value, entry by entry
            again = i if any(type(op) is type(other) for other in chain[:i]) else ""
            nodes.append(Node(f"{name}.{type(op).__name__}{again}", op, sources, values[inputs[0]].shape[1:]))
            sources = (len(nodes) - 1,)
        if chain:
            nodes.append(Node(name, chain[-1], sources, value.shape[1:]))
            sources = (len(nodes) - 1,)
        index[n] = sources[0]  # that of the input where there is no operator: an identity
    if problems:
        raise UnsupportedOperatorError(
            "tightrope cannot bound these operators:\n" + "\n".join(problems) + "\n"
            "Replace them (docs/architecture.md lists what is supported), or ask for them in an issue."
        )
    output = next(n for n in graph.nodes if n.op == "output").args[0]
    logits = values[output] if isinstance(output, fx.Node) else output
    if not isinstance(output, fx.Node) or output not in index or logits.ndim != 2:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise InputError(f"the network must return logits of shape (batch, classes), got {got}")
    return Graph(module, _upto(nodes, index[output]))


def _upto(nodes: list[Node], output: int) -> tuple[Node, ...]:
    """What an output depends on, which comes last: another value may have been read for its shape alone."""
    reached = {0, output}
    for i in range(output, 0, -1):
        if i in reached:
            reached.update(nodes[i].inputs)
    number = {old: new for new, old in enumerate(sorted(reached))}
    return tuple(replace(nodes[i], inputs=tuple(number[j] for j in nodes[i].inputs)) for i in number)


def _needed(graph: fx.Graph) -> set[fx.Node]:
    """The input, and what the output depends on: nothing need be said about a head that is not returned."""
    found = {n for n in graph.nodes if n.op in ("placeholder", "output")}
    waiting = list(found)
    while waiting:
        before = set(waiting.pop().all_input_nodes) - found
        found |= before
        waiting += before
    return found


def _holds_tensors(value: Any) -> bool:
    parts = value if isinstance(value, tuple | list) else (value,)
    return any(isinstance(part, Tensor) for part in parts)


def _names(module: nn.Module, n: fx.Node) -> tuple[str, str]:
    """The node's short name, and how to point a reader at it."""
    if n.op == "call_module":
        return str(n.target), f"{n.target} ({type(module.get_submodule(str(n.target))).__name__})"
    stack = list((n.meta.get("nn_module_stack") or {}).values())
    path = stack[-1][0] if stack and isinstance(stack[-1], tuple) else ""
    function = _target(n)
    name = f"{path}.{n.name}" if path else n.name
    return name, f"{name} (function {function}{f' in {path}' if path else ''})"


def _target(n: fx.Node) -> str:
    """What the function or method is called that a node calls."""
    return n.target if isinstance(n.target, str) else getattr(n.target, "__name__", str(n.target))


def _operators(
    module: nn.Module,
    n: fx.Node,
    values: dict[fx.Node, Any],
    constants: dict[fx.Node, Constant],
) -> tuple[list[ops.Operator], list[fx.Node]]:
    """The operators for one fx node, one after another, and the nodes it reads; none for an identity."""
    call = _Call(n, values, constants)
    if n.op == "call_module":
        target = module.get_submodule(str(n.target))
        if _is_altered(target):
            raise _Unsupported(
                "it has forward hooks, or a forward of its own, which a bound would not see; use "
                "parametrizations or a subclass instead"
            )
        make = _MODULES.get(type_before_parametrizations(target))
        if make is None:
            raise _Unsupported(_ADVICE.get(type(target).__name__, "not supported"))
        return _chain(make(target, call)), [call.input()]
    function = _FUNCTIONS.get(n.target) if n.op == "call_function" else _METHODS.get(str(n.target))
    if function is None:
        raise _Unsupported(_ADVICE.get(_target(n), "not supported"))
    made = function(call)
    if isinstance(made, tuple):
        chain, inputs = made
        return _chain(chain), inputs
    return _chain(made), [call.input()]


def _chain(made: ops.Operator | list[ops.Operator] | None) -> list[ops.Operator]:
    return made if isinstance(made, list) else [] if made is None else [made]


Constant = ops.Live | ops.Computed
"""A parameter or buffer, or what is computed of some."""


class _Call:
    """One call in the traced network, with a uniform way to read its arguments."""

    def __init__(self, node: fx.Node, values: dict[fx.Node, Any], constants: dict[fx.Node, Constant]) -> None:
        self.node, self.values, self.constants = node, values, constants
        self.shape: torch.Size = values[node].shape[1:]

    def get(self, position: int, name: str, default: Any = None) -> Any:
        """An argument by position or name; sizes that the probing pass computed become numbers."""
        args, kwargs = self.node.args, self.node.kwargs
        value = args[position] if position < len(args) else kwargs.get(name, default)
        return fx.node.map_arg(
            value, lambda n: self.values[n] if not isinstance(self.values[n], Tensor) else n
        )

    def input(self) -> fx.Node:
        """The value that a call of one value reads."""
        argument = self.get(0, "input")
        if not self.is_input(argument):
            raise _Unsupported("its first argument is not computed from the network's input")
        assert isinstance(argument, fx.Node)
        return argument

    def refuse_others(self, positions: int, *names: str) -> None:
        """Refuse arguments beyond these: an option that is not read may not be dropped in silence."""
        if len(self.node.args) > positions or set(self.node.kwargs) - set(names):
            raise _Unsupported("an argument of this call is not supported")

    def is_input(self, argument: Any) -> bool:
        """Whether an argument is computed from the network's input."""
        return isinstance(argument, fx.Node) and argument not in self.constants

    def live(self, argument: Any) -> Constant:
        """A parameter or buffer that the call reads, or what is computed of some."""
        if argument not in self.constants:
            raise _Unsupported(
                "its weights depend on the network's input; use parameters or parametrizations"
            )
        return self.constants[argument]

    def operand(self, argument: Any) -> ops.Operand:
        """A number, or what `live` returns."""
        return float(argument) if isinstance(argument, int | float) else self.live(argument)


def _constant(n: fx.Node, constants: dict[fx.Node, Constant]) -> Constant | None:
    """What a call computes of parameters and buffers alone, if it does so by functions known to be steady."""
    read, known = n.all_input_nodes, constants.keys()
    if n.op not in ("call_function", "call_method") or not read or read[0] not in known:
        return None
    if n.target in ("to", "type_as") and len(read) > 1 and not known & set(read[1:]):
        given = (*n.args[1:], *n.kwargs.values())  # `mean.to(x)`: where the network is, its parameters are
        return constants[read[0]] if all(isinstance(one, fx.Node) for one in given) else None
    steady = n.target in _STEADY or (n.target is getattr and n.args[1] in _STEADY)
    if not steady or not known >= set(read):
        return None
    args, kwargs = ops.replaced((n.args, n.kwargs), fx.Node, constants.__getitem__)
    return ops.Computed(n.target, args, kwargs)


# ------------------------------------------------------------------------------------------ modules

ModuleRule = Callable[[Any, _Call], ops.Operator | list[ops.Operator] | None]


def _linear(m: nn.Linear, _call: _Call) -> ops.Operator:
    return ops.Linear(ops.Live(m, "weight"), ops.Live(m, "bias") if m.bias is not None else None)


def _conv(m: nn.Conv1d | nn.Conv2d | nn.Conv3d, _call: _Call) -> ops.Operator:
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


def _batch_norm(m: nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d, _call: _Call) -> ops.Operator:
    norm = ops.BatchNorm(m)
    norm.frozen()  # refuses a layer without running statistics
    return norm


def _average(function: Callable[[Tensor], Tensor], divisor: int | None) -> ops.Operator:
    if divisor is not None and divisor < 0:
        raise _Unsupported(f"its divisor is negative ({divisor})")
    return ops.NonNegative(function)


def _pool(m: nn.Module, _call: _Call) -> ops.Operator:
    return _average(m, getattr(m, "divisor_override", None))


def _max_pool(m: nn.MaxPool1d | nn.MaxPool2d | nn.MaxPool3d, _call: _Call) -> ops.Operator:
    return ops.MaxPool(m)


def _pad(pad: Sequence[int], value: float, call: _Call) -> ops.Operator:
    if len(pad) // 2 > len(call.shape):
        raise _Unsupported("it pads the batch dimension")
    return ops.Pad(tuple(int(p) for p in pad), value)


def _constant_pad(m: Any, call: _Call) -> ops.Operator:
    return _pad(m.padding, float(m.value), call)


def _reshape(_m: nn.Module, call: _Call) -> ops.Operator:
    return ops.Reshape(call.shape)


def _resize(m: nn.Upsample, _call: _Call) -> ops.Operator:
    return _interpolation(m, m.mode)


def _interpolation(function: Callable[[Tensor], Tensor], mode: str) -> ops.Operator:
    if mode == "bicubic":
        raise _Unsupported("bicubic interpolation is not supported, bilinear is")
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


_MODULES: dict[type[nn.Module], ModuleRule] = {
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
CallRule = Callable[[_Call], Made]


def _elementwise(op: ops.Operator) -> CallRule:
    return lambda _call: op


def _leaky(call: _Call) -> Made:
    return ops.LeakyReLU(float(call.get(1, "negative_slope", 0.01)))


def _flatten_call(call: _Call) -> Made:
    return ops.Reshape(call.shape)


def _bind(function: Callable[..., Tensor], *names: str) -> Callable[[_Call], partial[Tensor]]:
    """A pooling function with the call's own options bound."""

    def rule(call: _Call) -> partial[Tensor]:
        call.refuse_others(1 + len(names), "input", *names)
        given = {name: call.get(i, name) for i, name in enumerate(names, start=1)}
        return partial(function, **{name: value for name, value in given.items() if value is not None})

    return rule


def _averaging(function: Callable[..., Tensor], *names: str) -> CallRule:
    bind = _bind(function, *names)

    def rule(call: _Call) -> ops.Operator:
        bound = bind(call)
        return _average(bound, bound.keywords.get("divisor_override"))

    return rule


def _over(function: Callable[..., Tensor]) -> CallRule:
    """A sum or mean over dimensions."""

    def rule(call: _Call) -> Made:
        call.refuse_others(3, "input", "dim", "keepdim")
        keepdim = bool(call.get(2, "keepdim", False))
        return ops.NonNegative(partial(function, dim=call.get(1, "dim"), keepdim=keepdim))

    return rule


def _interpolate(call: _Call) -> Made:
    names = ("size", "scale_factor", "mode", "align_corners", "recompute_scale_factor", "antialias")
    bound = _bind(F.interpolate, *names)(call)
    return _interpolation(bound, bound.keywords.get("mode", "nearest"))


def _permute(call: _Call) -> Made:
    first = call.get(1, "dims")
    dims: tuple[Any, ...] = tuple(first) if isinstance(first, tuple | list) else tuple(call.node.args[1:])
    return _moved(tuple(dim % len(dims) for dim in dims))


def _transpose(call: _Call) -> Made:
    call.refuse_others(3, "input", "dim0", "dim1")
    dims = list(range(len(call.shape) + 1))
    a, b = (int(call.get(i, f"dim{i - 1}")) for i in (1, 2))
    dims[a], dims[b] = dims[b], dims[a]
    return _moved(tuple(dims))


def _moved(dims: tuple[int, ...]) -> Made:
    if dims[0] != 0:
        raise _Unsupported("it moves the batch dimension")
    return ops.NonNegative(partial(torch.permute, dims=dims))


def _slice(call: _Call) -> Made:
    value, index = call.input(), call.get(1, "")
    index = index if isinstance(index, tuple) else (index,)
    if not all(isinstance(part, int | slice | None | type(...)) for part in index):
        raise _Unsupported("only numbers and slices are supported as indices")
    taken = sum(part is not None and part is not ... for part in index)
    whole = index[0] == slice(None) or (index[0] is ... and taken < call.values[value].ndim)
    if not whole:
        raise _Unsupported("it picks examples of the batch")
    return ops.NonNegative(partial(_pick, index=index))


def _pick(value: Tensor, index: tuple[Any, ...]) -> Tensor:
    return value[index]


def _clamp(call: _Call) -> Made:
    low, high = call.get(1, "min"), call.get(2, "max")
    if not all(end is None or isinstance(end, int | float) for end in (low, high)):
        raise _Unsupported("its limits must be numbers")
    return _between(low, high)


def _hardtanh(low: float, high: float) -> CallRule:
    return lambda call: _between(call.get(1, "min_val", low), call.get(2, "max_val", high))


def _dropout(call: _Call) -> Made:
    if call.get(2, "training", True):
        raise _Unsupported(
            "it is random in evaluation mode too: say training=self.training, or use nn.Dropout"
        )
    return None


def _matmul(call: _Call) -> Made:
    call.refuse_others(2, "input", "other")
    value, factor = call.input(), call.get(1, "other")
    weight = call.live(factor)
    if call.values[factor].ndim != 2:
        raise _Unsupported("its second factor must be a matrix")
    return ops.Linear(ops.Computed(torch.t, (weight,), {}), None), [value]


def _maximum(function: Callable[..., Tensor]) -> CallRule:
    bind = _bind(function, "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
    return lambda call: ops.MaxPool(bind(call))


def _pad_call(call: _Call) -> Made:
    call.refuse_others(4, "input", "pad", "mode", "value")
    if call.get(2, "mode", "constant") != "constant":
        raise _Unsupported("only constant padding is supported here; use the convolution's padding_mode")
    return _pad(call.get(1, "pad"), float(call.get(3, "value") or 0.0), call)


def _linear_call(call: _Call) -> Made:
    bias = call.get(2, "bias")
    return ops.Linear(call.live(call.get(1, "weight")), None if bias is None else call.live(bias))


def _conv_call(call: _Call) -> Made:
    bias = call.get(2, "bias")
    return ops.Conv(
        weight=call.live(call.get(1, "weight")),
        bias=None if bias is None else call.live(bias),
        stride=call.get(3, "stride", 1),
        padding=call.get(4, "padding", 0),
        dilation=call.get(5, "dilation", 1),
        groups=call.get(6, "groups", 1),
    )


def _sum(sign: int) -> CallRule:
    def rule(call: _Call) -> Made:
        call.refuse_others(2)
        first, second = call.get(0, "input"), call.get(1, "other")
        if call.is_input(first) and call.is_input(second):
            shapes = {call.values[n].shape[1:] for n in (first, second)}
            if shapes != {call.shape}:
                raise _Unsupported(f"it broadcasts values of shapes {sorted(map(tuple, shapes))}")
            return ops.Add(sign), [first, second]
        if call.is_input(first):
            return ops.Shift(call.operand(second), sign), [first]
        shift = ops.Shift(call.operand(first))
        return (shift if sign > 0 else [ops.Scale(-1.0), shift]), [second]

    return rule


def _product(call: _Call) -> Made:
    call.refuse_others(2)
    first, second = call.get(0, "input"), call.get(1, "other")
    if call.is_input(first) and call.is_input(second):
        raise _Unsupported("a product of two values is not affine")
    value, factor = (first, second) if call.is_input(first) else (second, first)
    return ops.Scale(call.operand(factor)), [value]


def _quotient(call: _Call) -> Made:
    call.refuse_others(2)
    value, divisor = call.get(0, "input"), call.get(1, "other")
    if not call.is_input(value) or call.is_input(divisor):
        raise _Unsupported("only division by a constant is affine")
    return ops.Scale(call.operand(divisor), divide=True), [value]


def _negative(_call: _Call) -> Made:
    return ops.Scale(-1.0)


def _concatenate(call: _Call) -> Made:
    call.refuse_others(2, "tensors", "dim")
    parts, dim = call.get(0, "tensors"), int(call.get(1, "dim", 0))
    dim = dim + len(call.shape) + 1 if dim < 0 else dim
    if dim == 0 or not all(call.is_input(p) for p in parts):
        raise _Unsupported("it joins along the batch, or joins constants")
    return ops.Concatenate(dim), list(parts)


_POOL = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")

_FUNCTIONS: dict[Any, CallRule] = {
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
    F.relu6: _hardtanh(0.0, 6.0),
    F.hardtanh: _hardtanh(-1.0, 1.0),
    F.dropout: _dropout,
    F.dropout1d: _dropout,
    F.dropout2d: _dropout,
    F.dropout3d: _dropout,
}

_METHODS: dict[str, CallRule] = {
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
    "add": _sum(1),
    "add_": _sum(1),
    "sub": _sum(-1),
    "mul": _product,
    "div": _quotient,
    "neg": _negative,
    "mean": _over(torch.mean),
    "sum": _over(torch.sum),
    "permute": _permute,
    "transpose": _transpose,
    "matmul": _matmul,
    "clamp": _clamp,
    "clamp_": _clamp,
    "clip": _clamp,
}

_LOSS = "it changes no answer: return the logits that it is given, and leave it to the loss"
_ADVICE = dict.fromkeys(("Softmax", "LogSoftmax", "softmax", "log_softmax"), _LOSS)

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


@torch.no_grad()
def _check_same(module: nn.Module, graph: Graph) -> None:
    """The traced network must compute what the module computes; a difference is a bug or a trick."""
    like = _like(module)
    if like.is_meta:
        return
    generator = torch.Generator().manual_seed(0)
    # Another batch size than the probing pass had, so that a network which mixes examples shows.
    x = torch.rand(_BATCH + 1, *graph.input_shape, generator=generator).to(like)
    try:
        expected, got = module(x.clone()), graph.run(x)[0]  # the module may overwrite its input
    except Exception as error:
        raise UnsupportedOperatorError(
            f"the network takes a batch of {_BATCH} examples but not one of {_BATCH + 1}, so its forward "
            f"mixes examples or fixes the size of a batch: {_reason(error)}"
        ) from error
    difference = float((expected - got).abs().max()) if expected.shape == got.shape else math.inf
    if not difference <= 1e4 * torch.finfo(like.dtype).eps * max(1.0, float(expected.abs().max())):
        raise UnsupportedOperatorError(
            "the traced network does not compute what the module computes (largest difference "
            f"{difference:.3g}): its forward depends on something tracing cannot see"
        )

"""From the user's `nn.Module` to a `Graph`, by symbolic tracing (torch.fx).

The tables in `rules.py` say which modules, functions and methods tightrope knows. Anything else is reported,
all at once, with its place in the network.
"""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import type_before_parametrizations
from torch.utils._python_dispatch import TorchDispatchMode

from tightrope.errors import InputError, UnsupportedOperatorError
from tightrope.graph import ops
from tightrope.graph.graph import Graph, Node, evaluation
from tightrope.graph.rules import (
    ADVICE,
    FUNCTIONS,
    METHODS,
    MODULES,
    Call,
    Constant,
    Unsupported,
    about_shapes,
    constant_of,
    is_cut,
)

_WRAPPERS = {"DataParallel": "module", "DistributedDataParallel": "module", "OptimizedModule": "_orig_mod"}
_CALL = nn.Module.__call__  # fx puts another one in its place while it traces
_SHARED = {"numpy", "__array__", "__dlpack__", "storage", "untyped_storage", "data_ptr"}
"""Methods that give a tensor's memory away: what is then written into it goes unseen."""
_BATCH = 2  # examples in the probing pass; more than one, so that a lost batch dimension shows


def trace(module: nn.Module, input_shape: Sequence[int]) -> Graph:
    """Trace a network into operators that share its live parameters.

    Args:
        module: any `nn.Module` from one batch of inputs to logits `(batch, classes)`, built of the
            operators in the tables of `rules.py`. Its control flow may depend on shapes, not on values.
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
    if any(kind.__name__ == "ScriptModule" for kind in type(module).__mro__):
        raise InputError(
            "the network is compiled by torch.jit, which cannot be traced: give the nn.Module itself"
        )
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
        fx_graph = _Tracer(input_shape).trace(module)
        values, stale = _probe(module, fx_graph, torch.Size(input_shape))
        graph = _translate(module, fx_graph, values, stale)
        _check_same(module, fx_graph, graph)
    return graph


def check_training_mode(module: nn.Module, input_shape: Sequence[int]) -> None:
    """Refuse a network whose forward calls other operators in training mode than in evaluation mode.

    Or one that holds gradients back by `torch.no_grad()`, which tracing does not see, or that reads what a
    layer (`nn.Dropout(inplace=True)`) overwrites in training mode only.

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
            fx_graph = tracer.trace(module)
            calls.append([(n.op, n.target, str(n.args), str(n.kwargs)) for n in fx_graph.nodes])
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
    if _is_on_meta(module):
        return
    trained = copy.deepcopy(module).train()
    device = _like(module).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        _, stale = _probe(trained, fx_graph, torch.Size(input_shape))
    if stale:
        raise InputError(
            "in training mode the network reads a value that a layer overwrote in place "
            f"({', '.join(sorted(n.name for n in stale))}): use nn.Dropout without inplace=True there"
        )


def recast(graph: Graph, dtype: torch.dtype) -> Graph:
    """A copy in evaluation mode with its own parameters, in another precision, without gradients."""
    module = copy.deepcopy(graph.module).to(dtype).eval().requires_grad_(False)
    return trace(module, graph.input_shape)


class _Shaped(fx.Proxy):
    """A proxy whose shape can be asked for while tracing."""

    tracer: _Tracer

    def __len__(self) -> int:
        return self.tracer.length(self)

    def __index__(self) -> int:
        return operator.index(self.tracer.steady(self))

    def __int__(self) -> int:
        return int(self.tracer.steady(self))

    def __float__(self) -> float:
        return float(self.tracer.steady(self))

    def __getattr__(self, name: str) -> fx.proxy.Attribute:
        return _Attribute(self, name)


def _in_place(function: Callable[..., Any]) -> Callable[[_Shaped, Any], fx.Proxy]:
    """`x += y` as a call of its own: fx takes it for `x = x + y`, which leaves other names of x alone."""
    return lambda proxy, other: proxy.tracer.create_proxy("call_function", function, (proxy, other), {})


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor"):
    setattr(_Shaped, f"__i{_name}__", _in_place(getattr(operator, f"__i{_name}__")))


class _Attribute(_Shaped, fx.proxy.Attribute):
    """An attribute of a proxy: its shape, or a method that is about to be called."""


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True  # so that nothing is computed from a buffer once and for all
    without_gradients = False  # whether something was computed without them

    def __init__(self, input_shape: Sequence[int]) -> None:
        super().__init__()
        self.input_shape = input_shape

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        try:
            return super().trace(root, concrete_args)
        except UnsupportedOperatorError:
            raise
        except Exception as error:
            raise UnsupportedOperatorError(
                f"the network cannot be traced: {_reason(error)}. Its forward may branch on shapes, not on "
                "values; see docs/architecture.md for what a network may contain"
            ) from error

    def create_args_for_root(
        self,
        root_fn: Callable[..., Any],
        is_module: bool,  # noqa: ARG002
        concrete_args: dict[str, Any] | tuple[Any, ...] | None = None,  # noqa: ARG002
    ) -> tuple[Any, list[Any]]:
        """The input is a proxy; whatever else the forward can be told stays as it is by default."""
        x = self.create_proxy("placeholder", "input", (), {})
        try:
            inspect.signature(root_fn).bind(self.root, x)
        except TypeError as error:
            raise UnsupportedOperatorError(
                f"the network must take exactly one input tensor, the rest by default: {error}"
            ) from error
        return root_fn, [self.root, x]

    def create_node(
        self, kind: str, target: Any, args: Any, kwargs: Any, *more: Any, **named: Any
    ) -> fx.Node:
        self.without_gradients |= not torch.is_grad_enabled()
        if target is getattr and args[1] == "data":
            raise Unsupported("it reads `.data`, so that what is done to it goes unseen")
        if kind == "call_method" and target in _SHARED:
            raise Unsupported(f"it calls `.{target}()`, so that what is done to it goes unseen")
        return super().create_node(kind, target, args, kwargs, *more, **named)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, np.generic):
            a = a.item()
        elif isinstance(a, np.ndarray):
            raise Unsupported("it uses a NumPy array; register that as a buffer instead")
        if isinstance(a, Tensor):
            owned = (*self.root.parameters(), *self.root.buffers(), *self.tensor_attrs)
            if not any(a is tensor for tensor in owned):
                raise Unsupported("it makes a tensor in its forward; register that as a buffer instead")
        return super().create_arg(a)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        known = type_before_parametrizations(m) in MODULES
        return known or super().is_leaf_module(m, module_qualified_name)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Shaped(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """A condition on shapes."""
        return bool(self.steady(obj, bool))

    def iter(self, obj: fx.Proxy) -> Iterator[fx.Proxy]:
        """The entries of a shape, or the parts of a value that was cut."""
        return (operator.getitem(obj, i) for i in range(self.length(obj)))

    def length(self, obj: fx.Proxy) -> int:
        """How many dimensions a shape has, or into how many parts a value was cut."""
        return len(self.about_shapes(obj, _BATCH))

    def steady(self, obj: fx.Proxy, kind: Callable[[Any], Any] = lambda value: value) -> Any:
        """What follows from the shape of every batch of such inputs, however many examples it has."""
        answers = {kind(self.about_shapes(obj, batch)) for batch in (1, _BATCH, _BATCH + 1)}
        if len(answers) > 1:
            raise Unsupported("it branches on how many examples a batch has, or computes with it")
        return answers.pop()

    def about_shapes(self, obj: fx.Proxy, batch: int) -> Any:
        """What a proxy stands for in a batch of so many examples, if their shape determines it."""
        rests_on = {obj.node}  # it may be made by being asked for
        shapes = about_shapes(self.graph)
        for n in reversed(self.graph.nodes):
            rests_on.update(n.all_input_nodes if n in rests_on else ())
        calls = (n for n in rests_on - shapes if n.op in ("call_function", "call_method"))
        known = obj.node in shapes or is_cut(obj.node)
        if not known or not all(_has_steady_shape(n, shapes) for n in calls):
            raise Unsupported("it branches on values, iterates over them or asks for their len()")
        return self._value(obj.node, batch)

    @cached_property
    def _still(self) -> nn.Module:
        """A copy of the network that is not being traced, and whose BatchNorm statistics do not move."""
        root = self.root
        assert isinstance(root, nn.Module)
        return copy.deepcopy(root).eval()

    def _value(self, node: fx.Node, batch: int) -> Any:
        """What a node yields for zeros."""
        graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
        graph.graph_copy(self.graph, copies)
        graph.output(copies[node])
        like = _like(self.root)
        x = torch.zeros(batch, *self.input_shape, dtype=like.dtype, device=like.device)
        tracing = nn.Module.__call__
        nn.Module.__call__ = _CALL  # type: ignore[method-assign]
        try:
            with torch.inference_mode(False), torch.no_grad():
                return fx.Interpreter(self._still, graph=graph).run(x)
        finally:
            nn.Module.__call__ = tracing  # type: ignore[method-assign]


def _has_steady_shape(n: fx.Node, shapes: set[fx.Node]) -> bool:
    """Whether the shape of what a call yields follows from the shapes of what it reads."""
    if n.target is operator.getitem:  # not `x[x > 0]`
        return shapes.issuperset(n.all_input_nodes[1:])
    return n.target in FUNCTIONS or n.target in METHODS or is_cut(n)


def _is_altered(module: nn.Module) -> bool:
    """Whether a call does something else than the forward of the module's class."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _like(module: nn.Module) -> Tensor:
    """A tensor with the dtype and device of the network's parameters."""
    tensors = (t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point())
    return next(tensors, torch.empty(0))


def _is_on_meta(module: nn.Module) -> bool:
    """Whether the network has no values, so that nothing can be tried on it."""
    return _like(module).is_meta


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
    versions: dict[fx.Node, list[int]] = {}
    stale: set[fx.Node] = set()

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            if any(_versions(values[i]) != versions[i] for i in n.all_input_nodes):
                stale.add(n)
            values[n] = super().run_node(n)
            versions[n] = _versions(values[n])
            return values[n]

    like = _like(module)
    x = torch.zeros(_BATCH, *shape, dtype=like.dtype, device=like.device)
    try:
        Recorder(module, graph=graph).run(x)
    except Exception as error:
        raise InputError(
            f"the network does not take inputs of shape {tuple(shape)}: {_reason(error)}"
        ) from error
    return values, stale


def _versions(value: Any) -> list[int]:
    """How often the tensors of a value were overwritten."""
    parts = value if isinstance(value, tuple | list) else (value,)
    return [part._version for part in parts if isinstance(part, Tensor) and not part.is_inference()]


def _reason(error: Exception) -> str:
    """The first line of an error's message."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def _translate(module: nn.Module, graph: fx.Graph, values: dict[fx.Node, Any], stale: set[fx.Node]) -> Graph:
    nodes: list[Node] = []
    index: dict[fx.Node, int] = {}
    constants: dict[fx.Node, Constant] = {}
    problems: list[str] = []
    needed, numbers = _needed(graph), about_shapes(graph)
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
        if constant := constant_of(n, constants):
            constants[n] = constant
            continue
        try:
            if not any(i in index for i in n.all_input_nodes):
                raise Unsupported("it does not read the input; use parameters, buffers or parametrizations")
            if is_cut(n) and all(user.target is operator.getitem for user in n.users):
                index[n] = index[Call(n, values, constants, numbers).input()]
                continue  # its parts are taken from what it cuts
            if not isinstance(value, Tensor):
                raise Unsupported("it yields several tensors")
            if value.shape[:1] != (_BATCH,):
                raise Unsupported(f"its result of shape {tuple(value.shape)} lost the batch dimension")
            chain, inputs = _operators(module, Call(n, values, constants, numbers))
            if value.ndim == 1 and any(isinstance(op, ops.Activation) for op in chain):
                raise Unsupported("it has one number per example: keep a dimension, (batch, 1), for it")
        except (Unsupported, InputError) as reason:
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


def _operators(module: nn.Module, call: Call) -> tuple[list[ops.Operator], list[fx.Node]]:
    """The operators for one call, one after another, and the nodes it reads; none for an identity."""
    n = call.node
    if n.op == "call_module":
        target = module.get_submodule(str(n.target))
        if _is_altered(target):
            raise Unsupported(
                "it has forward hooks, or a forward of its own, which a bound would not see; use a "
                "subclass or torch.nn.utils.parametrizations (they have weight_norm, too), or prune.remove"
            )
        make = MODULES.get(type_before_parametrizations(target))
        if make is None:
            raise Unsupported(ADVICE.get(type(target).__name__, "not supported"))
        return _chain(make(target, call)), [call.input()]
    function = FUNCTIONS.get(n.target) if n.op == "call_function" else METHODS.get(str(n.target))
    if function is None:
        raise Unsupported(ADVICE.get(_target(n), "not supported"))
    made = function(call)
    if isinstance(made, tuple):
        chain, inputs = made
        return _chain(chain), inputs
    return _chain(made), [call.input()]


def _chain(made: ops.Operator | list[ops.Operator] | None) -> list[ops.Operator]:
    return made if isinstance(made, list) else [] if made is None else [made]


class _Calls(TorchDispatchMode):
    """The tensor operations that are called meanwhile, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is not torch.ops.aten.detach.default:  # torch.utils.checkpoint detaches where fx does not
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@torch.inference_mode(False)
@torch.no_grad()
def _check_same(module: nn.Module, fx_graph: fx.Graph, graph: Graph) -> None:
    """The traced network must compute what the module computes; a difference is a bug or a trick.

    It is tried on other numbers of examples than the probing pass had, so that a network shows which mixes
    them or fixes how many there are, and on entries far outside of [0, 1], where clamps and thresholds show.
    """
    if _is_on_meta(module):
        return
    like, generator = _like(module), torch.Generator().manual_seed(0)
    pixels, low, high = (
        draw(1, *graph.input_shape, generator=generator) for draw in (torch.rand, *[torch.randn] * 2)
    )
    before = [tensor.clone() for tensor in graph.read()]
    for entries in (torch.cat([pixels, 10 * low, 100 * high]), pixels):
        x = entries.to(like)
        try:
            with torch.set_grad_enabled(len(x) == 1 and not like.is_inference()):  # forwards may ask
                with _Calls() as calls:
                    expected = module(x.clone())  # it may overwrite its input
                with _Calls() as traced:
                    fx.Interpreter(module, graph=fx_graph).run(x.clone())
            got = _run(graph, x)
        except UnsupportedOperatorError:
            raise
        except Exception as error:
            raise UnsupportedOperatorError(
                f"the network takes a batch of {_BATCH} examples but not one of {len(x)}, so its forward "
                f"mixes examples or fixes the size of a batch: {_reason(error)}"
            ) from error
        if not all(map(torch.equal, before, graph.read())):
            raise UnsupportedOperatorError(
                "the network's forward changes parameters or buffers that it reads (BatchNorm's statistics, "
                "a bias ...), so what it computes depends on what it was asked before"
            )
        if calls.names != traced.names:
            raise UnsupportedOperatorError(
                "the network does something else when it is called than while it is traced: its forward "
                "looks at what tracing changes (isinstance(x, torch.Tensor), torch.is_grad_enabled(), hooks "
                "of containers, a __call__ of its own ...)"
            )
        if len(x) == 1 and expected.numel() == got.numel():  # `squeeze()` also drops the batch
            expected = expected.view_as(got)
        if expected.shape != got.shape:
            raise UnsupportedOperatorError(
                f"of {len(x)} examples the module yields shape {tuple(expected.shape)}, its trace "
                f"{tuple(got.shape)}: its forward depends on how many examples a batch has"
            )
        size, difference = (z.detach().abs().amax(1) for z in (expected, expected - got))
        allowed = 1e4 * torch.finfo(like.dtype).eps * size.clamp(min=1.0)
        tried = torch.isfinite(size)  # half precision overflows
        tried[0] = True
        if not bool((difference <= allowed)[tried].all()):
            raise UnsupportedOperatorError(
                "the traced network does not compute what the module computes (largest difference "
                f"{float(difference[tried].max()):.3g}): its forward depends on something tracing cannot see"
            )


def _run(graph: Graph, x: Tensor) -> Tensor:
    """The logits in evaluation, if every value on the way has an entry for each example."""
    values = [x]
    for node in graph.nodes[1:]:
        assert node.op is not None
        values.append(node.op.apply(*(values[j] for j in node.inputs)))
        if values[-1].shape != (len(x), *node.shape):
            raise UnsupportedOperatorError(
                f"{node.name}: of {len(x)} examples it makes a value of shape {tuple(values[-1].shape)}: it "
                "mixes examples, or fixes the size of a batch"
            )
    return values[-1]

"""A network as a list of operators in topological order, sharing the module's live parameters."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tightrope.errors import InputError
from tightrope.graph.ops import (
    Activation,
    Affine,
    BatchNorm,
    Computed,
    Conv,
    Identity,
    Linear,
    Live,
    Operator,
    Reshape,
)
from tightrope.spec import Spec


@dataclass(frozen=True)
class Node:
    """One operator, where its inputs come from, and the shape it yields.

    Args:
        name: path of the module in the user's network, or the name of the function.
        op: the operator; None for the network's input, which is node 0.
        inputs: indices of the nodes it reads.
        shape: shape of its value, without the batch dimension.
    """

    name: str
    op: Operator | None
    inputs: tuple[int, ...]
    shape: torch.Size


@dataclass(frozen=True)
class Graph:
    """The operators of a traced network. Immutable: bounds are never stored on it.

    Args:
        module: the user's network, whose parameters the operators share.
        nodes: the operators in topological order; node 0 is the input, the last one the output.
    """

    module: nn.Module
    nodes: tuple[Node, ...]

    @property
    def input_shape(self) -> torch.Size:
        """Shape of one input."""
        return self.nodes[0].shape

    @property
    def classes(self) -> int:
        """Number of outputs."""
        return self.nodes[-1].shape[0]

    def activations(self) -> Iterator[tuple[int, Node]]:
        """The activations, in order, with their node numbers."""
        return ((i, node) for i, node in enumerate(self.nodes) if isinstance(node.op, Activation))

    def run(self, x: Float[Tensor, "batch *shape"]) -> tuple[Float[Tensor, "batch classes"], Graph]:
        """The logits in the module's present mode, and the graph as this pass fixed it.

        In evaluation the graph is the same one. In training, BatchNorm uses this batch's statistics
        and updates its running ones, as the module itself would; the graph that comes back holds
        those statistics, so that bounds asked of it are bounds of the function just computed.

        Raises:
            InputError: if `x` has another shape than the network was traced with.
        """
        self.check(x)
        values: list[Tensor | None] = [x]
        nodes, changed = list(self.nodes), False
        last_use = self._last_use()
        for i, node in enumerate(self.nodes[1:], start=1):
            assert node.op is not None
            value, op = node.op.run(*[_present(values[j]) for j in node.inputs])
            values.append(value)
            if op is not node.op:
                nodes[i], changed = replace(node, op=op), True
            for j in node.inputs:
                if last_use[j] == i:
                    values[j] = None
        return _present(values[-1]), replace(self, nodes=_fold_batch_norms(nodes)) if changed else self

    def entering(
        self, x: Float[Tensor, "batch *shape"]
    ) -> tuple[Float[Tensor, "batch classes"], dict[int, Tensor]]:
        """The logits at fixed statistics, and what enters each activation by its node number."""
        values = [x]
        for node in self.nodes[1:]:
            assert node.op is not None
            values.append(node.op.apply(*[values[j] for j in node.inputs]))
        return values[-1], {i: values[node.inputs[0]] for i, node in self.activations()}

    def has_batch_statistics(self) -> bool:
        """Whether a pass in the module's present mode depends on the whole batch (BatchNorm in training)."""
        ops = (node.op for node in self.nodes)
        return any(isinstance(op, BatchNorm) and op.statistics is None and op.module.training for op in ops)

    def frozen(self, copied: bool = False) -> Graph:
        """The graph in evaluation, whatever the module's mode: running statistics, no dropout.

        Args:
            copied: keep the statistics as they are now, while the module's may go on to move.
        """
        nodes = [node if node.op is None else replace(node, op=node.op.frozen()) for node in self.nodes]
        if copied:
            nodes = [
                replace(node, op=node.op.copied()) if isinstance(node.op, BatchNorm) else node
                for node in nodes
            ]
        return replace(self, nodes=_fold_batch_norms(nodes))

    def upto(self, node: int) -> Graph:
        """The part of the network that yields a node's value, as a vector."""
        nodes, shape = self.nodes[: node + 1], self.nodes[node].shape
        if len(shape) == 1:
            return replace(self, nodes=nodes)
        flat = torch.Size([shape.numel()])
        return replace(self, nodes=(*nodes, Node("flatten", Reshape(flat), (node,), flat)))

    def since(self, node: int) -> Graph:
        """The part of the network behind a node: a network whose input is the node's value.

        Raises:
            InputError: if a path goes around the node.
        """
        behind = self.nodes[node + 1 :]
        if any(j < node for n in behind for j in n.inputs):
            raise InputError(
                f"node {node} ({self.nodes[node].name}) does not separate: a path goes around it"
            )
        moved = [replace(n, inputs=tuple(j - node for j in n.inputs)) for n in behind]
        return replace(self, nodes=(replace(self.nodes[node], op=None, inputs=()), *moved))

    def separators(self) -> list[int]:
        """The nodes that every path from the input to the output goes through, in order."""
        first, found = len(self.nodes), []
        for i, node in reversed(list(enumerate(self.nodes))):
            if i <= first:
                found.append(i)
            first = min((first, *node.inputs))
        return found[::-1]

    def merge(self, spec: Spec) -> tuple[int, Tensor, Float[Tensor, "batch rows"]]:
        """Pull a specification back through the affine operators that end the network.

        Bounding `C W z` is tighter than bounding `W z` and subtracting.

        Returns:
            A node, and `(rows, offset)` with `C f(x) = <rows, value of the node> + offset`.
        """
        uses = _uses(self.nodes)
        i, rows = len(self.nodes) - 1, spec.rows
        ops: list[Affine] = []
        while isinstance(op := self.nodes[i].op, Affine) and len(self.nodes[i].inputs) == 1 and uses[i] <= 1:
            (source,) = self.nodes[i].inputs
            (rows,) = op.transpose(rows, [self.nodes[source].shape])
            ops.append(op)
            i = source
        constant = rows.new_zeros(1, *self.nodes[i].shape)
        for op in reversed(ops):
            constant = op.apply(constant)
        return i, rows, spec.rows.flatten(2) @ constant.flatten()

    def structure(self) -> str:
        """A hash of all but the weights: operators, their settings and connections, parameter shapes."""
        saved = self.module.state_dict()
        parts = [
            f"{type(node.op).__name__} {_settings(node.op)} {node.inputs} {tuple(node.shape)}"
            for node in self.nodes[1:]
        ]
        parts += [f"{name} {tuple(t.shape)} {t.dtype}" for name, t in saved.items()]
        parts += self._parametrizations()
        read = self._read()
        if read != [name for name in saved if not name.endswith("num_batches_tracked")]:
            parts.append(f"{read}")  # which layer has which weights does not follow from their order
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def _parametrizations(self) -> list[str]:
        """What computes weights from others (weight norm, for example), and how it is set."""
        found = list[str]()
        for path, module in self.module.named_modules():
            if parametrize.is_parametrized(module):
                for name, chain in module.parametrizations.items():
                    found += [f"{path}.{name} {type(part).__name__} {_plain(part)}" for part in chain]
        return found

    def tensors(self) -> dict[str, Tensor]:
        """What the network's function depends on: what is saved, buffers that are not, plain attributes.

        Also the weights that are computed from others, since what computes them may be anything.
        """
        with evaluation(self.module), torch.no_grad():
            computed = {
                f"{path}.{name} (computed)": getattr(module, name)
                for path, module in self.module.named_modules()
                if parametrize.is_parametrized(module)
                for name in module.parametrizations
            }
        plain = {
            f"{path}.{name}": value
            for path, module in self.module.named_modules()
            for name, value in vars(module).items()
            if isinstance(value, Tensor)
        }
        return {**computed, **plain, **dict(self.module.named_buffers()), **self.module.state_dict()}

    def read(self) -> list[Tensor]:
        """The tensors that the operators read, as they are now, in order."""
        found = list[Tensor]()
        with evaluation(self.module), torch.no_grad():
            for value in (value for node in self.nodes[1:] for value in vars(node.op).values()):
                if isinstance(value, Live | Computed):
                    sources = value.sources() if isinstance(value, Computed) else [value]
                    found += [source() for source in sources]
                elif isinstance(value, nn.Module):
                    found += [*value.parameters(), *value.buffers()]
        return found

    def _read(self) -> list[str]:
        """The names of the tensors that the operators read, in order."""
        paths = {id(module): f"{path}." if path else "" for path, module in self.module.named_modules()}
        found = list[str]()
        for value in (value for node in self.nodes[1:] for value in vars(node.op).values()):
            if isinstance(value, Live | Computed):
                sources = value.sources() if isinstance(value, Computed) else [value]
                found += [f"{paths[id(source.owner)]}{source.name}" for source in sources]
            elif isinstance(value, nn.Module):
                names = (name for name, _ in (*value.named_parameters(), *value.named_buffers()))
                found += [
                    f"{paths[id(value)]}{name}" for name in names if not name.endswith("num_batches_tracked")
                ]
        return found

    def check(self, x: Tensor) -> None:
        """Raise an InputError unless `x` is a batch of what the network was traced for."""
        if x.shape[1:] != self.input_shape or not x.is_floating_point():
            raise InputError(
                f"the network takes floating-point inputs of shape (batch, *{tuple(self.input_shape)}), "
                f"got {tuple(x.shape)} of {x.dtype}"
            )

    def _last_use(self) -> list[int]:
        last = list(range(len(self.nodes)))
        for i, node in enumerate(self.nodes):
            for j in node.inputs:
                last[j] = i
        return last


@contextmanager
def evaluation(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; every submodule gets its own mode back."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training


def _settings(op: Operator | None) -> list[Any]:
    """What an operator was told, but for its weights; a module says it, or most of it."""
    plain = (bool, int, float, str, tuple, list, type(None), nn.Module)
    found = list[Any]()
    for value in vars(op).values():
        if isinstance(value, partial):
            found += [value.func.__name__, *sorted(value.keywords.items())]
        elif isinstance(value, Computed):
            found.append(value.code())
        elif isinstance(value, plain):
            found.append(value)
        if isinstance(value, nn.AvgPool1d | nn.AvgPool2d | nn.AvgPool3d):
            untold = ("ceil_mode", "count_include_pad", "divisor_override")
            found += [getattr(value, name, None) for name in untold]
        elif isinstance(value, nn.Upsample):
            found += [value.align_corners, value.recompute_scale_factor]
    return found


def _plain(module: nn.Module) -> list[tuple[str, Any]]:
    """The numbers and words that a module was told."""
    told = (bool, int, float, str, tuple, type(None))
    return sorted(
        (name, value)
        for name, value in vars(module).items()
        if isinstance(value, told) and not name.startswith("_") and name != "training"
    )


def _uses(nodes: Sequence[Node]) -> list[int]:
    """How many nodes read each node."""
    uses = [0] * len(nodes)
    for node in nodes:
        for j in node.inputs:
            uses[j] += 1
    return uses


def _fold_batch_norms(nodes: list[Node]) -> tuple[Node, ...]:
    """Let the layer before each fixed BatchNorm do its work too, which saves two passes over its values."""
    uses, folded = _uses(nodes), list(nodes)
    for i, node in enumerate(nodes):
        if not isinstance(node.op, BatchNorm):
            continue
        (j,) = node.inputs
        layer = nodes[j].op
        per_channel = isinstance(layer, Conv) or (isinstance(layer, Linear) and len(nodes[j].shape) == 1)
        if isinstance(layer, Conv | Linear) and per_channel and uses[j] == 1:
            weight, bias = node.op.fold(layer.weight, layer.bias)
            folded[j] = replace(nodes[j], op=replace(layer, weight=weight, bias=bias))
            folded[i] = replace(node, op=Identity())
    return tuple(folded)


def _present(value: Tensor | None) -> Tensor:
    assert value is not None, "a value was dropped before its last use"
    return value

"""Certificates: what `checker.py` needs to repeat every proof, written beside the verdicts."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save
from torch import Tensor

from tightrope import checker
from tightrope.bounds import Problem, rounding_error
from tightrope.errors import InputError, TightropeError
from tightrope.files import to_json, write_atomically
from tightrope.graph import Graph, trace
from tightrope.graph.graph import Node
from tightrope.graph.ops import (
    Add,
    Affine,
    BatchNorm,
    Conv,
    Dropout,
    Identity,
    LeakyReLU,
    Linear,
    ReLU,
    Reshape,
    Scale,
    Shift,
)
from tightrope.region import Box
from tightrope.spec import Spec
from tightrope.verify.proof import Proof
from tightrope.verify.verdict import Certificate, Verdict

Array = np.ndarray

LARGEST_MATRIX = 2**22
"""Entries of a matrix, at most, that stands for an operator which the checker does not know."""

PRECISIONS = ("<f2", "<f4")
"""Of stored slopes: any slope yields a bound, so the first that suffices will do."""


class UnknownError(Exception):
    """What the checker does not know."""


@dataclass(frozen=True, eq=False)
class Program:
    """A network as the checker reads it.

    Args:
        nodes: operators, inputs and shapes, as JSON values.
        tensors: weights in float64, as the verifier used them.
    """

    nodes: list[dict[str, Any]]
    tensors: dict[str, Array]

    def content(self) -> bytes:
        """The file `network.safetensors`."""
        return pack(self.tensors, {"format": checker.FORMAT, "nodes": self.nodes})


def pack(tensors: Mapping[str, Array], header: Mapping[str, Any]) -> bytes:
    """A safetensors file with a JSON header."""
    return save(
        {name: np.ascontiguousarray(value) for name, value in tensors.items()}, {"header": to_json(header)}
    )


@torch.no_grad()
def export(graph: Graph) -> Program:
    """The network as the checker reads it.

    Args:
        graph: in float64, in evaluation mode.

    Raises:
        UnknownError: if it has an operator that the checker does not know.
        TightropeError: if the checker computes something else than the network.
    """
    graph = trace(copy.deepcopy(graph.module).cpu(), graph.input_shape)
    writer = _Writer()
    places = [writer.add("input", (), graph.input_shape)]
    for node in graph.nodes[1:]:
        inputs = tuple(places[j] for j in node.inputs)
        shapes = [graph.nodes[j].shape for j in node.inputs]
        places.append(writer.translate(node, inputs, shapes))
    if places[-1] != len(writer.nodes) - 1:
        raise UnknownError("an output that other nodes read, too")
    program = Program(writer.nodes, writer.tensors)
    x = torch.rand(4, *graph.input_shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    theirs = checker.Network(program.content()).run(x.flatten(1).numpy())
    ours = graph.run(x)[0].numpy()
    alone = Problem(graph, x, Box(0.0, domain=None), Spec.logits(len(x), graph.classes, x))
    rounding = 2 * rounding_error(alone).numpy()  # of both, where large numbers cancel
    if not (np.abs(theirs - ours) <= 1e-9 * (1 + np.abs(ours).max()) + rounding).all():
        raise TightropeError(
            "the checker computes something else than the network: this is a bug, please report it"
        )
    return program


class _Writer:
    """Nodes and tensors that become a program."""

    def __init__(self) -> None:
        self.nodes: list[dict[str, Any]] = []
        self.tensors: dict[str, Array] = {}

    def add(
        self,
        op: str,
        inputs: Sequence[int],
        shape: Sequence[int],
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        **settings: Any,
    ) -> int:
        number = len(self.nodes)
        node = {"op": op, "inputs": list(inputs), "shape": list(shape), **settings}
        for name, value in (("weight", weight), ("bias", bias)):
            if value is not None:
                node[name] = f"{number}.{name}"
                self.tensors[f"{number}.{name}"] = value.numpy()
        self.nodes.append(node)
        return number

    def translate(self, node: Node, inputs: tuple[int, ...], shapes: Sequence[torch.Size]) -> int:
        """The number of the node that yields a node's value."""
        op, shape = node.op, node.shape
        match op:
            case Identity() | Dropout() | Reshape():
                return inputs[0]
            case ReLU():
                return self.add("relu", inputs, shape, left=0.0)
            case LeakyReLU():
                return self.add("relu", inputs, shape, left=op.slope)
            case Linear() if len(shape) == 1:
                return self.add("dense", inputs, shape, op.weight(), op.bias() if op.bias else None)
            case Conv() if op.weight().ndim == 4 and not op.pad and not isinstance(op.padding, str):
                stride, padding, dilation = map(list, op.geometry())
                settings = {"stride": stride, "padding": padding, "dilation": dilation, "groups": op.groups}
                bias = op.bias() if op.bias else None
                return self.add("conv", inputs, shape, op.weight(), bias, of=list(shapes[0]), **settings)
            case Add() if shapes == [shape, shape]:
                return self.add("add", inputs, shape, sign=op.sign)
            case Scale() | Shift() | BatchNorm() if shapes == [shape]:
                return self._element_by_element(op, inputs, shape)
            case Affine():
                return self._matrix(op, inputs, shapes, shape)
        raise UnknownError(type(op).__name__)

    def _element_by_element(
        self, op: Scale | Shift | BatchNorm, inputs: tuple[int, ...], shape: torch.Size
    ) -> int:
        zero = torch.zeros(1, *shape, dtype=torch.float64)
        weight: Tensor | None = None
        bias: Tensor | None = None
        divide = False
        if isinstance(op, Scale):
            factor = op.factor() if callable(op.factor) else op.factor
            weight, divide = torch.as_tensor(factor, dtype=torch.float64).expand_as(zero), op.divide
        elif isinstance(op, Shift):
            bias = op.apply(zero)
        else:
            scale, shift = op.fold(lambda: op.module.running_var.new_ones(shape[0]), None)  # type: ignore[union-attr]
            per_channel = (1, -1, *[1] * (len(shape) - 1))
            weight, bias = (value().view(per_channel).expand_as(zero) for value in (scale, shift))
        flat = [None if value is None else value.flatten() for value in (weight, bias)]
        return self.add("scale", inputs, shape, *flat, divide=divide)

    def _matrix(
        self, op: Affine, inputs: tuple[int, ...], shapes: Sequence[torch.Size], shape: torch.Size
    ) -> int:
        """Any other affine operator: a matrix for each of its inputs, and their sum."""
        if shape.numel() * max(size.numel() for size in shapes) > LARGEST_MATRIX:
            raise UnknownError(f"{type(op).__name__} on values of this size")
        nothing = [torch.zeros(1, *size, dtype=torch.float64) for size in shapes]
        bias: Tensor | None = op.apply(*nothing).flatten()
        total: int | None = None
        for k, j in enumerate(inputs):
            rows = torch.eye(shape.numel(), dtype=torch.float64).view(1, -1, *shape)
            matrix = op.transpose(rows, shapes)[k][0].flatten(1)
            part = self.add("dense", (j,), shape, matrix, bias)
            bias = None
            total = part if total is None else self.add("add", (total, part), shape, sign=1)
        assert total is not None
        return total


@dataclass(frozen=True)
class Certificates:
    """A folder of certificates, one file for each batch of examples.

    Args:
        folder: beside the file of verdicts.
        network: the bytes of `network.safetensors`.
        identity: of the verdicts: eps, norm, domain, data.
    """

    folder: Path
    network: bytes
    identity: dict[str, Any]

    def begin(self, out: Path) -> None:
        """Write the network, if the file of verdicts is a new one.

        Raises:
            InputError: if there are certificates of other verdicts in the folder.
        """
        path = self.folder / "network.safetensors"
        if not out.exists() and any(self.folder.glob("[0-9]*.safetensors")):
            raise InputError(
                f"{self.folder} holds certificates of other verdicts: remove it, or choose another --out"
            )
        if not (out.exists() and path.exists()):
            write_atomically(path, self.network)

    @property
    def digest(self) -> str:
        """SHA-256 of the network's file."""
        return hashlib.sha256(self.network).hexdigest()

    def write(self, verdicts: Sequence[Verdict], x: Tensor, proofs: Mapping[int, Proof]) -> list[Verdict]:
        """Write the certificates of a batch, each checked before; the verdicts name them.

        Args:
            verdicts: on the batch.
            x: its inputs.
            proofs: of robust examples, by index.
        """
        network = checker.Network(self.network)
        inputs = x.flatten(1).cpu().numpy()
        short = inputs.astype("<f4")
        tensors: dict[str, Array] = {"x": short if (short == inputs).all() else inputs}
        claims = []
        for verdict, point in zip(verdicts, inputs, strict=True):
            claim = {name: getattr(verdict, name) for name in checker.CLAIM} | {"proof": None}
            if verdict.index in proofs:
                claim, cells = self._repeated(network, claim, point, proofs[verdict.index])
                tensors |= {f"{verdict.index}/{name}": value for name, value in cells.items()}
            claims.append(claim)
        header = {"format": checker.FORMAT, "certificates": self.digest, **self.identity, "claims": claims}
        content = pack(tensors, header)
        digest = hashlib.sha256(content).hexdigest()
        # Named by what it holds: a batch that is judged again leaves alone what earlier verdicts name.
        name = f"{verdicts[0].index:06d}-{digest[:8]}.safetensors"
        write_atomically(self.folder / name, content)
        rules = [claim["proof"] and claim["proof"]["rule"] for claim in claims]
        return [
            replace(verdict, certificate=Certificate(name, digest, rule))
            for verdict, rule in zip(verdicts, rules, strict=True)
        ]

    def _repeated(
        self, network: checker.Network, claim: dict[str, Any], x: Array, proof: Proof
    ) -> tuple[dict[str, Any], dict[str, Array]]:
        """The claim with its proof, and the proof's tensors; without, if the checker cannot repeat it."""
        proved = claim | {"proof": {"rule": proof.rule}}
        for kind in PRECISIONS:
            tensors = proof.tensors(kind)
            try:
                checker.check(network, self.identity, proved, x[None], tensors, {})
            except checker.RejectedError:
                continue
            return proved, tensors
        return claim, {}

"""Initialisations for certified training."""

from __future__ import annotations

import math

import torch

from tightrope.graph import Graph
from tightrope.graph.ops import Add, Affine, Conv, Linear


@torch.no_grad()
def ibp_initialisation(graph: Graph) -> None:
    """Weights `~ N(0, 2 pi / fan_in^2)`, so that interval bounds keep their width through the layers.

    The last layer keeps its own initialisation, biases too; a layer that is fed by a residual sum
    gets half the weights. Source: Shi et al. 2021, section 3.2; methods.md, section 4.
    """
    layers = [(i, node.op) for i, node in enumerate(graph.nodes) if isinstance(node.op, Linear | Conv)]
    for i, op in layers[:-1]:
        weight = op.weight()
        torch.nn.init.normal_(weight, std=math.sqrt(2 * math.pi) / weight[0].numel())
        if _fed_by_sum(graph, i):
            weight.mul_(0.5)


def _fed_by_sum(graph: Graph, i: int) -> bool:
    """Whether a residual sum lies between this layer and the layers before it."""
    (source,) = graph.nodes[i].inputs
    op = graph.nodes[source].op
    if isinstance(op, Add):
        return True
    passes = op is not None and not (isinstance(op, Affine) and isinstance(op, Linear | Conv))
    return passes and len(graph.nodes[source].inputs) == 1 and _fed_by_sum(graph, source)

"""Initialisations for certified training."""

from __future__ import annotations

import math
from contextlib import suppress

import torch
from torch.nn.utils.parametrize import is_parametrized

from tightrope.graph import Graph
from tightrope.graph.ops import Add, Conv, Linear


@torch.no_grad()
def ibp_initialisation(graph: Graph) -> None:
    """Weights `~ N(0, 2 pi / fan_in^2)`, so that interval bounds keep their width through the layers.

    The last layer keeps its own initialisation, biases too; a layer that is fed by a residual sum
    gets half the weights. Frozen weights stay as they are; a parametrized weight gets the value that its
    parametrization makes of this one, if it can be set. Source: Shi et al. 2021, section 3.2; methods.md,
    section 4.
    """
    modules = dict(graph.module.named_modules())
    layers = [(i, node.op) for i, node in enumerate(graph.nodes) if isinstance(node.op, Linear | Conv)]
    for i, op in layers[:-1]:
        weight = op.weight()
        drawn = torch.empty_like(weight).normal_(std=math.sqrt(2 * math.pi) / weight[0].numel())
        if _fed_by_sum(graph, i):
            drawn.mul_(0.5)
        module = modules.get(graph.nodes[i].name)
        if isinstance(weight, torch.nn.Parameter):
            if weight.requires_grad:
                weight.copy_(drawn)
        elif module is not None and is_parametrized(module, "weight"):
            with suppress(NotImplementedError):  # of those that cannot be set
                module.weight = drawn


def _fed_by_sum(graph: Graph, i: int) -> bool:
    """Whether a residual sum lies between this layer and the layers before it."""
    (source,) = graph.nodes[i].inputs
    op = graph.nodes[source].op
    if isinstance(op, Add):
        return True
    passes = op is not None and not isinstance(op, Linear | Conv)
    return passes and len(graph.nodes[source].inputs) == 1 and _fed_by_sum(graph, source)

"""How a network in training is doing on held-out training examples."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tightrope.bounds import Engine, Latent, Problem
from tightrope.bounds.latent import NOISE, boxes_upto
from tightrope.graph import Graph
from tightrope.graph.ops import Kinked
from tightrope.region import Box, Region
from tightrope.spec import Spec, smallest_margin
from tightrope.train.batch import Search

CHUNK = 500


@dataclass(frozen=True)
class HeldOut:
    """Training examples that the network is never trained on."""

    x: Float[Tensor, "examples *shape"]
    y: Int[Tensor, "examples"]


@torch.no_grad()
def evaluate(
    graph: Graph, held_out: HeldOut, region: Region, engine: Engine
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Clean and certified accuracy, and per layer the share of dead, active and unstable neurons.

    In the run's own precision and at running statistics: a guide for the eye, not a verdict.

    Returns:
        A record of accuracies, and one record per layer of ReLUs.
    """
    frozen = graph.frozen()
    clean, certified = 0, 0
    layers: dict[int, Tensor] = {}
    for x, y in zip(held_out.x.split(CHUNK), held_out.y.split(CHUNK), strict=True):
        clean += int((frozen.run(x)[0].argmax(1) == y).sum())
        bounds = engine(Problem(frozen, x, region, Spec.margins(y, graph.classes, x)))
        certified += int((smallest_margin(bounds.lower, y) > 0).sum())
        for i, (lower, upper) in bounds.boxes.items():
            if isinstance(graph.nodes[i].op, Kinked):
                counts = torch.stack(
                    [(upper <= 0).float().mean(), (lower >= 0).float().mean(), (upper - lower).mean()]
                )
                layers[i] = layers.get(i, 0) + counts.double() * len(x)
    count = len(held_out.y)
    records = []
    for i, sums in layers.items():
        dead, active, width = (sums / count).tolist()
        records.append(
            {
                "name": graph.nodes[i].name,
                "dead": dead,
                "active": active,
                "unstable": max(0.0, 1 - dead - active),
                # Bounds may overflow where the network itself does not; JSON knows no infinity.
                "width": width if math.isfinite(width) else torch.finfo(torch.float32).max,
            }
        )
    return {
        "examples": count,
        "eps": region.eps,
        "clean": clean / count,
        "certified": certified / count,
    }, records


@torch.no_grad()
def verified_error(graph: Graph, held_out: HeldOut, eps: float, search: Search, node: int) -> float:
    """Share of the correctly classified examples that an attack turns inside a node's latent region.

    Source: maar.txt, eq. 25; an estimate of how much could not be certified, on held-out training examples.
    """
    frozen, region = graph.frozen(), Box(eps)
    correct, turned = 0, 0
    generator = torch.Generator(held_out.x.device).manual_seed(0)
    for x, y in zip(held_out.x.split(CHUNK), held_out.y.split(CHUNK), strict=True):
        problem = Problem(frozen, x, region, Spec.margins(y, graph.classes, x), generator)
        latent = Latent.over(frozen, x, region, node, boxes_upto(problem, node, search.boxes))
        noise = search.attack(latent, latent.still, y, NOISE, generator)
        right = frozen.run(x)[0].argmax(1) == y
        correct += int(right.sum())
        turned += int((right & (latent.run(noise)[0].argmax(1) != y)).sum())
    return turned / correct if correct else 1.0

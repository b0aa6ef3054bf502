"""Latent robustness: how many answers an attack cannot turn inside a layer's latent region."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tightrope.attacks import Pgd
from tightrope.bounds import Latent, Linear, Problem
from tightrope.bounds.latent import NOISE, boxes_upto
from tightrope.errors import InputError
from tightrope.examples import Examples
from tightrope.given import whole
from tightrope.graph import Graph, recast
from tightrope.progress import Progress
from tightrope.region import Box, Region
from tightrope.spec import Spec
from tightrope.verify.pipeline import identify

LATENT_ATTACK = Pgd(steps=150, step=0.01)
"""What maar.txt, appendix C.2, attacks with; a step is counted in noise, which lies in [-1, 1]."""

CHUNK = 100


@dataclass(frozen=True)
class LatentRobustness:
    """How many examples withstand a latent attack: a statistic, neither a proof nor a counterexample.

    Args:
        node: behind which layer the region lies.
        eps: radius of the input's region.
        examples: how many were looked at.
        clean_correct: how many of them the network classifies correctly.
        withstood: how many of those stay correct at the point that the attack found.
        seconds: time spent.
        identity: what else it rests on: weights, data, attack, seed.
    """

    node: str
    eps: float
    examples: int
    clean_correct: int
    withstood: int
    seconds: float
    identity: dict[str, Any]

    def summary(self) -> dict[str, Any]:
        """Counts, and the share of all examples that are right and withstand."""
        own = {name: value for name, value in vars(self).items() if name != "identity"}
        return {**own, "latent_robustness": self.withstood / self.examples}


@torch.no_grad()
def latent_robustness(
    graph: Graph,
    examples: Examples,
    region: Region,
    node: str,
    *,
    attack: Pgd = LATENT_ATTACK,
    first: int | None = None,
    seed: int = 0,
) -> LatentRobustness:
    """Attack every example inside the zonotope behind an activation (maar.txt, eq. 26).

    Args:
        graph: the network; a float32 copy in evaluation mode is attacked.
        examples: the data set.
        region: where each input may move; one radius for all.
        node: name of an activation, as metrics and `Graph` name it, or "input".
        attack: the attack; its step is counted in noise.
        first: only the first so many examples.
        seed: of the random starts.

    Raises:
        InputError: if there is no such activation, the region is no l_inf ball, or `first` is not positive.
    """
    if not isinstance(region, Box) or isinstance(region.eps, Tensor):
        raise InputError("latent regions are there for l_inf balls of one radius: use --norm inf")
    first = None if first is None else whole(first, "the number of examples", 1)
    seed = whole(seed, "the seed", 0, 2**32 - 1)
    network = recast(graph, torch.float32)
    cut = _find(network, node)
    total = min(first or len(examples), len(examples))
    began, correct, withstood = time.perf_counter(), 0, 0
    exact = Linear("parallel", "linear", sides="none")
    with Progress("latent attack", total, 0, unit="example") as progress:
        for x, y, index in examples.batches(torch.arange(total).split(CHUNK)):
            right = network.run(x)[0].argmax(1) == y
            x, y = x[right], y[right]
            problem = Problem(network, x, region, Spec.margins(y, network.classes, x))
            latent = Latent.over(network, x, region, cut, boxes_upto(problem, cut, exact))
            generator = torch.Generator(x.device).manual_seed(seed + int(index[0]))
            noise = attack(latent, latent.still, y, NOISE, generator)
            correct += len(y)
            withstood += int((latent.run(noise)[0].argmax(1) == y).sum())
            progress.advance(len(index))
    identity = {**identify(graph, examples, region), "attack": vars(attack), "seed": seed}
    seconds = time.perf_counter() - began
    return LatentRobustness(node, region.eps, total, correct, withstood, seconds, identity)


def _find(graph: Graph, name: str) -> int:
    names = {"input": 0} | {node.name: i for i, node in graph.activations()}
    if name not in names:
        raise InputError(f"the network has no activation {name!r}; there are {', '.join(names)}")
    return names[name]

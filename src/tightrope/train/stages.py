"""Training layer by layer: the network is frozen from its input on, one activation further in each stage.

Source: Balunovic and Vechev 2020 (COLT); maar.txt, appendix A.2; seeds.md, section 5.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from tightrope.errors import InputError
from tightrope.graph import Graph
from tightrope.graph.ops import Kinked
from tightrope.train.schedules import Positive, Share


@dataclass(frozen=True)
class Stage:
    """A part of a run.

    Args:
        number: from 0.
        begin: share of the run that is done when it begins.
        end: and when it ends.
        cut: the node up to which the network is frozen; 0, the input, freezes nothing.
        before: the cut of the stage before, None in the first stage.
        after: the next activation behind the cut, if there is one.
        eps: what the method's radius is multiplied by.
        lr: what the learning rate is multiplied by.
    """

    number: int = 0
    begin: float = 0.0
    end: float = 1.0
    cut: int = 0
    before: int | None = None
    after: int | None = None
    eps: float = 1.0
    lr: float = 1.0

    def progress(self, of_run: float) -> float:
        """Share of the stage that is done when this share of the run is."""
        return min(1.0, max(0.0, (of_run - self.begin) / (self.end - self.begin)))


WHOLE = Stage()
"""The one stage of a method that trains the whole network all the time."""


class Layerwise(BaseModel):
    """A stage for the input and for each activation but the last.

    Args:
        widen: what the radius is multiplied by in the last stage.
        eps_factor: and once more for every stage that is still to come.
        lr_factor: what the learning rate, whose schedule is that of a stage, is multiplied by from stage to
            stage.
        mix: share of a stage over which its loss takes over from that of the stage before.
        lengths: how long the stages are, in any unit; all the same if none is given.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    widen: Positive = 1.05
    eps_factor: Positive = 1.1
    lr_factor: Positive = 0.75
    mix: Share = 0.3
    lengths: tuple[Positive, ...] = ()

    def of(self, graph: Graph) -> list[Stage]:
        """The stages of a network's training.

        Raises:
            InputError: if it has activations that no zonotope goes through, or not as many stages as lengths.
        """
        activations = [i for i, _ in graph.activations()]
        cuts = [0, *activations[:-1]]
        strange = [graph.nodes[i] for i in cuts[1:] if not isinstance(graph.nodes[i].op, Kinked)]
        if strange:
            names = ", ".join(f"{node.name} ({type(node.op).__name__})" for node in strange)
            raise InputError(
                f"training layer by layer attacks the regions behind ReLU and LeakyReLU, not behind {names}: "
                "use another network, or another method"
            )
        lengths = self.lengths or (1.0,) * len(cuts)
        if len(lengths) != len(cuts):
            raise InputError(
                f"this network is trained in {len(cuts)} stages (its input, and every activation but the "
                f"last), got {len(lengths)} lengths"
            )
        ends = [sum(lengths[: j + 1]) / sum(lengths) for j in range(len(cuts))]
        return [
            Stage(
                number=j,
                begin=0.0 if j == 0 else ends[j - 1],
                end=ends[j],
                cut=cut,
                before=None if j == 0 else cuts[j - 1],
                after=activations[j] if activations else None,
                eps=self.widen * self.eps_factor ** (len(cuts) - 1 - j),
                lr=self.lr_factor**j,
            )
            for j, cut in enumerate(cuts)
        ]


@contextmanager
def frozen_upto(graph: Graph, node: int) -> Iterator[Graph]:
    """The network with the operators up to a node as in evaluation and their parameters out of training.

    A parameter that is also used behind the node stays as it is, too.
    """
    if node == 0:
        yield graph
        return
    still = _used(graph.upto(node).frozen())
    nodes = [
        replace(n, op=n.op.frozen()) if n.op is not None and i <= node else n
        for i, n in enumerate(graph.nodes)
    ]
    for parameter in still:
        parameter.requires_grad_(False)
    try:
        yield replace(graph, nodes=tuple(nodes))
    finally:
        for parameter in still:
            parameter.requires_grad_(True)


def _used(graph: Graph) -> list[Tensor]:
    """The trainable parameters that a network's values depend on."""
    parameters = [p for p in graph.module.parameters() if p.requires_grad]
    with torch.enable_grad():
        values = [parameters[0].new_zeros(1, *graph.input_shape)]
        for node in graph.nodes[1:]:
            assert node.op is not None
            values.append(node.op.apply(*[values[j] for j in node.inputs]))
        total = torch.stack([value.sum() for value in values]).sum()
        if not total.requires_grad:
            return []
        parts = torch.autograd.grad(total, parameters, allow_unused=True)
    return [p for p, part in zip(parameters, parts, strict=True) if part is not None]

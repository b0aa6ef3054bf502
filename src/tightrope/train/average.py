"""The mean of the weights that a run went through, kept beside the network in training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from tightrope.errors import InputError
from tightrope.graph import Graph
from tightrope.graph.ops import BatchNorm
from tightrope.train.batch import State
from tightrope.train.schedules import Real, Share
from tightrope.train.stages import Stage


class Average(BaseModel):
    """Which weights are averaged, and how much each counts.

    Args:
        begin: share of the run from which on weights are averaged.
        decay: of an exponential moving average, `mean = decay mean + (1 - decay) weights` after each step;
            if not said, the weights at the end of each epoch all count the same (Izmailov et al. 2018, SWA).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    begin: Share
    decay: Annotated[Real, Field(gt=0, lt=1)] | None = None

    def check(self, stages: Sequence[Stage]) -> None:
        """Raise an InputError if the weights to be averaged belong to different trainings."""
        if len(stages) > 1:
            raise InputError(
                f"training.average: a mean is taken over a run of one stage, and this one has {len(stages)}, "
                "each of which trains another part of the network: leave training.average out"
            )


class AveragedNetwork:
    """The averaged network of a run; the weights in training know nothing of it.

    Args:
        average: which weights are averaged; if None, there is no averaged network, and nothing happens.
        module: the network in training.

    Attributes:
        state: the averaged network, and how many weights it is the mean of; a checkpoint holds it.
    """

    def __init__(self, average: Average | None, module: nn.Module) -> None:
        self.average = average
        self.state: State = {}
        self._parameters: list[tuple[Tensor, Tensor]] = []
        self._buffers: list[tuple[Tensor, Tensor]] = []
        if average is not None:
            self.state["average.count"] = torch.zeros((), dtype=torch.int64)
            self._parameters = self._beside(module.named_parameters())
            self._buffers = self._beside(module.named_buffers())

    def _beside(self, named: Iterable[tuple[str, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """Pairs of a tensor of the network and its counterpart here."""
        pairs = []
        for name, tensor in named:
            mine = self.state[f"average.network.{name}"] = tensor.detach().clone()
            pairs.append((tensor, mine))
        return pairs

    @torch.no_grad()
    def learn(self, done: float, epoch_ends: bool) -> None:
        """Take the present weights into the mean, if it is their turn.

        Args:
            done: share of the run that is done.
            epoch_ends: whether an epoch ends here.
        """
        average = self.average
        if average is None or done < average.begin or (average.decay is None and not epoch_ends):
            return
        count = int(self.state["average.count"].add_(1))
        weight = 1 / count if average.decay is None or count == 1 else 1 - average.decay
        for tensor, mine in self._parameters:
            mine.lerp_(tensor, weight)

    @contextmanager
    def in_place(self) -> Iterator[bool]:
        """For a while the network is the averaged one, if there is one yet, which is what this yields.

        What is done to its buffers, such as BatchNorm's statistics, stays with the averaged network.
        """
        if self.average is None or not self.state["average.count"]:
            yield False
            return
        for tensor, mine in self._buffers:
            mine.copy_(tensor)
        self._exchange()
        try:
            yield True
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for tensor, mine in (*self._parameters, *self._buffers):
            kept = tensor.clone()
            tensor.copy_(mine)
            mine.copy_(kept)

    @torch.no_grad()
    def replace(self) -> None:
        """Leave the averaged network, as it last was `in_place`, where the one in training is."""
        for tensor, mine in (*self._parameters, *self._buffers):
            tensor.copy_(mine)


@torch.no_grad()
def recompute_statistics(graph: Graph, batches: Iterable[Float[Tensor, "batch *shape"]]) -> None:
    """Set the running statistics of BatchNorm to their means over batches, at the present weights.

    Mean and variance of each batch count by its size; dropout is off, and what is frozen stays as it is.

    Args:
        graph: the network.
        batches: clean inputs; none is read where there is no BatchNorm.
    """
    ops = [node.op for node in graph.nodes if isinstance(node.op, BatchNorm)]
    norms = [op.module for op in ops if op.statistics is None]
    if not norms:
        return
    modes = {module: module.training for module in graph.module.modules()}
    momenta = {norm: norm.momentum for norm in norms}
    graph.module.eval()
    try:
        for norm in norms:
            norm.train()
            norm.reset_running_stats()
        seen = 0
        for x in batches:
            seen += len(x)
            for norm in norms:
                norm.momentum = len(x) / seen
            graph.run(x)
    finally:
        for norm, momentum in momenta.items():
            norm.momentum = momentum
        for module, mode in modes.items():
            module.training = mode

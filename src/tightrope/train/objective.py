"""What a method is made of: weighted losses, and the gradient that they add up to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

from tightrope.graph import Graph
from tightrope.train.batch import Batch, Margins, State, Term
from tightrope.train.schedules import Number

Weigh = Callable[[Batch, Margins], Tensor]
"""How much each example of a batch counts: `(batch, margins) -> (batch,)`, positive and without gradient."""


@dataclass(frozen=True)
class Loss:
    """One part of an objective.

    Args:
        name: how metrics and errors call it.
        weight: a number or a schedule; while it is 0, the term is not computed.
        term: the loss per example, or several per example, `(batch, several)`, whose means `join` makes one.
        margins: the lower bounds of the margins that it rests on, if it bounds the worst case.
        weigh: how much each example counts, if not all the same.
        join: what the loss is of the means of several terms, `(several,) -> ()`.
    """

    name: str
    weight: Number
    term: Term
    margins: Margins | None = None
    weigh: Weigh | None = None
    join: Callable[[Tensor], Tensor] | None = None

    @property
    def certified(self) -> bool:
        """Whether it bounds the worst case over the region."""
        return self.margins is not None

    def value(self, batch: Batch) -> Float[Tensor, ""]:
        """The (weighted) mean over the batch."""
        values = self.term(batch)
        if self.weigh is None or self.margins is None:
            mean = values.mean(0)
        else:
            weights = batch.weighed[self.name] = self.weigh(batch, self.margins)
            mean = weights.to(values) @ values / weights.sum()
        return self.join(mean) if self.join is not None and mean.ndim else mean


@dataclass(frozen=True)
class Gradient:
    """What a combiner leaves in `.grad`.

    Args:
        losses: value of each loss, by name.
        notes: what else is worth a line in the metrics.
    """

    losses: dict[str, float]
    notes: dict[str, float]


@runtime_checkable
class Combiner(Protocol):
    """One gradient from several losses."""

    def begin(self, graph: Graph) -> State:
        """What it remembers from step to step, at the beginning of a run."""
        ...

    def __call__(
        self, losses: Mapping[str, tuple[Loss, float]], batch: Batch, parameters: Sequence[Tensor]
    ) -> Gradient:
        """Set the `.grad` of the parameters.

        Args:
            losses: those that count now, with their weights, by name.
            batch: the batch, with the run's state.
            parameters: of the network.

        Raises:
            DivergedError: if a loss is NaN or infinite.
        """
        ...


@runtime_checkable
class Radii(Protocol):
    """A radius for every training example."""

    def begin(self, examples: int) -> State:
        """What it remembers, at the beginning of a run.

        Args:
            examples: size of the data set whose numbers `index` holds.
        """
        ...

    def __call__(self, eps: float, index: Int[Tensor, "batch"], state: State) -> Float[Tensor, "batch"]:
        """The radius of each example of a batch, at most `eps`."""
        ...

    def learn(self, batch: Batch, margins: Margins) -> None:
        """Change the state of the batch's examples, by how they fared."""
        ...

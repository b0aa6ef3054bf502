"""What training and certification ask of data: the examples with these numbers, please."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Examples(Protocol):
    """Numbered examples. `tightrope.data` has implementations."""

    def __len__(self) -> int: ...

    def identity(self) -> str:
        """A hash that tells these examples from others."""
        ...

    def batches(self, order: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """For each tensor of indices: inputs in [0, 1], labels, and the indices again."""
        ...

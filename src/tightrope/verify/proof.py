"""What made a proof: enough for a checker to repeat it (docs/certificates.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Rule = Literal["ibp", "crown-ibp", "crown", "fast-lin"]
"""How boxes are found and which slopes lines have where none are stored; the checker knows these names."""

Array = np.ndarray


@dataclass(frozen=True, eq=False)
class Leaf:
    """A cell that was closed.

    Args:
        rival: the class over which the margin was bounded.
        signs: by the number of a neuron among those of all ReLUs, 1 or -1 where it is given.
        slopes: of the lower lines of the proof's neurons.
        weight: of the margin; 0 where the cell is empty.
        multipliers: of the given signs, by the same numbers.
    """

    rival: int
    signs: dict[int, int]
    slopes: Array
    weight: float = 1.0
    multipliers: dict[int, float] | None = None


@dataclass(frozen=True, eq=False)
class Proof:
    """What proved one example.

    Args:
        rule: see `Rule`.
        neurons: the numbers of those whose slopes are stored.
        leaves: the cells, for every class that the rule does not prove; they cover the region.
    """

    rule: Rule
    neurons: Array | None = None
    leaves: tuple[Leaf, ...] = ()

    def tensors(self, kind: str) -> dict[str, Array]:
        """The cells as the checker reads them: rivals, trees of splits, slopes, weights.

        Args:
            kind: numpy's name of the type of slopes.
        """
        if not self.leaves:
            return {}
        assert self.neurons is not None
        rivals = sorted({leaf.rival for leaf in self.leaves})
        splits, ordered = list[int](), list[Leaf]()
        for rival in rivals:
            _write(tuple(leaf for leaf in self.leaves if leaf.rival == rival), (), splits, ordered)
        weights = [[leaf.weight, *(leaf.multipliers or {}).values()] for leaf in ordered]
        return {
            "neurons": self.neurons.astype("<i4"),
            "rivals": np.array(rivals, "<i4"),
            "splits": np.array(splits, "<i4"),
            "slopes": np.stack([leaf.slopes for leaf in ordered]).astype(kind),
            "weights": np.array(
                [value for row in weights for value in row], {"<f2": "<f4", "<f4": "<f8"}[kind]
            ),
        }


def _write(leaves: Sequence[Leaf], path: tuple[int, ...], splits: list[int], ordered: list[Leaf]) -> None:
    """Write the tree whose cells these are, root first: a neuron, its positive half, its negative half.

    A neuron whose sign is given in all of them may be taken for the root, whatever the search took.
    """
    stack = [(tuple(leaves), path)]
    while stack:
        some, above = stack.pop()
        common = set(some[0].signs).difference(above).intersection(*(leaf.signs for leaf in some[1:]))
        if not common:
            (leaf,) = some  # cells that overlap, or leave a gap, are no tree
            splits.append(-1)
            given = leaf.multipliers or {}
            ordered.append(
                Leaf(leaf.rival, leaf.signs, leaf.slopes, leaf.weight, {n: given.get(n, 0.0) for n in above})
            )
            continue
        neuron = min(common)
        splits.append(neuron)
        halves = [tuple(leaf for leaf in some if leaf.signs[neuron] == side) for side in (-1, 1)]
        stack += [(half, (*above, neuron)) for half in halves]

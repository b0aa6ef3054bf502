"""Setting training examples aside, so that choices are never made on the test set."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from tightrope.errors import InputError


def hold_out(
    y: Int64[Tensor, "n"], count: int, seed: int
) -> tuple[Int64[Tensor, "kept"], Int64[Tensor, "count"]]:
    """Split `range(len(y))` into examples to train on and `count` held-out ones, class by class.

    Every class gives its share of `count`, rounded so that the shares add up (largest remainders
    first). The same `y`, `count` and `seed` give the same split on every machine.

    Args:
        y: class numbers `(n,)`.
        count: how many examples to hold out, 0 to n - 1.
        seed: 0 to 2**32 - 1.

    Returns:
        `(train_index, held_out_index)`, sorted, on the CPU.

    Raises:
        InputError: if `count` or `seed` is out of range.
    """
    if len(y) < 2:
        raise InputError(f"a training set needs 2 examples at least, one of which is held out; got {len(y)}")
    if not 0 <= count < len(y):
        raise InputError(f"cannot hold out {count} of {len(y)} examples: choose at most {len(y) - 1}")
    if not 0 <= seed < 2**32:
        raise InputError(f"the seed of a split must lie in 0 to 2**32 - 1, got {seed}")
    labels = y.cpu().numpy()
    # RandomState, unlike the newer Generator, promises the same stream in every numpy version.
    order = np.random.RandomState(seed).permutation(len(labels))
    _, labels, sizes = np.unique(labels[order], return_inverse=True, return_counts=True)
    quota, remainder = np.divmod(count * sizes, len(order))
    quota[np.argsort(-remainder, kind="stable")[: count - quota.sum()]] += 1
    # How many of the same class come before each example in the shuffled order.
    by_class = np.argsort(labels, kind="stable")
    rank = np.empty_like(order)
    rank[by_class] = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    held_out = rank < quota[labels]
    return torch.from_numpy(np.sort(order[~held_out])), torch.from_numpy(np.sort(order[held_out]))

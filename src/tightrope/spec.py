"""What is to be bounded: linear functions of the logits, one matrix of rows per example."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor

from tightrope.errors import InputError


@dataclass(frozen=True)
class Spec:
    """Rows `C` of a specification `C f(x)`, shape `(batch, rows, classes)`.

    A margin is positive where the example is safe, here and everywhere else in tightrope.
    """

    rows: Float[Tensor, "batch rows classes"]

    @classmethod
    def margins(cls, y: Integer[Tensor, "batch"], classes: int, like: Tensor) -> Spec:
        """`C[t] = e_y - e_t`: row t is the margin of class y over class t, row y is zero.

        Args:
            y: the labels.
            classes: number of classes.
            like: a tensor whose dtype and device the rows take.

        Raises:
            InputError: if a label lies outside `0 .. classes - 1`, or there is one class alone: without a
                wrong one everything would be robust.
        """
        if classes < 2:
            raise InputError(
                f"a network with {classes} output has no wrong class, so nothing can be robust or not: give "
                "it an output for every class (for a single logit z: 0 and z)"
            )
        if len(y) and not 0 <= int(y.min()) <= int(y.max()) < classes:
            raise InputError(
                f"labels must lie in 0..{classes - 1} for a network with {classes} outputs, "
                f"got {int(y.min())}..{int(y.max())}"
            )
        unit = torch.eye(classes, dtype=like.dtype, device=like.device)
        return cls(unit[y.long()].unsqueeze(1) - unit)  # uint8 would be taken for a mask

    @classmethod
    def logits(cls, batch: int, classes: int, like: Tensor) -> Spec:
        """The logits themselves."""
        return cls(torch.eye(classes, dtype=like.dtype, device=like.device).expand(batch, -1, -1))


def smallest_margin(
    margins: Float[Tensor, "batch classes"], y: Int[Tensor, "batch"]
) -> Float[Tensor, "batch"]:
    """The smallest margin over the wrong classes; NaN counts as minus infinity."""
    others = margins.scatter(1, y.unsqueeze(1), torch.inf)
    return torch.where(others.isnan(), -torch.inf, others).amin(1)

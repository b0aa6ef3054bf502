"""Random flips and shifts of a batch of images, on the batch's device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Shaped
from torch import Tensor

from tightrope.errors import InputError


@dataclass(frozen=True)
class Augment:
    """Each image is flipped left to right with probability 1/2 and shifted by at most `pad` pixels.

    A shift is a random crop of the image padded by `pad` on every side. With both off, a batch is
    returned as it is and no random numbers are drawn.

    Args:
        flip: whether to flip.
        pad: largest shift in pixels, each way.
        mode: what moves in at the border: the `edge` pixel repeated, or `zeros`.

    Raises:
        InputError: if `pad` is negative or `mode` is unknown.

    Example:
        >>> augment = Augment(flip=True, pad=4, mode="zeros")
        >>> augment(torch.rand(8, 3, 32, 32), torch.Generator().manual_seed(0)).shape
        torch.Size([8, 3, 32, 32])
    """

    flip: bool = False
    pad: int = 0
    mode: Literal["edge", "zeros"] = "edge"

    def __post_init__(self) -> None:
        if self.pad < 0:
            raise InputError(f"pad is the largest shift in pixels and must not be negative, got {self.pad}")
        if self.mode not in ("edge", "zeros"):
            raise InputError(f"mode must be 'edge' or 'zeros', got {self.mode!r}")

    def check(self, shape: Sequence[int]) -> None:
        """Raise an InputError if inputs of this shape cannot be changed so."""
        if (self.flip or self.pad) and len(shape) != 3:
            raise InputError(
                f"only images (c, h, w) can be augmented, got inputs of shape {tuple(shape)}: switch it off"
            )

    def __call__(self, x: Shaped[Tensor, "n c h w"], generator: torch.Generator) -> Shaped[Tensor, "n c h w"]:
        """A changed copy of `x`; random numbers are drawn on the generator's device.

        Raises:
            InputError: if `x` is not a batch of images `(n, c, h, w)`.
        """
        if not self.flip and self.pad == 0:
            return x
        self.check(x.shape[1:])
        n, _, height, width = x.shape

        def draw(low: int, high: int) -> Tensor:
            return torch.randint(low, high + 1, (n, 1), generator=generator, device=generator.device).to(
                x.device
            )

        # From where in the image each row and column of the result comes, per image.
        row = torch.arange(height, device=x.device).expand(n, -1)
        column = torch.arange(width, device=x.device).expand(n, -1)
        if self.flip:
            column = torch.where(draw(0, 1).bool(), width - 1 - column, column)
        if self.pad:
            row, column = row + draw(-self.pad, self.pad), column + draw(-self.pad, self.pad)
        source = row.clamp(0, height - 1).unsqueeze(2) * width + column.clamp(0, width - 1).unsqueeze(1)
        moved = x.flatten(2).gather(2, source.flatten(1).unsqueeze(1).expand(-1, x.shape[1], -1)).view_as(x)
        if self.mode == "zeros":
            inside = ((row >= 0) & (row < height)).unsqueeze(2) & (
                (column >= 0) & (column < width)
            ).unsqueeze(1)
            moved = moved.mul_(inside.unsqueeze(1))
        return moved

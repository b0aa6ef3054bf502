"""What a loaded data set is: images and labels as two tensors, checked once when they are put together."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from jaxtyping import Float32, Int64, Shaped
from torch import Tensor

from tightrope.errors import DataError


def unit(x: Shaped[Tensor, "*shape"]) -> Float32[Tensor, "*shape"]:
    """Pixels as float32 in [0, 1]: uint8 is divided by 255, floats keep their value."""
    if x.dtype != torch.uint8:
        return x.to(torch.float32)
    # CUDA turns a division by a Python number into a product with its rounded reciprocal, which would
    # make the images of one data set differ between devices in the last bit.
    return x.to(torch.float32).div_(torch.full((), 255.0, device=x.device))


@dataclass(frozen=True, eq=False)
class Split:
    """Images with their labels.

    Args:
        x: `(n, *shape)`, uint8 or float32 in [0, 1].
        y: `(n,)`, int64, not negative.

    Raises:
        DataError: for another dtype or shape, no examples, a NaN or infinite value, a value outside
            [0, 1], or a negative label.
    """

    x: Shaped[Tensor, "n *shape"]
    y: Int64[Tensor, "n"]

    def __post_init__(self) -> None:
        if self.x.dtype not in (torch.uint8, torch.float32):
            raise DataError(f"images must be uint8 or float32, got {self.x.dtype}: convert them first")
        if self.x.requires_grad:
            raise DataError("images must be numbers, these are computed with a gradient: give x.detach()")
        if self.y.dtype != torch.int64:
            raise DataError(f"labels must be int64 class numbers, got {self.y.dtype}: convert them first")
        if self.x.ndim < 2 or self.y.shape != self.x.shape[:1]:
            raise DataError(
                f"images must be (n, *shape) and labels (n,), got {tuple(self.x.shape)} and "
                f"{tuple(self.y.shape)}: give one label per image"
            )
        if self.x.numel() == 0:
            raise DataError(
                f"there are no examples (images of shape {tuple(self.x.shape)}): give at least one"
            )
        if self.x.dtype == torch.float32:
            low, high = (float(end) for end in self.x.aminmax())
            # aminmax hands on a NaN, and no comparison with a NaN holds.
            if not (low >= 0 and high <= 1):
                seen = "NaN" if low != low else f"values from {low:.9g} to {high:.9g}"
                raise DataError(
                    f"images must be finite and lie in [0, 1], found {seen}: give uint8 or divide by the "
                    "largest value; normalisation belongs in the network, as its first layer"
                )
        if self.y.min() < 0:
            raise DataError(
                f"labels must be 0, 1, 2, ..., found {int(self.y.min())}: number the classes from 0"
            )

    def __len__(self) -> int:
        return len(self.x)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one image, for example `(1, 28, 28)`."""
        return tuple(self.x.shape[1:])

    def images(self, index: Int64[Tensor, "batch"]) -> Float32[Tensor, "batch *shape"]:
        """The images at `index` as float32 in [0, 1], on the device of the split."""
        return unit(self.x[index.to(self.x.device)])

    def to(self, device: torch.device | str) -> Split:
        """The same examples on `device`."""
        return Split(self.x.to(device), self.y.to(device))

    def subset(self, index: Int64[Tensor, "some"]) -> Split:
        """The examples at `index`, in that order."""
        index = index.to(self.x.device)
        return Split(self.x[index], self.y[index])

    def identity(self) -> str:
        """SHA-256 (hex) of dtype, shape and bytes of images and labels; the same on every device."""
        digest = hashlib.sha256()
        for tensor in (self.x, self.y):
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.cpu().contiguous().numpy().data)
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class DataSet:
    """A training and a test split over the same classes.

    Args:
        name: what `load` was asked for.
        train: the training examples.
        test: the test examples.
        classes: number of classes; labels are 0 to classes - 1.
        class_names: one name per class.

    Raises:
        DataError: if the splits hold images of different shapes, a label is not below `classes`, or
            there is not one name per class.
    """

    name: str
    train: Split
    test: Split
    classes: int
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.train.shape != self.test.shape:
            raise DataError(
                f"{self.name}: training images are {self.train.shape}, test images {self.test.shape}: "
                "give both the same shape"
            )
        for which, split in (("training", self.train), ("test", self.test)):
            largest = int(split.y.max())
            if largest >= self.classes:
                raise DataError(
                    f"{self.name}: a {which} label is {largest}, expected 0 to {self.classes - 1}: "
                    "correct the labels, or give training examples of every class"
                )
        if len(self.class_names) != self.classes:
            raise DataError(
                f"{self.name}: {len(self.class_names)} names for {self.classes} classes: name each one"
            )

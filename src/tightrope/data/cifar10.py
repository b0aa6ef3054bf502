"""CIFAR-10: 60,000 colour photographs of 32x32 pixels in ten classes (Krizhevsky)."""

from __future__ import annotations

import io
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tightrope.data.dataset import DataSet, Split
from tightrope.data.files import Download, Publication, damaged, read
from tightrope.errors import DataError

_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_BATCHES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
_PIXELS = 3 * 32 * 32

PUBLICATION = Publication(
    name="cifar10",
    home="https://www.cs.toronto.edu/~kriz/cifar.html",
    layouts=[
        (("cifar-10-batches-bin",), [f"{batch}.bin" for batch in _BATCHES]),
        (("cifar-10-batches-py",), _BATCHES),
    ],
    downloads=[
        Download(
            "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
            md5="c32a1d4ab5d03f1284b67883e8d87530",
            folder="cifar-10-batches-bin",
        )
    ],
)


def load_cifar10(root: Path, download: bool) -> DataSet:
    """CIFAR-10 with images `(3, 32, 32)` as uint8; batches of any number of records are accepted.

    Raises:
        DataError: if files are missing and cannot be fetched, or are damaged.
    """
    files = PUBLICATION.locate(root, download)
    return DataSet("cifar10", _split(files[:-1]), _split(files[-1:]), 10, _CLASSES)


def _split(files: list[Path]) -> Split:
    batches = [read_binary(file) if ".bin" in file.suffixes else read_pickled(file) for file in files]
    x = np.concatenate([pixels for pixels, _ in batches]).reshape(-1, 3, 32, 32)
    y = np.concatenate([labels for _, labels in batches]).astype(np.int64)
    return Split(torch.from_numpy(x), torch.from_numpy(y))


def read_binary(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Pixels `(n, 3072)` and labels `(n,)` of a batch in the binary layout: records of label, then pixels.

    Raises:
        DataError: if the file is not a whole number of records, or a label is not 0 to 9.
    """
    content = read(path)
    if len(content) == 0 or len(content) % (1 + _PIXELS):
        raise damaged(path, f"expected records of {1 + _PIXELS} bytes, found {len(content)} bytes in all")
    records = np.frombuffer(content, np.uint8).reshape(-1, 1 + _PIXELS)
    return records[:, 1:], _checked(path, records[:, 0])


def read_pickled(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Pixels `(n, 3072)` and labels `(n,)` of a batch in the Python layout, without running its code.

    Raises:
        DataError: if the file asks for any object but a numpy array, or is not a batch.
    """
    try:
        batch = _ArraysOnly(path).load()
        pixels = batch[b"data"].array()
        labels = np.array(batch[b"labels"], dtype=np.int64)
        if pixels.shape != (len(labels), _PIXELS) or labels.ndim != 1 or len(labels) == 0:
            raise ValueError(f"images {pixels.shape} and labels {labels.shape} do not fit")
    except DataError:
        raise
    except Exception as error:  # a damaged pickle can fail in nearly any way
        raise damaged(
            path, f"it does not hold a batch of CIFAR-10 ({type(error).__name__}: {error})"
        ) from error
    return pixels, _checked(path, labels)


def _checked(path: Path, labels: NDArray[Any]) -> NDArray[np.uint8]:
    wrong = (labels < 0) | (labels > 9)
    if wrong.any():
        record = int(wrong.argmax())
        raise damaged(path, f"labels are 0 to 9, record {record} has {labels[record]}")
    return labels.astype(np.uint8)


class _Array:
    """Stands in for each numpy object in a pickle, and only remembers what it was to be made from."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state

    def array(self) -> NDArray[np.uint8]:
        """The array of bytes that was pickled."""
        _, shape, dtype, by_column, content = self.state
        if dtype.arguments[0] not in (b"u1", "u1") or len(content) != math.prod(shape):
            raise ValueError(
                f"expected {math.prod(shape)} bytes, found {len(content)} of {dtype.arguments[0]}"
            )
        return np.frombuffer(content, np.uint8).reshape(shape, order="F" if by_column else "C")


class _ArraysOnly(pickle.Unpickler):
    """Knows the names that a pickled numpy array mentions, and no others.

    Even these are not handed out: `_Array` takes their place, so that nothing in the file is called.
    """

    names = frozenset(
        {
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
        }
    )

    def __init__(self, path: Path) -> None:
        super().__init__(io.BytesIO(read(path)), encoding="bytes")
        self.path = path

    def find_class(self, module: str, name: str) -> type[_Array]:
        if (module, name) not in self.names:
            raise DataError(
                f"{self.path} asks for {module}.{name}, which the published files never do: it may be "
                "malicious. Delete it, and get the data from " + PUBLICATION.home
            )
        return _Array

"""MNIST: 70,000 handwritten digits of 28x28 grey pixels (LeCun, Cortes, Burges)."""

from __future__ import annotations

from pathlib import Path

import torch

from tightrope.data.dataset import DataSet, Split
from tightrope.data.files import Download, Publication, damaged
from tightrope.data.idx import read_idx

_MIRROR = "https://ossci-datasets.s3.amazonaws.com/mnist/"
_FILES = {
    "train-images-idx3-ubyte": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte": "ec29112dd5afa0611ce80d1b7f02629c",
}

PUBLICATION = Publication(
    name="mnist",
    home="http://yann.lecun.com/exdb/mnist/ (mirror: " + _MIRROR + ")",
    layouts=[(("MNIST/raw", "mnist", ""), tuple(_FILES))],
    downloads=[Download(f"{_MIRROR}{file}.gz", md5, "MNIST/raw") for file, md5 in _FILES.items()],
)


def load_mnist(root: Path, download: bool) -> DataSet:
    """MNIST with images `(1, 28, 28)` as uint8.

    Raises:
        DataError: if files are missing and cannot be fetched, or are damaged.
    """
    files = PUBLICATION.locate(root, download)
    digits = tuple(str(digit) for digit in range(10))
    return DataSet("mnist", _split(*files[:2]), _split(*files[2:]), 10, digits)


def _split(images: Path, labels: Path) -> Split:
    x, y = read_idx(images), read_idx(labels)
    if x.shape[1:] != (28, 28) or len(x) == 0:
        raise damaged(images, f"expected images (n, 28, 28), found an array {x.shape}")
    if y.shape != x.shape[:1]:
        raise damaged(labels, f"expected {len(x)} labels, one per image, found an array {y.shape}")
    if y.max() > 9:
        raise damaged(labels, f"labels are 0 to 9, found {y.max()}")
    return Split(torch.from_numpy(x).unsqueeze(1), torch.from_numpy(y).long())

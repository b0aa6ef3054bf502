"""Small files in the publishers' formats, and a network that is never there."""

import os
import struct
from pathlib import Path

import numpy as np
import pooch
import pytest

from tightrope.errors import DataError

MNIST = {
    "train-images-idx3-ubyte": (20, 28, 28),
    "train-labels-idx1-ubyte": (20,),
    "t10k-images-idx3-ubyte": (10, 28, 28),
    "t10k-labels-idx1-ubyte": (10,),
}


@pytest.fixture(autouse=True)
def network(monkeypatch):
    """Every download fails as it does without a network; gives the list of addresses tried."""
    tried = []

    def retrieve(url, **_):
        tried.append(url)
        raise OSError("no route to host")

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    return tried


@pytest.fixture
def idx():
    """Bytes of an IDX file."""

    def encode(array):
        return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()

    return encode


@pytest.fixture
def mnist_files(idx):
    """The four files of a very small MNIST, by name."""
    pixels = np.random.default_rng(0)
    return {
        name: idx(
            pixels.integers(0, 256, shape, dtype=np.uint8)
            if len(shape) == 3
            else np.arange(shape[0], dtype=np.uint8) % 10
        )
        for name, shape in MNIST.items()
    }


@pytest.fixture
def write():
    """Write files by name into a folder."""

    def write(folder: Path, files):
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (folder / name).write_bytes(content)

    return write


@pytest.fixture
def real_root():
    """Gives the folder that holds a real publication, or skips the test."""
    root = os.environ.get("TIGHTROPE_DATA")
    if not root:
        pytest.skip("TIGHTROPE_DATA is not set: it names the folder with the real data sets")

    def holding(publication):
        try:
            publication.locate(Path(root), download=False)
        except DataError as missing:
            pytest.skip(f"TIGHTROPE_DATA lacks it: {missing}")
        return Path(root)

    return holding

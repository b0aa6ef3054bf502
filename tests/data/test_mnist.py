import gzip
import time

import numpy as np
import pytest
import torch

from tightrope.data import load
from tightrope.data.mnist import PUBLICATION
from tightrope.errors import DataError


@pytest.mark.parametrize("folder", ["MNIST/raw", "mnist", "."])
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_is_found_in_each_accepted_folder_plain_or_gzipped(tmp_path, write, mnist_files, folder, ending):
    pack = gzip.compress if ending else bytes
    write(tmp_path / folder, {name + ending: pack(content) for name, content in mnist_files.items()})
    data = load("mnist", tmp_path)
    assert (len(data.train), len(data.test), data.train.shape, data.classes) == (20, 10, (1, 28, 28), 10)
    assert data.train.x.dtype == torch.uint8
    assert data.train.x.numpy().tobytes() == mnist_files["train-images-idx3-ubyte"][16:]
    assert data.test.y.tolist() == list(range(10))


def test_plain_and_gzipped_files_may_be_mixed(tmp_path, write, mnist_files):
    mnist_files["t10k-labels-idx1-ubyte.gz"] = gzip.compress(mnist_files.pop("t10k-labels-idx1-ubyte"))
    write(tmp_path, mnist_files)
    assert len(load("mnist", tmp_path).test) == 10


@pytest.mark.parametrize(
    ("file", "array", "message"),
    [
        ("train-labels-idx1-ubyte", np.full(20, 11), "labels are 0 to 9, found 11"),
        ("train-labels-idx1-ubyte", np.zeros(19), "expected 20 labels"),
        ("t10k-labels-idx1-ubyte", np.zeros((10, 1)), "expected 10 labels"),
        ("train-images-idx3-ubyte", np.zeros((20, 32, 32)), r"expected images \(n, 28, 28\)"),
        ("train-images-idx3-ubyte", np.zeros((0, 28, 28)), r"expected images \(n, 28, 28\)"),
    ],
)
def test_files_that_cannot_be_mnist_are_named(tmp_path, write, idx, mnist_files, file, array, message):
    write(tmp_path, mnist_files | {file: idx(array.astype(np.uint8))})
    with pytest.raises(DataError, match=message) as caught:
        load("mnist", tmp_path)
    assert str(tmp_path / file) in str(caught.value)


def test_the_real_data_set_loads_fast(real_root):
    root, start = real_root(PUBLICATION), time.process_time()
    data = load("mnist", root, download=False)
    assert time.process_time() - start < 1  # 0.3 s
    assert (len(data.train), len(data.test)) == (60_000, 10_000)
    assert data.test.y[:5].tolist() == [7, 2, 1, 0, 4]
    assert data.train.x.sum() == 1_567_298_545

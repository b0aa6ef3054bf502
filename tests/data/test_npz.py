import pickle

import numpy as np
import pytest
import torch

from tightrope.data import load
from tightrope.errors import DataError

RNG = np.random.default_rng(0)


@pytest.fixture
def saved(tmp_path):
    """Save arrays as an .npz file, from good defaults: 6 training and 3 test images (1, 4, 5)."""

    def save(**changes):
        arrays = {
            "x_train": RNG.random((6, 1, 4, 5)),
            "y_train": np.array([0, 1, 2, 0, 1, 2]),
            "x_test": RNG.random((3, 1, 4, 5)),
            "y_test": np.array([2, 1, 0]),
        } | changes
        file = tmp_path / "own.npz"
        np.savez(file, **{key: array for key, array in arrays.items() if array is not None})
        return str(file)

    return save


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_floats_become_float32(saved, dtype):
    x = RNG.random((6, 1, 4, 5)).astype(dtype)
    data = load(saved(x_train=x))
    assert data.train.x.dtype == torch.float32
    np.testing.assert_array_equal(data.train.x.numpy(), x.astype(np.float32))
    assert (data.name, data.classes, data.class_names) == ("own.npz", 3, ("0", "1", "2"))


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64, np.uint32])
def test_labels_of_any_integer_type_become_int64(saved, dtype):
    assert load(saved(y_train=np.array([0, 1, 2, 0, 1, 2], dtype))).train.y.tolist() == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize(
    ("given", "shape"),
    [
        ((7,), (7,)),
        ((4, 5), (1, 4, 5)),
        ((1, 4, 5), (1, 4, 5)),
        ((3, 4, 5), (3, 4, 5)),
        ((4, 5, 1), (1, 4, 5)),
        ((4, 5, 3), (3, 4, 5)),
        ((3, 4, 3), (3, 4, 3)),
        ((16, 4, 4), (16, 4, 4)),
    ],
)
def test_images_become_channels_first_where_that_is_plain(saved, given, shape):
    x_train, x_test = (RNG.integers(0, 256, (n, *given), dtype=np.uint8) for n in (6, 3))
    data = load(saved(x_train=x_train, x_test=x_test))
    assert data.train.shape == data.test.shape == shape
    assert data.train.x.dtype == torch.uint8
    moved = x_train if given[-1] not in (1, 3) or given == shape else np.moveaxis(x_train, -1, 1)
    np.testing.assert_array_equal(data.train.x.numpy(), moved.reshape(6, *shape))


def spoilt(value):
    x = RNG.random((6, 1, 4, 5))
    x[4, 0, 2, 1] = value
    return x


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_train": spoilt(np.nan)}, "found NaN"),
        ({"x_train": spoilt(np.inf)}, r"values from .* to inf"),
        ({"x_train": spoilt(-np.inf)}, r"values from -inf"),
        ({"x_train": spoilt(255.0)}, r"lie in \[0, 1\], found values from .* to 255: give uint8 or divide"),
        ({"x_train": spoilt(-0.5)}, r"found values from -0.5"),
        ({"x_train": np.zeros((6, 1, 4, 5), np.int64)}, "uint8 or floats"),
        ({"x_train": np.zeros(6)}, "reshape"),
        ({"x_train": np.zeros((6, 1, 1, 4, 5))}, "reshape"),
        ({"x_train": np.zeros((6, 1, 4, 6))}, "same shape"),
        ({"x_test": np.zeros((0, 1, 4, 5)), "y_test": np.zeros(0, int)}, "no examples"),
        ({"y_train": np.array([0, 1, 2, 0, 1, -1])}, "found -1"),
        ({"y_test": np.array([0, 1, 3])}, "test label is 3, expected 0 to 2"),
        ({"y_train": np.zeros(5, int)}, "one label per image"),
        ({"y_train": np.zeros((6, 1), int)}, "one label per image"),
        ({"y_train": np.zeros(6)}, "integers, got float64"),
        ({"y_test": None, "x_test": None}, "lacks x_test, y_test"),
        ({"y_test": np.array([0, 1, "two"], object)}, "plain arrays"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(saved, changes, message):
    with pytest.raises(DataError, match=message) as caught:
        load(saved(**changes))
    assert "own.npz" in str(caught.value)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: b"",
        lambda content: b"no archive",
        lambda content: content.replace(b"NUMPY", b"numpy"),
        lambda content: content[:200] + bytes(8) + content[208:],
        lambda content: pickle.dumps([1]),
    ],
    ids=["half", "empty", "text", "header", "checksum", "pickle"],
)
def test_a_damaged_file_is_named_with_what_to_do(tmp_path, saved, damage):
    file = saved()
    damaged = tmp_path / "damaged.npz"
    damaged.write_bytes(damage((tmp_path / "own.npz").read_bytes()))
    load(file)
    with pytest.raises(DataError, match=r"damaged\.npz is damaged or not .* save it again"):
        load(str(damaged))


def test_a_lone_array_is_refused(tmp_path):
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    with pytest.raises(DataError, match=r"array\.npz"):
        load(str(tmp_path / "array.npz"))


def test_a_missing_file_is_named_in_full(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=str(tmp_path / "absent.npz")):
        load("absent.npz")

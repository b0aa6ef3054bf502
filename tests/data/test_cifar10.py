import pickle
import struct

import numpy as np
import pytest

from tightrope.data import load
from tightrope.data.cifar10 import PUBLICATION
from tightrope.errors import DataError

BATCHES = [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]
RNG = np.random.default_rng(0)
PIXELS = {name: RNG.integers(0, 256, (4, 3072), dtype=np.uint8) for name in BATCHES}
LABELS = {name: [3, 9, 0, number] for number, name in enumerate(BATCHES)}


def binary(name):
    return np.concatenate([np.array(LABELS[name], np.uint8)[:, None], PIXELS[name]], axis=1).tobytes()


def python2(name, by_column=False):
    """A batch as Python 2 and its numpy wrote them, opcode by opcode: the published files."""
    content = PIXELS[name].tobytes("F" if by_column else "C")
    dtype = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR(K\x01(K\x04M\x00\x0ct"
        + dtype
        + (b"\x88" if by_column else b"\x89")
        + b"T"
        + struct.pack("<i", len(content))
        + content
        + b"tb"
    )
    labels = b"](" + b"".join(b"K" + bytes([label]) for label in LABELS[name]) + b"e"
    return b"\x80\x02}(U\x04data" + array + b"U\x06labels" + labels + b"u."


def python3(name):
    return pickle.dumps({b"data": PIXELS[name], b"labels": LABELS[name]}, protocol=4)


LAYOUTS = {
    "binary": {f"cifar-10-batches-bin/{name}.bin": binary(name) for name in BATCHES},
    "python 2": {f"cifar-10-batches-py/{name}": python2(name) for name in BATCHES},
    "python 2, by column": {f"cifar-10-batches-py/{name}": python2(name, True) for name in BATCHES},
    "python 3": {f"cifar-10-batches-py/{name}": python3(name) for name in BATCHES},
}


def put(root, files):
    for name, content in files.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(content)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_data_whatever_the_number_of_records(tmp_path, layout):
    put(tmp_path, LAYOUTS[layout])
    data = load("cifar10", tmp_path)
    assert data.train.shape == (3, 32, 32)
    expected = np.concatenate([PIXELS[name] for name in BATCHES[:5]])
    np.testing.assert_array_equal(data.train.x.flatten(1).numpy(), expected)
    assert data.train.y.tolist() == [label for name in BATCHES[:5] for label in LABELS[name]]
    assert data.test.y.tolist() == [3, 9, 0, 5]
    assert data.class_names[:2] == ("airplane", "automobile")


def test_the_hand_written_pickle_is_one(tmp_path):
    """The opcodes above mean what they are meant to mean: numpy's own unpickling agrees."""
    content = python2("test_batch", True).replace(b"numpy.core.", b"numpy._core.")
    batch = pickle.loads(content, encoding="bytes")
    np.testing.assert_array_equal(batch[b"data"], PIXELS["test_batch"])


class Malicious:
    def __reduce__(self):
        return (eval, ("__import__('pathlib').Path('pwned').touch()",))


class FromSystem:
    def __reduce__(self):
        import os

        return (os.system, ("touch pwned",))


@pytest.mark.parametrize("payload", [Malicious(), FromSystem()], ids=["eval", "system"])
def test_a_pickle_that_asks_for_anything_else_is_refused_and_not_run(tmp_path, monkeypatch, payload):
    monkeypatch.chdir(tmp_path)
    batch = pickle.dumps({b"data": payload, b"labels": [0]})
    put(tmp_path, LAYOUTS["python 2"] | {"cifar-10-batches-py/data_batch_2": batch})
    with pytest.raises(DataError, match=r"data_batch_2 asks for .* may be malicious"):
        load("cifar10", tmp_path)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("bin/data_batch_3.bin", binary("data_batch_3")[:-1], "expected records of 3073 bytes"),
        ("bin/test_batch.bin", b"", "expected records of 3073 bytes"),
        ("bin/data_batch_1.bin", bytes(3073) + b"\x0a" + bytes(3072), "record 1 has 10"),
        ("py/test_batch", python2("test_batch")[:-100], "does not hold a batch"),
        ("py/test_batch", b"not a pickle", "does not hold a batch"),
        ("py/test_batch", pickle.dumps([1, 2]), "does not hold a batch"),
        ("py/test_batch", pickle.dumps({b"data": 3, b"labels": [1]}), "does not hold a batch"),
        (
            "py/test_batch",
            pickle.dumps({b"data": np.zeros((1, 3072)), b"labels": [1]}, 4),
            "does not hold a batch",
        ),
        ("py/test_batch", pickle.dumps({b"data": PIXELS["test_batch"], b"labels": [1]}, 4), "do not fit"),
        (
            "py/test_batch",
            pickle.dumps({b"data": PIXELS["test_batch"], b"labels": [1, 2, -1, 0]}, 4),
            "record 2 has -1",
        ),
    ],
)
def test_a_damaged_batch_is_named_with_what_to_do(tmp_path, file, content, message):
    layout = LAYOUTS["binary" if file.startswith("bin") else "python 2"]
    put(tmp_path, layout | {f"cifar-10-batches-{file}": content})
    with pytest.raises(DataError, match=message) as caught:
        load("cifar10", tmp_path)
    assert str(tmp_path / f"cifar-10-batches-{file}") in str(caught.value)
    assert "load again" in str(caught.value)


def test_the_real_data_set_has_its_classes_in_equal_parts(real_root):
    data = load("cifar10", real_root(PUBLICATION), download=False)
    assert data.train.y.bincount().tolist() == [5000] * 10
    assert len(data.test) > 0
    assert data.test.y[:4].tolist() == [3, 8, 8, 0]

import gzip

import numpy as np
import pytest

from tightrope.data.idx import read_idx
from tightrope.errors import DataError

ARRAY = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_reads_an_array_back_plain_or_gzipped(tmp_path, idx, pack):
    file = tmp_path / "some-idx3-ubyte"
    file.write_bytes(pack(idx(ARRAY)))
    np.testing.assert_array_equal(read_idx(file), ARRAY)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-1], "promises 24 bytes of data, it has 23"),
        (lambda content: content + b"x", "promises 24 bytes of data, it has 25"),
        (lambda content: content[:9], "inside its header"),
        (lambda content: b"", "starts with 00 00 08"),
        (lambda content: b"<html>", "starts with 00 00 08, this one with 3c 68 74"),
        (lambda content: gzip.compress(content)[:-12], "cannot be decompressed"),
        (lambda content: gzip.compress(content)[:-8] + bytes(8), "cannot be decompressed"),
    ],
    ids=["short", "long", "header", "empty", "web page", "gzip cut", "gzip checksum"],
)
def test_a_damaged_file_is_named_with_what_to_do(tmp_path, idx, damage, message):
    file = tmp_path / "some-idx3-ubyte"
    file.write_bytes(damage(idx(ARRAY)))
    with pytest.raises(DataError, match=message) as caught:
        read_idx(file)
    assert str(file) in str(caught.value)
    assert "load again" in str(caught.value)


def test_a_file_that_cannot_be_opened_is_named(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read_idx(tmp_path)

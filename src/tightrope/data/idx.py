"""MNIST's file format IDX: a big-endian header with the dimensions, then the bytes."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tightrope.data.files import damaged, read

_UINT8 = 8


def read_idx(path: Path) -> NDArray[np.uint8]:
    """The array of an IDX file of unsigned bytes, gzipped or not.

    Raises:
        DataError: if the file is not such a file, or shorter or longer than its header says.
    """
    content = read(path)
    if len(content) < 4 or content[:3] != bytes([0, 0, _UINT8]):
        raise damaged(
            path, f"an IDX file of bytes starts with 00 00 08, this one with {content[:3].hex(' ')}"
        )
    start = 4 + 4 * content[3]
    if len(content) < start:
        raise damaged(path, f"it ends inside its header, after {len(content)} bytes")
    shape = [int(size) for size in np.frombuffer(content[4:start], dtype=">u4")]
    if len(content) - start != math.prod(shape):
        raise damaged(
            path, f"its header promises {math.prod(shape)} bytes of data, it has {len(content) - start}"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy()  # writable, as torch wants it

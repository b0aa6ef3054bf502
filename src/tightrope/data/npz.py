"""A user's own data: an `.npz` file with `x_train, y_train, x_test, y_test`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tightrope.data.dataset import DataSet, Split
from tightrope.errors import DataError

_KEYS = ("x_train", "y_train", "x_test", "y_test")


def load_npz(path: Path) -> DataSet:
    """The data set in an `.npz` file, never unpickling anything.

    Images are uint8, or floats in [0, 1]. Grey `(n, h, w)` becomes `(n, 1, h, w)`. Channels-last
    `(n, h, w, c)` becomes `(n, c, h, w)` where c is 1 or 3 and h is not; other shapes stay. Labels are
    integers `(n,)` from 0; the largest training label sets the number of classes.

    Raises:
        DataError: if the file is missing or damaged, lacks an array, or holds what is not described above.
    """
    if not path.is_file():
        raise DataError(
            f"{path.absolute()} does not exist: give the path of an .npz file with {', '.join(_KEYS)}"
        )
    try:
        # numpy leaves a file open that it opened itself and then could not read.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in _KEYS if key in archive}
    except PermissionError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; check its permissions") from None
    except Exception as error:  # a damaged archive can fail in nearly any way
        raise DataError(
            f"{path} is damaged or not an .npz file of plain arrays ({type(error).__name__}: {error}): "
            "save it again with numpy.savez, and no array of Python objects"
        ) from error
    missing = [key for key in _KEYS if key not in arrays]
    if missing:
        raise DataError(f"{path} lacks {', '.join(missing)}: save it with numpy.savez and {', '.join(_KEYS)}")
    try:
        train, test = (Split(_images(arrays[f"x_{s}"]), _labels(arrays[f"y_{s}"])) for s in ("train", "test"))
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    classes = int(train.y.max()) + 1
    return DataSet(path.name, train, test, classes, tuple(str(label) for label in range(classes)))


def _images(x: NDArray[Any]) -> Tensor:
    if x.dtype != np.uint8 and not np.issubdtype(x.dtype, np.floating):
        raise DataError(f"images must be uint8 or floats in [0, 1], got {x.dtype}: convert them first")
    if x.ndim not in (2, 3, 4):
        raise DataError(
            f"images must be (n, features), (n, h, w) or (n, c, h, w), got {x.shape}: reshape them"
        )
    if x.ndim == 3:
        x = x[:, None]
    elif x.ndim == 4 and x.shape[3] in (1, 3) and x.shape[1] not in (1, 3):
        x = x.transpose(0, 3, 1, 2)
    return torch.from_numpy(np.ascontiguousarray(x, dtype=np.uint8 if x.dtype == np.uint8 else np.float32))


def _labels(y: NDArray[Any]) -> Tensor:
    if not np.issubdtype(y.dtype, np.integer):
        raise DataError(f"labels must be integers, got {y.dtype}: give class numbers from 0")
    return torch.from_numpy(y.astype(np.int64))

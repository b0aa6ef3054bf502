"""The data sets that can be asked for by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path

from tightrope.data.cifar10 import load_cifar10
from tightrope.data.dataset import DataSet
from tightrope.data.digits import load_digits
from tightrope.data.files import data_root
from tightrope.data.mnist import load_mnist
from tightrope.data.npz import load_npz
from tightrope.errors import DataError

_LOADERS: dict[str, Callable[[Path, bool], DataSet]] = {
    "digits": lambda _root, _download: load_digits(),
    "mnist": load_mnist,
    "cifar10": load_cifar10,
}


def names() -> list[str]:
    """The names that `load` knows; it also takes the path of an `.npz` file."""
    return list(_LOADERS)


def load(name: str, root: Path | None = None, download: bool = True) -> DataSet:
    """Load a data set.

    Args:
        name: one of `names()`, or the path of an `.npz` file with `x_train, y_train, x_test, y_test`.
        root: folder that holds data sets; if None, the environment variable `TIGHTROPE_DATA`, else the
            user's cache folder. Not used for digits and `.npz` files.
        download: whether missing files may be fetched from their publisher into the root.

    Raises:
        DataError: if there is no such data set, or it is missing, damaged or out of range.

    Example:
        >>> data = load("digits")
        >>> len(data.train), data.train.shape, data.classes
        (1437, (1, 8, 8), 10)
    """
    if name.endswith(".npz"):
        return load_npz(Path(name).expanduser())
    if name not in _LOADERS:
        near = difflib.get_close_matches(name, _LOADERS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise DataError(
            f"there is no data set {name!r}: {hint}Choose {', '.join(_LOADERS)}, or the path of an .npz file"
        )
    return _LOADERS[name](data_root(root), download)

"""Where training gets its batches from: tensors on the device, or any map-style dataset."""

from __future__ import annotations

import hashlib
import operator
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    default_collate,
    default_convert,
)

from tightrope.data.dataset import DataSet, Split, unit
from tightrope.errors import DataError
from tightrope.train.checkpoint import derive_seed

Batch = tuple[Float32[Tensor, "batch *shape"], Int64[Tensor, "batch"], Int64[Tensor, "batch"]]


@runtime_checkable
class Source(Protocol):
    """Examples that can be counted, named, and read in a given order."""

    def __len__(self) -> int: ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one image."""

    def labels(self) -> Int64[Tensor, "n"]:
        """The label of every example, in order, on the CPU."""

    def identity(self) -> str:
        """A hash that tells these examples from others, to guard caches and checkpoints."""

    def batches(self, order: Iterable[Int64[Tensor, "batch"]]) -> Iterator[Batch]:
        """For each tensor of indices in `order`: images (float32 in [0, 1]), labels, and the indices.

        All three are on the source's device.
        """


class TensorSource:
    """A split kept whole on a device; a batch is one gather, without worker processes."""

    def __init__(self, split: Split, device: torch.device | str = "cpu") -> None:
        self.split = split.to(device)
        self.device = torch.device(device)

    def __len__(self) -> int:
        return len(self.split)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one image."""
        return self.split.shape

    def labels(self) -> Int64[Tensor, "n"]:
        """The label of every example, on the CPU."""
        return self.split.y.cpu()

    def identity(self) -> str:
        """SHA-256 of all images and labels."""
        return self.split.identity()

    def batches(self, order: Iterable[Int64[Tensor, "batch"]]) -> Iterator[Batch]:
        """Images, labels and indices for each tensor of indices in `order`."""
        for index in order:
            index = index.to(self.split.y.device)
            yield self.split.images(index), self.split.y[index], index


class LoaderSource:
    """Any map-style dataset of `(x, y)`, read through a DataLoader and checked batch by batch.

    x is a tensor or numpy array, float in [0, 1] or uint8, of one shape and dtype throughout; y is an
    integer from 0.

    What the dataset draws for a batch (by torch, numpy or random) is a function of torch's seed and of the
    batch: not of what was read before, nor of the workers.

    Args:
        dataset: has `__len__` and `__getitem__`.
        workers: number of worker processes; 0 reads in this one.
        device: where batches go.

    Raises:
        DataError: if the dataset is empty or not map-style; later, from the reading methods, if an
            example cannot be read or is not as described.
    """

    def __init__(self, dataset: Dataset[Any], workers: int = 0, device: torch.device | str = "cpu") -> None:
        if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
            raise DataError(
                f"{type(dataset).__name__} cannot be read by index: give a map-style dataset of (x, y) with "
                "__len__ and __getitem__"
            )
        self._length = len(dataset)
        if self._length == 0:
            raise DataError(f"{type(dataset).__name__} is empty: give at least one example")
        self._examples = _Examples(dataset)
        self._workers = workers
        self.device = torch.device(device)
        self._first = self._examples.read_all([0], seed=0)[0][0]

    def __len__(self) -> int:
        return self._length

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one image."""
        return tuple(self._first.shape)

    def labels(self) -> Int64[Tensor, "n"]:
        """The label of every example, on the CPU. Reads the whole dataset, the first time only."""
        return self._labels

    @cached_property
    def _labels(self) -> Tensor:
        return torch.cat([y for _, y, _ in self._read(torch.arange(self._length).split(256))])

    def identity(self) -> str:
        """SHA-256 of the length and of 16 evenly spaced examples: a change elsewhere goes unnoticed here.

        (What is resumed example by example, as verdicts are, compares each one.)

        Where two readings differ, as with random transforms, only shape and labels are hashed.
        """
        probes = [int(index) for index in np.linspace(0, self._length - 1, min(16, self._length))]
        first, second = (self._examples.read_all(probes, seed) for seed in range(2))
        steady = all(torch.equal(x, again) for (x, _), (again, _) in zip(first, second, strict=True))
        digest = hashlib.sha256(f"{self._length} {self.shape}".encode())
        for x, y in first:
            digest.update(f"{y} {x.dtype}".encode())
            if steady:
                digest.update(x.contiguous().numpy().data)
        return digest.hexdigest()

    def batches(self, order: Iterable[Int64[Tensor, "batch"]]) -> Iterator[Batch]:
        """Images, labels and indices for each tensor of indices in `order`.

        With workers, `order` is read a few batches ahead.
        """
        for x, y, index in self._read(order):
            yield unit(x.to(self.device)), y.to(self.device), index.to(self.device)

    def _read(self, order: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        loader: DataLoader[Any] = DataLoader(
            self._examples,
            batch_sampler=([_seed_of(index), *index.tolist()] for index in order),
            num_workers=self._workers,
            generator=torch.Generator(),  # it draws for its workers, but not from the caller's numbers
            collate_fn=_Collate(self.shape, self._first.dtype),
        )
        for batch in loader:
            if isinstance(batch, DataError):
                raise batch
            yield batch


class _Examples(Dataset[Any]):
    """The examples of a dataset with their numbers.

    An example that cannot be used is returned as an error instead of raising it, because a DataLoader
    puts a worker's traceback into the message of whatever a worker raises.
    """

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __getitems__(self, batch: list[int]) -> list[tuple[Tensor, int, int] | DataError]:
        """The examples of a batch, given as the seed to read it under, and then their numbers."""
        seed, *index = batch
        with _seeded(seed):
            return [self._numbered(number) for number in index]

    def _numbered(self, index: int) -> tuple[Tensor, int, int] | DataError:
        try:
            return *self.read(index), index
        except DataError as error:
            return error

    def read_all(self, index: list[int], seed: int) -> list[tuple[Tensor, int]]:
        """Images and labels, with what the dataset draws under a seed."""
        with _seeded(seed):
            return [self.read(number) for number in index]

    def read(self, index: int) -> tuple[Tensor, int]:
        """Image (uint8 or float32) and label of one example."""
        try:
            example = self.dataset[index]
        except Exception as error:  # whatever a user's code raises
            raise DataError(
                f"example {index} cannot be read ({type(error).__name__}: {error}): correct the dataset"
            ) from error
        if not isinstance(example, tuple | list) or len(example) != 2:
            raise DataError(
                f"example {index} is a {type(example).__name__}, expected a pair (image, label): make "
                "a TensorDataset(images, labels) of two tensors"
            )
        x, y = example
        if not isinstance(x, Tensor | np.ndarray):
            raise DataError(
                f"the image of example {index} is a {type(x).__name__}, expected a tensor or numpy array: "
                "convert it in the dataset"
            )
        x = _tensor(x, f"the image of example {index}")
        if x.is_floating_point():
            x = x.to(torch.float32)
        try:
            return x, operator.index(y)
        except TypeError as error:
            raise DataError(
                f"the label of example {index} is {y!r}, expected an integer class number"
            ) from error


def _seed_of(index: Tensor) -> int:
    """What a batch is read under; batches that come under one seed are told apart by their first example."""
    return derive_seed(torch.initial_seed(), "batch", int(index[0]))


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The generators that a dataset may draw from are seeded for a while, and then as they were."""
    kept, kept_by_numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(kept)
            np.random.set_state(kept_by_numpy)


class _Collate:
    """Stacks examples into a checked batch; like `_Examples`, returns an error instead of raising it."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.shape = shape
        self.dtype = dtype

    def __call__(self, examples: list[tuple[Tensor, int, int] | DataError]) -> Batch | DataError:
        usable = []
        for example in examples:
            if isinstance(example, DataError):
                return example
            usable.append(example)
        images, labels, index = zip(*usable, strict=True)
        for number, x in zip(index, images, strict=True):
            if (x.shape, x.dtype) != (self.shape, self.dtype):
                return DataError(
                    f"the image of example {number} is {tuple(x.shape)}, {x.dtype}, that of example 0 is "
                    f"{self.shape}, {self.dtype}: give all images one shape and dtype"
                )
        try:
            split = Split(torch.stack(images), torch.tensor(labels))
        except DataError as error:
            if len(usable) == 1:
                return DataError(f"example {index[0]}: {error}")
            # Only now is it worth the time to look for the one to name.
            alone = (self([example]) for example in usable)
            return next((found for found in alone if isinstance(found, DataError)), error)
        return split.x, split.y, torch.tensor(index)


def as_source(data: Any, device: torch.device | str = "cpu") -> Source:
    """The source that fits `data`, with batches on `device`.

    Args:
        data: a `Source` (returned as it is), a `Split`, images and labels as two tensors or arrays, any
            map-style dataset of `(x, y)`, or a `DataLoader` of one, which is read for its examples and
            number of workers: in which order and how many at once, its reader says. A loader that picks among
            the examples is refused.
        device: where batches go.

    Raises:
        DataError: if `data` is none of these, or its examples cannot be used.
    """
    if isinstance(data, Source):
        return data
    if isinstance(data, DataSet):
        raise DataError(
            f"{data.name} holds a training and a test split: pass one of them, such as data.train"
        )
    if isinstance(data, str | Path):
        raise DataError(
            f"{str(data)!r} names a data set: load it, such as tightrope.data.load({str(data)!r}).train"
        )
    if isinstance(data, DataLoader):
        return _of_loader(data, device)
    arrays = isinstance(data, tuple | list) and all(isinstance(part, Tensor | np.ndarray) for part in data)
    if arrays and data:
        names = ("the images", "the labels", *["what comes after them"] * len(data))
        data = TensorDataset(*_of_one_length([_tensor(*part) for part in zip(data, names, strict=False)]))
    if isinstance(data, TensorDataset):
        if len(data.tensors) != 2:
            raise DataError(f"a TensorDataset must hold images and labels, got {len(data.tensors)} tensors")
        x, y = data.tensors
        whole = not (y.is_floating_point() or y.is_complex() or y.dtype == torch.bool)
        data = Split(x.float() if x.is_floating_point() else x, y.long() if whole else y)
    return TensorSource(data, device) if isinstance(data, Split) else LoaderSource(data, device=device)


def _tensor(values: Tensor | np.ndarray, what: str) -> Tensor:
    try:
        return torch.as_tensor(values)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{what} cannot be made a tensor, of dtype {values.dtype}: give numbers ({error})"
        ) from None


def _of_one_length(tensors: list[Tensor]) -> list[Tensor]:
    sizes = [len(tensor) if tensor.ndim else 0 for tensor in tensors]
    if len(set(sizes)) > 1:
        raise DataError(f"there are {' and '.join(map(str, sizes))} images and labels: give as many of each")
    return tensors


def _of_loader(loader: DataLoader[Any], device: torch.device | str) -> Source:
    """The examples behind a loader, if it does no more than to shuffle and stack them."""
    if isinstance(loader.dataset, IterableDataset) or not hasattr(loader.dataset, "__len__"):
        return as_source(loader.dataset)  # says that it cannot be read by index
    if not _goes_through_all(loader):
        raise DataError(
            "the DataLoader has a sampler or batch_sampler that picks examples, which would not be "
            "used: give the dataset, or a torch.utils.data.Subset of it"
        )
    if loader.collate_fn not in (default_collate, default_convert):
        raise DataError(
            "the DataLoader has a collate_fn of its own, which would not be used: give a map-style dataset "
            "of the (x, y) that it yields"
        )
    if loader.num_workers:
        return LoaderSource(loader.dataset, loader.num_workers, device)
    return as_source(loader.dataset, device)


def _goes_through_all(loader: DataLoader[Any]) -> bool:
    """Whether a loader hands out every example of its dataset once, but for a last batch that it may drop."""
    sampler: Any = loader.sampler
    if loader.batch_sampler is not None:
        if type(loader.batch_sampler) is not BatchSampler:
            return False
        sampler = loader.batch_sampler.sampler  # is another where the loader was given a batch sampler
    if type(sampler) not in (SequentialSampler, RandomSampler) or getattr(sampler, "replacement", False):
        return False
    return len(sampler) == len(sampler.data_source) == len(loader.dataset)  # type: ignore[arg-type]

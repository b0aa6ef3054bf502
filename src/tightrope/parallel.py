"""The same work in several processes: batches go out, results come back as they are done."""

from __future__ import annotations

import functools
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

import cloudpickle
import torch

from tightrope.errors import TightropeError
from tightrope.memory import keep_freed, share_memory

T = TypeVar("T")


def each(function: Callable[..., T], batches: Iterable[tuple[Any, ...]], jobs: int) -> Iterator[T]:
    """`function(*batch)` for every batch; in the order in which they are done, if there are several jobs.

    Args:
        function: what to do; with several jobs it is pickled, by value where need be.
        batches: its arguments, drawn as they are needed.
        jobs: how many processes, of one thread each; 1 does the work in this one.

    Raises:
        TightropeError: if a process was killed.
    """
    if jobs == 1:
        yield from (function(*batch) for batch in batches)
        return
    from joblib import Parallel, delayed, parallel_config  # takes a while to import

    # An interrupted run cancels what it has not done, as it should.
    warnings.filterwarnings("ignore", message=".*tasks which were still being processed by the workers")
    # Pickled once, and unpickled once in each process, where modules of the user's own are found first.
    work = delayed(_alone)
    pickled, folder = cloudpickle.dumps(function), str(Path.cwd())
    with parallel_config("loky", n_jobs=jobs, inner_max_num_threads=1):
        results = Parallel(return_as="generator_unordered", batch_size=1)(
            work(pickled, folder, jobs, batch) for batch in batches
        )
        try:
            yield from results
        except BrokenProcessPool:
            raise TightropeError(
                "a worker process was killed, perhaps because memory ran out; what was done is kept: go on "
                "with --resume and fewer --jobs"
            ) from None


def _alone(pickled: bytes, folder: str, jobs: int, batch: tuple[Any, ...]) -> Any:
    os.chdir(folder)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    torch.set_num_threads(1)
    share_memory(jobs)
    keep_freed()
    return _unpickled(pickled)(*batch)


@functools.lru_cache(maxsize=1)
def _unpickled(pickled: bytes) -> Callable[..., Any]:
    function: Callable[..., Any] = cloudpickle.loads(pickled)
    return function

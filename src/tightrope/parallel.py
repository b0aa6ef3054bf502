"""The same work by several workers: batches go out, results come back as they are done."""

from __future__ import annotations

import functools
import logging
import os
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

import cloudpickle
import torch

from tightrope.errors import InputError, TightropeError
from tightrope.extras import require
from tightrope.given import whole
from tightrope.memory import keep_freed, share_memory

T = TypeVar("T")

RETRIES = 3  # how often Ray runs a batch again whose worker or machine died
PATIENCE = 10.0  # seconds until a machine that does not answer counts as unreachable


class Pool(Protocol):
    """Workers that are ready."""

    @property
    def count(self) -> int:
        """How many batches are worked on at once."""
        ...

    def each(self, function: Callable[..., T], batches: Iterable[tuple[Any, ...]]) -> Iterator[T]:
        """`function(*batch)` for every batch, in the order in which they are done.

        Args:
            function: what to do; where it is done in other processes it is pickled, by value where need be.
            batches: its arguments, begun in this order and drawn as they are needed.

        Raises:
            TightropeError: if a worker died and its batch could not be done by another.
        """
        ...


@dataclass(frozen=True)
class Workers:
    """Who does the work: this process, several of this machine, or those of a Ray cluster.

    Args:
        jobs: processes of this machine, of one thread each; 1 is this process, with all its threads.
        ray: a Ray cluster, each of whose processors is a worker of one thread: the address HOST:PORT of one
            that runs, "local" to start one on this machine, "auto" for the one that runs here (or that
            RAY_ADDRESS names), else as "local". A program that is connected to Ray already stays with that
            cluster. None takes no Ray.

    Raises:
        InputError: if `jobs` is no positive number, both are given, or `ray` is no address.

    Example:
        >>> with Workers().pool() as pool:
        ...     list(pool.each(max, [(1, 2), (4, 3)]))
        [2, 4]
    """

    jobs: int = 1
    ray: str | None = None

    def __post_init__(self) -> None:
        whole(self.jobs, "the number of jobs", 1)
        if self.jobs > 1 and self.ray is not None:
            raise InputError("jobs are processes of this machine, Ray has its own: give --jobs or --ray")
        if self.ray not in (None, "auto", "local"):
            _host_and_port(str(self.ray))

    @property
    def several(self) -> bool:
        """Whether the work is done in other processes, on processors."""
        return self.jobs > 1 or self.ray is not None

    @contextmanager
    def pool(self) -> Iterator[Pool]:
        """The workers, as long as they are needed.

        Raises:
            InputError: if Ray is not installed, or the address is none.
            TightropeError: if there is no Ray cluster at the address.
        """
        if self.ray is not None:
            with _connected(self.ray) as ray:
                yield _Cluster(ray)
        elif self.jobs > 1:
            yield _Processes(self.jobs)
        else:
            yield _Here()


class _Here:
    """This process."""

    count = 1

    def each(self, function: Callable[..., T], batches: Iterable[tuple[Any, ...]]) -> Iterator[T]:
        return (function(*batch) for batch in batches)


@dataclass(frozen=True)
class _Processes:
    """Processes of this machine, by joblib."""

    count: int

    def each(self, function: Callable[..., T], batches: Iterable[tuple[Any, ...]]) -> Iterator[T]:
        from joblib import Parallel, delayed, parallel_config  # takes a while to import

        # An interrupted run cancels what it has not done, as it should.
        warnings.filterwarnings("ignore", message=".*tasks which were still being processed by the workers")
        # Pickled once, and unpickled once in each process, where modules of the user's own are found first.
        work = delayed(_alone)
        pickled, folder = cloudpickle.dumps(function), str(Path.cwd())
        with parallel_config("loky", n_jobs=self.count, inner_max_num_threads=1):
            results = Parallel(return_as="generator_unordered", batch_size=1)(
                work(pickled, folder, self.count, batch, os.getpid()) for batch in batches
            )
            try:
                yield from results
            except BrokenProcessPool:
                raise TightropeError(
                    "a worker process was killed, perhaps because memory ran out; what was done is kept: go "
                    "on with --resume and fewer --jobs"
                ) from None


@dataclass(frozen=True)
class _Cluster:
    """The processors of a Ray cluster; Ray runs a batch again whose worker or machine died.

    Args:
        ray: the module, connected.
    """

    ray: Any

    @functools.cached_property
    def count(self) -> int:
        return sum(self._processors)

    @functools.cached_property
    def _processors(self) -> list[int]:
        """Of each machine."""
        return [int(node["Resources"].get("CPU", 0)) for node in self.ray.nodes() if node["Alive"]]

    def each(self, function: Callable[..., T], batches: Iterable[tuple[Any, ...]]) -> Iterator[T]:
        ray, batches = self.ray, iter(batches)
        work = ray.remote(num_cpus=1, max_retries=RETRIES)(_alone)
        given = ray.put(cloudpickle.dumps(function)), str(Path.cwd()), max(self._processors)
        pending = [work.remote(*given, batch) for batch in islice(batches, 2 * self.count)]
        try:
            while pending:
                (done,), pending = ray.wait(pending, num_returns=1)
                pending += [work.remote(*given, batch) for batch in islice(batches, 1)]
                yield self._result(done)
        finally:
            for one in pending:
                ray.cancel(one)

    def _result(self, done: Any) -> Any:
        errors = self.ray.exceptions
        try:
            return self.ray.get(done)
        except errors.RayTaskError as error:
            if isinstance(error.cause, ImportError):
                raise TightropeError(
                    f"a machine of the Ray cluster cannot import what this one can ({error.cause}): install "
                    "the same there, and keep code of your own in a folder that all of them see"
                ) from None
            raise error.cause from error
        except errors.RayError as error:
            raise TightropeError(
                f"a batch was given to workers of the Ray cluster {1 + RETRIES} times, and none came back "
                f"({type(error).__name__}), perhaps because memory ran out; what was done is kept: go on "
                "with --resume"
            ) from error


@contextmanager
def _connected(address: str) -> Iterator[Any]:
    """The module ray, connected to the cluster at an address."""
    ray = require("ray", "ray", "--ray")
    if ray.is_initialized():
        yield ray
        return
    if address not in ("auto", "local"):
        _knock(address)
    options: dict[str, Any] = {"include_dashboard": False} if address in ("auto", "local") else {}
    if address != "auto":
        options["address"] = address
    try:
        ray.init(**options, log_to_driver=False, logging_level=logging.ERROR)
    except (Exception, SystemExit) as error:  # Ray ends a program whose cluster does not answer
        raise TightropeError(
            f"no Ray cluster could be used at {address!r}: {error} (one that asks for a token takes "
            "RAY_AUTH_MODE=token)"
        ) from error
    try:
        if not _Cluster(ray).count:
            raise TightropeError(f"the Ray cluster at {address!r} has no processors: add machines to it")
        yield ray
    finally:
        ray.shutdown()


def _host_and_port(address: str) -> tuple[str, int]:
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if host is None or port is None:
        raise InputError(f"{address!r} is no address of a Ray cluster: give HOST:PORT, auto or local")
    return host, port


def _knock(address: str) -> None:
    """See whether anything answers there: Ray itself would try for two minutes."""
    try:
        socket.create_connection(_host_and_port(address), timeout=PATIENCE).close()
    except OSError as error:
        raise TightropeError(
            f"nothing answers at {address!r} ({error.strerror or error}): is the Ray cluster up "
            "(ray status), and is this its address?"
        ) from None


def _alone(
    pickled: bytes, folder: str, sharing: int, batch: tuple[Any, ...], parent: int | None = None
) -> Any:
    """Work on a batch in a process that has one thread and its share of the machine's memory.

    Args:
        pickled: what works.
        folder: where modules of the user's own are found.
        sharing: how many processes share the machine's memory.
        batch: its arguments.
        parent: the process that this one must not outlive.
    """
    if parent is not None:
        _leave_with(parent)
    if Path(folder).is_dir():  # a machine of a cluster need not have it
        os.chdir(folder)
        if folder not in sys.path:
            sys.path.insert(0, folder)
    torch.set_num_threads(1)
    share_memory(sharing)
    keep_freed()
    return _unpickled(pickled)(*batch)


@functools.cache
def _leave_with(parent: int) -> None:
    """End this process when its parent is gone: it would wait for work for minutes, with all its memory."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@functools.lru_cache(maxsize=1)
def _unpickled(pickled: bytes) -> Callable[..., Any]:
    function: Callable[..., Any] = cloudpickle.loads(pickled)
    return function

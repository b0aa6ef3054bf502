"""Trials side by side: each in a process of its own, of one thread."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Self

import torch

from tightrope.errors import TightropeError
from tightrope.memory import share_memory
from tightrope.train import Interrupted
from tightrope.tune.trial import Task, run

INTERRUPTED = 130  # exit status, as of the command line
_LATE = (
    "torch._dynamo",
)  # imported by the first optimiser step, for 1.6 s; passed over if there is no such module


class Workers:
    """Runs tasks, so many at once; one job runs them in this process.

    A process per trial, rather than a pool: one that is killed takes no other with it, each can be told to
    save its state and stop, and one that lost its parent does so by itself.

    Args:
        jobs: how many at once.
    """

    def __init__(self, jobs: int) -> None:
        self._jobs = jobs
        self._running: dict[int, tuple[Task, BaseProcess]] = {}
        self._done: list[Task] = []
        # A server that has imported everything forks quickly; it computes nothing, so no thread is lost.
        method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        self._context = multiprocessing.get_context(method)
        if jobs > 1 and method == "forkserver":
            self._context.set_forkserver_preload([__name__, *_LATE])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Have whatever still runs save its state and stop."""
        processes = [process for _, process in self._running.values()]
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()

    @property
    def free(self) -> bool:
        """Whether one more can be started."""
        return len(self._running) + len(self._done) < self._jobs

    @property
    def busy(self) -> bool:
        """Whether there is something to wait for."""
        return bool(self._running or self._done)

    def start(self, task: Task) -> None:
        """Run one more."""
        if self._jobs == 1:
            run(task)
            self._done.append(task)
            return
        process = self._context.Process(target=_alone, args=(task, self._jobs))  # type: ignore[attr-defined]
        process.start()
        self._running[process.sentinel] = task, process

    def done(self) -> list[Task]:
        """Wait until at least one has come to its end.

        Raises:
            Interrupted: if one was asked to stop.
            TightropeError: if one ended without a result.
        """
        done, self._done = self._done, []
        for sentinel in wait([*self._running]) if self._running else ():
            assert isinstance(sentinel, int)
            task, process = self._running.pop(sentinel)
            process.join()
            if process.exitcode == INTERRUPTED:
                raise Interrupted
            if process.exitcode != 0:
                raise TightropeError(_why(task, process.exitcode))
            done.append(task)
        return done


def _why(task: Task, status: int | None) -> str:
    with contextlib.suppress(OSError, IndexError):
        last = (task.folder / "train.log").read_text(encoding="utf-8").splitlines()[-1]
        if last.startswith("error: "):
            return last.removeprefix("error: ")
    return (
        f"the process of trial {task.number} was killed or failed (exit status {status}), perhaps because "
        "memory ran out; what was done is kept: go on with --resume, and fewer --jobs"
    )


def _alone(task: Task, jobs: int) -> None:
    """What the process of a trial does."""
    torch.set_num_threads(1)
    share_memory(jobs)
    threading.Thread(target=_stop_without_parent, daemon=True).start()
    try:
        run(task)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except TightropeError as error:
        with (task.folder / "train.log").open("a", encoding="utf-8") as log:
            print("error:", " ".join(str(error).split()), file=log)  # the last line, for `_why`
        sys.exit(1)


def _stop_without_parent() -> None:
    """Have this process save its state and stop once the one that started it is gone."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)

"""One record for every example, appended to a file: what was stopped goes on where it was."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic

import torch
from torch import Tensor

from tightrope.errors import IdentityError, InputError
from tightrope.examples import Examples
from tightrope.files import append_lines, fingerprint, locked, to_json, write_atomically
from tightrope.given import whole
from tightrope.identity import check_identity
from tightrope.memory import keep_freed
from tightrope.parallel import Workers
from tightrope.progress import Progress
from tightrope.verify.records import Kind, R, read_inputs, read_records

READ = 256  # examples at once, where they are only looked at
ROUNDS = 4  # batches for each of several workers at least: some take longer than others
ALONE = Workers()

Batch = tuple[Tensor, Tensor, Tensor]
"""Inputs, labels and indices."""

Judging = Callable[[Tensor, Tensor, Tensor], list[R]]
"""Yields the records of a batch: inputs, labels and indices."""


@dataclass(frozen=True)
class Rest(Generic[R]):
    """What is done about examples after all others.

    Args:
        label: what is going on then, for the progress.
        is_open: whether a record is not final; such records are not written.
        judge: who judges their examples, given these records by index.
        batch: examples per batch at most, and between two writes.
    """

    label: str
    is_open: Callable[[R], bool]
    judge: Callable[[dict[int, R]], Judging[R]]
    batch: int


@dataclass(frozen=True)
class Inputs:
    """What the examples were when they were judged: no record goes on to stand for another input.

    Args:
        known: by index, the beginning of a hash of input and label.
    """

    known: dict[int, str]

    def watched(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches; their examples are known from then on.

        Raises:
            IdentityError: if an example is another than it was.
        """
        for x, y, index in batches:
            for image, label, number in zip(x, y, index.tolist(), strict=True):
                now = fingerprint({"x": image, "y": label})[:16]
                if self.known.setdefault(number, now) != now:
                    raise IdentityError(
                        f"example {number} is not the one that was judged before: its image or label has "
                        "changed, or its data set draws at random. Give data that stay, and start afresh"
                    )
            yield x, y, index


def go_through(
    examples: Examples,
    judge: Judging[R],
    kind: Kind[R],
    header: dict[str, Any],
    *,
    label: str,
    first: int | None,
    batch: int,
    out: Path | None,
    resume: bool,
    workers: Workers = ALONE,
    rest: Rest[R] | None = None,
    begin: Callable[[], None] | None = None,
) -> tuple[R, ...]:
    """One record per example, by index; appended to a file batch by batch.

    What is found out about an example must not depend on which others are in its batch: how large batches
    are depends on how many workers there are, and what is in them on what a stopped run had done.

    Args:
        examples: the data set.
        judge: who judges them.
        kind: of the file.
        header: of the file; its "identity" must agree with that of a file to resume, and "examples", if it
            says how many were asked for, can only grow.
        label: what is going on, for the progress.
        first: only the first so many examples.
        batch: examples per batch at most, and between two writes.
        out: the file; None writes none.
        resume: go on from it.
        workers: who judges; the file is written by this process alone, in the order in which batches are
            done.
        rest: what is done about examples whose records are not final.
        begin: writes what lies beside the file, when no other process can be writing it.

    Raises:
        InputError: if `first` is no positive number, the file cannot be written, or it already exists and
            `resume` is not asked for.
        IdentityError: if the file to resume from rests on something else, or an example has changed.
        TightropeError: if workers died; what was done is in the file.
    """
    first = None if first is None else whole(first, "the number of examples", 1)
    known: dict[int, R] = {}
    inputs = Inputs({})
    keep_freed()
    with _only_writer_of(out), workers.pool() as pool:  # a file is begun only where there are workers
        begun = out is not None and out.exists()
        if begin is not None and not begun:
            begin()
        if out is not None:
            known = _start(out, kind, header, resume, inputs)
        if begin is not None and begun:  # once that has not been refused
            begin()
        total = min(first or len(examples), len(examples))
        open_ = [i for i in range(total) if i not in known]
        done = torch.tensor([i for i in inputs.known if i < total], dtype=torch.int64)
        for _ in inputs.watched(examples.batches(done.split(READ))) if len(done) else ():
            pass  # each has been compared

        def go(judge: Judging[R], indices: list[int], batch: int) -> Iterator[list[R]]:
            parts = torch.tensor(indices, dtype=torch.int64).split(share(batch, len(indices), pool.count))
            return pool.each(judge, inputs.watched(examples.batches(parts if indices else ())))

        def keep(records: list[R]) -> None:
            known.update((record.index, record) for record in records)
            if out is not None and records:
                append_lines(out, _dumped(records, kind, inputs))

        left: dict[int, R] = {}
        with Progress(label, total, total - len(open_), unit="example", slow=True) as progress:
            for records in go(judge, open_, batch):
                left |= {record.index: record for record in records if rest and rest.is_open(record)}
                keep([record for record in records if record.index not in left])
                progress.advance(len(records))
        if rest and left:
            with Progress(rest.label, len(left), unit="example", slow=True) as progress:
                for records in go(rest.judge(left), sorted(left), rest.batch):
                    keep(records)
                    progress.advance(len(records))
    return tuple(known[i] for i in range(total))


def share(batch: int, examples: int, workers: int) -> int:
    """How large batches of at most `batch` examples are, so that all workers have some to the end."""
    if workers == 1:
        return batch
    return max(1, min(batch, math.ceil(examples / (ROUNDS * workers))))


@contextmanager
def _only_writer_of(out: Path | None) -> Iterator[None]:
    """Refuse to write to a file that another process is writing to."""
    if out is None:
        yield
        return
    taken = InputError(f"another process is writing to {out}; wait for it, or choose another --out")
    with locked(out.with_name(f".{out.name}.lock"), taken):
        yield


def _dumped(records: Iterable[R], kind: Kind[R], inputs: Inputs) -> Iterator[dict[str, Any]]:
    """Records as JSON values, with what their examples were."""
    for record in records:
        known = inputs.known.get(record.index)
        yield kind.dump(record) if known is None else {**kind.dump(record), "input": known}


def _start(out: Path, kind: Kind[R], header: dict[str, Any], resume: bool, inputs: Inputs) -> dict[int, R]:
    """Begin a file of records, or read what an earlier run left in it, and of which inputs."""
    if not out.exists():
        write_atomically(out, to_json(header) + "\n")
        return {}
    if not resume:
        raise InputError(
            f"{out} already exists: resume it (--resume, in Python resume=True), or write elsewhere, --out"
        )
    found, records = read_records(out, kind)
    check_identity(found["identity"], header["identity"], str(out))
    if "examples" in header:
        found["examples"] = max(header["examples"], found.get("examples", 0))
    # A line that was cut off by a crash must not be continued.
    inputs.known.update(read_inputs(out))
    lines = [to_json(record) + "\n" for record in (found, *_dumped(records, kind, inputs))]
    write_atomically(out, "".join(lines))
    return {record.index: record for record in records}

"""The one training loop, with its metrics, checkpoints and exact resume."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, model_validator
from torch import Tensor
from typing_extensions import TypedDict  # pydantic refuses typing.TypedDict before Python 3.12

from tightrope.errors import DivergedError, InputError, warn
from tightrope.examples import Examples
from tightrope.files import (
    append_lines,
    check_line,
    read_lines,
    save_tensors,
    write_atomically,
)
from tightrope.graph import Graph
from tightrope.graph.graph import evaluation
from tightrope.graph.ops import BatchNorm
from tightrope.memory import channels_innermost, keep_freed
from tightrope.progress import Progress
from tightrope.train.average import Average, AveragedNetwork, recompute_statistics
from tightrope.train.batch import Batch
from tightrope.train.checkpoint import (
    Checkpoint,
    Progressed,
    derive_seed,
    forked_rng,
    read_checkpoint,
    save_checkpoint,
)
from tightrope.train.combine import Total
from tightrope.train.evaluate import HeldOut, evaluate, verified_error
from tightrope.train.methods import Method
from tightrope.train.schedules import Number, Real, Steps, Whole, at, first_drop, last, settles
from tightrope.train.stages import Stage, frozen_upto
from tightrope.train.step import train_step

NOTE = "note: "
"""What tells a method's notes from its losses in the sums of an epoch."""

Augmentation = Callable[[Tensor, torch.Generator], Tensor]


class Training(BaseModel):
    """How a method is run: everything that is not the method.

    Args:
        epochs: passes over the training examples.
        batch: examples per step.
        optimiser: "adam", "adamw" or "sgd" (with momentum 0.9).
        lr: learning rate, a number or a schedule; of a stage, where a method trains layer by layer.
        weight_decay: weight decay of the optimiser.
        clip: largest l_2 norm of the gradient; 0 clips nothing.
        accumulate: a batch is gone through in so many parts, one at a time in memory, whose gradients add up.
        average: which weights of the run the trained network is the mean of; the last ones if not said.
        bn_statistics: BatchNorm's statistics outside of training steps: "running" averages over the steps, or
            "recompute" over the training examples at the end of each epoch. An average is recomputed always.
        checkpoint_seconds: how often a checkpoint is written.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: Whole = Field(default=100, ge=1)
    batch: Whole = Field(default=100, ge=1)
    optimiser: Literal["adam", "adamw", "sgd"] = "adam"
    lr: Number = Steps(start=1e-3, factor=0.1, at=(0.25, 0.42))
    weight_decay: Real = Field(default=0.0, ge=0)
    clip: Real = Field(default=0.0, ge=0)
    accumulate: Whole = Field(default=1, ge=1)
    average: Average | None = None
    bn_statistics: Literal["running", "recompute"] = "running"
    checkpoint_seconds: Real = Field(default=30.0, gt=0)

    @property
    def part(self) -> int:
        """Examples that are gone through at once."""
        return self.batch // self.accumulate

    @model_validator(mode="after")
    def _divides(self) -> Training:
        if self.batch % self.accumulate:
            raise ValueError(
                f"accumulate must divide the batch into equal parts, got {self.accumulate} for a batch of "
                f"{self.batch}"
            )
        return self

    @model_validator(mode="after")
    def _learns(self) -> Training:
        if not (at(self.lr, 0.0) > 0 and last(self.lr) >= 0):
            raise ValueError(f"the learning rate must begin above 0 and never fall below, got {self.lr}")
        return self


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop, and has saved its state."""


def train(
    graph: Graph,
    examples: Examples,
    index: Tensor,
    held_out: HeldOut,
    method: Method,
    training: Training,
    *,
    out: Path,
    seed: int,
    test_eps: float,
    identity: Mapping[str, Any],
    augment: Augmentation | None = None,
    resume: bool = False,
    watch: Callable[[Mapping[str, Any]], bool] | None = None,
) -> None:
    """Train a network in place, writing metrics, checkpoints and the final weights to `out`.

    The caller has asked `check_settings`, and sees to it that nobody else trains in `out`.

    Args:
        graph: the traced network.
        examples: training data.
        index: which of its examples to train on.
        held_out: examples for the metrics.
        method: what to train for.
        training: how.
        out: the run folder, which exists.
        seed: one seed, one result on one machine.
        test_eps: radius of the certified accuracy in the metrics.
        identity: what a checkpoint must agree on to be resumed (data, settings ...).
        augment: random change of a batch of inputs.
        resume: go on from the checkpoint in `out`.
        watch: sees each epoch's record, and says whether to stop.

    Raises:
        DivergedError: if a loss or gradient turns NaN or infinite; the last good state is saved.
        IdentityError: if the checkpoint belongs to another run.
        Interrupted: on Ctrl-C or SIGTERM, or where `watch` says so, after saving.
    """
    checkpoint, metrics = out / "checkpoint" / "last.safetensors", out / "metrics.jsonl"
    keep_freed()
    per_epoch = -(-len(index) // training.batch)
    total = per_epoch * training.epochs
    stages = method.stages(graph)
    graph.module.train()
    clean = partial(_inputs, examples, index, training.batch, seed)
    with forked_rng(held_out.x.device), _stop_requested() as stop, ExitStack() as held:
        held.enter_context(channels_innermost(graph.module))
        state = method.begin(graph, len(examples))
        average = AveragedNetwork(training.average, graph.module)
        found: Checkpoint | None = None
        if resume and checkpoint.exists():
            found = read_checkpoint(checkpoint, identity)
            found.restore(graph.module, state | average.state)
            done = found.progress()
            _forget_epochs_after(metrics, done.step, per_epoch)
        else:
            done = Progressed(0, 0.0, {})
            torch.manual_seed(derive_seed(seed, "initialise", 0))
            if method.initialise is not None:
                method.initialise(graph)
            metrics.unlink(missing_ok=True)
        resumed, saved = done.step, time.monotonic()

        def check() -> None:
            kept = (*graph.module.state_dict().values(), *average.state.values())
            if not all(bool(torch.isfinite(t).all()) for t in kept):
                raise DivergedError(
                    f"a weight turned NaN or infinite before step {done.step}. The last good state is in "
                    f"{checkpoint}. Lower the learning rate"
                )

        def save() -> None:
            nonlocal saved
            check()
            save_checkpoint(checkpoint, graph.module, optimiser, state | average.state, done, identity)
            saved = time.monotonic()

        progress = held.enter_context(Progress(f"train {method.name}", total, done.step))
        for stage in stages:
            begin, end = round(stage.begin * total), round(stage.end * total)
            if end < done.step:
                continue
            live = held.enter_context(frozen_upto(graph, stage.cut))
            optimiser = _optimiser(graph, training)
            if found is not None and begin < resumed:
                found.restore_optimiser(optimiser)
            if done.step == 0:
                save()
            while done.step < end:
                epoch, offset = divmod(done.step, per_epoch)
                order = _order(index, training.batch, seed, epoch)[offset : offset + end - done.step]
                for x, y, numbers in examples.batches(_seeded(order, seed, done.step)):
                    began = time.perf_counter()
                    # Not the generator's: dropout would follow the numbers that attacks start from.
                    _seed(derive_seed(seed, "dropout", done.step))
                    generator = torch.Generator(x.device).manual_seed(derive_seed(seed, "step", done.step))
                    now = Moment(method, training, epoch, done.step / total, stage)
                    for group in optimiser.param_groups:
                        group["lr"] = now.lr
                    x = x if augment is None else augment(x, generator)
                    region = method.region(stage, now.progress, numbers, state)
                    batch = Batch(live, x, y, region, now.progress, generator, numbers, state, stage)
                    try:
                        result = train_step(method, batch, optimiser, training.clip, training.part)
                    except DivergedError as error:
                        with suppress(DivergedError):  # weights may be lost before a loss shows it
                            save()
                        raise DivergedError(
                            f"{error} at step {done.step} ({now}). The last good state is in {checkpoint}. "
                            "Lower the learning rate, clip the gradient, or lengthen the ramp"
                        ) from None
                    notes = {f"{NOTE}{name}": value for name, value in result.notes.items()}
                    done.add({**result.losses, **notes, "gradient_norm": result.gradient_norm}, len(y))
                    ends = done.step % per_epoch == 0
                    average.learn(done.step / total, ends)
                    done.seconds += time.perf_counter() - began
                    progress.advance()
                    if ends:
                        check()
                        began = time.perf_counter()
                        if training.bn_statistics == "recompute":
                            recompute_statistics(live, clean())
                        with average.in_place() as averaged:
                            if averaged:
                                recompute_statistics(live, clean())
                            done.seconds += time.perf_counter() - began
                            record = _epoch_record(graph, held_out, test_eps, done, now, averaged)
                        append_lines(metrics, [record])
                        progress.note(_epoch_line(record, training.epochs))
                        done.sums = {}
                        if watch is not None and watch(record):
                            stop.set()
                    if stop.is_set():
                        save()
                        raise Interrupted
                    if time.monotonic() - saved > training.checkpoint_seconds:
                        save()
            if len(stages) > 1:
                if training.bn_statistics == "recompute":  # a stage may end within an epoch
                    recompute_statistics(live, clean())
                _keep(graph, out, stage)
        save()
        average.replace()
        save_tensors(out / "model.safetensors", graph.module.state_dict())


@dataclass(frozen=True)
class Moment:
    """Where in a run a step lies, and what its schedules say there."""

    method: Method
    training: Training
    epoch: int
    of_run: float
    stage: Stage

    @property
    def progress(self) -> float:
        """Share of the stage that is done."""
        return self.stage.progress(self.of_run)

    @property
    def eps(self) -> float:
        """Radius of the region."""
        return self.stage.eps * at(self.method.eps, self.progress)

    @property
    def lr(self) -> float:
        """Learning rate."""
        return self.stage.lr * at(self.training.lr, self.progress)

    def __str__(self) -> str:
        return f"epoch {self.epoch + 1}, eps {self.eps:.4g}, lr {self.lr:.4g}"


def _keep(graph: Graph, out: Path, stage: Stage) -> None:
    """Save the network as a stage left it, in a folder that can be certified as the run's own."""
    folder = out / "stages" / str(stage.number + 1)
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / "model.safetensors", graph.module.state_dict())
    for name in ("model.json", "recipe.toml"):
        if (out / name).exists():
            write_atomically(folder / name, (out / name).read_text(encoding="utf-8"))


def check_settings(graph: Graph, method: Method, training: Training, examples: int) -> None:
    """Raise an InputError if a network cannot be trained so, on so many examples."""
    stages = method.stages(graph)
    _check_last_batch(graph, examples, training.batch, training.part)
    _check_parts(method, training)
    if training.average is not None:
        training.average.check(stages)


def _check_last_batch(graph: Graph, examples: int, batch: int, part: int) -> None:
    """Raise an InputError if BatchNorm would have to take the variance of a single number."""
    norms = [node for node in graph.nodes if isinstance(node.op, BatchNorm)]
    if not any(math.prod(node.shape[1:]) == 1 for node in norms):
        return
    last = (examples - 1) % batch + 1
    if last == 1:
        raise InputError(
            f"batches of {batch} leave one of the {examples} training examples alone in the last batch, "
            "and BatchNorm cannot normalise one example: choose another batch size"
        )
    for size in (min(batch, examples), last):
        if size // -(-size // part) == 1:
            raise InputError(
                f"training.accumulate leaves a single example as a part of a batch of {size}, and BatchNorm "
                "cannot normalise one example: accumulate less, or choose another batch size"
            )


def _check_parts(method: Method, training: Training) -> None:
    """Raise an InputError if the gradient of a batch is not the sum of its parts'."""
    if training.accumulate > 1 and not isinstance(method.combiner, Total):
        raise InputError(
            f"training.accumulate: {method.name} weighs the gradients of its losses over a whole batch, "
            "which is more than a sum over parts: leave training.accumulate at 1, and lower training.batch"
        )


def _order(index: Tensor, batch: int, seed: int, epoch: int) -> tuple[Tensor, ...]:
    """The batches of one epoch: a function of the seed and the epoch alone."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "order", epoch))
    shuffled = index[torch.randperm(len(index), generator=generator)]
    return torch.split(shuffled, batch)


def _seeded(order: Iterable[Tensor], seed: int, step: int) -> Iterator[Tensor]:
    """The batches, each read under its own seed, so that a dataset's random transforms resume exactly."""
    for number, index in enumerate(order, start=step):
        _seed(derive_seed(seed, "read", number))
        yield index


def _seed(seed: int) -> None:
    """`torch.manual_seed`, which keeps a stack trace per call for accelerators that may never come: 2 ms."""
    if torch.cuda.is_available() or torch.backends.mps.is_available() or torch.xpu.is_available():
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


def _inputs(examples: Examples, index: Tensor, batch: int, seed: int) -> Iterator[Tensor]:
    """The training inputs as they are, in batches that are always the same."""
    own = derive_seed(seed, "statistics", 0)
    for x, _, _ in examples.batches(_seeded(_order(index, batch, own, 0), own, 0)):
        yield x


def _optimiser(graph: Graph, training: Training) -> torch.optim.Optimizer:
    parameters = [p for p in graph.module.parameters() if p.requires_grad]
    if not parameters:
        raise InputError("the network has no parameters to train (all are frozen, or there are none)")
    lr, decay = at(training.lr, 0.0), training.weight_decay
    if training.optimiser == "sgd":
        return torch.optim.SGD(parameters, lr, momentum=0.9, weight_decay=decay, foreach=True)
    kind = torch.optim.Adam if training.optimiser == "adam" else torch.optim.AdamW
    return kind(parameters, lr, weight_decay=decay, foreach=True)


def _epoch_record(
    graph: Graph, held_out: HeldOut, test_eps: float, done: Progressed, now: Moment, averaged: bool
) -> dict[str, Any]:
    means = done.means()
    gradient_norm = means.pop("gradient_norm")
    notes = {k.removeprefix(NOTE): v for k, v in means.items() if k.startswith(NOTE)}
    losses = {k: v for k, v in means.items() if not k.startswith(NOTE)}
    staged: dict[str, Any] = {}
    with evaluation(graph.module):  # computed weights, such as spectral norm's, stay as they are
        accuracy, layers = evaluate(graph, held_out, now.method.ball(test_eps), now.method.engine)
        if now.method.search is not None:
            staged = {"stage": now.stage.number + 1}
            error = verified_error(graph, held_out, test_eps, now.method.search, now.stage.cut)
            accuracy = accuracy | {"verified_error": error}
    return {
        "epoch": now.epoch + 1,
        "step": done.step,
        "seconds": round(done.seconds, 3),
        "progress": now.of_run,
        **staged,
        **({"averaged": True} if averaged else {}),
        "eps": now.eps,
        "lr": now.lr,
        "gradient_norm": gradient_norm,
        "losses": losses,
        **({"notes": notes} if notes else {}),
        "weights": {loss.name: at(loss.weight, now.progress) for loss in now.method.losses},
        "held_out": accuracy,
        "layers": layers,
    }


def _epoch_line(record: Mapping[str, Any], epochs: int) -> str:
    losses = ", ".join(f"{name} {value:.3f}" for name, value in record["losses"].items())
    held, who = record["held_out"], "averaged, held out" if "averaged" in record else "held out"
    return (
        f"epoch {record['epoch']}/{epochs}: {losses}; eps {record['eps']:.4g}, lr {record['lr']:.2g}; "
        f"{who}: clean {held['clean']:.2%}, certified {held['certified']:.2%} at eps {held['eps']:.4g}"
    )


class _Epoch(TypedDict):
    step: int


_EPOCH = TypeAdapter(_Epoch)


def _forget_epochs_after(metrics: Path, step: int, per_epoch: int) -> None:
    """Drop the metrics of epochs that a resumed run is going to repeat; warn if others are lost."""
    kept: list[bytes] = []
    if metrics.exists():
        lines = enumerate(read_lines(metrics), start=1)
        kept = [line for number, line in lines if check_line(_EPOCH, line, metrics, number)["step"] <= step]
        write_atomically(metrics, b"".join(line + b"\n" for line in kept))
    epochs = step // per_epoch
    if len(kept) < epochs:
        warn(
            f"{metrics} holds {len(kept)} of the {epochs} epochs that are done: restore it, or reports lack "
            "the others (the training goes on as it would have)",
        )


def warn_of_schedules(method: Method, training: Training) -> None:
    """Warn of schedules that probably do not go together as they are meant to."""
    arrived = settles(method.eps)
    if first_drop(training.lr) < arrived:
        warn(
            f"the learning rate falls at {first_drop(training.lr):.3g} of the run, before eps has arrived at "
            f"{arrived:.3g}: the network will hardly learn the full radius",
        )
    average = training.average
    if average is not None and average.begin < arrived:
        warn(
            f"training.average begins at {average.begin:.3g} of the run, before eps has arrived at "
            f"{arrived:.3g}: the mean takes in networks that were trained for smaller balls",
        )


@contextmanager
def _stop_requested() -> Iterator[threading.Event]:
    """Set when Ctrl-C or SIGTERM asks to stop; a second Ctrl-C stops at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, _frame: object) -> None:
        stop.set()
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""The loop: one seed, one result, however often the run is stopped, killed or short of disk.

Unless said otherwise, the runs have everything that could break an exact resume: BatchNorm, dropout,
random flips and shifts, an attack from random starts, and a last batch that is smaller.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.data import Dataset, TensorDataset

from tightrope import fit, methods
from tightrope.data import Augment, Split, as_source, hold_out
from tightrope.data.source import LoaderSource
from tightrope.errors import DivergedError, IdentityError, InputError, TightropeError
from tightrope.files import load_tensors, locked
from tightrope.recipes import parse_recipe, read_recipe
from tightrope.train import Course, Interrupted, Loss, Method, Ramp, Steps, terms
from tightrope.train.evaluate import evaluate
from tightrope.train.methods import LatentAttack

IMAGES, HELD_OUT, BATCH, EPOCHS = 63, 12, 16, 3
PER_EPOCH, TOTAL = 4, 12
OPTIONS = {
    "epochs": EPOCHS,
    "batch": BATCH,
    "held_out": HELD_OUT,
    "lr": Steps(start=0.01, factor=0.5, at=(0.8,)),
    "augment": Augment(flip=True, pad=1),
    "device": "cpu",
}
NEVER, ALWAYS = 1e6, 1e-6  # seconds between checkpoints
RAMP = Course(shape="smooth", begin=0.1, finish=0.7)
METHODS = {
    "standard": methods.standard(),
    "fgsm": methods.fgsm(eps=0.1),
    "pgd": methods.pgd(eps=0.1, steps=2),
    "ibp": methods.ibp(eps=0.1, ramp=RAMP),
    "shi-ibp": methods.shi_ibp(eps=0.1, ramp=RAMP),
    "diffai": methods.diffai(eps=0.1, ramp=RAMP),
    "staps": methods.staps(eps=0.1, steps=2, ramp=RAMP),
    "maar": methods.maar(eps=0.1, attack=LatentAttack(steps=2, projections=4)),
}


class Watched:
    """A source that calls `action` just before it hands out the batch of a training step, counted from 1."""

    def __init__(self, source, at, action):
        self.source, self.at, self.action = source, at, action
        self.calls = self.steps = 0

    def __len__(self):
        return len(self.source)

    @property
    def shape(self):
        return self.source.shape

    def labels(self):
        return self.source.labels()

    def identity(self):
        return self.source.identity()

    def batches(self, order):
        self.calls += 1  # the first call reads the held-out examples
        for batch in self.source.batches(order):
            self.steps += self.calls > 1
            if self.steps == self.at:
                self.action()
            yield batch


def send(number):
    return lambda: os.kill(os.getpid(), number)


def go(network, images, out, method="fgsm", data=None, stop=None, action=None, network_seed=0, **options):
    """A training run; `stop` is the step before which `action` is called."""
    source = as_source(images(IMAGES) if data is None else data)
    if stop is not None:
        source = Watched(source, stop, action or send(signal.SIGINT))
    module = options.pop("module", None) or network(norm=True, dropout=True, seed=network_seed)
    method = METHODS[method] if isinstance(method, str) else method
    return fit(module, source, method, out=out, **{**OPTIONS, "checkpoint_seconds": NEVER, **options})


@pytest.fixture(scope="module")
def run(network, images):
    """Trains: `run(out, method, stop=..., ...)`."""
    return lambda *args, **options: go(network, images, *args, **options)


@pytest.fixture(scope="module")
def reference(run, tmp_path_factory):
    """The folder of a run that nothing disturbed, made once per set of options."""
    folders = {}

    def make(method="fgsm", **options):
        key = (method, *sorted(options.items()))
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("reference")
            run(folders[key], method, **options)
        return folders[key]

    return make


def metrics(out):
    """The records of metrics.jsonl, read as strict JSON, without the time they took."""
    lines = (out / "metrics.jsonl").read_text().split("\n")
    assert lines.pop() == "", "the last line is not complete"
    records = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert all(record.pop("seconds") > 0 for record in records)
    return records


def weights(out, name="model.safetensors"):
    return load_tensors(out / name)[0]


def saved_step(out):
    return load_tensors(out / "checkpoint" / "last.safetensors")[1]["progress"]["step"]


def same(first, second):
    return set(first) == set(second) and all(torch.equal(first[name], second[name]) for name in first)


def assert_same_run(out, expected):
    assert same(weights(out), weights(expected))
    assert metrics(out) == metrics(expected)


# --------------------------------------------------------------------------------- stop and resume


@pytest.mark.parametrize("method", METHODS)
def test_a_run_stopped_every_few_steps_ends_as_one_never_stopped(run, reference, tmp_path, method):
    for part in itertools.count():
        try:
            run(tmp_path, method, stop=part % 3 + 1, resume=part > 0, network_seed=part)
            break
        except Interrupted:
            assert not (tmp_path / "model.safetensors").exists()
    assert part == 6
    assert_same_run(tmp_path, reference(method))


@pytest.mark.parametrize("optimiser", ["adamw", "sgd"])
def test_every_optimiser_resumes_exactly(run, reference, tmp_path, optimiser):
    options = {"optimiser": optimiser, "weight_decay": 0.01, "clip": 0.5}
    with pytest.raises(Interrupted):
        run(tmp_path, stop=6, **options)
    run(tmp_path, resume=True, network_seed=1, **options)
    assert_same_run(tmp_path, reference(**options))


@pytest.mark.parametrize("optimiser", ["adam", "sgd"])
def test_convolutions_whose_weights_are_laid_out_anew_resume_exactly(run, tmp_path, optimiser):
    def module():
        torch.manual_seed(0)
        first, second = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, stride=2)
        return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(32, 3))

    options = {"method": "shi-ibp", "optimiser": optimiser, "weight_decay": 0.01}
    run(tmp_path / "whole", module=module(), **options)
    with pytest.raises(Interrupted):
        run(tmp_path / "parts", module=module(), stop=6, **options)
    run(tmp_path / "parts", module=module(), resume=True, **options)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_says_so(run, tmp_path, number):
    with pytest.raises(Interrupted) as stopped:
        run(tmp_path, stop=6, action=send(number))
    assert isinstance(stopped.value, KeyboardInterrupt)
    assert saved_step(tmp_path) == 6
    assert [record["epoch"] for record in metrics(tmp_path)] == [1]


def test_a_second_signal_stops_at_once(run, reference, tmp_path):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as stopped:
        run(tmp_path, stop=6, action=twice)
    assert not isinstance(stopped.value, Interrupted)
    assert saved_step(tmp_path) == 0
    run(tmp_path, resume=True)
    assert_same_run(tmp_path, reference())


def test_a_stop_in_the_last_step_leaves_only_the_weights_to_write(run, reference, tmp_path):
    with pytest.raises(Interrupted):
        run(tmp_path, stop=TOTAL)
    assert saved_step(tmp_path) == TOTAL
    run(tmp_path, resume=True, network_seed=1)
    assert_same_run(tmp_path, reference())


def test_resuming_a_finished_run_changes_nothing(run, reference, tmp_path):
    shutil.copytree(reference(), tmp_path / "run")
    result = run(tmp_path / "run", resume=True, network_seed=1)
    assert_same_run(tmp_path / "run", reference())
    assert same(result.model.state_dict(), weights(reference()))


def test_resume_without_a_run_begins_one(run, reference, tmp_path):
    run(tmp_path / "new", resume=True)
    assert_same_run(tmp_path / "new", reference())


@pytest.mark.parametrize("outcome", ["done", "stopped", "failed"])
def test_signal_handlers_are_given_back(run, tmp_path, outcome):
    def fail():
        raise OSError("the disk with the data is gone")

    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    options = {"done": {}, "stopped": {"stop": 2}, "failed": {"stop": 2, "action": fail}}[outcome]
    errors = {"done": (), "stopped": Interrupted, "failed": OSError}[outcome]
    try:
        run(tmp_path, epochs=1, **options)
    except errors:
        assert outcome != "done"
    else:
        assert outcome == "done"
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_training_outside_the_main_thread_works(run, reference, tmp_path):
    thread = threading.Thread(target=run, args=(tmp_path,))
    thread.start()
    thread.join()
    assert_same_run(tmp_path, reference())


class Noisy(Dataset):
    """A dataset that draws random numbers for every example it hands out, in every way there is."""

    def __init__(self, split):
        self.split = split

    def __len__(self):
        return len(self.split)

    def __getitem__(self, index):
        dimmed = torch.rand(()) * random.random() * np.random.rand()
        return (self.split.x[index] * dimmed).clamp(0, 1), int(self.split.y[index])


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_dataset_s_own_random_transforms_resume_exactly_with_any_workers(run, images, tmp_path, workers):
    data = Noisy(images(IMAGES))
    run(tmp_path / "whole", data=data)
    with pytest.raises(Interrupted):
        run(tmp_path / "parts", data=LoaderSource(data, workers), stop=6)
    never = 10**6  # the same kind of source again
    run(tmp_path / "parts", data=LoaderSource(data, workers), stop=never, resume=True)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


# ------------------------------------------------------------------------- crashes and full disks


class Crash(BaseException):
    """What no part of the code may catch: the process is gone."""


def failing_at(count, error):
    """An `os.fsync` that fails the given time it is called; also counts."""
    calls = itertools.count(1)
    real = os.fsync

    def fsync(descriptor):
        if next(calls) == count:
            raise error
        real(descriptor)

    return fsync


WRITES = ["model", "environment", "recipe", "checkpoint 0", *(f"checkpoint {step}" for step in range(1, 4))]
WRITES += ["metrics 1", *(f"checkpoint {step}" for step in range(4, 8)), "metrics 2", "checkpoint 8"]
WRITES += ["last checkpoint", "weights"]


@pytest.mark.parametrize("count", range(1, len(WRITES) + 1), ids=WRITES)
def test_a_crash_in_any_write_loses_nothing(run, reference, tmp_path, monkeypatch, count):
    begun = count > WRITES.index("checkpoint 0") + 1
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing_at(count, Crash()))
        with pytest.raises(Crash):
            run(tmp_path, epochs=2, checkpoint_seconds=ALWAYS)
    run(tmp_path, epochs=2, checkpoint_seconds=ALWAYS, resume=True, network_seed=int(begun))
    assert_same_run(tmp_path, reference(epochs=2))
    for name in ("recipe.toml", "model.json", "environment.json"):
        assert (tmp_path / name).exists()


def test_the_writes_above_are_all_there_are(run, tmp_path, monkeypatch):
    count = itertools.count(1)
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (next(count), real(descriptor)))
    run(tmp_path, epochs=2, checkpoint_seconds=ALWAYS)
    assert next(count) - 1 == len(WRITES)


@pytest.mark.parametrize(
    "count", [WRITES.index(name) + 1 for name in ("checkpoint 2", "metrics 1", "weights")]
)
def test_a_full_disk_stops_the_run_with_one_line_and_it_goes_on_when_there_is_space(
    run, reference, tmp_path, monkeypatch, count
):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing_at(count, full))
        with pytest.raises(TightropeError, match="no space left to write"):
            run(tmp_path, epochs=2, checkpoint_seconds=ALWAYS)
    run(tmp_path, epochs=2, resume=True, network_seed=1)
    assert_same_run(tmp_path, reference(epochs=2))


def test_a_failure_loses_what_was_done_since_the_last_checkpoint_only(run, reference, tmp_path):
    def fail():
        raise RuntimeError("the reader broke")

    with pytest.raises(RuntimeError, match="the reader broke"):
        run(tmp_path, stop=6, action=fail, checkpoint_seconds=ALWAYS)
    assert saved_step(tmp_path) == 5
    run(tmp_path, resume=True)
    assert_same_run(tmp_path, reference())


def test_a_line_that_a_crash_cut_off_is_written_again(run, reference, tmp_path):
    with pytest.raises(Interrupted):
        run(tmp_path, stop=6)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 2, "step"')
    run(tmp_path, resume=True)
    assert_same_run(tmp_path, reference())


@pytest.mark.parametrize("line", ["{}", '{"epoch": 1}', '{"epoch": 1, "step": "a"}', "[]"])
def test_a_damaged_line_of_metrics_is_named(run, tmp_path, line):
    with pytest.raises(Interrupted):
        run(tmp_path, stop=6)
    before = (tmp_path / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(before + line + "\n")
    with pytest.raises(InputError, match=r"metrics.jsonl, line 2: "):
        run(tmp_path, resume=True)


KILLED = """
import os, runpy, signal, sys
import torch
torch.set_num_threads(1)
helpers, tests = runpy.run_path(sys.argv[1]), runpy.run_path(sys.argv[2])
kill = tests["send"](signal.SIGKILL)
first = os.fork()  # what takes its time is done once for both: to import
kind = "write" if first else "step"
if not first:
    stop = {"stop": 6, "action": kill}
else:
    assert os.waitpid(first, 0)[1] == signal.SIGKILL
    stop, calls, real = {}, [], os.fsync
    def fsync(descriptor):
        calls.append(descriptor)
        if len(calls) == 9:
            kill()
        real(descriptor)
    os.fsync = fsync
from pathlib import Path
tests["go"](helpers["make_network"], helpers["make_images"], Path(sys.argv[3]) / kind,
            checkpoint_seconds=tests["ALWAYS"], **stop)
"""


def test_a_killed_process_loses_at_most_one_interval(run, reference, tmp_path):
    """SIGKILL before the sixth step, and in the middle of writing the checkpoint of the fourth."""
    here = Path(__file__)
    killed = subprocess.run([sys.executable, "-c", KILLED, here.with_name("conftest.py"), here, tmp_path])
    assert killed.returncode == -signal.SIGKILL
    for kind, step in {"step": 5, "write": 3}.items():
        assert saved_step(tmp_path / kind) == step
        run(tmp_path / kind, resume=True, network_seed=1)
        assert_same_run(tmp_path / kind, reference())


def test_a_corrupt_checkpoint_is_refused(run, tmp_path):
    with pytest.raises(Interrupted):
        run(tmp_path, stop=2)
    path = tmp_path / "checkpoint" / "last.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"last\.safetensors is corrupt"):
        run(tmp_path, resume=True)


def test_two_processes_cannot_train_in_one_folder(run, tmp_path):
    with pytest.raises(Interrupted):
        run(tmp_path, stop=2)
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another process is training in"):
            run(tmp_path, resume=True)
    run(tmp_path, resume=True)


def test_a_run_that_is_refused_leaves_the_files_of_the_one_that_goes_on_alone(run, tmp_path):
    """Though that one has written no checkpoint yet."""
    with locked(tmp_path / ".lock", InputError("taken")):
        with pytest.raises(InputError, match="another process is training in"):
            run(tmp_path, seed=1)
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_every_file_is_written_under_the_lock(run, tmp_path, monkeypatch):
    real = os.fsync

    def fsync(descriptor):
        with pytest.raises(InputError, match="taken"), locked(tmp_path / ".lock", InputError("taken")):
            pytest.fail("the lock is free")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    run(tmp_path, epochs=1)


# ---------------------------------------------------------------------------------------- identity


@pytest.fixture(scope="module")
def stopped(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("stopped")
    with pytest.raises(Interrupted):
        run(out, stop=6)
    return out


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed: 0 there, 1 now"),
        ({"epochs": 4}, "training.epochs: 3 there, 4 now"),
        ({"batch": 8}, "training.batch: 16 there, 8 now"),
        ({"lr": 0.01}, "training.lr: none there, 0.01 now"),
        ({"optimiser": "sgd"}, "training.optimiser: 'adam' there, 'sgd' now"),
        ({"clip": 1.0}, "training.clip: 0.0 there, 1.0 now"),
        ({"test_eps": 0.2}, "test_eps: 0.1 there, 0.2 now"),
        ({"held_out": 9}, "held_out: 12 there, 9 now"),
        ({"augment": Augment(flip=True)}, "augment.pad: 1 there, 0 now"),
        ({"method": methods.fgsm(eps=0.2)}, "method.eps: 0.1 there, 0.2 now"),
        ({"method": methods.fgsm(eps=0.1, step=1.0)}, "method.step: 1.25 there, 1.0 now"),
        ({"method": methods.pgd(eps=0.1)}, "method.name: 'fgsm' there, 'pgd' now"),
        ({"data": "images(63, seed=1)"}, "data identity"),
        ({"module": "network(norm=True)"}, "network structure"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_resume_with_anything_else_is_refused_by_name(
    run, reference, stopped, network, images, tmp_path, change, named
):
    """And a resume with the same settings still works."""
    out = tmp_path / "run"
    shutil.copytree(stopped, out)
    made = {"data": lambda: images(IMAGES, seed=1), "module": lambda: network(norm=True)}
    change = {key: made[key]() if key in made else value for key, value in change.items()}
    with pytest.raises(IdentityError, match="was made with other settings") as refused:
        run(out, resume=True, **change)
    assert named in str(refused.value)
    run(out, resume=True)
    assert_same_run(out, reference())


def test_a_dataset_with_one_other_label_is_not_resumed_on(run, network, images, tmp_path):
    class Listed(Dataset):
        def __init__(self, y):
            self.x, self.y = images(IMAGES).x, y

        def __len__(self):
            return len(self.y)

        def __getitem__(self, index):
            return self.x[index], int(self.y[index])

    y = images(IMAGES).y
    run(tmp_path, data=Listed(y), epochs=1, network_seed=1)
    probed = set(np.linspace(0, IMAGES - 1, 16).astype(int).tolist())
    other = y.clone()
    changed = next(i for i in range(IMAGES) if i not in probed)
    other[changed] = (other[changed] + 1) % 3
    with pytest.raises(IdentityError, match="labels: one with the hash"):
        run(tmp_path, data=Listed(other), epochs=1, network_seed=1, resume=True)
    run(tmp_path, data=Listed(y), epochs=1, network_seed=1, resume=True)


def test_how_often_to_save_may_change(run, reference, stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "run")
    run(tmp_path / "run", resume=True, checkpoint_seconds=ALWAYS)
    assert_same_run(tmp_path / "run", reference())


# -------------------------------------------------------------------------------------- randomness


def test_one_seed_one_result(run, reference, tmp_path):
    run(tmp_path)
    assert_same_run(tmp_path, reference())


def test_seed_0_is_a_seed(run, reference, tmp_path):
    run(tmp_path, seed=1)
    assert not same(weights(tmp_path), weights(reference(seed=0)))
    assert_same_run(reference(seed=0), reference())


@pytest.mark.parametrize("method", ["fgsm", "shi-ibp"])
@pytest.mark.parametrize("stop", [None, 2])
def test_the_caller_s_random_numbers_are_left_alone(run, tmp_path, method, stop):
    before = torch.get_rng_state()
    try:
        run(tmp_path, method, epochs=1, stop=stop)
    except Interrupted:
        assert stop
    assert torch.equal(torch.get_rng_state(), before)


def test_the_caller_s_random_numbers_have_no_influence(run, reference, tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(123)
        run(tmp_path, "shi-ibp")
    assert_same_run(tmp_path, reference("shi-ibp"))


def test_what_dropout_draws_is_not_what_attacks_start_from(run, tmp_path):
    seeds = []

    def look(batch):
        seeds.append((torch.initial_seed(), batch.generator.initial_seed()))
        return terms.natural(batch)

    run(tmp_path, Method("look", 0.1, (Loss("look", 1.0, look),)), epochs=1)
    assert len({seed for pair in seeds for seed in pair}) == 2 * len(seeds) > 2


def test_the_metrics_do_not_move_weights_that_move_at_each_use(run, network, tmp_path, monkeypatch):
    module, looks = network(), []
    parametrizations.spectral_norm(module[3])

    def look(*args):
        before = {name: value.clone() for name, value in module.state_dict().items()}
        found = evaluate(*args)
        looks.append(same(before, module.state_dict()))
        return found

    monkeypatch.setattr("tightrope.train.loop.evaluate", look)
    run(tmp_path, module=module)
    assert looks == [True] * OPTIONS["epochs"]


def test_every_epoch_sees_every_example_once_in_a_new_order(network, images, tmp_path):
    class Recorder(Watched):
        def batches(self, order):
            for batch in super().batches(order):
                if self.calls > 1:
                    seen.append(batch[2].tolist())
                yield batch

    seen: list[list[int]] = []
    source = Recorder(as_source(images(IMAGES)), at=None, action=None)
    fit(network(), source, methods.standard(), out=tmp_path, **OPTIONS)
    epochs = [seen[i : i + PER_EPOCH] for i in range(0, TOTAL, PER_EPOCH)]
    assert [[len(batch) for batch in epoch] for epoch in epochs] == [[16, 16, 16, 3]] * EPOCHS
    orders = [list(itertools.chain(*epoch)) for epoch in epochs]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(orders[2])
    assert len(set(orders[0])) == IMAGES - HELD_OUT
    assert orders[0] != orders[1] != orders[2]


# -------------------------------------------------------------------------------------- divergence


def test_a_loss_that_turns_nan_stops_the_run_by_step_and_term(run, tmp_path):
    with pytest.raises(DivergedError) as stopped:
        run(tmp_path, "standard", optimiser="sgd", lr=1e25)
    message = str(stopped.value)
    assert message.startswith("the loss `natural` is ")
    step = saved_step(tmp_path)
    assert f"at step {step} (epoch {step // PER_EPOCH + 1}, eps 0, lr 1e+25)" in message
    assert f"The last good state is in {tmp_path / 'checkpoint' / 'last.safetensors'}" in message
    assert "Lower the learning rate" in message
    assert all(torch.isfinite(t).all() for t in weights(tmp_path, "checkpoint/last.safetensors").values())
    assert not (tmp_path / "model.safetensors").exists()


def poisoned(batch):
    return terms.natural(batch) * math.nan


def broken_gradient(batch):
    return (batch.logits.square().sum(1) * 0).sqrt()


@pytest.mark.parametrize("bad", [poisoned, broken_gradient])
def test_the_state_before_the_step_is_what_is_saved(run, tmp_path, bad):
    """Down to the running statistics, which the forward pass of the lost step had moved."""
    late = Ramp(start=0.0, end=1.0, begin=6 / TOTAL, finish=1.0)
    method = Method("mine", 0.0, (Loss("natural", 1.0, terms.natural), Loss("bad", late, bad)))
    with pytest.raises(DivergedError, match=r"bad.* is nan at step 7 \(epoch 2, "):
        run(tmp_path / "lost", method)
    with pytest.raises(Interrupted):
        run(tmp_path / "stopped", method, stop=7)
    lost, kept = (weights(tmp_path / name, "checkpoint/last.safetensors") for name in ("lost", "stopped"))
    assert same(lost, kept)


@pytest.mark.parametrize(
    "options",
    [
        {"checkpoint_seconds": ALWAYS},
        {"batch": IMAGES},
        {"batch": IMAGES, "epochs": 1},
        {"checkpoint_seconds": NEVER},
    ],
    ids=["at a checkpoint", "at an epoch's end", "at the end", "at the next step"],
)
def test_weights_that_overflow_never_replace_a_good_state(run, tmp_path, options):
    steep = Method("steep", 0.0, (Loss("natural", 1e6, terms.natural),))
    with pytest.raises(DivergedError, match="The last good state is in"):
        run(tmp_path, steep, optimiser="sgd", lr=3e38, **options)
    assert saved_step(tmp_path) == 0
    assert all(torch.isfinite(t).all() for t in weights(tmp_path, "checkpoint/last.safetensors").values())
    assert not (tmp_path / "model.safetensors").exists()


def test_a_network_that_explodes_at_once_says_so(run, network, tmp_path):
    module = network()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1e12)
    with pytest.raises(DivergedError, match=r"natural.* is (inf|nan) at step 0 \(epoch 1, "):
        run(tmp_path, "standard", module=module)


# ----------------------------------------------------------------------------------------- metrics


def test_the_metrics_say_what_was_trained_and_how(reference):
    records = metrics(reference("ibp"))
    method, lr = METHODS["ibp"], OPTIONS["lr"]
    assert [record["epoch"] for record in records] == [1, 2, 3]
    assert [record["step"] for record in records] == [4, 8, 12]
    for record in records:
        progress = (record["step"] - 1) / TOTAL  # of the epoch's last step
        assert record["progress"] == progress
        assert record["eps"] == method.eps(progress)
        assert record["lr"] == lr(progress)
        assert record["weights"] == {loss.name: loss.weight(progress) for loss in method.losses}
        assert record["held_out"]["examples"] == HELD_OUT
        assert record["held_out"]["eps"] == 0.1
        assert 0 <= record["held_out"]["certified"] <= record["held_out"]["clean"] <= 1
        assert [set(layer) for layer in record["layers"]] == [
            {"name", "dead", "active", "unstable", "width"}
        ] * 2
        assert record["gradient_norm"] > 0
        assert set(record["losses"]) == {"natural", "robust"}
    assert records[-1]["eps"] == 0.1
    assert records[-1]["weights"] == {"natural": 0.5, "robust": 0.5}


def test_a_term_without_weight_in_an_epoch_has_no_loss_in_it(run, tmp_path):
    run(tmp_path, methods.ibp(eps=0.1, ramp=Course(begin=0.5, finish=0.7)))
    assert [set(record["losses"]) for record in metrics(tmp_path)] == [
        {"natural"},
        {"natural", "robust"},
        {"natural", "robust"},
    ]


def test_the_losses_of_an_epoch_are_means_over_its_examples(run, network, images, tmp_path):
    """With no learning to speak of, the mean is the loss of the network over the training examples."""
    options = {"augment": None, "module": network(), "epochs": 1, "optimiser": "sgd", "lr": 1e-12}
    run(tmp_path, "standard", data=images(51 + HELD_OUT), **options)
    split = images(51 + HELD_OUT)
    index, _ = hold_out(split.y, HELD_OUT, 0)
    expected = nn.functional.cross_entropy(network()(split.x[index]), split.y[index]).item()
    assert metrics(tmp_path)[0]["losses"]["natural"] == pytest.approx(expected, rel=1e-5)


def test_time_adds_up_over_the_parts_of_a_run(run, tmp_path):
    with pytest.raises(Interrupted):
        run(tmp_path, stop=6)
    before = load_tensors(tmp_path / "checkpoint" / "last.safetensors")[1]["progress"]["seconds"]
    result = run(tmp_path, resume=True)
    assert 0 < before < result.metrics()[-1]["seconds"]


# ---------------------------------------------------------------------------------------- warnings


@pytest.mark.parametrize(("falls", "warned"), [(0.1, True), (0.49, True), (0.5, False), (0.9, False)])
def test_a_learning_rate_that_falls_before_the_ramp_ends_is_warned_about(run, tmp_path, falls, warned):
    method = methods.ibp(eps=0.1, ramp=Course(begin=0.1, finish=0.5))
    options = {"lr": Steps(start=0.01, at=(falls,)), "epochs": 1}
    if warned:
        with pytest.warns(
            UserWarning, match=f"falls at {falls:.3g} of the run, before eps has arrived at 0.5"
        ):
            run(tmp_path, method, **options)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run(tmp_path, method, **options)


def test_a_last_batch_that_batch_norm_cannot_normalise_is_refused_before_training(run, network, tmp_path):
    with pytest.raises(InputError, match="batches of 10 leave one of the 51 training examples alone"):
        run(tmp_path / "a", batch=10)
    with pytest.raises(InputError, match="batches of 1 leave one"):
        run(tmp_path / "b", batch=1)
    run(tmp_path / "c", batch=10, epochs=1, module=network(norm=False))


def test_a_network_without_parameters_to_train_is_refused(run, network, tmp_path):
    with pytest.raises(InputError, match="no parameters to train"):
        run(tmp_path, module=network().requires_grad_(False))


@pytest.mark.parametrize("lr", [0.0, -1.0, Ramp(start=0.0, end=1.0), Ramp(start=1.0, end=-1.0)])
def test_a_learning_rate_that_does_not_learn_is_refused(run, tmp_path, lr):
    with pytest.raises(ValueError, match="the learning rate must begin above 0 and never fall below"):
        run(tmp_path, lr=lr)


# --------------------------------------------------------------------------------------------- fit


class MapStyle(Dataset):
    """Bytes and plain integers, one pair at a time."""

    def __init__(self, split):
        self.x, self.y = (split.x * 255).round().byte(), split.y.tolist()

    def __len__(self):
        return len(self.y)

    def __getitem__(self, index):
        return self.x[index].numpy(), self.y[index]


class Plain(nn.Module):
    """A network as users write them."""

    def __init__(self):
        super().__init__()
        self.hidden, self.last = nn.Linear(36, 16), nn.Linear(16, 3)

    def forward(self, x):
        return self.last(torch.relu(self.hidden(x.flatten(1))))


@pytest.mark.parametrize(
    "wrap",
    [lambda split: split, lambda split: TensorDataset(split.x, split.y), MapStyle],
    ids=["split", "TensorDataset", "map-style"],
)
def test_fit_trains_any_network_on_any_dataset(images, tmp_path, wrap):
    module = Plain()
    result = fit(
        module,
        wrap(images(200)),
        methods.ibp(eps=0.02),
        out=tmp_path,
        epochs=8,
        batch=20,
        lr=0.02,
        device="cpu",
    )
    assert result.model is module
    assert not module.training
    assert same(module.state_dict(), weights(tmp_path))
    records = result.metrics()
    assert len(records) == 8
    assert records[-1]["held_out"] == {"examples": 20, "eps": 0.02} | {
        key: records[-1]["held_out"][key] for key in ("clean", "certified")
    }
    assert records[-1]["held_out"]["certified"] > 0.9


def test_the_same_examples_train_the_same_network_however_they_are_given(run, images, tmp_path):
    split = images(IMAGES)
    exact = Split((split.x * 255).round().byte(), split.y)
    run(tmp_path / "split", data=exact)
    run(tmp_path / "tensors", data=TensorDataset(exact.x, exact.y))
    run(tmp_path / "map", data=MapStyle(split))
    for name in ("tensors", "map"):
        assert_same_run(tmp_path / name, tmp_path / "split")


@pytest.mark.parametrize(("count", "held_out"), [(63, 6), (15, 1)])
def test_a_tenth_of_a_small_data_set_is_held_out(network, images, tmp_path, count, held_out):
    result = fit(network(), images(count), methods.standard(), out=tmp_path, epochs=1, batch=7, device="cpu")
    assert result.metrics()[0]["held_out"]["examples"] == held_out


def test_a_folder_that_holds_a_run_is_not_overwritten(run, stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "run")
    with pytest.raises(InputError, match="already holds a run: resume it"):
        run(tmp_path / "run")
    assert saved_step(tmp_path / "run") == 6


def test_labels_that_the_network_has_no_output_for_are_refused(run, images, tmp_path):
    split = images(IMAGES)
    with pytest.raises(InputError, match="the network has 3 outputs, but the data has the label 3"):
        run(tmp_path, data=Split(split.x, split.y + 1))
    assert not list(tmp_path.iterdir())


def test_the_folder_says_how_to_repeat_the_run(run, reference, tmp_path):
    out = reference()
    recipe = parse_recipe(read_recipe(out / "recipe.toml"), "the run's recipe")
    assert recipe.build_method().options == METHODS["fgsm"].options
    assert (recipe.seed, recipe.test_eps, recipe.held_out) == (0, 0.1, HELD_OUT)
    assert recipe.training.model_dump(exclude={"checkpoint_seconds"}) == {
        "epochs": EPOCHS,
        "batch": BATCH,
        "optimiser": "adam",
        "lr": OPTIONS["lr"].model_dump(),
        "weight_decay": 0.0,
        "clip": 0.0,
        "accumulate": 1,
        "average": None,
        "bn_statistics": "running",
    }
    environment = json.loads((out / "environment.json").read_text())
    assert environment["seed"] == 0
    assert environment["device"] == "cpu"
    assert (
        environment["parameters"]
        == sum(t.numel() for t in weights(out).values() if t.is_floating_point()) - 24
    )
    model = json.loads((out / "model.json").read_text())
    assert (model["input_shape"], model["classes"], model["name"]) == ([1, 6, 6], 3, None)

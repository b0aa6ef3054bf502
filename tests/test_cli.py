"""The command line, as one types it: what it prints, what it leaves behind, and its exit status."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import click
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tightrope import cli
from tightrope.verify import VERIFIERS, BoundStage

FIGURES = ("examples", "clean_correct", "robust", "falsified", "undecided", "certified_accuracy",
           "clean_accuracy", "attacked_accuracy", "eps", "norm", "verifier", "seconds")  # fmt: skip

PROGRAM = (sys.executable, "-c", "from tightrope.cli import main; main()")
IBP = ("--model", "2x100", "--method", "ibp", "--eps", "0.03")
DIGITS = ("train", "--data", "digits", "--model", "digits-cnn", "--method", "ibp", "--eps", "0.1")

# Networks of a user's own, good and bad; the tests run in a folder that holds this as `nets.py`.
NETS = """
import torch
from torch import nn

def good(): return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
def unbounded(): return nn.Sequential(nn.Linear(4, 3), nn.Softmax(1), nn.GELU())
class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = good()
    def forward(self, x): return self.net(x)
def own(): return Own()
def wide(): return nn.Sequential(nn.Linear(5, 3))
def leaves(): raise SystemExit(7)
def two_classes(): return nn.Sequential(nn.Linear(4, 2))
def frozen(): return good().requires_grad_(False)
def number(): return 3
def fails(): raise RuntimeError("out of ideas")
def takes_one(x): return x
def nan():
    net = good()
    net[0].weight.data[0, 0] = torch.nan
    return net
"""


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    code: int
    out: str
    err: str

    def json(self) -> dict[str, Any]:
        """The last line of stdout."""
        return json.loads(self.out.splitlines()[-1])


def tightrope(*arguments: object) -> Outcome:
    """Run the command line in this process."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(sys, "argv", ["tightrope", *map(str, arguments)]),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("always")
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
    return Outcome(code, out.getvalue(), err.getvalue())


def assert_refused(outcome: Outcome, *said: str, code: int = 2, lines: int = 1) -> None:
    """One clear message on stderr, and nothing on stdout."""
    assert (outcome.code, outcome.out) == (code, ""), outcome
    *_, last = outcome.err.split("error: ")
    assert len(last.splitlines()) == lines, outcome.err
    assert "Traceback" not in outcome.err
    for fragment in said:
        assert fragment in last


def blobs(examples: int, seed: int = 0) -> dict[str, Any]:
    """Points of the unit cube, in three classes by two of their four coordinates."""
    draw = np.random.default_rng(seed)
    x = [draw.random((examples, 4), np.float32) for _ in range(2)]
    y = [(p[:, 0] > 0.5).astype(int) + (p[:, 1] > 0.5) for p in x]
    return {"x_train": x[0], "y_train": y[0], "x_test": x[1], "y_test": y[1]}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with `blobs.npz` and a run on it in `run`; not to be changed."""
    folder = tmp_path_factory.mktemp("trained")
    np.savez(folder / "blobs.npz", **blobs(600))
    with contextlib.chdir(folder):
        options = ("--epochs", "20", "--set", "training.lr=0.01", "--out", "run")
        assert tightrope("train", "--data", "blobs.npz", *IBP, *options).code == 0
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch, trained) -> Path:
    """The current folder, with a run in `run`, its data in `blobs.npz`, and `nets.py`."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    (tmp_path / "nets.py").write_text(NETS)
    yield tmp_path
    sys.modules.pop("nets", None)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def verdicts_of(path: Path) -> list[dict[str, Any]]:
    """The verdicts in a file, in order, without what differs from one time to the next."""
    records = sorted(lines_of(path)[1:], key=lambda record: record["index"])
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


def agree(one: Path, other: Path) -> bool:
    """Whether two files hold the same verdicts, but for what batches of another size round otherwise."""
    records = [verdicts_of(path) for path in (one, other)]
    margins = [[record.pop("margin", 0.0) for record in file] for file in records]
    for record in (record for file in records for record in file if "witness" in record):
        record["witness"] = record["witness"] is not None
    return records[0] == records[1] and margins[0] == pytest.approx(margins[1], rel=1e-6, abs=1e-6)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# --------------------------------------------------------------------------------------------- help


def test_without_arguments_it_says_what_there_is():
    outcome = tightrope()
    assert outcome.code == 2
    assert "quickstart" in outcome.err


@pytest.mark.parametrize("command", sorted(cli.cli.commands))
def test_help_explains_every_option(command):
    outcome = tightrope(command, "--help")
    assert (outcome.code, outcome.err) == (0, "")
    options = [p for p in cli.cli.commands[command].params if isinstance(p, click.Option)]
    assert [option.name for option in options if not option.help] == []


def test_python_dash_m_is_the_same_command_and_waits_for_nothing_it_does_not_need():
    command = [sys.executable, "-X", "importtime", "-m", "tightrope", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("tightrope")
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert {"click", "tightrope.cli"} <= imported
    assert not {"matplotlib", "sklearn", "pooch", "scipy.optimize"} & imported


@pytest.mark.parametrize("what", ["methods", "models", "data", "verifiers"])
def test_list_names_what_can_be_asked_for(what):
    named = json.loads(tightrope("list", what, "--json").out)
    plain = tightrope("list", what).out
    assert named
    assert [line.split()[0] for line in plain.splitlines()] == list(named)


def test_list_says_that_networks_also_come_with_batchnorm():
    assert "NAME-bn: with BatchNorm" in tightrope("list", "models").err
    assert tightrope("list", "models", "--json").err == tightrope("list", "data").err == ""


# -------------------------------------------------------------------------------------------- train


def test_train_leaves_a_run_folder_that_certify_takes_as_it_is(here):
    assert {"recipe.toml", "metrics.jsonl", "model.safetensors", "model.json", "checkpoint",
            "environment.json"} <= {path.name for path in Path("run").iterdir()}  # fmt: skip
    assert len(lines_of(Path("run/metrics.jsonl"))) == 20
    outcome = tightrope("certify", "run")
    assert outcome.code == 0
    assert "600 examples, eps 0.03 in l_inf" in outcome.out
    assert "verdicts: run/certify-cascade-inf-0.03.jsonl" in outcome.err


def test_a_recipe_repeats_its_run(here):
    assert tightrope("train", "run/recipe.toml", "--out", "again").code == 0
    assert Path("again/model.safetensors").read_bytes() == Path("run/model.safetensors").read_bytes()
    assert Path("again/recipe.toml").read_text() == Path("run/recipe.toml").read_text()


def test_train_with_json_says_everything_else_on_stderr(here):
    outcome = tightrope("train", "--data", "blobs.npz", *IBP, "--epochs", 1, "--out", "a", "--json")
    assert outcome.json()["run"] == "a"
    assert outcome.json()["held_out"]["examples"] == 60
    assert len(outcome.out.splitlines()) == 1
    assert "trained a" in outcome.err


def test_the_run_folder_is_named_after_what_was_trained(here):
    assert tightrope("train", "--data", "blobs.npz", *IBP, "--model", "nets:good", "--epochs", 1).code == 0
    assert [path.name for path in Path("runs").iterdir()] == ["blobs-nets-good-ibp-0.03"]
    assert tightrope("certify", "runs/blobs-nets-good-ibp-0.03", "--first", 5).code == 0


def test_a_dry_run_prints_a_recipe_that_can_be_run_and_writes_nothing(here):
    before = snapshot(here)
    outcome = tightrope("train", "--data", "blobs.npz", *IBP, "--epochs", 1, "--dry-run")
    assert "# 10,903 parameters" in outcome.out
    assert "# about" in outcome.out
    assert snapshot(here) == before
    Path("recipe.toml").write_text(outcome.out)
    assert tightrope("train", "recipe.toml", "--dry-run").out.split("# about")[0] in outcome.out


def test_a_dry_run_as_json(here):
    outcome = tightrope("train", "--data", "blobs.npz", *IBP, "--epochs", 3, "--dry-run", "--json")
    facts = outcome.json()
    assert facts["recipe"]["training"]["epochs"] == 3
    assert facts["parameters"] == 10_903
    assert facts["seconds"] > 0
    assert len(outcome.out.splitlines()) == 1


def test_a_budget_chooses_the_epochs(here, monkeypatch):
    monkeypatch.setattr(
        cli.train, "predict_seconds", lambda _graph, _method, training, *_: 2.0 * training.epochs
    )
    outcome = tightrope("train", "--data", "blobs.npz", *IBP, "--budget", "1m", "--dry-run", "--json")
    assert outcome.json()["recipe"]["training"]["epochs"] == 30
    assert outcome.json()["seconds"] == 60
    outcome = tightrope("train", "--data", "blobs.npz", *IBP, "--budget", "1s", "--dry-run")
    assert "a budget of 1 s is less than one epoch takes, about 0m02s" in outcome.err


def test_a_small_data_set_holds_out_a_tenth(here):
    outcome = tightrope("train", "--data", "blobs.npz", *IBP, "--dry-run", "--json")
    assert outcome.json()["recipe"]["held_out"] == 60


def test_train_warns_of_radii_that_will_not_do(here):
    wide = tightrope("train", "--data", "blobs.npz", *IBP, "--eps", 8, "--epochs", 1, "--out", "a")
    assert "warning: eps 8 is wider than the range of a pixel" in wide.err
    small = tightrope("train", "--data", "blobs.npz", *IBP, "--test-eps", 0.1, "--epochs", 1, "--out", "b")
    assert "warning: the network is trained at eps 0.03 but is to be certified at 0.1" in small.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        pytest.param([], ["(data is missing)"], id="nothing to train"),
        pytest.param(["nothere.toml"], ["nothere.toml"], id="no recipe"),
        pytest.param(["run"], ["'run' is a directory"], id="a folder as recipe"),
        pytest.param([*DIGITS[1:], "--data", "digit"], ["'digit'", "'digits'"], id="data"),
        pytest.param([*DIGITS[1:], "--model", "digit-cnn"], ["'digit-cnn'", "'digits-cnn'"], id="model"),
        pytest.param([*DIGITS[1:], "--method", "ipb"], ["'ipb'", "'ibp'"], id="method"),
        pytest.param([*DIGITS[1:], "--model", "dm-small"], ["(1, 8, 8)", "too small"], id="shape"),
        pytest.param([*DIGITS[1:], "--eps", "-0.1"], ["eps above 0", "-0.1"], id="negative eps"),
        pytest.param([*DIGITS[1:], "--eps", "0"], ["eps above 0"], id="eps 0"),
        pytest.param([*DIGITS[1:], "--eps", "nan"], ["'--eps'", "'nan'", "8/255"], id="eps nan"),
        pytest.param([*DIGITS[1:], "--eps", "inf"], ["'--eps'", "'inf'"], id="eps inf"),
        pytest.param([*DIGITS[1:], "--eps", "8/0"], ["'--eps'", "'8/0'"], id="eps 8/0"),
        pytest.param([*DIGITS[1:], "--eps", "much"], ["'--eps'", "'much'"], id="eps a word"),
        pytest.param([*DIGITS[1:], "--epochs", "0"], ["'--epochs'", "x>=1"], id="epochs"),
        pytest.param([*DIGITS[1:], "--seed", "-1"], ["'--seed'", "-1"], id="seed"),
        pytest.param([*DIGITS[1:], "--device", "tpu"], ["'tpu'", "--device cpu"], id="device"),
        pytest.param([*DIGITS[1:], "--device", "meta"], ["'meta'", "--device cpu"], id="meta device"),
        pytest.param([*DIGITS[1:], "--dveice", "cpu"], ["--dveice", "--device", "train --help"], id="option"),
        pytest.param([*DIGITS[1:], "--budget", "5"], ["'5'", "15m"], id="budget without a unit"),
        pytest.param([*DIGITS[1:], "--budget", "0s"], ["'0s'", "15m"], id="no budget"),
        pytest.param([*DIGITS[1:], "--set", "nonsense"], ["key=value", "'nonsense'"], id="set"),
        pytest.param([*DIGITS[1:], "--set", "data.x=3"], ["data.x", "not a table"], id="set in no table"),
        pytest.param([*DIGITS[1:], "--set", "held_out=2000"], ["2000", "1436"], id="held out"),
        pytest.param([*DIGITS[1:], "--data", "nothere.npz"], ["nothere.npz", "x_train"], id="no npz"),
        pytest.param(
            ["--data", "digits", "--model", "digits-cnn", "--method", "ibp"],
            ["ibp needs the radius", "--eps 8/255"],
            id="no eps",
        ),
        pytest.param([*DIGITS[1:], "--set", "modle=x"], ["unknown key modle", "'model'"], id="misspelt"),
        pytest.param(
            ["--data", "blobs.npz", *IBP, "--set", "augment.flip=true", "--out", "new"],
            ["only images", "(4,)", "switch it off"],
            id="augmented points",
        ),
        pytest.param(["--resume"], ["--out RUN"], id="resume what"),
        pytest.param(["--resume", "--out", "nothere"], ["no run to resume"], id="no run to resume"),
    ],
)  # fmt: skip
def test_train_refuses_in_one_line(here, arguments, said):
    assert_refused(tightrope("train", *arguments), *said)
    assert not Path("new").exists()  # a corrected command finds no run begun


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ("training.bach=3", ["training.bach", "'training.batch'"]),
        ("method.kapa=3", ["kapa", "'kappa'"]),
        ("training.batch=0", ["training.batch", "got 0"]),
        ("training.lr=0", ["training", "learning rate"]),
        ("training.lr=nan", ["training.lr", "finite"]),
        ("method.ramp.finish=0.01", ["finish (0.01)", "begins (0.03)"]),
    ],
)
def test_train_refuses_a_recipe_key_by_name(assignment, said):
    assert_refused(tightrope(*DIGITS, "--set", assignment), *said)


@pytest.mark.parametrize(
    ("wrong", "option", "said"),
    [
        ('method = "ibp"', ("--eps", 0.1), ["method.eps cannot be set", "not a table"]),
        ('method = "ibp"', ("--method", "ibp"), ["method.name cannot be set", "not a table"]),
        ("training = 5", ("--epochs", 2), ["training.epochs cannot be set", "not a table"]),
        ('modifiers = "reweight"', ("--with", "l1"), ["modifiers.l1 cannot be set", "not a table"]),
        ('modifiers = ["reweight"]', ("--with", "reweight"), ["modifiers.reweight cannot be set"]),
    ],
)
def test_train_refuses_an_option_for_what_the_recipe_says_otherwise(here, wrong, option, said):
    Path("recipe.toml").write_text(f'{wrong}\ndata = "blobs.npz"\nmodel = "2x100"\n')
    assert_refused(tightrope("train", "recipe.toml", *option), *said)


def test_a_modifier_that_the_recipe_has_keeps_its_options(here):
    recipe = Path("run/recipe.toml").read_text() + "\n[modifiers.l1]\nweight = 0.25\n"
    Path("recipe.toml").write_text(recipe)
    outcome = tightrope("train", "recipe.toml", "--with", "l1", "--dry-run", "--json")
    assert outcome.json()["recipe"]["modifiers"] == {"l1": {"weight": 0.25}}


@pytest.mark.parametrize(
    ("factory", "said"),
    [
        ("wide", ["inputs of shape (4,)"]),
        ("two_classes", ["2 outputs", "label 2"]),
        ("frozen", ["no parameters to train"]),
        ("nan", ["`0.weight`", "NaN"]),
        ("number", ["nets:number", "int", "torch.nn.Module"]),
        ("fails", ["nets:fails", "RuntimeError: out of ideas"]),
        ("leaves", ["nets:leaves", "SystemExit: 7"]),
        ("takes_one", ["nets:takes_one", "without arguments"]),
        ("nothere", ["nets:nothere", "no attribute 'nothere'"]),
    ],
)
@pytest.mark.parametrize("dry", [(), ("--dry-run",)], ids=["run", "dry-run"])
def test_train_refuses_a_network_it_cannot_train(here, factory, said, dry):
    outcome = tightrope("train", "--data", "blobs.npz", *IBP, "--model", f"nets:{factory}", *dry)
    assert_refused(outcome, *said)
    assert not Path("runs").exists()


@pytest.mark.parametrize("model", ["nomodule:good", ":", "nets:"])
def test_train_refuses_a_network_it_cannot_find(here, model):
    assert_refused(
        tightrope("train", "--data", "blobs.npz", *IBP, "--model", model), f"{model} cannot be made"
    )


def test_every_unsupported_operator_is_named_with_its_place(here):
    outcome = tightrope("train", "--data", "blobs.npz", *IBP, "--model", "nets:unbounded")
    assert_refused(outcome, "1 (Softmax)", "2 (GELU)", lines=4)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        pytest.param({"x_test": None}, ["lacks x_test"], id="a key missing"),
        pytest.param({"x_train": np.full((600, 4), np.nan)}, ["NaN"], id="NaN"),
        pytest.param({"x_test": np.full((600, 4), np.inf)}, ["inf"], id="infinite"),
        pytest.param({"x_train": np.full((600, 4), 255.0)}, ["[0, 1]", "255"], id="out of range"),
        pytest.param({"y_train": np.full(600, -1)}, ["found -1"], id="negative label"),
        pytest.param({"y_test": np.full(600, 7)}, ["label is 7", "0 to 2"], id="label too large"),
        pytest.param({"y_train": np.full(600, 0.5)}, ["integers"], id="labels no integers"),
        pytest.param({"y_train": np.zeros(599, int)}, ["one label per image"], id="labels too few"),
        pytest.param({"x_test": np.zeros((600, 5))}, ["(4,)", "(5,)"], id="another shape"),
        pytest.param({"x_train": np.array([None] * 600)}, ["plain arrays"], id="objects"),
    ],
)  # fmt: skip
def test_train_refuses_data_it_cannot_use(here, change, said):
    arrays = {key: value for key, value in (blobs(600) | change).items() if value is not None}
    np.savez("bad.npz", **arrays)
    assert_refused(tightrope("train", "--data", "bad.npz", *IBP), "bad.npz", *said)


def test_train_refuses_a_damaged_npz(here):
    content = Path("blobs.npz").read_bytes()
    Path("bad.npz").write_bytes(content[: len(content) // 2])
    assert_refused(tightrope("train", "--data", "bad.npz", *IBP), "bad.npz", "damaged")


def test_missing_data_says_where_it_looked_and_how_to_get_it(here, monkeypatch):
    monkeypatch.setenv("TIGHTROPE_DATA", str(here / "nodata"))
    with mock.patch("pooch.retrieve", side_effect=OSError("no network")):
        outcome = tightrope("train", "--data", "mnist", *IBP)
    assert_refused(outcome, str(here / "nodata"), "TIGHTROPE_DATA", "no network")


def test_a_loss_that_diverges_stops_the_run_and_names_step_and_term(here):
    arguments = ("train", "--data", "blobs.npz", *IBP, "--set", "training.lr=1e30", "--out", "a")
    outcome = tightrope(*arguments)
    assert_refused(outcome, "natural", "at step 1", "a/checkpoint/last.safetensors", code=1)
    weights = load_file("a/checkpoint/last.safetensors").values()
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights)
    assert_refused(tightrope("certify", "a"), "a holds no weights yet", "--resume")


# ------------------------------------------------------------------------- run folders and resuming


def test_a_run_folder_is_not_trained_in_twice(here):
    before = snapshot(here / "run")
    outcome = tightrope("train", "--data", "blobs.npz", *IBP, "--out", "run")
    assert_refused(outcome, "run already holds a run", "--resume", "--out")
    assert snapshot(here / "run") == before


def test_resuming_a_finished_run_changes_nothing(here):
    before = snapshot(here / "run")
    assert tightrope("train", "--resume", "--out", "run").code == 0
    assert snapshot(here / "run") == before


def test_resuming_with_other_settings_names_them(here):
    outcome = tightrope("train", "--resume", "--out", "run", "--set", "training.batch=50")
    assert_refused(outcome, "training.batch: 100 there, 50 now", lines=3)


def test_resuming_with_other_data_is_refused(here):
    np.savez("blobs.npz", **blobs(600, seed=1))
    assert_refused(tightrope("train", "--resume", "--out", "run"), "data identity", lines=3)


def test_weights_without_a_checkpoint_are_not_overwritten(here):
    shutil.rmtree("run/checkpoint")
    before = snapshot(here / "run")
    assert_refused(tightrope("train", "--resume", "--out", "run"), "no checkpoint to resume")
    assert snapshot(here / "run") == before


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("recipe.toml", b"data ="),
        ("recipe.toml", b"\xff\xfe\x00"),
        ("recipe.toml", b""),
        ("checkpoint/last.safetensors", b""),
        ("checkpoint/last.safetensors", b"\xff\xfe\x00"),
        ("metrics.jsonl", b""),
    ],
)
def test_resuming_from_a_damaged_file_names_it(here, name, content):
    Path("run", name).write_bytes(content)
    assert_refused(tightrope("train", "--resume", "--out", "run"), f"run/{name}")


def test_resuming_warns_of_lost_metrics(here):
    outcome = tightrope("train", "--resume", "--out", "run")
    assert "warning" not in outcome.err
    whole = Path("run/metrics.jsonl").read_bytes()
    Path("run/metrics.jsonl").write_bytes(b"".join(whole.splitlines(keepends=True)[5:]))
    outcome = tightrope("train", "--resume", "--out", "run")
    assert outcome.code == 0
    assert "warning: run/metrics.jsonl holds 15 of the 20 epochs that are done: restore it" in outcome.err
    Path("run/metrics.jsonl").unlink()
    assert "holds 0 of the 20 epochs" in tightrope("train", "--resume", "--out", "run").err


def test_an_empty_recipe_is_not_taken_for_a_training_from_python(here):
    Path("run/recipe.toml").write_text("")
    assert_refused(tightrope("train", "--resume", "--out", "run"), "run/recipe.toml is damaged", "restore it")
    Path("run/recipe.toml").write_text('[method]\nname = "standard"\n')
    assert_refused(tightrope("train", "--resume", "--out", "run"), "run was trained from Python")


def test_ctrl_c_keeps_the_run_and_resuming_ends_with_the_same_weights(here, monkeypatch):
    from tightrope.train import loop

    advance, steps = loop.Progress.advance, []

    def stop_at_step_50(progress: Any, count: int = 1) -> None:
        advance(progress, count)
        steps.append(count)
        if len(steps) == 50:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Progress, "advance", stop_at_step_50)
        outcome = tightrope("train", "run/recipe.toml", "--out", "a")
    assert outcome.code == 130
    assert "interrupted" in outcome.err
    assert "--resume" in outcome.err
    assert (len(steps), Path("a/model.safetensors").exists()) == (50, False)

    assert tightrope("train", "--resume", "--out", "a").code == 0
    assert Path("a/model.safetensors").read_bytes() == Path("run/model.safetensors").read_bytes()
    assert len(lines_of(Path("a/metrics.jsonl"))) == 20


@contextlib.contextmanager
def full_disk(after: int) -> Iterator[None]:
    """A disk with room for so many more writes."""
    left, fsync = iter(range(after)), os.fsync

    def full(descriptor: int) -> None:
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with mock.patch("os.fsync", full):
        yield


def test_a_full_disk_stops_a_run_that_can_go_on_later(here):
    with full_disk(after=8):
        outcome = tightrope("train", "run/recipe.toml", "--out", "a")
    assert_refused(outcome, "no space left", "a/metrics.jsonl", code=1)
    assert tightrope("train", "--resume", "--out", "a").code == 0
    assert Path("a/model.safetensors").read_bytes() == Path("run/model.safetensors").read_bytes()


def test_a_full_disk_stops_certify_which_can_go_on_later(here):
    path, how = "run/certify-linear-inf-0.03.jsonl", ("--verifier", "linear")
    with full_disk(after=2):
        assert_refused(tightrope("certify", "run", *how), "no space left", path, code=1)
    assert len(verdicts_of(Path(path))) == 250
    assert tightrope("certify", "run", *how, "--resume", "--json").json()["examples"] == 600


def test_a_folder_that_cannot_be_written_is_named(here):
    denied = PermissionError(errno.EACCES, "Permission denied", "locked/a")
    with mock.patch("os.mkdir", side_effect=denied):
        outcome = tightrope("train", "--data", "blobs.npz", *IBP, "--out", "locked/a")
    assert_refused(outcome, "locked/a", "Permission denied")
    assert_refused(tightrope("train", "--data", "blobs.npz", *IBP, "--out", "nets.py"), "is a file")


CUDA = torch.OutOfMemoryError("CUDA out of memory.")
CPU = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")


@pytest.mark.parametrize("error", [CUDA, CPU, MemoryError()], ids=["cuda", "cpu", "numpy"])
@pytest.mark.parametrize(
    ("command", "does", "said"),
    [
        (["train", "--data", "blobs.npz", *IBP], (cli.train, "run_recipe"), "training.batch"),
        (["certify", "run"], (cli.verify, "certify"), "--verifier"),
        (["attack", "run"], (cli.verify, "certify"), "--jobs"),
        (["radius", "run"], (cli.verify, "radius"), "--batch"),
        (["report", "run"], (cli.report, "_is_search"), "free some memory"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_out_of_memory_says_what_to_lower(here, error, command, does, said):
    with mock.patch.object(*does, side_effect=error):
        outcome = tightrope(*command)
    assert_refused(outcome, "out of memory", said, code=1)
    assert ("training" in outcome.err) == (command[0] == "train")
    assert ("--device cpu" in outcome.err) == (error is CUDA)


# ------------------------------------------------------------------------------- certify and attack


def test_certify_with_json_prints_the_figures_of_the_contract_and_nothing_else(here):
    outcome = tightrope("certify", "run", "--json")
    figures = outcome.json()
    assert tuple(figures) == FIGURES
    assert len(outcome.out.splitlines()) == 1
    counts = [figures[key] for key in ("robust", "falsified", "undecided")]
    assert min(counts[:2]) > 0, "the test needs a network with different verdicts"
    assert sum(counts) == figures["clean_correct"] < figures["examples"] == 600
    assert figures["certified_accuracy"] == figures["robust"] / 600
    assert figures["clean_accuracy"] == figures["clean_correct"] / 600
    assert figures["attacked_accuracy"] == (figures["clean_correct"] - figures["falsified"]) / 600
    assert (figures["eps"], figures["norm"], figures["verifier"]) == (0.03, "inf", "cascade")


def test_certify_takes_fractions_and_the_first_examples(here):
    figures = tightrope("certify", "run", "--eps", "8/255", "--first", 10, "--json").json()
    assert (figures["eps"], figures["examples"]) == (8 / 255, 10)


@pytest.mark.parametrize("norm", ["inf", "2", "1"])
def test_certify_at_eps_0_calls_robust_what_is_correct(here, norm):
    outcome = tightrope("certify", "run", "--eps", 0, "--norm", norm, "--json")
    figures = outcome.json()
    assert figures["robust"] == figures["clean_correct"]
    assert "warning: at eps 0 nothing moves" in outcome.err


def test_certify_without_an_attack_does_not_claim_one(here):
    outcome = tightrope("certify", "run", "--attack-steps", 0, "--json")
    assert outcome.json()["attacked_accuracy"] is None
    assert "not attacked" in outcome.err


def test_certify_warns_of_an_eps_in_other_units(here):
    assert "warning: eps 8 is wider" in tightrope("certify", "run", "--eps", 8, "--first", 5).err


def test_attack_looks_into_the_region_behind_a_layer(here):
    outcome = tightrope("attack", "run", "--latent", "input", "--first", 50, "--attack-steps", 5, "--json")
    found = outcome.json()
    assert found["examples"] == 50
    assert found["latent_robustness"] == found["withstood"] / 50 <= found["clean_correct"] / 50
    record = json.loads((here / "run" / f"latent-input-{found['eps']:.4g}.json").read_text())
    assert record["format"] == "tightrope-latent/1"
    assert record["identity"]["attack"]["steps"] == 5
    assert record["identity"]["attack"]["step"] == 0.01  # what is not said is as in the paper
    assert tightrope("attack", "run", "--latent", "nothing").code == 2
    again = ("attack", "run", "--latent", "input", "--first", 5, "--attack-steps", 1)
    assert tightrope(*again).code == 0
    assert len(list((here / "run").glob("latent-input-*.json"))) == 2
    assert_refused(tightrope(*again, "--out", "run/recipe.toml"), "already exists: choose another --out")


@pytest.mark.parametrize("options", [(), ("--latent", "input")])
def test_an_attack_of_no_steps_is_none(here, options):
    outcome = tightrope("attack", "run", "--attack-steps", 0, *options)
    assert_refused(outcome, "at least one step", "--attack-steps 0")


def test_attack_says_nothing_of_certificates(here):
    outcome = tightrope("attack", "run")
    assert outcome.code == 0
    assert "without a counterexample" in outcome.out
    assert "certified" not in outcome.out
    assert "certify:" not in outcome.err


def test_the_same_question_again_gets_a_new_file_and_the_same_answer(here):
    for _ in range(2):
        assert tightrope("certify", "run", "--first", 100).code == 0
    first, second = (Path(f"run/certify-cascade-inf-0.03{n}.jsonl") for n in ("", "-2"))
    assert verdicts_of(first) == verdicts_of(second)


def test_a_results_folder_is_a_target_and_nothing_is_written_into_it(here):
    Path("results").mkdir()
    for name in ("model.json", "model.safetensors", "recipe.toml"):
        shutil.copy(Path("run", name), "results")
    before = snapshot(here)
    assert tightrope("certify", "results", "--json").json()["examples"] == 600
    assert snapshot(here) == before
    assert tightrope("certify", "results", "--first", 5, "--out", "elsewhere/a.jsonl").code == 0
    assert len(lines_of(Path("elsewhere/a.jsonl"))) == 6


def test_a_factory_with_its_weights_is_a_target(here):
    assert tightrope("train", "--data", "blobs.npz", *IBP, "--model", "nets:good", "--epochs", 1,
                     "--out", "a").code == 0  # fmt: skip
    options = ("--data", "blobs.npz", "--eps", 0.03, "--json")
    outcome = tightrope("certify", "nets:good", "--weights", "a/model.safetensors", *options)
    figures = tightrope("certify", "a", "--json").json()
    assert outcome.json() == figures | {"seconds": outcome.json()["seconds"]}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        pytest.param(["nothere"], ["nothere does not exist", "run folder"], id="no target"),
        pytest.param(["nets.py"], ["nets.py is a file", "run folder"], id="a file"),
        pytest.param(["."], ["model.json"], id="no run folder"),
        pytest.param(["nets:good"], ["--weights"], id="no weights"),
        pytest.param(["nets:good", "--weights", "run/model.safetensors"], ["another network", "0.weight"],
                     id="wrong weights"),
        pytest.param(["nets:good", "--weights", "nothere"], ["nothere is missing"], id="weights missing"),
        pytest.param(["nets:good", "--weights", "run"], ["'run' is a directory"], id="folder as weights"),
        pytest.param(["run", "--data", "digits"], ["(1, 8, 8)"], id="other data"),
        pytest.param(["run", "--data", "mnits"], ["'mnits'", "'mnist'"], id="unknown data"),
        pytest.param(["run", "--verifier", "ipb"], ["'ipb'", "ibp"], id="verifier"),
        pytest.param(["run", "--norm", "3"], ["'3'", "'inf', '2', '1'"], id="norm"),
        pytest.param(["run", "--eps", "-1"], ["not negative", "-1"], id="negative eps"),
        pytest.param(["run", "--eps", "nan"], ["'nan'"], id="eps nan"),
        pytest.param(["run", "--first", "0"], ["'--first'", "x>=1"], id="first"),
        pytest.param(["run", "--attack-step", "0"], ["must be a positive number"], id="attack step"),
        pytest.param(["run", "--device", "tpu"], ["'tpu'"], id="device"),
        pytest.param(["run", "--out", "."], ["'.' is a directory"], id="a folder as file"),
        pytest.param(["run", "--resmue"], ["--resmue", "--resume"], id="option"),
        pytest.param([], ["TARGET", "certify --help"], id="nothing"),
    ],
)  # fmt: skip
def test_certify_refuses_in_one_line(here, arguments, said):
    assert_refused(tightrope("certify", *arguments), *said)


def test_certify_asks_for_what_a_factory_cannot_know(here):
    save_file({}, "none.safetensors")
    Path("empty.py").write_text("from torch import nn\nnets = lambda: nn.Sequential(nn.ReLU())\n")
    outcome = tightrope("certify", "empty:nets", "--weights", "none.safetensors")
    assert_refused(outcome, "on what data (--data) or at which eps (--eps)")
    outcome = tightrope("certify", "empty:nets", "--weights", "none.safetensors", "--eps", 0.1)
    assert_refused(outcome, "does not say on what data (--data)\n")
    options = ("--weights", "none.safetensors", "--data", "blobs.npz", "--eps", "0.1", "--resume")
    assert_refused(tightrope("certify", "empty:nets", *options), "--out FILE")


def cut(content: bytes) -> bytes:
    """The first half, ending within an assignment: TOML that is cut between two lines is still TOML."""
    half = content[: len(content) // 2]
    return half[: half.rfind(b"=")] if b"=" in half else half


@pytest.mark.parametrize("name", ["model.safetensors", "model.json", "recipe.toml"])
@pytest.mark.parametrize("damage", [cut, lambda _: b"\xff\xfe\x00"], ids=["cut", "noise"])
def test_certify_names_a_damaged_file(here, name, damage):
    path = Path("run", name)
    path.write_bytes(damage(path.read_bytes()))
    assert_refused(tightrope("certify", "run"), f"run/{name}")


def test_certify_refuses_weights_with_nan(here):
    tensors = load_file("run/model.safetensors")
    next(iter(tensors.values())).view(-1)[0] = torch.nan
    save_file(tensors, "run/model.safetensors")
    assert_refused(tightrope("certify", "run"), "run/model.safetensors", "NaN")


def test_certify_does_not_overwrite_verdicts(here):
    assert tightrope("certify", "run", "--first", 5, "--out", "a.jsonl").code == 0
    before = Path("a.jsonl").read_bytes()
    assert_refused(tightrope("certify", "run", "--out", "a.jsonl"), "already exists", "--resume", "--out")
    outcome = tightrope("certify", "run", "--eps", 0.1, "--out", "a.jsonl", "--resume")
    assert_refused(outcome, "eps: 0.03 there, 0.1 now", lines=3)
    assert Path("a.jsonl").read_bytes() == before


@pytest.mark.parametrize("damage", ["", "noise\n", "{}\n"])
def test_certify_names_damaged_verdicts(here, damage):
    Path("a.jsonl").write_text(damage)
    assert_refused(tightrope("certify", "run", "--out", "a.jsonl", "--resume"), "a.jsonl, line 1")


def test_ctrl_c_keeps_finished_verdicts_and_resuming_gives_the_same(here, monkeypatch):
    from tightrope.verify import resumable

    def stop(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(resumable.Progress, "advance", stop)
        outcome = tightrope("certify", "run")
    assert outcome.code == 130
    assert "interrupted" in outcome.err
    path = Path("run/certify-cascade-inf-0.03.jsonl")
    assert 0 < len(verdicts_of(path)) < 600
    assert tightrope("certify", "run", "--resume").code == 0
    assert tightrope("certify", "run", "--out", "whole.jsonl").code == 0
    assert agree(path, Path("whole.jsonl"))


@pytest.mark.parametrize("command", ["certify", "attack", "radius"])
def test_ctrl_c_speaks_of_resuming_only_where_something_is_kept(here, monkeypatch, command):
    from tightrope.verify import resumable

    shutil.move("run/checkpoint", "elsewhere")  # a results folder: nothing is written there
    monkeypatch.setattr(resumable.Progress, "advance", mock.Mock(side_effect=KeyboardInterrupt))
    assert tightrope(command, "run") == Outcome(130, "", "\ninterrupted\n")
    outcome = tightrope(command, "run", "--out", "a.jsonl")
    assert outcome == Outcome(130, "", "\ninterrupted: what was done is kept; go on with --resume\n")


@pytest.mark.parametrize("command", [["train", "run/recipe.toml"], ["certify", "run"]])
def test_ctrl_c_before_anything_was_done_does_not_speak_of_resuming(here, command):
    module = getattr(cli, command[0].replace("certify", "verify"))
    with mock.patch.object(module, "load", side_effect=KeyboardInterrupt):
        assert tightrope(*command, "--out", "a") == Outcome(130, "", "\ninterrupted\n")


def test_a_terminated_certify_is_interrupted_as_by_ctrl_c(here):
    path = Path("a.jsonl")
    command = ["certify", "run", "--out", "a.jsonl", "--threads", "1", "--attack-restarts", "12"]
    process = subprocess.Popen([*PROGRAM, *command], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (path.exists() and path.read_bytes().count(b"\n") > 1) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.terminate()
    _, err = process.communicate()
    assert process.returncode == 130
    assert err.splitlines()[-1] == "interrupted: what was done is kept; go on with --resume"


def test_the_solver_says_nothing_on_standard_output(here):
    command = ["certify", "run", "--verifier", "milp", "--attack-steps", "0", "--out", "a.jsonl", "--json"]
    done = subprocess.run([*PROGRAM, *command], capture_output=True, text=True)
    assert len(done.stdout.splitlines()) == 1


def test_a_killed_certify_resumes_to_the_same_verdicts(here):
    path = Path("a.jsonl")
    command = ["certify", "run", "--out", "a.jsonl", "--threads", "1", "--attack-restarts", "12"]
    process = subprocess.Popen([*PROGRAM, *command], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (path.exists() and path.read_bytes().count(b"\n") > 1) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert 0 < len(lines_of(path)) - 1 < 600
    with path.open("a") as file:
        file.write('{"index": 599, "lab')  # what a crash may leave of a line

    assert tightrope(*command, "--resume").code == 0
    assert tightrope(*command[:3], "whole.jsonl", *command[4:]).code == 0
    assert agree(path, Path("whole.jsonl"))


@pytest.mark.parametrize("command", ["certify", "radius"])
def test_several_jobs_find_what_one_does(here, command):
    options = ("--verifier", "crown-ibp")
    assert tightrope(command, "run", *options, "--out", "one.jsonl", "--threads", 1).code == 0
    two = tightrope(command, "run", *options, "--out", "two.jsonl", "--jobs", 2, "--json")
    assert two.json()["examples"] == 600
    assert agree(Path("one.jsonl"), Path("two.jsonl"))
    assert lines_of(Path("one.jsonl"))[0]["identity"] == lines_of(Path("two.jsonl"))[0]["identity"]


def test_jobs_find_a_users_own_network(here):
    options = ("--data", "blobs.npz", "--eps", 0.03, "--jobs", 2, "--out", "two.jsonl")
    save_file(own_weights(), "own.safetensors")
    assert tightrope("certify", "nets:own", "--weights", "own.safetensors", *options).code == 0
    assert len(verdicts_of(Path("two.jsonl"))) == 600


def own_weights() -> dict[str, torch.Tensor]:
    import importlib

    with mock.patch.object(sys, "path", [str(Path.cwd()), *sys.path]):
        return importlib.import_module("nets").own().state_dict()


def test_killed_jobs_lose_nothing_that_was_written_and_resume_to_the_same_verdicts(here):
    path = Path("a.jsonl")
    command = ["certify", "run", "--out", "a.jsonl", "--attack-restarts", "4"]
    process = subprocess.Popen([*PROGRAM, *command, "--jobs", "2"], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (path.exists() and path.read_bytes().count(b"\n") > 1) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    kept = verdicts_of(path)
    assert 0 < len(kept) < 600
    assert tightrope(*command, "--resume", "--jobs", 2).code == 0
    assert verdicts_of(path)[kept[0]["index"]] == kept[0]
    assert tightrope(*command[:3], "whole.jsonl", *command[4:], "--threads", 1).code == 0
    assert agree(path, Path("whole.jsonl"))


def test_a_proof_of_what_an_attack_refuted_has_its_own_exit_status(here, monkeypatch):
    from tightrope.bounds import Bounds, Interval, Problem

    def liar(problem: Problem) -> Bounds:
        honest = Interval()(problem)
        return Bounds(honest.lower + 1e3, honest.upper + 1e3, honest.boxes)

    monkeypatch.setitem(VERIFIERS, "liar", (BoundStage("liar", liar, cheap=True),))
    outcome = tightrope("certify", "run", "--verifier", "liar")
    assert_refused(outcome, "certified by liar and attacked", ".safetensors", code=3)
    (saved,) = Path("run").glob("soundness-violation-*.safetensors")
    assert {"x", "witness"} <= set(load_file(saved))


# ------------------------------------------------------------------------------------------- radius


RADIUS_FIGURES = ("examples", "clean_correct", "mean_radius", "median_radius", "at_largest", "curve",
                  "largest", "tolerance", "norm", "verifier", "seconds")  # fmt: skip


def test_radius_with_json_prints_its_figures_and_nothing_else(here):
    outcome = tightrope("radius", "run", "--json")
    figures = outcome.json()
    assert tuple(figures) == RADIUS_FIGURES
    assert len(outcome.out.splitlines()) == 1
    assert (figures["examples"], figures["largest"], figures["tolerance"]) == (600, 0.06, 0.001)
    assert (figures["norm"], figures["verifier"]) == ("inf", "linear")
    assert 0 < figures["mean_radius"] < 0.06
    assert "radii: run/radius-linear-inf.jsonl" in outcome.err
    assert len(lines_of(Path("run/radius-linear-inf.jsonl"))) == 601


def test_radius_agrees_with_certify_at_the_runs_test_eps(here):
    curve = tightrope("radius", "run", "--verifier", "ibp", "--json").json()["curve"]
    figures = tightrope("certify", "run", "--verifier", "ibp", "--attack-steps", 0, "--json").json()
    assert curve[0] == {"eps": 0.0, "certified_accuracy": figures["clean_accuracy"]}
    assert curve[2] == {"eps": 0.03, "certified_accuracy": figures["certified_accuracy"]}
    assert [point["eps"] for point in curve] == pytest.approx([0, 0.015, 0.03, 0.045, 0.06])


def test_radius_says_in_words_what_it_found(here):
    options = ("--norm", "2", "--eps", "8/255", "--tolerance", "1/255")
    outcome = tightrope("radius", "run", "--first", 20, *options)
    assert "20 examples, radius in l_2 certified by linear: mean 0.0" in outcome.out
    assert "at the largest eps, 0.03137" in outcome.out
    assert "certified accuracy: " in outcome.out


def test_radius_looks_no_further_than_a_pixel_can_move(here):
    recipe = Path("run/recipe.toml")
    recipe.write_text(recipe.read_text().replace("test_eps = 0.03", "test_eps = 0.7"))
    assert tightrope("radius", "run", "--first", 5, "--json").json()["largest"] == 1.0
    assert tightrope("radius", "run", "--first", 5, "--norm", "2", "--json").json()["largest"] == 1.4


def test_radius_resumes_to_the_same_radii(here):
    assert tightrope("radius", "run", "--batch", 200).code == 0
    path = Path("run/radius-linear-inf.jsonl")
    wanted, content = verdicts_of(path), path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert tightrope("radius", "run", "--batch", 200, "--resume").code == 0
    assert verdicts_of(path) == wanted
    assert_refused(tightrope("radius", "run", "--eps", 0.1, "--resume"), "largest: 0.06 there, 0.1", lines=3)
    assert_refused(tightrope("radius", "run", "--out", str(path)), "already exists", "--resume", "--out")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        pytest.param(["nothere"], ["nothere does not exist"], id="no target"),
        pytest.param(["run", "--eps", "0"], ["above 0"], id="eps 0"),
        pytest.param(["run", "--tolerance", "0"], ["tolerance"], id="tolerance 0"),
        pytest.param(["run", "--verifier", "none"], ["'none' proves nothing"], id="no verifier"),
        pytest.param(["run", "--batch", "0"], ["'--batch'", "x>=1"], id="batch"),
        pytest.param(["run", "--attack-steps", "5"], ["--attack-steps"], id="an option of certify"),
    ],
)
def test_radius_refuses_in_one_line(here, arguments, said):
    assert_refused(tightrope("radius", *arguments), *said)


def test_radius_asks_for_what_a_factory_cannot_know(here):
    save_file({}, "none.safetensors")
    Path("empty.py").write_text("from torch import nn\nnets = lambda: nn.Sequential(nn.ReLU())\n")
    assert_refused(tightrope("radius", "empty:nets", "--weights", "none.safetensors"), "(--data) or at which")


# -------------------------------------------------------------------------------- ONNX and VNN-LIB


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory) -> Path:
    """A folder with the run's network in `net.onnx` and properties of it in `properties`."""
    folder = tmp_path_factory.mktemp("exported")
    with contextlib.chdir(trained):
        options = ("--vnnlib", folder / "properties", "--first", 12, "--json")
        outcome = tightrope("export", "run", "--onnx", folder / "net.onnx", *options)
    assert outcome.json() == {"onnx": str(folder / "net.onnx"), "properties": 12}, outcome.err
    return folder


def test_an_exported_network_gets_the_verdicts_of_its_run(here, exported):
    run = ("--first", 100, "--out", "run.jsonl")
    assert tightrope("certify", "run", *run).code == 0
    net = ("--data", "blobs.npz", "--eps", 0.03, "--first", 100, "--out", "net.jsonl")
    assert tightrope("certify", exported / "net.onnx", *net).code == 0
    one, other = (verdicts_of(Path(name)) for name in ("run.jsonl", "net.jsonl"))
    assert [v["status"] for v in one] == [v["status"] for v in other]
    assert {"robust", "falsified"} <= {v["status"] for v in one}


def test_attack_and_radius_take_an_onnx_file(here, exported):
    options = ("--data", "blobs.npz", "--eps", 0.03, "--first", 10, "--json")
    for command in ("attack", "radius"):
        assert tightrope(command, exported / "net.onnx", *options).json()["examples"] == 10


def test_a_property_gets_the_verdict_of_its_example(here, exported):
    assert tightrope("certify", "run", "--first", 12, "--out", "run.jsonl").code == 0
    for verdict in verdicts_of(Path("run.jsonl")):
        path = exported / "properties" / f"{verdict['index']:05d}-eps-0.03.vnnlib"
        outcome = tightrope("certify", exported / "net.onnx", "--vnnlib", path, "--json")
        answers = {"robust": "unsat", "falsified": "sat", "misclassified": "sat", "undecided": "unknown"}
        assert outcome.json()["result"] == answers[verdict["status"]]
        assert (outcome.code, len(outcome.out.splitlines())) == (0, 1)


def test_a_counter_example_is_printed_as_the_competitions_have_it(here, exported):
    Path("p.vnnlib").write_text(
        "".join(f"(declare-const {v} Real)" for v in ("X_0", "X_1", "X_2", "X_3", "Y_0", "Y_1", "Y_2"))
        + "".join(f"(assert (<= X_{i} 1)) (assert (>= X_{i} 0))" for i in range(4))
        + "(assert (or (<= Y_0 Y_1)))"
    )
    outcome = tightrope("certify", exported / "net.onnx", "--vnnlib", "p.vnnlib")
    sat, first, *_, last = outcome.out.splitlines()
    assert (outcome.code, sat) == (0, "sat")
    assert first.startswith("((X_0 ")
    assert last.startswith("(Y_2 ")
    assert last.endswith("))")
    assert tightrope("certify", "run", "--vnnlib", "p.vnnlib", "--json").json()["result"] == "sat"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["certify", "run", "--vnnlib", "p.vnnlib", "--eps", "0.1"], "leave out --eps"),
        (
            ["certify", "run", "--vnnlib", "p.vnnlib", "--first", "1", "--eps", "0"],
            "leave out --eps, --first",
        ),
        (["certify", "run", "--vnnlib", "p.vnnlib", "--jobs", "2"], "leave out --jobs"),
        (["certify", "run", "--vnnlib", "p.vnnlib", "--ray", "auto"], "leave out --ray"),
        (["certify", "run", "--jobs", "2", "--ray", "auto"], "give --jobs or --ray"),
        (["radius", "run", "--ray", "nonsense"], "'nonsense' is no address of a Ray cluster: give HOST:PORT"),
        (["certify", "run", "--vnnlib", "nothing"], "cannot read nothing"),
        (["certify", "nets:good", "--weights", "run/model.safetensors"], "weights of another network"),
        (["certify", "nothing.onnx"], "nothing.onnx is missing"),
        (["export", "run"], "Missing option '--onnx'"),
        (["export", "run", "--onnx", "a.onnx", "--vnnlib", "p", "--data", "digit"], "'digit'"),
    ],
)
def test_onnx_and_vnnlib_refuse_in_one_line(here, arguments, said):
    assert_refused(tightrope(*arguments), said)


def test_a_network_for_other_inputs_than_the_data_is_refused(here, exported):
    options = ("--data", "digits", "--eps", 0.1)
    assert_refused(tightrope("certify", exported / "net.onnx", *options), "(4,)", "(1, 8, 8)")


# --------------------------------------------------------------------------------------- modifiers


def test_a_modifier_is_added_by_name_and_its_options_are_set_like_any(here):
    command = (
        "--data",
        "blobs.npz",
        "--model",
        "2x100",
        "--method",
        "wong-kolter",
        "--eps",
        0.02,
        "--dry-run",
    )
    outcome = tightrope(
        "train", *command, "--with", "tightness-r", "--set", "modifiers.tightness-r.gamma=0.25", "--json"
    )
    assert outcome.code == 0
    assert outcome.json()["recipe"]["modifiers"] == {"tightness-r": {"gamma": 0.25}}


def test_the_run_folder_names_the_modifiers(here):
    command = (
        "--data",
        "blobs.npz",
        "--model",
        "2x100",
        "--method",
        "crown-ibp",
        "--eps",
        0.02,
        "--epochs",
        1,
    )
    assert tightrope("train", *command, "--with", "tightness-d", "--with", "tightness-r").code == 0
    assert Path("runs/blobs-2x100-crown-ibp-tightness-d-tightness-r-0.02/model.safetensors").exists()


def test_a_modifier_that_does_not_apply_or_is_not_known_is_refused(here):
    command = ("train", "--data", "blobs.npz", "--model", "2x100", "--method", "ibp", "--eps", 0.02)
    assert_refused(tightrope(*command, "--with", "tightness-r"), "ibp has none")
    assert_refused(tightrope(*command, "--with", "tightness"), "unknown modifier 'tightness'", "tightness-")


def test_list_knows_the_modifiers(here):
    outcome = tightrope("list", "modifiers")
    assert outcome.code == 0
    assert "tightness-r" in outcome.out


# ----------------------------------------------------------------------------- report and quickstart


def test_report_makes_one_page_of_several_runs(here):
    shutil.copytree("run", "other")
    assert tightrope("certify", "run", "--first", 20).code == 0
    assert tightrope("radius", "run", "--first", 20).code == 0
    outcome = tightrope("report", "run", "other", "--out", "page.html")
    assert outcome.out == "report: page.html\n"
    assert "Certified accuracy against eps" in Path("page.html").read_text()


def test_compare_prints_a_line_per_file_and_says_what_differs(here):
    assert tightrope("certify", "run", "--verifier", "ibp").code == 0
    assert tightrope("certify", "run", "--verifier", "ibp", "--eps", 0.01).code == 0
    outcome = tightrope("compare", "run", "--out", "compare.html")
    header, *lines = outcome.out.splitlines()
    assert header.split()[-4:] == ["clean", "attacked", "certified", "cost"]
    assert [line.split()[:5] for line in lines] == [
        ["run", "ibp", "blobs.npz", eps, "ibp"] for eps in ("0.01", "0.03")
    ]
    assert "The rows differ in eps: compare only rows that agree." in outcome.err
    assert "Clean, attacked and certified" in Path("compare.html").read_text()


def test_compare_names_the_norm_where_it_is_not_l_inf(here):
    for norm in ("inf", "2"):
        assert tightrope("certify", "run", "--verifier", "ibp", "--norm", norm, "--eps", 0.02).code == 0
    outcome = tightrope("compare", "run", "--out", "compare.html")
    assert [line.split("blobs.npz")[1].split("600")[0].split() for line in outcome.out.splitlines()[1:]] == [
        ["0.02", "l_2", "ibp"],
        ["0.02", "ibp"],
    ]
    assert ">ibp, eps 0.02 (l2)<" in Path("compare.html").read_text()  # a label of the picture


def test_compare_as_json(here):
    assert tightrope("compare", "run", "--json").json()["runs"][0]["certified"] is None
    figures = tightrope("certify", "run", "--verifier", "ibp", "--json").json()
    (run,) = tightrope("compare", "run", "--json").json()["runs"]
    assert run["certified"] == figures["certified_accuracy"]
    assert run["source"] == "certify-ibp-inf-0.03.jsonl"
    assert_refused(tightrope("compare", "nothing", "--json"), "no run folder at nothing")


def test_report_names_what_is_no_run(here):
    assert_refused(tightrope("report", "nothere"), "nothere")


def test_quickstart_trains_certifies_and_reports(tmp_path, monkeypatch):
    """The one slow test: a user's first minute."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out = subprocess.check_output([*PROGRAM, "quickstart"], cwd=tmp_path, text=True)
    assert "report: runs/quickstart/report.html" in out
    run = tmp_path / "runs/quickstart"
    statuses = [record["status"] for record in lines_of(run / "certify-cascade-inf-0.1.jsonl")[1:]]
    assert len(statuses) == 360
    assert statuses.count("robust") > 180
    assert (run / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("option", "said"), [(("--eps", -1), "not negative"), (("--data", "digits"), "(1, 8, 8)")]
)
def test_export_writes_nothing_before_it_knows_that_it_can_write_all(here, option, said):
    before = snapshot(here)
    assert_refused(tightrope("export", "run", "--onnx", "a.onnx", "--vnnlib", "p", *option), said)
    assert snapshot(here) == before


def test_properties_of_another_radius_are_not_mixed(here):
    options = ("export", "run", "--onnx", "a.onnx", "--vnnlib", "p", "--first", 2)
    for _ in range(2):
        assert tightrope(*options).code == 0
    assert_refused(tightrope(*options, "--eps", 0.01), "p holds other properties", "choose another folder")
    assert_refused(tightrope(*options[:4], "--eps", 0.01), "give --vnnlib FOLDER")


def test_a_run_in_another_norm_is_certified_in_it(here):
    options = ("--data", "blobs.npz", "--model", "2x100", "--method", "ibp", "--eps", 0.1, "--epochs", 1)
    outcome = tightrope("train", *options, "--norm", "2", "--out", "l2")
    assert outcome.out.endswith("at eps 0.1 in l_2\n")
    assert tightrope("certify", "l2", "--verifier", "ibp", "--json").json()["norm"] == "2"
    assert Path("l2/certify-ibp-2-0.1.jsonl").exists()
    assert tightrope("radius", "l2", "--first", 2, "--json").json()["norm"] == "2"
    assert "is taken for l_inf: say --eps" in tightrope("certify", "l2", "--first", 2, "--norm", "inf").err
    assert_refused(tightrope("export", "l2", "--onnx", "a.onnx", "--vnnlib", "p"), "one in l_2", "give --eps")
    assert tightrope("report", "l2").code == 0
    assert "0.1 (l2)" in Path("l2/report.html").read_text()
    refused = tightrope("train", *options[:5], "colt", *options[6:], "--norm", "2", "--out", "colt")
    assert_refused(refused, "colt trains on latent regions, which are there for l_inf")


def test_a_radius_is_not_taken_for_another_norm_in_silence(here):
    assert "is taken for l_2: say --eps" in tightrope("certify", "run", "--first", 2, "--norm", "2").err
    assert "say --eps" not in tightrope("certify", "run", "--first", 2).err


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--test-eps", 0.9, "is to be certified at 0.9"),
        ("--set", "method.ramp.finish=0.6", "falls at 0.25 of the run, before eps has arrived at 0.6"),
        ("--set", "training.average={begin=0.01}", "training.average begins at 0.01 of the run, before"),
    ],
)
def test_a_dry_run_warns_as_the_run_would(here, option, value, said):
    command = ("train", "--data", "blobs.npz", *IBP, option, value, "--epochs", 1)
    for outcome in (tightrope(*command, "--dry-run"), tightrope(*command)):
        assert outcome.code == 0
        assert outcome.err.count(said) == 1


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("--method", "advibp", "--set", "training.accumulate=2"), "training.accumulate: advibp weighs"),
        (("--method", "colt", "--set", "training.average={begin=0.5}"), "training.average: a mean is taken"),
    ],
    ids=["accumulate", "average"],
)
@pytest.mark.parametrize("plan", [(), ("--dry-run",), ("--budget", "1m")], ids=["run", "dry-run", "budget"])
def test_settings_that_do_not_go_together_are_refused_before_anything_is_done(here, settings, said, plan):
    outcome = tightrope("train", "--data", "blobs.npz", *IBP, *settings, *plan, "--out", "new")
    assert_refused(outcome, said)
    assert outcome.err.startswith("error: ")
    assert not Path("new").exists()


def test_epochs_and_budget_are_two_answers_to_one_question(here):
    outcome = tightrope("train", "--data", "blobs.npz", *IBP, "--epochs", 2, "--budget", "20s")
    assert_refused(outcome, "--epochs or --budget, not both")

"""A search over a recipe's ranges: what it declares, what is stopped, what is kept, and what comes out."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import tomllib
from functools import partialmethod
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from markupsafe import Markup

from tightrope.errors import DataError, InputError, RecipeError, TightropeError
from tightrope.recipes import parse_recipe, read_recipe
from tightrope.train import methods
from tightrope.train.schedules import Course, Ramp, Steps
from tightrope.tune import study
from tightrope.tune import trial as trials_module
from tightrope.tune.ranges import Between, OneOf, read_ranges, size
from tightrope.tune.study import search
from tightrope.tune.trial import CHECKS, Point, Trial, due, front, hopeless, read_trials, settled
from tightrope.tune.workers import Workers

from .test_cli import PROGRAM, assert_refused, blobs, lines_of, tightrope

RECIPE = """
data = "blobs.npz"
model = "2x100"

[method]
name = "ibp"
eps = 0.03
ramp = { begin = 0.1, finish = 0.5 }

[training]
epochs = 4
lr = 0.01

[tune]
"method.eps" = { low = 0.02, high = 0.06 }
"training.batch" = [50, 100]
"""


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """The current folder, with `blobs.npz` and a recipe that declares ranges."""
    monkeypatch.chdir(tmp_path)
    np.savez("blobs.npz", **blobs(300))
    Path("recipe.toml").write_text(RECIPE)
    return tmp_path


@pytest.fixture(autouse=True)
def _quick_plots(request, monkeypatch) -> None:
    """Leave plots empty, unless a test asks for them: drawing takes the time."""
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr(
            "tightrope.report.figures._svg", lambda _figure, _key, _alt: Markup("<svg></svg>")
        )


@pytest.fixture
def drawn() -> None:
    """Ask for real plots."""


def base() -> dict[str, Any]:
    content = tomllib.loads(RECIPE) | {"data": "digits"}
    return tomllib.loads(parse_recipe(content, "a recipe").to_toml())


def trial(number: int, clean: float, certified: float, **changes: Any) -> Trial:
    point = Point(clean=clean, certified=certified)
    return Trial(number=number, values={}, state="finished", point=point, **changes)


# ------------------------------------------------------------------------------------------- ranges


def test_ranges_are_declared_by_the_keys_that_set_takes():
    section = {
        "method.eps": {"low": "8/255", "high": 0.3},
        "method": {"kappa": [0.0, 0.5]},  # as TOML reads a dotted key without quotes
        "training.lr": {"low": 1e-4, "high": 1e-2, "log": True},
        "training.batch": {"low": 32, "high": 64},
        "modifiers.reweight.gamma": {"low": 1, "high": 5},
        "augment.flip": [True, False],
    }
    assert read_ranges(section, base(), "r.toml") == {
        "method.eps": Between(low=8 / 255, high=0.3),
        "method.kappa": OneOf((0.0, 0.5)),
        "training.lr": Between(low=1e-4, high=1e-2, log=True),
        "training.batch": Between(low=32, high=64, whole=True),
        "modifiers.reweight.gamma": Between(low=1, high=5),
        "augment.flip": OneOf((True, False)),
    }


def test_the_ranges_in_the_repository_can_be_searched():
    recipes = list((Path(__file__).parent.parent / "recipes").rglob("tune-*.toml"))
    assert recipes
    for path in recipes:
        content = read_recipe(path)
        plain = tomllib.loads(parse_recipe(content, str(path)).to_toml())
        assert len(read_ranges(content["tune"], plain, str(path))) == len(content["tune"])


def test_a_space_is_as_large_as_the_product_of_its_ranges():
    few, whole = OneOf((0.0, 0.5)), Between(low=3, high=5, whole=True)
    assert size({"a": few, "b": whole}) == 6
    assert list(whole.values()) == [3, 4, 5]
    assert size({"a": few, "b": Between(low=0, high=1)}) == float("inf")


@pytest.mark.parametrize(
    ("section", "said"),
    [
        pytest.param({"method.epss": [0.1]}, ["method.epss", "'eps'"], id="unknown option"),
        pytest.param({"training.bach": [3]}, ["training.bach", "'training.batch'"], id="unknown key"),
        pytest.param({"method.eps.x": [3]}, ["method.eps.x", "eps is a value"], id="through a value"),
        pytest.param({"method.eps": []}, ["method.eps", "list is empty"], id="no choices"),
        pytest.param({"method.eps": {}}, ["method.eps", "low", "required"], id="no ends"),
        pytest.param({"method.eps": {"low": 0.3, "high": 0.1}}, ["low 0.3 is above high 0.1"], id="empty"),
        pytest.param({"method.eps": {"low": 0.1, "hi": 0.3}}, ["high: Field required"], id="misspelt end"),
        pytest.param({"method.eps": {"low": "a", "high": 0.3}}, ["low", "'a'"], id="a word as end"),
        pytest.param({"method.eps": {"low": 0.1, "high": 0.3, "whole": True}}, ["whole"], id="whole"),
        pytest.param({"training.lr": {"low": 0, "high": 1, "log": True}}, ["above 0", "low 0"], id="log 0"),
        pytest.param({"training.lr": {"low": -1, "high": 1}}, ["learning rate", "-1"], id="low out of range"),
        pytest.param({"method.kappa": {"low": 0, "high": 2}}, ["kappa", "2"], id="high out of range"),
        pytest.param({"training.batch": {"low": 1.5, "high": 3}}, ["training.batch", "integer"], id="whole?"),
        pytest.param({"training.optimiser": {"low": 1, "high": 3}}, ["'adam'"], id="a number for a word"),
        pytest.param({"training.batch": ["a"]}, ["training.batch", "'a'"], id="a word for a number"),
        pytest.param({"training.lr": [[1]]}, ["numbers, words or booleans"], id="a list in a list"),
        pytest.param({"training.batch": [50, 50]}, ["listed twice"], id="a choice twice"),
        pytest.param({"method.eps": 0.3}, ["method.eps", "range", "0.3"], id="a value"),
        pytest.param({"test_eps": [0.1, 0.2]}, ["test_eps", "same radius"], id="test eps"),
        pytest.param({"seed": [0, 1]}, ["seed", "held out"], id="seed"),
        pytest.param({"method.name": ["ibp", "pgd"]}, ["one method at a time"], id="method"),
        pytest.param({}, ["nothing to search", "[tune]"], id="nothing"),
        pytest.param(None, ["nothing to search"], id="no section"),
    ],
)  # fmt: skip
def test_ranges_that_will_not_do_are_refused_by_name(section, said):
    with pytest.raises(RecipeError) as error:
        read_ranges(section, base(), "r.toml")
    for fragment in ("r.toml", *said):
        assert fragment in str(error.value)


def test_all_bad_ranges_are_named_at_once():
    with pytest.raises(RecipeError) as error:
        read_ranges({"method.epss": [1], "training.batch": []}, base(), "r.toml")
    assert len(str(error.value).splitlines()) == 3


# ---------------------------------------------------------------------------------------- the front

POINTS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=30)


@hypothesis.given(POINTS)
def test_the_front_is_what_nothing_else_beats(points):
    found = [trial(number, clean / 6, certified / 6) for number, (clean, certified) in enumerate(points)]
    best, reached = [], -1
    for clean, certified in sorted(set(points), reverse=True):  # by falling clean accuracy
        if certified > reached:
            best.append((clean, certified))
            reached = certified
    kept = [points[one.number] for one in front(found)]
    assert sorted(set(kept)) == sorted(best)
    assert len(kept) == sum(points.count(point) for point in best)
    assert kept == sorted(kept, key=lambda point: (point[0], -point[1]))


def test_only_finished_trials_are_on_the_front():
    better = trial(0, 0.9, 0.9).model_copy(update={"state": "pruned"})
    failed = Trial(number=2, values={}, state="failed")
    assert [one.number for one in front([better, trial(1, 0.5, 0.5), failed])] == [1]


# ------------------------------------------------------------------------------------------ pruning


def test_a_trial_is_compared_after_its_ramps_alone_and_never_after_its_last_epoch():
    assert [due(epoch, 10, 0.0) for epoch in range(1, 11)] == [None] * 4 + [*CHECKS, None]
    assert [due(epoch, 10, 0.75) for epoch in range(1, 11)] == [None] * 7 + [0.8, 0.9, None]
    assert [due(epoch, 4, 0.0) for epoch in range(1, 5)] == [
        None,
        0.5,
        0.7,
        None,
    ]  # 3 of 4 epochs pass 0.6 and 0.7
    assert [due(epoch, 1, 0.0) for epoch in (1,)] == [None]
    assert due(9, 10, float("inf")) is None


def test_a_method_is_settled_when_neither_eps_nor_a_weight_moves():
    course = Course(begin=0.1, finish=0.6)
    assert settled(methods.METHODS["ibp"](eps=0.3, ramp=course)) == 0.6
    assert settled(methods.METHODS["pgd"](eps=Ramp(end=0.3, begin=0.0, finish=0.3))) == 0.3
    assert settled(methods.METHODS["pgd"](eps=Steps(start=0.05, factor=2, at=(0.3, 0.7)))) == 0.7
    slow = Ramp(start=1.0, end=0.0, begin=0.0, finish=0.9)
    assert settled(methods.METHODS["crown-ibp"](eps=0.3, beta=slow, ramp=course)) == 0.9
    assert settled(methods.METHODS["pgd"](eps=0.3)) == 0
    assert settled(methods.METHODS["colt"](eps=0.1)) == float("inf")


def test_a_trial_is_hopeless_if_a_finished_one_was_better_by_the_margin_in_both():
    now = Point(clean=0.8, certified=0.5)

    def rival(number: int, clean: float, certified: float, state: str = "finished") -> Trial:
        along = {0.5: Point(clean=clean, certified=certified)}
        return trial(number, 1.0, 1.0, along=along).model_copy(update={"state": state})

    near = [rival(0, 0.84, 0.9), rival(1, 0.9, 0.54), rival(2, 1.0, 1.0, "pruned")]
    assert hopeless(now, 0.5, near, 0.05) is None
    assert hopeless(now, 0.5, [*near, rival(3, 0.85, 0.55)], 0.05) == 3
    assert hopeless(now, 0.6, [rival(3, 0.85, 0.55)], 0.05) is None  # nothing is known of it there


def test_a_hopeless_trial_is_stopped_and_stays_off_the_front(here):
    content = read_recipe(Path("recipe.toml"))
    content["tune"] = {"training.lr": [0.01, 1e-7]}
    found = search(content, "recipe.toml", Path("out"), trials=2)
    good, bad = sorted(found.trials, key=lambda one: -one.values["training.lr"])
    if bad.number < good.number:  # the bad one came first, and had nobody to be compared with
        assert [one.state for one in found.trials] == ["finished", "finished"]
        content["seed"] = 1
        found = search(content, "recipe.toml", Path("again"), trials=2)
        good, bad = sorted(found.trials, key=lambda one: -one.values["training.lr"])
    assert (good.state, bad.state, bad.epochs) == ("finished", "pruned", 2)
    assert f"trial {good.number} was better in both at 50%" in bad.reason
    assert found.front == [good]
    folder = found.folder / "trials" / f"{bad.number:04d}"
    assert not (folder / "model.safetensors").exists()
    assert tightrope("train", "--resume", "--out", folder).code == 0  # it can go on
    assert len(lines_of(folder / "metrics.jsonl")) == 4


def test_the_order_of_ranges_is_one_that_a_stored_recipe_keeps():
    ranges = {"training.batch": {"low": 32, "high": 64}, "method.kappa": [0.0, 0.5]}
    stored = dict(reversed(ranges.items()))  # as tomli_w writes them: lists before tables
    orders = [list(read_ranges(section, base(), "r.toml")) for section in (ranges, stored)]
    assert orders[0] == orders[1]


# ------------------------------------------------------------------------------------------- search


def test_a_search_leaves_run_folders_a_table_a_file_and_a_page(here, drawn):
    outcome = tightrope("tune", "recipe.toml", "--out", "out", "--trials", 4, "--epochs", 2, "--json")
    assert outcome.code == 0, outcome.err
    summary = outcome.json()
    assert summary == json.loads(Path("out/front.json").read_text())
    assert (summary["finished"], summary["pruned"], summary["failed"]) == (4, 0, 0)
    assert (summary["test_eps"], summary["held_out"]) == (0.03, 30)
    assert len(summary["front"]) + len(summary["others"]) == 4
    for line in [*summary["front"], *summary["others"]]:
        last = lines_of(Path("out", line["run"], "metrics.jsonl"))[-1]["held_out"]
        assert (line["clean"], line["certified"]) == (last["clean"], last["certified"])
        assert set(line["values"]) == {"method.eps", "training.batch"}
    assert "trial" in outcome.err
    assert "2 epochs" not in outcome.out
    page = Path("out/report.html").read_text()
    for text in ("Clean against certified", "The front: trials that no other one beats", "<title>trial 0"):
        assert text in page
    assert tightrope("report", "out", "--out", "again.html").code == 0
    assert "The front: trials that no other one beats" in Path("again.html").read_text()
    best = summary["front"][0]["run"]
    assert tightrope("report", "out", f"out/{best}").code == 2
    assert tightrope("certify", f"out/{best}", "--first", 5).code == 0
    assert tightrope("report", f"out/{best}").code == 0


def test_what_a_trial_was_on_the_way_is_told_by_epoch_even_if_metrics_are_lost():
    records = [{"epoch": i, "held_out": {"clean": 0.9, "certified": i / 100}} for i in range(1, 21)]
    standard = methods.standard()
    along = trials_module._along(records, 20, standard)
    assert set(along) == set(CHECKS)
    without_some = trials_module._along(records[12:], 20, standard)
    assert without_some
    assert without_some.items() < along.items()


def test_a_trials_recipe_trains_the_same_network(here):
    assert tightrope("tune", "recipe.toml", "--out", "out", "--trials", 2, "--epochs", 2).code == 0
    for number in ("0000", "0001"):
        folder = Path("out/trials", number)
        assert "tune" not in read_recipe(folder / "recipe.toml")
        assert tightrope("train", folder / "recipe.toml", "--out", number).code == 0
        assert Path(number, "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_train_leaves_the_section_out_and_says_so(here):
    outcome = tightrope("train", "recipe.toml", "--out", "run", "--epochs", 1)
    assert outcome.code == 0
    assert "note: [tune] is left out" in outcome.err
    assert "tune" not in read_recipe(Path("run/recipe.toml"))


def test_a_search_that_was_killed_goes_on_as_if_it_had_not_been(here):
    content = read_recipe(Path("recipe.toml"))
    whole = search(content, "recipe.toml", Path("whole"), trials=4)

    from tightrope.train import loop

    advance, steps = loop.Progress.advance, []

    def killed(progress: Any, count: int = 1) -> None:
        advance(progress, count)
        steps.append(count)
        if len(steps) == 40:
            raise SystemExit("killed")

    with mock.patch.object(loop.Progress, "advance", killed), pytest.raises(SystemExit):
        search(content, "recipe.toml", Path("part"), trials=4)
    done = {path: path.stat().st_mtime_ns for path in Path("part").glob("trials/*/trial.json")}
    assert 0 < len(done) < 4
    with Path("part/study.journal").open("ab") as journal:  # what a power cut leaves of a line
        journal.write(b'{"op_code": 8, "wor')
    part = search(content, "recipe.toml", Path("part"), trials=4, resume=True)
    assert {path: path.stat().st_mtime_ns for path in done} == done  # nothing was done again

    def facts(one: Trial) -> dict[str, Any]:
        return one.model_dump(exclude={"seconds"})

    assert [facts(one) for one in part.trials] == [facts(one) for one in whole.trials]
    for number in range(4):
        name = Path("trials", f"{number:04d}", "model.safetensors")
        if Path("whole", name).exists():
            assert Path("part", name).read_bytes() == Path("whole", name).read_bytes()


def test_a_search_that_was_killed_at_any_write_of_its_journal_goes_on_as_if_it_had_not_been(here):
    from optuna.storages.journal import JournalFileBackend

    content = read_recipe(Path("recipe.toml"))
    content["training"]["epochs"] = 1
    content["tune"]["training.batch"] = [50]
    append, writes = JournalFileBackend.append_logs, []

    def killed(backend: Any, logs: Any, at: int) -> None:
        append(backend, logs)
        writes.append(logs)
        if len(writes) == at:
            raise SystemExit("killed")

    def values(found: Any) -> list[tuple[int, Any]]:
        return [(one.number, one.values) for one in found.trials]

    with mock.patch.object(JournalFileBackend, "append_logs", partialmethod(killed, at=-1)):
        whole = values(search(content, "recipe.toml", Path("whole"), trials=2))
    assert [number for number, _ in whole] == [0, 1]
    for at in range(1, len(writes) + 1):
        writes.clear()
        out = Path(f"killed-at-{at}")
        kill = mock.patch.object(JournalFileBackend, "append_logs", partialmethod(killed, at=at))
        with kill, pytest.raises(SystemExit):
            search(content, "recipe.toml", out, trials=2)
        assert values(search(content, "recipe.toml", out, trials=2, resume=True)) == whole, f"write {at}"


def test_a_trial_that_was_killed_after_the_check_that_stopped_it_is_trained_no_further(here):
    content = read_recipe(Path("recipe.toml"))
    content["tune"] = {"training.lr": [0.01, 1e-7]}
    content["seed"] = next(
        seed
        for seed in range(9)
        if search(content | {"seed": seed}, "recipe.toml", Path(f"seed-{seed}"), trials=2).count("pruned")
    )
    write = trials_module.write_atomically

    def killed(path: Path, text: str) -> None:
        if '"pruned"' in text:
            raise SystemExit("killed")
        write(path, text)

    with mock.patch.object(trials_module, "write_atomically", killed), pytest.raises(SystemExit):
        search(content, "recipe.toml", Path("out"), trials=2)
    found = search(content, "recipe.toml", Path("out"), trials=2, resume=True)
    assert [(one.state, one.epochs) for one in found.trials] == [("finished", 4), ("pruned", 2)]


def test_a_search_can_be_made_longer(here):
    assert tightrope("tune", "recipe.toml", "--out", "out", "--trials", 1, "--epochs", 1).code == 0
    assert tightrope("tune", "--resume", "--out", "out", "--trials", 3, "--json").json()["finished"] == 3


def test_what_there_is_to_try_is_tried_once(here):
    content = read_recipe(Path("recipe.toml"))
    content["training"]["epochs"] = 1
    content["tune"] = {"training.batch": {"low": 50, "high": 51}, "method.kappa": [0.0, 0.5]}
    found = search(content, "recipe.toml", Path("out"), trials=20)
    tried = {tuple(one.values.values()) for one in found.trials}
    assert tried == {(0.0, 50), (0.5, 50), (0.0, 51), (0.5, 51)}  # keys in alphabetical order
    assert len(found.trials) == 4


def test_a_trial_that_diverges_has_failed_and_the_search_goes_on(here):
    content = read_recipe(Path("recipe.toml"))
    content["tune"] = {"training.lr": [1e-3, 1e30]}
    found = search(content, "recipe.toml", Path("out"), trials=2)
    bad = next(one for one in found.trials if one.values["training.lr"] > 1)
    assert bad.state == "failed"
    assert "is nan at step" in bad.reason
    assert [one.values["training.lr"] for one in found.front] == [1e-3]


def interrupted_search(out: str) -> Path:
    """A search that was stopped in its first trial; the run folder of that."""
    from tightrope.train import loop

    with mock.patch.object(loop.Progress, "note", side_effect=SystemExit), pytest.raises(SystemExit):
        tightrope_search(out)
    return Path(out, "trials/0000")


def tightrope_search(out: str, **more: Any) -> Any:
    return search(read_recipe(Path("recipe.toml")), "recipe.toml", Path(out), trials=1, **more)


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoint/last.safetensors"])
def test_a_damaged_file_stops_the_search_and_makes_no_trial_fail(here, name):
    path = interrupted_search("out") / name
    content = path.read_bytes()
    path.write_bytes(b"noise\n")
    outcome = tightrope("tune", "--resume", "--out", "out", "--trials", 1)
    assert_refused(outcome, name, "restore")
    assert read_trials(Path("out")) == []
    path.write_bytes(content)
    assert [one.state for one in tightrope_search("out", resume=True).trials] == ["finished"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("study.journal", b"noise\n"),
        ("study.journal", b"\xff\xfe\n"),
        ("study.journal", b"4\n"),
        ("study.journal", b'{"op_code": 99}\n'),
        ("tune.json", b"{}"),
    ],
)
def test_a_damaged_file_of_the_search_is_named(here, name, content):
    interrupted_search("out")
    Path("out", name).write_bytes(content)
    assert_refused(tightrope("tune", "--resume", "--out", "out", "--trials", 1), name)


def test_a_part_that_is_missing_from_the_search_s_own_file_is_named(here):
    interrupted_search("out")
    path = Path("out/tune.json")
    about = json.loads(path.read_text())
    path.write_text(json.dumps({**about, "identity": 4}))
    assert_refused(tightrope("tune", "--resume", "--out", "out", "--trials", 1), "tune.json: identity")
    del about["ranges"]
    path.write_text(json.dumps(about))
    assert_refused(tightrope("report", "out", "--out", "page.html"), "tune.json: ranges")


def test_a_run_of_something_else_in_a_trial_s_folder_stops_the_search(here):
    shutil.copytree(interrupted_search("other"), "out/trials/0000")
    Path("recipe.toml").write_text(RECIPE.replace("epochs = 4", "epochs = 3"))
    said = "training.epochs: 4 there, 3 now"
    assert_refused(tightrope("tune", "recipe.toml", "--out", "out"), said, lines=3)
    several = tightrope("tune", "recipe.toml", "--out", "out", "--resume", "--jobs", 2, "--trials", 1)
    assert_refused(several, said, code=1)
    assert read_trials(Path("out")) == []


def test_a_file_that_cannot_be_written_stops_the_search_and_makes_no_trial_fail(here):
    fsync = os.fsync

    def limited(descriptor: int) -> None:
        if os.fstat(descriptor).st_size > 20_000:  # a checkpoint
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        fsync(descriptor)

    with mock.patch("os.fsync", limited):
        outcome = tightrope("tune", "recipe.toml", "--out", "out", "--trials", 2)
    assert_refused(outcome, "cannot write out/trials/0000", os.strerror(errno.EFBIG))
    assert read_trials(Path("out")) == []
    assert tightrope("tune", "--resume", "--out", "out", "--trials", 2).code == 0


def test_data_that_are_gone_stop_the_search_and_make_no_trial_fail(here):
    folder = interrupted_search("out")
    task = trials_module.Task(Path("out"), 0, {}, {"data": "gone.npz"})
    with pytest.raises(DataError, match=r"gone\.npz"):
        trials_module.run(task)
    assert not (folder / "trial.json").exists()


def test_a_search_in_which_nothing_is_finished_has_failed(here):
    text = RECIPE.replace('"training.batch" = [50, 100]', '"training.lr" = { low = 1e30, high = 1e35 }')
    Path("bad.toml").write_text(text)
    outcome = tightrope("tune", "bad.toml", "--out", "out", "--trials", 2)
    assert_refused(outcome, "no trial was finished", "trial.json", code=1)
    assert [one.state for one in read_trials(Path("out"))] == ["failed", "failed"]
    assert tightrope("report", "out").code == 0
    page = Path("out/report.html").read_text()
    assert "No trial is finished, so there is no front." in page
    assert page.count("at step") == 2  # why, trial by trial
    assert "The front: trials that no other one beats" not in page


def test_a_search_is_no_run_to_compare(here):
    assert tightrope("tune", "recipe.toml", "--out", "out", "--trials", 1, "--epochs", 1).code == 0
    run = "out/trials/0000"
    both = (run, "out")
    for command in (("compare", "out"), ("compare", *both), ("report", *both), ("report", *both[::-1])):
        assert_refused(tightrope(*command), "out is a search", "report", "out/trials")
    assert tightrope("compare", run).code == 0


def test_a_budget_begins_no_trial_that_would_not_be_done(here, monkeypatch):
    clock = iter(range(0, 10_000, 10))  # every look at it takes ten seconds: before, at and after each trial
    monkeypatch.setattr(study, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    content = read_recipe(Path("recipe.toml"))
    content["training"]["epochs"] = 1
    found = search(content, "recipe.toml", Path("out"), trials=50, budget=100.0)
    assert len(found.trials) == 3  # the third is begun at 70 s, the fourth would be at 100 s


def test_ctrl_c_keeps_what_was_done_and_the_page_of_it(here, monkeypatch):
    from tightrope.train import loop

    advance, steps = loop.Progress.advance, []

    def stop(progress: Any, count: int = 1) -> None:
        advance(progress, count)
        steps.append(count)
        if len(steps) == 40:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Progress, "advance", stop)
        outcome = tightrope("tune", "recipe.toml", "--out", "out", "--trials", 5)
    assert outcome.code == 130
    assert "--resume" in outcome.err
    kept = len(read_trials(Path("out")))
    assert 0 < kept < 5
    assert Path("out/report.html").exists()
    assert tightrope("tune", "--resume", "--out", "out", "--trials", 5).code == 0
    assert len(read_trials(Path("out"))) == 5


def test_ctrl_c_before_a_search_is_begun_keeps_nothing_and_does_not_say_so(here):
    with mock.patch.object(study, "load", side_effect=KeyboardInterrupt):
        outcome = tightrope("tune", "recipe.toml", "--out", "out")
    assert (outcome.code, outcome.err) == (130, "\ninterrupted\n")


def begun(folders: list[Path], asked: threading.Event | None = None) -> bool:
    """Wait until each run has finished an epoch; False if it takes too long, or nobody asks any more."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and not (asked and asked.is_set()):
        if all((one / "metrics.jsonl").exists() for one in folders):
            return True
        time.sleep(0.01)
    return False


def test_several_jobs_share_the_trials_and_ctrl_c_stops_them_all(here):
    folders = [Path("out/trials/0000"), Path("out/trials/0001")]
    over = threading.Event()

    def interrupt() -> None:
        if begun(folders, over):
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    command = ("tune", "recipe.toml", "--out", "out", "--trials", 4, "--jobs", 2, "--epochs", 4000)
    try:
        outcome = tightrope(*command)
    finally:
        over.set()
        thread.join()
    assert outcome.code == 130
    assert "--resume" in outcome.err
    before = [len(lines_of(one / "metrics.jsonl")) for one in folders]
    assert not any((one / "trial.json").exists() for one in folders)
    time.sleep(0.5)
    assert [len(lines_of(one / "metrics.jsonl")) for one in folders] == before  # nobody trains on


def test_workers_of_a_search_that_was_killed_stop_and_their_trials_are_taken_up(here):
    command = ["tune", "recipe.toml", "--out", "out", "--trials", "2", "--epochs", "40"]
    process = subprocess.Popen([*PROGRAM, *command, "--jobs", "2"], stderr=subprocess.DEVNULL)
    folders = [Path("out/trials/0000"), Path("out/trials/0001")]
    assert begun(folders)
    process.kill()
    process.wait()
    assert not Path("out/front.json").exists()
    assert tightrope(*command, "--resume").code == 0
    summary = json.loads(Path("out/front.json").read_text())
    assert summary["finished"] + summary["pruned"] == 2
    for one in folders:
        epochs = [record["epoch"] for record in lines_of(one / "metrics.jsonl")]
        assert epochs == list(range(1, len(epochs) + 1))


@pytest.mark.parametrize(
    ("log", "said"),
    [
        ("", "the process of trial 3 was killed or failed (exit status -9)"),
        ("error: no space left to write x\n", "no space left to write x"),
    ],
)
def test_a_worker_that_ends_without_a_result_stops_the_others_and_says_why(tmp_path, monkeypatch, log, said):
    task = trials_module.Task(tmp_path, 3, {}, {})
    task.folder.mkdir(parents=True)
    (task.folder / "train.log").write_text(log)
    asked: list[str] = []

    def process(status: int | None) -> Any:
        join, terminate = lambda: asked.append("join"), lambda: asked.append("terminate")
        return SimpleNamespace(exitcode=status, join=join, terminate=terminate)

    monkeypatch.setattr("tightrope.tune.workers.wait", lambda _sentinels: [7])

    def search_with_two() -> None:
        with Workers(2) as workers:
            workers._running = {7: (task, process(-9)), 8: (task, process(None))}
            workers.done()

    with pytest.raises(TightropeError, match=re.escape(said)):
        search_with_two()
    assert asked == ["join", "terminate", "join"]


# ------------------------------------------------------------------------------------------ refused


def test_another_search_is_not_resumed(here):
    assert tightrope("tune", "recipe.toml", "--out", "out", "--trials", 1, "--epochs", 1).code == 0
    again = tightrope("tune", "recipe.toml", "--out", "out")
    assert_refused(again, "already holds a search", "--resume")
    other = tightrope("tune", "recipe.toml", "--out", "out", "--resume", "--epochs", 2)
    assert_refused(other, "training.epochs: 1 there, 2 now", lines=3)
    Path("other.toml").write_text(RECIPE.replace("high = 0.06", "high = 0.07"))
    ranges = tightrope("tune", "other.toml", "--out", "out", "--resume", "--epochs", 1)
    assert_refused(ranges, "tune.method.eps", "0.07", lines=3)
    np.savez("blobs.npz", **blobs(300, seed=1))
    assert_refused(tightrope("tune", "--out", "out", "--resume"), "data identity", lines=3)


@pytest.mark.parametrize(
    ("arguments", "said", "lines"),
    [
        (["--out", "out"], ["RECIPE", "--resume --out OUT"], 1),
        (["--resume", "--out", "out"], ["out holds no search to resume"], 1),
        (["recipe.toml", "--resume", "--out", "out"], ["out holds no search to resume"], 1),
        (["plain.toml"], ["plain.toml declares nothing to search"], 1),
        (["bad.toml"], ["[tune] of bad.toml", "method.epss", "'eps'"], 2),
        (["nowhere.toml"], ["there is no recipe nowhere.toml"], 1),
        (["five.toml", "--epochs", "2"], ["training.epochs cannot be set", "not a table"], 1),
        (["recipe.toml", "--prune-margin", "0"], ["--prune-margin", "got 0"], 1),
    ],
)
def test_tune_refuses_before_any_training(here, arguments, said, lines):
    Path("plain.toml").write_text(RECIPE.split("[tune]")[0])
    Path("bad.toml").write_text(RECIPE.replace('"method.eps"', '"method.epss"'))
    Path("five.toml").write_text("training = 5\n")
    assert_refused(tightrope("tune", *arguments), *said, lines=lines)
    assert not list(here.rglob("metrics.jsonl"))
    assert not list(here.rglob("tune.json"))


def test_two_searches_do_not_share_a_folder(here):
    from filelock import FileLock

    Path("out").mkdir()
    with FileLock("out/.lock"):
        assert_refused(tightrope("tune", "recipe.toml", "--out", "out"), "another search is going on in out")


def test_without_optuna_the_error_has_the_command_that_installs_it(here, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert_refused(tightrope("tune", "recipe.toml"), "pip install 'tightrope[tune]'")


@pytest.mark.parametrize("content", ["", "{}", '{"format": "tightrope-trial/1", "number": "x"}'])
def test_a_damaged_trial_is_named(here, content):
    assert tightrope("tune", "recipe.toml", "--out", "out", "--trials", 1, "--epochs", 1).code == 0
    Path("out/trials/0000/trial.json").write_text(content)
    outcome = tightrope("tune", "--resume", "--out", "out", "--trials", 2)
    assert_refused(outcome, "out/trials/0000/trial.json")


def test_a_trial_in_whose_folder_another_process_trains_is_waited_for(here, monkeypatch):
    from filelock import FileLock

    monkeypatch.setattr(trials_module, "PATIENCE", 0.01)
    Path("out/trials/0000").mkdir(parents=True)
    with FileLock("out/trials/0000/.lock"), contextlib.suppress(InputError):
        outcome = tightrope("tune", "recipe.toml", "--out", "out", "--trials", 1)
    assert_refused(outcome, "another process is training in", code=1)
    assert not Path("out/trials/0000/trial.json").exists()

"""The page as a whole: what it needs, what it leaves out, what it refuses."""

import re

import numpy as np
import pytest

from tightrope.errors import InputError
from tightrope.report import write_report

from .conftest import TEN, epoch, verdict, witness, write_lines


def test_the_page_is_self_contained_and_accessible(report, make_run, digits, drawn):
    values = np.full((1, 4, 4), 0.6)
    page = report(
        make_run(verdicts=[verdict(0, "falsified", witness=witness(values)), *TEN[1:]], metrics=True),
        make_run("b"),
    )
    assert "http" not in page.source
    for _, attributes in page.elements:
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/png;base64,"))
    assert not page.all("script")
    assert not page.all("link")
    assert "@import" not in page.source
    assert all(image["alt"] for image in page.all("img"))
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in page.all("svg"))
    assert all("scope" in cell for cell in page.all("th"))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = re.findall(r'(?:url\(|href=")#([^)"]+)', page.source)
    assert set(targets) <= set(ids)


def test_the_same_folders_give_the_same_bytes(tmp_path, make_run, drawn):
    folder = make_run(metrics=True)
    write_report([folder], tmp_path / "1.html")
    write_report([folder], tmp_path / "2.html")
    assert (tmp_path / "1.html").read_bytes() == (tmp_path / "2.html").read_bytes()


def test_what_has_no_data_is_left_out(report, make_run):
    folder = make_run(verdicts=[])
    write_lines(folder / "metrics.jsonl", [{"epoch": 1, "losses": {"natural": 0.5}}])
    page = report(folder)
    assert len(page.all("svg")) == 1
    assert "Losses" in page.words
    assert not {"Margins", "Held-out accuracy", "Schedules", "Layers"} & set(page.words)


def test_each_missing_piece_is_said_in_a_sentence(report, make_run):
    folder = make_run()
    for name in ("recipe.toml", "environment.json"):
        (folder / name).unlink()
    text = report(folder).text
    for name in ("recipe.toml is missing", "environment.json is missing", "metrics.jsonl is missing"):
        assert name in text
    assert "Data digits Test eps 0.3" in text  # from the certify file


def test_a_run_that_is_not_certified_yet_says_how_to(report, make_run):
    folder = make_run()
    (folder / "certify-ibp.jsonl").unlink()
    assert "run `tightrope certify`" in report(folder).text


def test_a_run_that_is_still_in_training_says_so(report, make_run):
    folder = make_run(metrics=True)
    (folder / "certify-ibp.jsonl").unlink()
    (folder / "checkpoint").mkdir()
    text = report(folder).text
    assert "Training is unfinished (3 epochs so far): go on with `tightrope train --resume --out" in text
    assert "tightrope certify" not in text
    (folder / "model.safetensors").touch()
    assert "unfinished" not in report(folder).text


def test_folders_of_the_same_name_are_told_apart(report, make_run, tmp_path):
    text = report(make_run("x/run"), make_run("y/run")).text
    assert str(tmp_path / "runs" / "x" / "run") in text


def test_what_stands_in_the_files_cannot_become_markup(report, make_run, drawn):
    folder = make_run(verifier="<script>alert(1)</script>")
    write_lines(folder / "metrics.jsonl", [epoch(1, losses={"<script>": 1.0, r"$\frac$": 2.0})])
    page = report(folder)
    assert not page.all("script")
    assert "verifier <script>alert(1)</script>" in page.text


class TestErrors:
    """Folders and files that cannot be used."""

    def test_no_folder(self, tmp_path):
        with pytest.raises(InputError, match="no run folder was given"):
            write_report([], tmp_path / "report.html")

    def test_a_folder_that_does_not_exist(self, tmp_path):
        with pytest.raises(InputError, match=r"no run folder at .*missing"):
            write_report([tmp_path / "missing"], tmp_path / "report.html")

    def test_a_folder_that_is_no_run(self, tmp_path):
        with pytest.raises(InputError, match="is not a run folder"):
            write_report([tmp_path], tmp_path / "report.html")

    def test_a_folder_given_twice(self, make_run, tmp_path):
        folder = make_run()
        with pytest.raises(InputError, match="given twice"):
            write_report([folder, folder], tmp_path / "report.html")

    @pytest.mark.parametrize("name", ["model = 1", 'method = "ibp"', "[method]\neps = 0.1", "test_eps = 'a'"])
    def test_a_recipe_that_is_none(self, make_run, tmp_path, name):
        folder = make_run()
        (folder / "recipe.toml").write_text(name)
        with pytest.raises(InputError, match=r"recipe\.toml: .*restore the file"):
            write_report([folder], tmp_path / "report.html")

    @pytest.mark.parametrize(
        "name", ["recipe.toml", "environment.json", "metrics.jsonl", "certify-ibp.jsonl"]
    )
    def test_a_broken_file_is_named_and_the_old_report_stays(self, make_run, tmp_path, name):
        folder, out = make_run(), tmp_path / "report.html"
        out.write_text("old")
        (folder / name).write_text("{broken\n")
        with pytest.raises(InputError, match=re.escape(name)):
            write_report([folder], out)
        assert out.read_text() == "old"

    def test_a_report_that_cannot_be_written(self, make_run, tmp_path):
        with pytest.raises(InputError, match="cannot write "):
            write_report([make_run()], tmp_path)

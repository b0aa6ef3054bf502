"""Runs side by side."""

from __future__ import annotations

import json
from html import unescape
from pathlib import Path

import pytest

from tightrope.errors import InputError
from tightrope.report import compare, differences

from .conftest import TEN, header, write_lines

RESULT = {
    "ours": {
        "verified_error": {"mean": 11.03, "deviation": 0.59},
        "clean_error": {"mean": 3.2, "deviation": 0.07},
        "examples": 10,
        "verifier": "ibp",
    },
    "seeds": [0, 1, 2],
    "cost_in_plain_epochs": 329,
}


@pytest.fixture
def recorded(tmp_path) -> Path:
    """A results folder without verdicts."""
    folder = tmp_path / "results" / "recorded"
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(RESULT))
    (folder / "recipe.toml").write_text(
        'data = "digits"\ntest_eps = 0.3\nmethod = { name = "ibp", eps = 0.4 }\n'
    )
    return folder


def test_a_run_has_a_line_for_each_of_its_files(make_run):
    folder = make_run("a")
    write_lines(folder / "certify-crown.jsonl", [header(verifier="crown"), *TEN[:5]])
    crown, ibp = compare([folder])
    assert (crown.facts["verifier"], crown.facts["examples"], crown.facts["certified"]) == ("crown", 5, 1.0)
    assert ibp.facts == {
        "run": "a",
        "method": "ibp",
        "data": "digits",
        "cost_in_plain_epochs": None,
        "eps": 0.3,
        "norm": "inf",
        "verifier": "ibp",
        "examples": 10,
        "clean": 0.9,
        "attacked": 0.7,
        "certified": 0.6,
        "source": "certify-ibp.jsonl",
    }


def test_an_attack_alone_certifies_nothing(make_run):
    (row,) = compare([make_run("a", verifier="none")])
    assert (row.facts["attacked"], row.facts["certified"]) == (0.7, None)
    assert row.headlines[2].detail == "no verifier was run"


def test_a_results_folder_has_a_line_for_what_it_records(recorded):
    (row,) = compare([recorded])
    assert row.facts["certified"] == pytest.approx(0.8897)
    assert row.facts["clean"] == pytest.approx(0.968)
    assert row.facts["attacked"] is None
    assert (row.facts["source"], row.cost) == ("result.json", "329")
    assert [line.value for line in row.headlines] == ["96.80 %", "n/a", "88.97 %"]
    assert row.headlines[2].detail == "± 0.59, 3 seeds"


def test_a_run_that_was_not_certified_has_a_line_too(make_run):
    folder = make_run("a")
    (folder / "certify-ibp.jsonl").unlink()
    (row,) = compare([folder])
    assert (row.setting, row.facts["certified"]) == ("", None)


def test_what_measures_something_else_is_pointed_out(make_run, recorded):
    assert differences(compare([make_run("a"), make_run("b"), recorded])) == ""
    other = make_run("c", verdicts=TEN[:5], eps=0.1)
    assert differences(compare([make_run("d"), other])) == (
        "The rows differ in eps and examples: compare only rows that agree."
    )


def test_the_page_has_the_table_and_the_picture_and_no_more(make_run, recorded, tmp_path, drawn):
    compare([make_run("a", metrics=True), recorded], tmp_path / "compare.html")
    page = unescape((tmp_path / "compare.html").read_text())
    for text in (
        "2 runs side by side.",
        "88.97 %",
        "± 0.59, 3 seeds",
        "60.0 %",
        "329",
        "Clean, attacked and",
    ):
        assert text in page
    assert "a: clean accuracy 90.0 %, attacked accuracy 70.0 %, certified accuracy 60.0 %; recorded:" in page
    for text in ("The full recipe", 'href="#run', "http"):
        assert text not in page.replace("http://www.w3.org", "").replace("https://www.w3.org", "")


def test_no_run_at_all_is_refused():
    with pytest.raises(InputError, match="no run folder was given"):
        compare([])

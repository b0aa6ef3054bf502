"""What the page says of a run besides its verdicts."""

import json

import pytest

from .conftest import TEN, header, write_lines


def test_the_header_says_what_was_trained_and_how(report, make_run):
    text = report(make_run(metrics=True)).text
    for words in ("digits", "dm-small", "Method ibp", "Training eps 0.4", "Test eps 0.3", "Seed 0"):
        assert words in text
    for words in (
        "abc1234",
        "the lab's machine",
        "2026-11-20 12:00 UTC",
        "tightrope train r.toml",
        "340,000",
    ):
        assert words in text
    assert "Training time 90 s" in text


def test_a_run_from_python_has_no_names_for_data_and_model(report, make_run):
    folder = make_run()
    (folder / "recipe.toml").write_text('[method]\nname = "standard"\n')
    write_lines(folder / "certify-ibp.jsonl", [header() | {"data": None}, *TEN])
    text = report(folder).text
    assert "10 test examples of unnamed data" in text
    assert "Method standard" in text
    assert "Training eps" not in text


@pytest.mark.parametrize("eps", ['"8/255"', '{ shape = "linear", end = "8/255", finish = 0.5 }'])
def test_the_training_eps_is_where_its_schedule_ends(report, make_run, eps):
    folder = make_run()
    recipe = (folder / "recipe.toml").read_text()
    (folder / "recipe.toml").write_text(recipe.replace("eps = 0.4", f"eps = {eps}"))
    assert "Training eps 8/255" in report(folder).text


def test_a_results_folder_shows_its_recorded_figures(report, tmp_path):
    folder = tmp_path / "mnist-dm-small-ibp-0.3"
    folder.mkdir()
    result = {"paper": {"source": "a paper", "certified": 0.9}, "ours": {"seeds": [0, 1]}, "commit": "f" * 40}
    (folder / "result.json").write_text(json.dumps(result))
    text = report(folder).text
    assert "paper · source a paper" in text
    assert "ours · seeds 0, 1" in text
    assert "Commit ffffffffffff " in text

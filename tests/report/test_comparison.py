"""Runs side by side."""

from __future__ import annotations

import json
from html import unescape
from pathlib import Path

import pytest

from tightrope.errors import InputError
from tightrope.report import compare, differences
from tightrope.verify.stages import LARGEST

from .conftest import TEN, header, verdict, write_lines

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


def test_a_certification_that_was_stopped_is_pointed_out(make_run, report):
    run = make_run("a")
    (path,) = run.glob("certify-*.jsonl")
    first, *rest = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps({**json.loads(first), "examples": 12}), *rest, ""]))
    said = f"{path.name} is unfinished: it holds 10 of 12 examples"
    assert said in differences(compare([run]))
    assert said in report(run).text


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


def test_several_runs_are_compared_first(report, make_run):
    page = report(
        make_run("first", metrics=True), make_run("second", metrics=True, attack=None, verifier="crown")
    )
    text = page.text
    comparison = text[: text.index("Held-out accuracy")]
    assert "first digits · dm-small · ibp · trained at eps 0.4" in comparison
    assert "verifier crown, eps 0.3 (l∞), 10 test examples of digits 90.0 % 9 of 10 n/a" in comparison
    assert "The rows differ" not in text
    labels = [svg["aria-label"] for svg in page.all("svg")]
    assert "Held-out accuracies by epoch of 2 runs: first, second." in labels


def test_a_comparison_of_unlike_rows_warns(report, make_run):
    text = report(make_run("a"), make_run("b", eps=0.1, verdicts=TEN[:5])).text
    assert "The rows differ in eps and examples: compare only rows that agree." in text


def test_a_comparison_keeps_a_run_without_certificates(report, make_run):
    folder = make_run("b")
    (folder / "certify-ibp.jsonl").unlink()
    assert "not certified yet" in report(make_run("a"), folder).text


class TestMarginsCompared:
    """Histograms of the margins of several runs laid over each other."""

    @staticmethod
    def verdicts(*margins):
        return [
            verdict(index, "robust" if margin > 0 else "undecided", margin=margin)
            for index, margin in enumerate(margins)
        ]

    @pytest.fixture
    def compared(self, report):
        """What the plots of the comparison say in words."""

        def compared(*runs):
            labels = [svg["aria-label"] for svg in report(*runs).all("svg")]
            return [label for label in labels if label.startswith("Histograms of the margins of")]

        return compared

    def test_runs_that_answer_the_same_question_have_a_line_each(self, report, make_run, drawn):
        page = report(
            make_run("a", verdicts=self.verdicts(-1, 1, 3)), make_run("b", verdicts=self.verdicts(2, 4, 6))
        )
        labels = [svg["aria-label"] for svg in page.all("svg")]
        assert labels[0].startswith("a: clean accuracy 100.0 %, attacked accuracy 100.0 %, certified ")
        assert labels[1] == "Histograms of the margins of a (median 1), b (median 4)."
        assert "Margins compared" in page.words
        assert "Share of examples" in page.words
        assert "Verifier ibp, eps 0.3 (l∞), digits." in page.text
        assert "The lines differ" not in page.text

    @pytest.mark.parametrize(
        "other", [{"eps": 0.1}, {"norm": "2"}, {"verifier": "crown"}, {"data": "2" * 64}]
    )
    def test_files_on_different_questions_are_not_compared(self, compared, make_run, other):
        assert compared(make_run("a"), make_run("b", **other)) == []

    def test_there_is_a_plot_for_every_question_of_two_runs(self, compared, make_run):
        folders = [make_run(name) for name in "abc"]
        for folder in folders[1:]:
            write_lines(folder / "certify-crown.jsonl", [header(verifier="crown"), *TEN])
        of_ibp, of_crown = sorted(compared(*folders), key=len, reverse=True)
        assert all(f"{name} (median" in of_ibp for name in "abc")
        assert "a (median" not in of_crown

    def test_two_files_of_one_run_are_no_comparison(self, compared, make_run):
        folder, other = make_run("a"), make_run("b", eps=0.1)
        write_lines(folder / "certify-ibp-2.jsonl", [header(), *TEN])
        assert compared(folder, other) == []

    def test_two_files_of_one_run_are_told_apart(self, compared, make_run):
        folder = make_run("a")
        write_lines(folder / "certify-ibp-2.jsonl", [header(), *TEN])
        (words,) = compared(folder, make_run("b"))
        for name in ("a (certify-ibp.jsonl)", "a (certify-ibp-2.jsonl)", "b (median"):
            assert name in words

    def test_other_examples_or_attacks_are_warned_of(self, report, make_run):
        text = report(make_run("a"), make_run("b", attack=None, verdicts=TEN[:5])).text
        assert "The lines differ in examples and attack: compare only lines that agree." in text

    def test_examples_beyond_the_ends_are_counted(self, report, make_run, drawn):
        near = self.verdicts(*[1.0] * 300)
        far = self.verdicts(*[1.0] * 300, -1e6, LARGEST)
        text = report(make_run("a", verdicts=near), make_run("b", verdicts=far)).text
        assert "2 examples beyond the ends" in text[: text.index("Result with verifier")]

    def test_margins_of_zero_and_of_infinity_do_not_stop_it(self, report, make_run, drawn):
        runs = make_run("a", verdicts=self.verdicts(0.0)), make_run("b", verdicts=self.verdicts(-LARGEST))
        assert "Margins compared" in report(*runs).words


class TestSensitivity:
    def runs(self, make_run, lams, **changes):
        for lam in lams:
            folder = make_run(f"lam{lam}", **changes)
            text = (folder / "recipe.toml").read_text().replace("kappa = 0.5", f"lam = {lam}")
            (folder / "recipe.toml").write_text(text)
            yield folder

    def test_runs_that_differ_in_one_number_are_plotted_against_it(self, report, make_run):
        page = report(*self.runs(make_run, (2, 4, 6)))
        assert "Sensitivity to method.lam" in page.text
        assert any(
            "method.lam 2: clean 90.0%, certified 60.0%" in svg["aria-label"] for svg in page.all("svg")
        )

    @pytest.mark.parametrize("lams", [(2, 4), (2, 2, 2), (2, 4, '"many"')])
    def test_others_are_not(self, report, make_run, lams):
        folders = []
        for place, lam in enumerate(lams):
            folder = make_run(f"run{place}")
            text = (folder / "recipe.toml").read_text().replace("kappa = 0.5", f"lam = {lam}")
            (folder / "recipe.toml").write_text(text)
            folders.append(folder)
        assert "Sensitivity" not in report(*folders).text

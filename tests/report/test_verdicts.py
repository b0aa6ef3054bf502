"""Accuracies, verdicts by stage, and margins of a certify file."""

import pytest

from tightrope.report.verdicts import clopper_pearson

from .conftest import verdict


def test_the_headline_gives_shares_counts_and_intervals(report, make_run):
    text = report(make_run()).text
    assert "Clean accuracy 90.0 % 9 of 10 95 % interval 55.5 to 99.7 %" in text
    assert "Attacked accuracy 70.0 % 7 of 10" in text
    assert "Certified accuracy 60.0 % 6 of 10 95 % interval 26.2 to 87.8 %" in text
    assert "Verifier ibp, eps 0.3 (l∞), 10 test examples of digits; attack: pgd, steps 40" in text
    assert "lies between 60.0 % and 70.0 %: for 1 example neither" in text


def test_without_an_attack_the_page_says_so(report, make_run):
    assert "Attacked accuracy n/a no attack was run" in report(make_run(attack=None)).text


def test_a_single_example_of_many_is_not_rounded_away(report, make_run):
    verdicts = [verdict(index, "robust") for index in range(1999)] + [verdict(1999, "undecided")]
    assert "Certified accuracy 99.95 % 1,999 of 2,000" in report(make_run(verdicts=verdicts)).text


def test_the_verdict_table_counts_and_times_each_stage(report, make_run):
    verdicts = [
        verdict(0, "robust", seconds=0.001),
        verdict(1, "robust", seconds=0.003),
        verdict(2, "robust", stage="milp", seconds=300),
        verdict(3, "misclassified", seconds=0.0),
    ]
    text = report(make_run(verdicts=verdicts)).text
    assert "robust ibp 2 50.0 % 4 ms 2 ms" in text
    assert "robust milp 1 25.0 % 5 min 00 s 5 min 00 s" in text
    assert "misclassified clean 1 25.0 % 0 ms 0 ms" in text
    assert "all 4 100.0 % 5 min 00 s 2 ms" in text


def test_equal_margins_of_zero_still_make_a_histogram(report, make_run, drawn):
    assert "Margins" in report(make_run(verdicts=[verdict(0, "undecided", margin=0.0)])).words


def test_examples_beyond_the_histogram_are_counted(report, make_run):
    verdicts = [verdict(index, "robust") for index in range(300)] + [verdict(300, "undecided", margin=-1e6)]
    assert "1 example beyond the ends" in report(make_run(verdicts=verdicts)).text


def test_a_certify_file_without_verdicts_is_left_out(report, make_run):
    page = report(make_run(verdicts=[]))
    assert "certify-ibp.jsonl holds no verdict yet" in page.text
    assert "Certified accuracy" not in page.words


@pytest.mark.parametrize(
    ("successes", "trials", "interval"),
    [(0, 10, (0.0, 0.30850)), (10, 10, (0.69150, 1.0)), (5, 10, (0.18709, 0.81291))],
)
def test_the_interval_is_clopper_and_pearsons(successes, trials, interval):
    assert clopper_pearson(successes, trials) == pytest.approx(interval, abs=1e-5)

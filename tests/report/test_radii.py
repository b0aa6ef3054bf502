"""Plots and tables of certified radii."""

import pytest

from tightrope.errors import InputError
from tightrope.report import figures
from tightrope.verify import read_radii

from .conftest import write_radii


class TestRadii:
    """Certified accuracy against eps."""

    def test_the_curve_goes_from_the_clean_accuracy_down_the_sorted_radii(self, tmp_path):
        path = write_radii(tmp_path, [0.3, None, 0.1, 0.0, 0.3])
        eps, shares = figures._steps(read_radii(path))
        assert eps == [0.0, 0.1, 0.3, 0.6]
        assert shares == [0.8, 0.6, 0.4, 0.0]

    def test_a_curve_ends_above_0_where_the_largest_eps_was_certified(self, tmp_path):
        path = write_radii(tmp_path, [0.6, 0.3])
        assert figures._steps(read_radii(path)) == ([0.0, 0.3, 0.6], [1.0, 1.0, 0.5])

    def test_it_stands_on_the_page_with_mean_and_median(self, report, make_run, drawn):
        folder = make_run()
        write_radii(folder, [0.6, 0.3, None, 0.1])
        page = report(folder)
        assert "Certified accuracy against eps" in page.words
        assert "ibp l∞, 4 test examples of digits, to within 0.001" in page.text
        assert "0.2500 0.2000 1 at 0.6 2 s" in page.text
        (alt,) = [svg["aria-label"] for svg in page.all("svg") if "against eps" in svg["aria-label"]]
        assert "ibp, mean radius 0.2500 (l∞, 4 test examples" in alt

    def test_verifiers_have_a_line_each_and_norms_a_panel_each(self, report, make_run, drawn):
        folder = make_run()
        for changes in ({}, {"verifier": "crown"}, {"norm": "2"}, {"suffix": "-2"}):
            write_radii(folder, [0.3], **changes)
        page = report(folder)
        for words in ("Certified accuracy in l∞", "Certified accuracy in l2", "crown"):
            assert words in page.source
        for name in ("ibp (radius-ibp-inf.jsonl)", "ibp (radius-ibp-inf-2.jsonl)"):
            assert name in page.text
        assert page.text.rindex("l2, 1 test example") > page.text.rindex("l∞, 1 test example")

    def test_runs_are_laid_over_each_other(self, report, make_run):
        folders = [make_run(name) for name in ("a", "b")]
        for folder in folders:
            write_radii(folder, [0.3, 0.1])
        page = report(*folders)
        labels = [svg["aria-label"] for svg in page.all("svg") if "against eps" in svg["aria-label"]]
        assert len(labels) == 3
        assert "a, ibp, mean radius 0.2000" in labels[0]
        assert "b, ibp, mean radius 0.2000" in labels[0]
        assert "The rows differ" not in page.text

    def test_lines_of_other_examples_are_warned_of(self, report, make_run):
        folder = make_run()
        write_radii(folder, [0.3, 0.1])
        write_radii(folder, [0.3], verifier="crown")
        assert "The rows differ in examples: compare only rows that agree." in report(folder).text

    def test_a_folder_with_nothing_else_is_a_run(self, report, tmp_path):
        write_radii(tmp_path, [0.3])
        assert "Data digits" in report(tmp_path).text

    def test_a_file_without_radii_is_left_out(self, report, make_run):
        folder = make_run()
        write_radii(folder, [])
        page = report(folder)
        assert "radius-ibp-inf.jsonl holds no radius yet" in page.text
        assert "Certified accuracy against eps" not in page.words

    def test_a_broken_file_is_named(self, report, make_run):
        folder = make_run()
        write_radii(folder, [0.3], norm="3")
        with pytest.raises(InputError, match=r"radius-ibp-3\.jsonl, line 1: identity\.norm"):
            report(folder)

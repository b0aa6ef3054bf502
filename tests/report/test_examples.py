"""Pictures of successful attacks."""

import numpy as np
import pytest

from tightrope.errors import DataError, InputError

from .conftest import header, verdict, witness, write_lines


class TestExamples:
    """Pictures of successful attacks."""

    @staticmethod
    def falsified(count, change=0.3, shape=(1, 4, 4)):
        values = witness(np.full(shape, 0.5 + change), predicted=3)
        return [verdict(index, "falsified", witness=values) for index in range(count)]

    def test_at_most_eight_are_drawn_in_three_pictures_each(self, report, make_run, digits):
        page = report(make_run(verdicts=self.falsified(10)))
        assert len(page.all("img")) == 24
        assert "8 of 10 inputs" in page.text
        assert page.text.count(" 7 → 3 ") == 8
        assert "1.67" in page.text
        assert "largest change of a pixel 0.3" in page.text

    def test_the_same_example_in_two_files_is_drawn_once(self, report, make_run, digits):
        folder = make_run(verdicts=self.falsified(2))
        write_lines(folder / "certify-crown.jsonl", [header(verifier="crown"), *self.falsified(2)])
        assert len(report(folder).all("img")) == 6

    def test_classes_are_called_by_their_names(self, report, make_run, digits):
        digits.class_names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse")
        assert "7 (horse) → 3 (cat)" in report(make_run(verdicts=self.falsified(1))).text

    def test_colour_images_are_drawn(self, report, make_run, digits):
        digits.test.shape = (3, 4, 4)
        page = report(make_run(verdicts=self.falsified(1, shape=(3, 4, 4))))
        assert len(page.all("img")) == 3
        assert "mid-grey is no change" in page.text

    @pytest.mark.parametrize(
        ("verdicts", "why"),
        [
            ([verdict(10, "falsified", witness=witness(np.zeros((1, 4, 4))))], "it has no test example 10"),
            ([verdict(0, "falsified", label=1, witness=witness(np.zeros((1, 4, 4))))], "has another label"),
            (
                [verdict(0, "falsified", witness=witness(np.zeros(3)))],
                "has shape (1, 4, 4), its witness (3,)",
            ),
            ([verdict(0, "falsified", witness=witness(np.zeros((1, 4, 4))))], "0.5 away, more than eps"),
        ],
    )
    def test_another_data_set_than_the_certified_one_is_not_drawn(
        self, report, make_run, digits, verdicts, why
    ):
        page = report(make_run(verdicts=verdicts))
        assert "Inputs with a counterexample: 1. The data set “digits” at hand is not the one" in page.text
        assert why in page.text
        assert not page.all("img")

    def test_the_distance_is_measured_in_the_norm_of_the_file(self, report, make_run, digits):
        page = report(make_run(verdicts=self.falsified(1, change=0.1), norm="2", eps=0.3))
        assert "0.4 away, more than eps" in page.text

    def test_inputs_that_are_not_images_are_not_drawn(self, report, make_run, digits):
        digits.test.shape = (2,)
        page = report(make_run(verdicts=self.falsified(1, shape=(2,))))
        assert "Inputs of shape (2,) are not images" in page.text

    def test_data_that_is_not_at_hand_is_said_and_not_downloaded(self, report, make_run, monkeypatch):
        def load(name, download):
            assert not download
            raise DataError("mnist is missing")

        monkeypatch.setattr("tightrope.report.examples.load_data", load)
        text = report(make_run(verdicts=self.falsified(1))).text
        assert "The data set “digits” is not at hand, so they are not drawn (mnist is missing)." in text

    def test_a_broken_witness_is_an_error_that_names_the_file(self, report, make_run, digits):
        broken = {"shape": [1, 4, 4], "float64": "AAAA", "predicted": 3}
        with pytest.raises(InputError, match=r"certify-ibp\.jsonl, line 2: a witness of shape"):
            report(make_run(verdicts=[verdict(0, "falsified", witness=broken)]))

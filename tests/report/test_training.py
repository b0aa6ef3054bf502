"""Plots of a run's metrics."""

import json
import math

import pytest

from tightrope.errors import InputError
from tightrope.report import figures
from tightrope.report.read import read_run
from tightrope.verify.stages import LARGEST

from .conftest import epoch, header, verdict, write_lines


def test_there_is_a_plot_for_everything_the_metrics_hold(report, make_run, drawn):
    page = report(make_run(metrics=True))
    titles = {"Margins", "Held-out accuracy", "Losses", "Schedules", "Layers"}
    assert titles <= set(page.words)
    assert len(page.all("svg")) == len(titles)
    assert "After epoch 3: clean 97.0 %, certified 50.0 % at eps 0.3, on 100 examples." in page.text


def test_values_that_are_not_finite_do_not_stop_the_plots(report, make_run, drawn):
    folder = make_run(
        verdicts=[verdict(0, "robust", margin=LARGEST), verdict(1, "undecided", margin=-LARGEST)]
    )
    write_lines(
        folder / "metrics.jsonl", [epoch(1), epoch(2, losses={"natural": math.nan, "robust": math.inf})]
    )
    page = report(folder)
    assert "Losses" in page.words
    assert "2 examples beyond the ends" in page.text


class TestNotes:
    """What only some methods and modifiers write down."""

    BISECTOR = "How the two gradients are combined"
    NOTED = {"agree": 0.5, "adversarial first": 0.2, "robust first": 0.3, "cosine": 0.1, "fosc": 0.02} | {
        "adversarial weight": 0.4,
        "robust weight": 5.0,
    }

    @pytest.fixture
    def noted(self, make_run):
        """A run that noted this in its epochs, one argument each."""

        def noted(*notes):
            folder = make_run()
            epochs = [epoch(number, notes=found) for number, found in enumerate(notes, start=1)]
            write_lines(folder / "metrics.jsonl", epochs)
            return folder

        return noted

    def test_the_bisector_has_a_plot_that_begins_after_the_warm_up(self, report, noted, drawn):
        page = report(noted({}, self.NOTED, self.NOTED))
        assert self.BISECTOR in page.words
        assert "Single examples" not in page.words
        for words in ("Share of steps led by", "Cosine and FOSC", "Coefficient of each gradient"):
            assert words in page.words
        for label in ("both gradients", "adversarial", "robust", "cosine", "FOSC (right scale)"):
            assert label in page.words

    def test_without_disagreement_there_is_no_fosc(self, report, noted, drawn):
        agreed = {name: value for name, value in self.NOTED.items() if name != "fosc"}
        page = report(noted(agreed))
        assert self.BISECTOR in page.words
        assert "FOSC (right scale)" not in page.words

    def test_the_mean_radius_stands_beside_the_eps(self, report, noted, drawn):
        page = report(noted({"mean radius": 0.1}, {"mean radius": 0.08}))
        assert {"Single examples", "Training radius", "training eps", "mean radius"} <= set(page.words)
        assert not {self.BISECTOR, "Effective share of the examples"} & set(page.words)
        assert "Examples that cannot be proved are trained at less" in page.text
        assert "The effective share is" not in page.text

    def test_every_weighted_loss_has_its_effective_share(self, report, noted, drawn):
        page = report(noted({"effective share of robust": 0.6, "effective share of <b>": 0.7}))
        assert {"Single examples", "Effective share of the examples", "robust loss"} <= set(page.words)
        assert "<b> loss" in page.text
        assert "Training radius" not in page.words
        assert "Examples that cannot be proved" not in page.text

    def test_radius_and_shares_are_drawn_side_by_side(self, report, noted, drawn):
        page = report(noted({"mean radius": 0.1, "effective share of robust": 0.6}))
        assert page.words.count("Single examples") == 1
        assert {"Training radius", "Effective share of the examples"} <= set(page.words)

    def test_other_notes_and_none_make_no_plot(self, report, noted):
        page = report(noted({"of a later version": 1.0}, {}))
        assert not {self.BISECTOR, "Single examples"} & set(page.words)


class TestLayerByLayer:
    @pytest.fixture
    def staged(self, make_run):
        def make(name="a", errors=(0.3, 0.2, 0.1), **changes):
            folder = make_run(name, **changes)
            records = [
                epoch(number, stage=1 + (number > 2), held_out={"clean": 0.9, "verified_error": error})
                for number, error in enumerate(errors, start=1)
            ]
            write_lines(folder / "metrics.jsonl", records)
            return folder

        return make

    def test_verified_error_is_plotted_and_put_into_words(self, report, staged):
        page = report(staged())
        assert "Layer by layer" in page.text
        assert any(
            "Verified error at the end: this run 10.0 %" in svg["aria-label"] for svg in page.all("svg")
        )

    def test_a_line_marks_the_end_of_each_stage(self, drawn, staged):
        runs = {"": read_run(staged()).epochs}
        ends = figures.stages(runs, "key", "alt").count("stroke-dasharray")
        assert ends == 2  # one line in each panel

    def test_runs_are_laid_over_each_other(self, report, staged):
        page = report(staged("colt"), staged("maar", errors=(0.3, 0.1, 0.05)))
        assert any("colt 10.0 %; maar 5.0 %" in svg["aria-label"] for svg in page.all("svg"))

    def test_a_table_tells_how_robust_each_stage_left_the_network(self, report, staged):
        folder = staged()
        for number, robust in ((1, 4), (2, 6)):
            part = folder / "stages" / str(number)
            part.mkdir(parents=True)
            (part / "recipe.toml").write_text((folder / "recipe.toml").read_text())
            found = [verdict(i, "robust" if i < robust else "undecided") for i in range(10)]
            write_lines(part / "certify-ibp.jsonl", [header(), *found])
            record = {"format": "tightrope-latent/1", "node": "3", "eps": 0.1, "examples": 100}
            record |= {"clean_correct": 95, "withstood": 80 + number}
            (part / "latent-3-0.1.json").write_text(json.dumps(record))
        text = report(folder).text
        assert "after stage 1 verifier ibp, eps 0.3 (l∞), 10 test examples of digits 100.0 % 40.0 %" in text
        assert "after stage 2 verifier ibp, eps 0.3 (l∞), 10 test examples of digits 100.0 % 60.0 %" in text
        assert "withstood by 82.0 %" in text
        assert "finished verifier ibp" in text

    def test_a_broken_latent_file_is_named(self, report, staged):
        folder = staged()
        (folder / "latent-3-0.1.json").write_text('{"format": "tightrope-latent/1"}')
        with pytest.raises(InputError, match=r"latent-3-0.1.json: node"):
            report(folder)


def test_a_learning_rate_that_falls_to_zero_is_drawn_on_a_linear_axis(drawn):
    def schedules(*rates):
        epochs = [epoch(number, lr=rate) for number, rate in enumerate(rates, start=1)]
        return figures.schedules(epochs, "key", "alt")

    assert "1e-05" in schedules(1e-3, 1e-4, 1e-5)  # in steps: each decade has its tick
    assert "0.0004" in schedules(1e-3, 5e-4, 1e-9)
    assert "1e-0" not in schedules(1e-3, 5e-4, 1e-9)

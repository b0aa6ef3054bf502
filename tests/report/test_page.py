import json
import math
import re
import types
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from tightrope.errors import DataError, InputError
from tightrope.report import figures, write_report
from tightrope.report.page import clopper_pearson, eps_text
from tightrope.report.read import read_run
from tightrope.verify import read_radii
from tightrope.verify.stages import LARGEST

from .conftest import TEN, epoch, header, verdict, witness, write_lines, write_radii

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """A page taken apart: its text, its elements, and whether every element is closed in turn."""

    def __init__(self, source):
        super().__init__()
        self.source, self.open, self.elements, self.words = source, [], [], []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.words))

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture
def report(tmp_path):
    def report(*runs):
        write_report(runs, tmp_path / "out" / "report.html")
        return Page((tmp_path / "out" / "report.html").read_text())

    return report


@pytest.fixture
def digits(monkeypatch):
    """A data set of ten grey 4 x 4 images, all of class 7, in place of the real ones."""

    class Test:
        y = torch.full((10,), 7)
        shape = (1, 4, 4)

        def __len__(self):
            return 10

        def images(self, index):
            return torch.full((len(index), *self.shape), 0.5)

    data = types.SimpleNamespace(test=Test(), class_names=tuple("0123456789"))
    monkeypatch.setattr("tightrope.report.examples.load_data", lambda name, root=None, download=True: data)
    return data


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


def test_there_is_a_plot_for_everything_the_metrics_hold(report, make_run, drawn):
    page = report(make_run(metrics=True))
    titles = {"Margins", "Held-out accuracy", "Losses", "Schedules", "Layers"}
    assert titles <= set(page.words)
    assert len(page.all("svg")) == len(titles)
    assert "After epoch 3: clean 97.0 %, certified 50.0 % at eps 0.3, on 100 examples." in page.text


def test_what_has_no_data_is_left_out(report, make_run):
    folder = make_run(verdicts=[])
    write_lines(folder / "metrics.jsonl", [{"epoch": 1, "losses": {"natural": 0.5}}])
    page = report(folder)
    assert len(page.all("svg")) == 1
    assert "Losses" in page.words
    assert not {"Margins", "Held-out accuracy", "Schedules", "Layers"} & set(page.words)


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


def test_equal_margins_of_zero_still_make_a_histogram(report, make_run, drawn):
    assert "Margins" in report(make_run(verdicts=[verdict(0, "undecided", margin=0.0)])).words


def test_examples_beyond_the_histogram_are_counted(report, make_run):
    verdicts = [verdict(index, "robust") for index in range(300)] + [verdict(300, "undecided", margin=-1e6)]
    assert "1 example beyond the ends" in report(make_run(verdicts=verdicts)).text


def test_each_missing_piece_is_said_in_a_sentence(report, make_run):
    folder = make_run()
    for name in ("recipe.toml", "environment.json"):
        (folder / name).unlink()
    text = report(folder).text
    for name in ("recipe.toml is missing", "environment.json is missing", "metrics.jsonl is missing"):
        assert name in text
    assert "Data digits Test eps 0.3" in text  # from the certify file


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


def test_a_run_that_is_not_certified_yet_says_how_to(report, make_run):
    folder = make_run()
    (folder / "certify-ibp.jsonl").unlink()
    assert "run `tightrope certify`" in report(folder).text


def test_a_certify_file_without_verdicts_is_left_out(report, make_run):
    page = report(make_run(verdicts=[]))
    assert "certify-ibp.jsonl holds no verdict yet" in page.text
    assert "Certified accuracy" not in page.words


def test_a_results_folder_shows_its_recorded_figures(report, tmp_path):
    folder = tmp_path / "mnist-dm-small-ibp-0.3"
    folder.mkdir()
    result = {"paper": {"source": "a paper", "certified": 0.9}, "ours": {"seeds": [0, 1]}, "commit": "f" * 40}
    (folder / "result.json").write_text(json.dumps(result))
    text = report(folder).text
    assert "paper · source a paper" in text
    assert "ours · seeds 0, 1" in text
    assert "Commit ffffffffffff " in text


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


def test_folders_of_the_same_name_are_told_apart(report, make_run, tmp_path):
    text = report(make_run("x/run"), make_run("y/run")).text
    assert str(tmp_path / "runs" / "x" / "run") in text


def test_what_stands_in_the_files_cannot_become_markup(report, make_run, drawn):
    folder = make_run(verifier="<script>alert(1)</script>")
    write_lines(folder / "metrics.jsonl", [epoch(1, losses={"<script>": 1.0, r"$\frac$": 2.0})])
    page = report(folder)
    assert not page.all("script")
    assert "verifier <script>alert(1)</script>" in page.text


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
        def load(name, root, download):
            assert not download
            raise DataError("mnist is missing")

        monkeypatch.setattr("tightrope.report.examples.load_data", load)
        text = report(make_run(verdicts=self.falsified(1))).text
        assert "The data set “digits” is not at hand, so they are not drawn (mnist is missing)." in text

    def test_a_broken_witness_is_an_error_that_names_the_file(self, report, make_run, digits):
        broken = {"shape": [1, 4, 4], "float64": "AAAA", "predicted": 3}
        with pytest.raises(InputError, match=r"certify-ibp\.jsonl, line 2: a witness of shape"):
            report(make_run(verdicts=[verdict(0, "falsified", witness=broken)]))


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


@pytest.mark.parametrize(
    ("eps", "text"), [(0.3, "0.3"), (8 / 255, "8/255"), (2 / 255, "2/255"), (0, "0"), (0.12345678, "0.1235")]
)
def test_eps_is_written_as_people_write_it(eps, text):
    assert eps_text(eps) == text


@pytest.mark.parametrize(
    ("successes", "trials", "interval"),
    [(0, 10, (0.0, 0.30850)), (10, 10, (0.69150, 1.0)), (5, 10, (0.18709, 0.81291))],
)
def test_the_interval_is_clopper_and_pearsons(successes, trials, interval):
    assert clopper_pearson(successes, trials) == pytest.approx(interval, abs=1e-5)


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

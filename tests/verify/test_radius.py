import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tightrope.bounds import Estimate, Interval
from tightrope.data import Split, as_source
from tightrope.errors import IdentityError, InputError, TightropeError
from tightrope.graph import trace
from tightrope.region import Box, L1Ball, L2Ball
from tightrope.verify import VERIFIERS, BoundStage, certified_radii, certify, read_radii

from .conftest import handmade, labelled, random_net

REGIONS = {"inf": Box, "2": L2Ball, "1": L1Ball}
FREE = {name: kind(8.0, domain=None) for name, kind in REGIONS.items()}

# The margin of class 0 over class 1 is <WEIGHT, x> - 1: an l_p ball reaches 0 where its radius is the
# margin over the dual norm of WEIGHT.
WEIGHT = torch.tensor([3.0, -4.0, 0.0])
DUAL = {"inf": 7.0, "2": 5.0, "1": 4.0}
PATIENT = 600.0  # seconds: what branch and bound finds must not depend on how busy the machine is


def linear():
    net = nn.Linear(3, 2)
    with torch.no_grad():
        net.weight.copy_(torch.stack([WEIGHT, torch.zeros(3)]))
        net.bias.copy_(torch.tensor([-1.0, 0.0]))
    return trace(net.eval(), (3,))


def points(*rows):
    return as_source(Split(torch.tensor(rows), torch.zeros(len(rows), dtype=torch.int64)))


def values(result):
    return [one.radius for one in result]


def records(result):
    """What is said of each example, without how long it took."""
    return [{**vars(one), "seconds": None} for one in result]


@pytest.fixture
def verifier(monkeypatch):
    """Make engines a verifier called "test"."""

    def add(*engines):
        stages = tuple(BoundStage(f"test {place}", engine) for place, engine in enumerate(engines))
        monkeypatch.setitem(VERIFIERS, "test", stages)
        return "test"

    return add


class TestExactRadius:
    """Where the radius is known: a linear network, whose bounds are exact, in inputs without ends."""

    @pytest.mark.parametrize("norm", REGIONS)
    @settings(max_examples=10, deadline=None)
    @given(
        rows=st.lists(st.lists(st.floats(0, 1, width=32), min_size=3, max_size=3), min_size=1, max_size=6),
        tolerance=st.sampled_from([0.5, 1e-2, 1e-6]),
    )
    def test_the_radius_is_found_to_the_tolerance_and_never_exceeded(self, norm, rows, tolerance):
        result = certified_radii(linear(), points(*rows), FREE[norm], tolerance=tolerance, verifier="ibp")
        margins = torch.tensor(rows).double() @ WEIGHT.double() - 1
        for one, margin in zip(result, margins.tolist(), strict=True):
            exact = max(margin, 0) / DUAL[norm]
            assert one.radius <= exact
            assert one.radius >= min(exact, 8.0) - tolerance - 1e-6
            assert (one.status == "misclassified") == (margin <= 0)
            assert (one.status == "robust") == (one.radius > 0)

    @pytest.mark.parametrize("verifier", ["ibp", "crown-ibp", "fast-lin", "crown", "linear"])
    def test_every_verifier_finds_it_on_a_linear_network(self, verifier):
        result = certified_radii(linear(), points([1.0, 0.1, 0.5]), Box(1.0, domain=None), verifier=verifier)
        assert values(result) == [pytest.approx(1.6 / 7, abs=1e-3)]

    def test_the_first_example_may_be_the_one_that_is_proved_everywhere(self):
        result = certified_radii(linear(), points([1.0, 0.1, 0.5], [0.9, 0.4, 0.0]), Box(0.1, domain=None))
        assert result.radii[0].radius == result.largest == 0.1
        assert result.radii[1].radius == pytest.approx(0.1 / 7, abs=1e-3)
        assert result.summary()["at_largest"] == 1

    def test_what_is_right_but_proved_nowhere_is_undecided_at_0(self):
        (one,) = certified_radii(linear(), points([0.5, 0.1, 0.0]), Box(0.1), tolerance=0.05)
        assert (one.status, one.radius, one.predicted) == ("undecided", 0.0, 0)

    def test_what_is_misclassified_has_radius_0(self):
        (one,) = certified_radii(linear(), points([0.1, 0.5, 0.0]), Box(0.1))
        assert (one.status, one.radius, one.predicted, one.label) == ("misclassified", 0.0, 1, 0)


class TestAgreementWithCertify:
    """A radius is an eps that `certify` certifies."""

    @pytest.mark.parametrize("norm", REGIONS)
    @pytest.mark.parametrize("verifier", ["ibp", "crown", "linear"])
    def test_at_its_radius_an_example_is_robust_and_a_tolerance_above_it_is_not(self, norm, verifier):
        graph = random_net(3)
        examples = labelled(graph, 12)
        result = certified_radii(
            graph, examples, REGIONS[norm](2.0), tolerance=2 / 512, verifier=verifier, time_limit=PATIENT
        )
        x, y, _ = next(examples.batches([torch.arange(12)]))
        between = [one for one in result if 0 < one.radius < 2]
        assert len(between) > 3
        for one in between[:3]:
            alone = as_source(Split(x[one.index][None], y[one.index][None]))
            at, above = (
                next(iter(certify(graph, alone, REGIONS[norm](eps), verifier=verifier, attack=None)))
                for eps in (one.radius, one.radius + 2 / 512)
            )
            assert at.status == "robust"
            assert above.status in ("undecided", "falsified")

    def test_the_curve_at_half_the_largest_eps_is_the_certified_accuracy_there(self):
        graph = random_net(1)
        examples = labelled(graph, 200)
        result = certified_radii(graph, examples, Box(0.14), verifier="ibp")
        for eps in (0.07, 0.035):
            wanted = certify(graph, examples, Box(eps), verifier="ibp", attack=None).summary()
            assert 0.2 < wanted["certified_accuracy"] < 0.9
            assert result.certified_accuracy(eps) == wanted["certified_accuracy"]

    @pytest.mark.parametrize("seed", range(2))
    def test_a_row_of_stages_reaches_at_least_as_far_as_each_of_its_stages(self, seed):
        graph = random_net(seed)
        examples = labelled(graph, 60, seed)
        found = {
            name: values(certified_radii(graph, examples, Box(0.4), verifier=name))
            for name in ("ibp", "crown-ibp", "crown", "linear")
        }
        for weaker, stronger in (("ibp", "linear"), ("crown-ibp", "linear"), ("crown", "linear")):
            pairs = list(zip(found[weaker], found[stronger], strict=True))
            assert all(low <= high + 1e-3 for low, high in pairs)
        assert sum(found["linear"]) > sum(found["ibp"]) + 0.1
        assert sum(found["crown"]) > sum(found["crown-ibp"])

    def test_bounds_that_are_nan_certify_nothing(self, graph, examples, verifier):
        def broken(problem):
            bounds = Interval()(problem)
            return replace(bounds, lower=bounds.lower * torch.nan)

        result = certified_radii(graph, examples, Box(0.1), verifier=verifier(broken))
        assert [one.status for one in result] == ["undecided"] * 3 + ["misclassified"]
        assert values(result) == [0.0] * 4

    def test_an_engine_that_only_estimates_is_refused(self, graph, examples, verifier):
        def estimate(problem):
            bounds = Interval()(problem)
            return Estimate(bounds.lower, bounds.upper, bounds.boxes)

        with pytest.raises(TightropeError, match="estimates"):
            certified_radii(graph, examples, Box(0.1), verifier=verifier(estimate))

    def test_proofs_are_made_in_float64(self, graph, examples, verifier):
        seen = set()

        def spy(problem):
            seen.update({problem.x.dtype, problem.region.eps.dtype, problem.spec.rows.dtype})
            return Interval()(problem)

        certified_radii(graph, examples, Box(0.1), verifier=verifier(spy))
        assert seen == {torch.float64}


class TestStages:
    """A dear stage is asked only what the cheap ones before it cannot prove."""

    def test_a_stage_that_adds_nothing_is_asked_once(self, graph, examples, verifier):
        asked = []

        def second(problem):
            asked.append(problem.region.eps.tolist())
            return Interval()(problem)

        result = certified_radii(graph, examples, Box(0.64), verifier=verifier(Interval(), second))
        (eps,) = asked
        assert eps == pytest.approx([one.radius + 0.64 / 1024 for one in result if one.status == "robust"])

    def test_a_stage_that_adds_much_takes_ever_longer_steps(self, graph, examples, verifier):
        asked = []

        def nothing(problem):
            bounds = Interval()(problem)
            return replace(bounds, lower=bounds.lower - 1e9)

        def second(problem):
            asked.extend(problem.region.eps.tolist())
            return Interval()(problem)

        result = certified_radii(graph, examples, Box(0.5), first=1, verifier=verifier(nothing, second))
        assert [round(eps * 1024) for eps in asked[:3]] == [1, 1 + 2, 1 + 2 + 4]
        assert len(asked) < 20
        assert values(result) == values(certified_radii(graph, examples, Box(0.5), first=1, verifier="ibp"))

    def test_all_examples_of_a_batch_are_bisected_at_once(self, verifier):
        calls = []

        def spy(problem):
            calls.append(len(problem.x))
            return Interval()(problem)

        graph = random_net(0)
        certified_radii(graph, labelled(graph, 100), Box(0.2), tolerance=0.2 / 1024, verifier=verifier(spy))
        assert max(calls) == 100
        assert len(calls) <= 12


class TestSummary:
    def test_it_says_what_the_command_line_promises(self, graph, examples):
        summary = certified_radii(graph, examples, Box(0.8), tolerance=0.05, verifier="ibp").summary()
        assert summary.pop("seconds") >= 0
        # The margins 0.8, 0.1 and 0.24 fall by 2 eps, the last by 3: to 0 at 0.4, 0.05 and 0.08.
        assert summary == {
            "examples": 4,
            "clean_correct": 3,
            "mean_radius": pytest.approx(0.1),
            "median_radius": pytest.approx(0.025),
            "at_largest": 0,
            "curve": [
                {"eps": eps, "certified_accuracy": share}
                for eps, share in (
                    (0.0, 0.75),
                    (0.2, 0.25),
                    (0.4, 0.0),
                    (pytest.approx(0.6), 0.0),
                    (0.8, 0.0),
                )
            ],
            "largest": 0.8,
            "tolerance": 0.05,
            "norm": "inf",
            "verifier": "ibp",
        }

    def test_the_curve_falls_from_the_clean_accuracy(self):
        graph = random_net(2)
        x = torch.rand(50, 4, generator=torch.Generator().manual_seed(0))
        examples = as_source(Split(x, torch.arange(50) % 3))
        result = certified_radii(graph, examples, Box(0.2), verifier="ibp")
        shares = [result.certified_accuracy(eps) for eps in torch.linspace(0, 0.2, 50).tolist()]
        clean = result.summary()["clean_correct"] / 50
        assert 0 < clean < 1
        assert shares[0] == clean
        assert shares == sorted(shares, reverse=True)

    def test_the_first_examples_only(self, graph, examples):
        assert len(certified_radii(graph, examples, Box(0.1), first=2)) == 2
        assert len(certified_radii(graph, examples, Box(0.1), first=100)) == 4

    @pytest.mark.parametrize("batch", [1, 3, 250])
    def test_the_batch_changes_nothing(self, graph, examples, batch):
        wanted = records(certified_radii(graph, examples, Box(0.3)))
        assert records(certified_radii(graph, examples, Box(0.3), batch=batch)) == wanted


class TestFile:
    """Radii are kept as they come."""

    def test_it_says_what_the_radii_rest_on(self, graph, examples, tmp_path):
        out = tmp_path / "radius.jsonl"
        certified_radii(graph, examples, L2Ball(0.5), out=out, about={"data": "digits"})
        header, *lines = [json.loads(line) for line in out.read_text().splitlines()]
        identity = header["identity"]
        assert (header["format"], header["data"]) == ("tightrope-radius/1", "digits")
        assert len(identity.pop("weights")) == len(identity.pop("network")) == 64
        assert identity == {
            "data": examples.identity(),
            "norm": "2",
            "domain": [0.0, 1.0],
            "largest": 0.5,
            "tolerance": 0.001,
            "verifier": "linear",
            "time_limit": 1.0,
        }
        assert [line["index"] for line in lines] == [0, 1, 2, 3]

    def test_it_is_read_back_as_it_was(self, graph, examples, tmp_path):
        out = tmp_path / "radius.jsonl"
        result = certified_radii(graph, examples, Box(0.3), out=out)
        assert read_radii(out) == result

    def test_from_wherever_it_was_cut_off_it_goes_on_to_the_same_radii(self, graph, examples, tmp_path):
        out = tmp_path / "radius.jsonl"

        def run(resume):
            return records(
                certified_radii(graph, examples, Box(0.3), batch=2, out=out, resume=resume, verifier="ibp")
            )

        wanted = run(resume=False)
        content = out.read_bytes()
        for length in range(content.index(b"\n") + 1, len(content) + 1, 31):
            out.write_bytes(content[:length])
            assert run(resume=True) == wanted
            assert sorted(records(read_radii(out)), key=lambda record: record["index"]) == wanted

    @pytest.mark.parametrize(
        ("key", "change"),
        [
            ("weights", lambda: {"graph": trace(TestFile.other_weights(), (3,))}),
            ("data", lambda: {"examples": labelled(random_net(0, inputs=3), 4)}),
            ("largest", lambda: {"region": Box(0.2)}),
            ("norm", lambda: {"region": L2Ball(0.1)}),
            ("domain", lambda: {"region": Box(0.1, domain=None)}),
            ("verifier", lambda: {"verifier": "crown"}),
            ("tolerance", lambda: {"tolerance": 1e-2}),
        ],
    )
    def test_what_was_made_otherwise_is_refused_by_name(self, graph, examples, tmp_path, key, change):
        out = tmp_path / "radius.jsonl"
        asked = {"graph": graph, "examples": examples, "region": Box(0.1), "verifier": "ibp", "out": out}
        certified_radii(**asked)
        before = out.read_bytes()
        with pytest.raises(
            IdentityError, match=rf"radius\.jsonl was made with other settings:\n  {key}: .*\n"
        ):
            certified_radii(**asked | change(), resume=True)
        assert out.read_bytes() == before

    @staticmethod
    def other_weights():
        net = handmade()
        net[0].bias.data[0] += 1e-7
        return net

    def test_one_of_verdicts_is_refused(self, graph, examples, tmp_path):
        out = tmp_path / "certify.jsonl"
        certify(graph, examples, Box(0.1), out=out)
        with pytest.raises(InputError, match="line 1: format"):
            certified_radii(graph, examples, Box(0.1), out=out, resume=True)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"radius": -0.1}, "line 2: radius"),
            ({"radius": math.nan}, "line 2: radius"),
            ({"status": "falsified"}, "line 2: status"),
            (
                {"status": "misclassified"},
                "line 2: the status 'misclassified' does not go with the radius 0.",
            ),
            ({"radius": 0.0}, "line 2: the status 'robust' does not go with the radius 0;"),
        ],
    )
    def test_a_radius_that_is_none(self, graph, examples, tmp_path, changes, message):
        out = tmp_path / "radius.jsonl"
        certified_radii(graph, examples, Box(0.1), first=1, out=out)
        header, line = out.read_text().splitlines()
        out.write_text(f"{header}\n{json.dumps(json.loads(line) | changes)}\n")
        with pytest.raises(InputError, match=message):
            read_radii(out)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"region": Box(0.0)}, "above 0"),
        ({"region": Box(torch.full((4,), 0.1))}, "one number above 0"),
        ({"tolerance": 0.0}, "tolerance"),
        ({"tolerance": math.nan}, "tolerance"),
        ({"tolerance": math.inf}, "tolerance"),
        ({"tolerance": 1e-12}, "tolerance"),
        ({"batch": 0}, "in a batch must be a whole number from 1 up"),
        ({"time_limit": 0.0}, "time limit in seconds must be a positive number, got 0.0"),
        ({"first": 0}, "must be a whole number from 1 up, got 0"),
        ({"verifier": "magic"}, "there is no verifier 'magic'"),
        ({"verifier": "none"}, "'none' proves nothing"),
        ({"region": Box(0.1, domain=(0.2, 0.8))}, r"domain \(0\.2, 0\.8\), got 0 to 1"),
    ],
)
def test_requests_that_make_no_sense_are_refused(graph, examples, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        certified_radii(**{"graph": graph, "examples": examples, "region": Box(0.1)} | changes)

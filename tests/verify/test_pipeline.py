import copy
import math
import weakref
from contextlib import nullcontext
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from tightrope import checker
from tightrope.attacks import Pgd
from tightrope.bounds import Estimate, Interval, Linear
from tightrope.data import Split, as_source
from tightrope.errors import InputError, SoundnessViolation, TightropeError
from tightrope.files import load_tensors
from tightrope.graph import trace
from tightrope.region import Box, L1Ball, L2Ball
from tightrope.verify import VERIFIERS, BoundStage, Finding, Judge, Stage, certify, read_verdicts

from .conftest import ANSWERS, POINTS, handmade, labelled, random_net, same, timeless

ATTACK = Pgd(steps=4, step=1.0, loss="margin")


@pytest.fixture
def verifier(monkeypatch):
    """Make an engine a verifier called "test"."""

    def add(engine, cheap=True):
        monkeypatch.setitem(VERIFIERS, "test", (BoundStage("test", engine, cheap=cheap),))
        return "test"

    return add


def statuses(result):
    return [verdict.status for verdict in result]


class TestVerdicts:
    """What is said about examples whose answers are known by hand."""

    def test_each_status_with_its_stage_and_margin(self, graph, examples):
        result = certify(graph, examples, Box(0.1), verifier="ibp", attack=ATTACK)
        assert [(verdict.status, verdict.stage) for verdict in result] == [answer[:2] for answer in ANSWERS]
        assert [verdict.margin for verdict in result] == pytest.approx([a[2] for a in ANSWERS], abs=1e-6)
        assert [verdict.predicted for verdict in result] == [0, 0, 0, 1]
        assert [verdict.label for verdict in result] == [0, 0, 0, 0]
        assert [verdict.index for verdict in result] == [0, 1, 2, 3]

    def test_only_a_falsified_example_has_a_witness_with_the_class_it_is_taken_for(self, graph, examples):
        witnesses = [verdict.witness for verdict in certify(graph, examples, Box(0.1), attack=ATTACK)]
        assert [found is not None for found in witnesses] == [False, True, False, False]
        assert witnesses[1].predicted == 1
        assert witnesses[1].point[:2].tolist() == pytest.approx([0.45, 0.55])

    def test_without_an_attack_nothing_is_falsified_and_attacked_accuracy_is_unknown(self, graph, examples):
        result = certify(graph, examples, Box(0.1), verifier="ibp", attack=None)
        assert statuses(result) == ["robust", "undecided", "undecided", "misclassified"]
        assert result.summary()["attacked_accuracy"] is None

    def test_without_a_verifier_what_the_attack_leaves_is_undecided(self, graph, examples):
        result = certify(graph, examples, Box(0.1), verifier="none", attack=ATTACK)
        assert statuses(result) == ["undecided", "falsified", "undecided", "misclassified"]
        assert result.verdicts[0].stage == "attack"
        assert result.verdicts[0].margin == pytest.approx(0.6)  # the worst point that the attack found

    def test_with_neither_only_the_clean_answers_are_looked_at(self, graph, examples):
        result = certify(graph, examples, Box(0.1), verifier="none", attack=None)
        assert statuses(result) == ["undecided"] * 3 + ["misclassified"]
        assert {verdict.stage for verdict in result} == {"clean"}

    def test_at_radius_zero_every_right_answer_is_robust(self, graph, examples):
        result = certify(graph, examples, Box(0.0), attack=ATTACK)
        assert statuses(result) == ["robust"] * 3 + ["misclassified"]

    def test_a_stage_sees_only_what_the_stages_before_it_left_open(self, graph, examples, monkeypatch):
        seen = []

        def second(problem):
            seen.append(problem.x.tolist())
            return Interval()(problem)

        stages = (BoundStage("first", Interval()), BoundStage("second", second))
        monkeypatch.setitem(VERIFIERS, "test", stages)
        result = certify(graph, examples, Box(0.1), verifier="test", attack=ATTACK)
        assert [verdict.stage for verdict in result] == ["first", "attack", "second", "clean"]
        assert [row for rows in seen for row in rows] == [pytest.approx([0.62, 0.38, 1.0])]

    def test_bounds_that_are_nan_prove_nothing(self, graph, examples, verifier):
        def broken(problem):
            bounds = Interval()(problem)
            return replace(bounds, lower=bounds.lower * torch.nan)

        result = certify(graph, examples, Box(0.1), verifier=verifier(broken), attack=ATTACK)
        assert "robust" not in statuses(result)

    def test_an_engine_that_only_estimates_cannot_certify(self, graph, examples, verifier):
        def estimate(problem):
            bounds = Interval()(problem)
            return Estimate(bounds.lower, bounds.upper, bounds.boxes)

        with pytest.raises(TightropeError, match="estimates"):
            certify(graph, examples, Box(0.1), verifier=verifier(estimate))

    def test_a_point_that_a_stage_found_is_replayed_before_it_counts(self, graph, examples, monkeypatch):
        limits = []

        @dataclass(frozen=True)
        class Pointing:
            name: str = "pointing"
            cheap: bool = False
            searches: bool = False

            def __call__(self, problem, y, limit):
                limits.append(limit)
                x, attack = problem.x, Pgd(steps=20, step=0.2, loss="margin")
                worst = attack(problem.graph, x, y, problem.region, torch.Generator())
                nowhere = torch.full_like(worst, torch.nan)
                point = torch.where(torch.arange(len(x)).view(-1, 1) % 2 == 0, nowhere, worst + 5.0)
                return Finding(torch.zeros_like(y, dtype=torch.bool), x.new_zeros(len(x)), point)

        monkeypatch.setitem(VERIFIERS, "test", (Pointing(),))
        result = certify(graph, examples, Box(0.1), verifier="test", attack=None, time_limit=7.0)
        for verdict in result:
            assert verdict.status in ("undecided", "falsified", "misclassified")
            if verdict.witness is not None:
                x = torch.tensor(POINTS[verdict.index], dtype=torch.float64)
                assert (verdict.witness.point - x).abs().max() <= 0.1 + 1e-12
                assert graph.run(verdict.witness.point.float()[None])[0].argmax() != verdict.label
        assert limits == [7.0]

    def test_time_that_a_stage_spent_on_one_example_is_counted_there(self, graph, examples, monkeypatch):
        @dataclass(frozen=True)
        class Slow:
            name: str = "slow"
            cheap: bool = False
            searches: bool = False

            def __call__(self, problem, y, limit):
                clock[0] += 10 + 2 * len(y)
                seconds = problem.x.new_zeros(len(y)).index_fill(0, torch.tensor([1]), 10.0)
                return Finding(torch.zeros_like(y, dtype=torch.bool), seconds, seconds=seconds)

        clock = [0.0]
        monkeypatch.setitem(VERIFIERS, "test", (Slow(),))
        monkeypatch.setattr("time.perf_counter", lambda: clock[0])
        result = certify(graph, examples, Box(0.1), verifier="test", attack=None)
        seconds = [verdict.seconds for verdict in result if verdict.status == "undecided"]
        assert seconds == pytest.approx([2.0, 12.0, *[2.0] * (len(seconds) - 2)])

    def test_a_stage_that_proves_and_refutes_an_example_stops_the_program(
        self, graph, examples, monkeypatch, tmp_path
    ):
        @dataclass(frozen=True)
        class Contradiction:
            name: str = "contradiction"
            cheap: bool = False
            searches: bool = False

            def __call__(self, problem, y, limit):
                x, attack = problem.x, Pgd(steps=20, step=0.2, loss="margin")
                point = attack(problem.graph, x, y, problem.region, torch.Generator())
                return Finding(torch.ones_like(y, dtype=torch.bool), x.new_ones(len(x)), point)

        monkeypatch.setitem(VERIFIERS, "test", (Contradiction(),))
        with pytest.raises(SoundnessViolation):
            certify(graph, examples, Box(0.1), verifier="test", attack=None, out=tmp_path / "a.jsonl")

    @pytest.mark.parametrize("limit", [0.0, -1.0, math.nan])
    def test_a_time_limit_must_be_positive(self, graph, examples, limit):
        with pytest.raises(InputError, match="time limit"):
            certify(graph, examples, Box(0.1), verifier="ibp", attack=None, time_limit=limit)

    def test_every_example_took_some_time(self, graph, examples):
        result = certify(graph, examples, Box(0.1), attack=ATTACK)
        assert all(verdict.seconds > 0 for verdict in result)
        assert result.seconds == pytest.approx(sum(verdict.seconds for verdict in result))


class TestWhatStagesShare:
    """Bounds that one stage computed are there for those after it, and for nobody else."""

    SEARCHES = ("cascade", "milp")

    @dataclass(frozen=True)
    class Forgetful:
        """A stage that does not know what earlier ones computed, and tells later ones nothing."""

        stage: Stage

        def __getattr__(self, name):
            return getattr(self.stage, name)

        def __call__(self, problem, y, limit):
            return self.stage(replace(problem), y, limit)

    @pytest.mark.parametrize("verifier", SEARCHES)
    def test_crown_bounds_no_neuron_twice_but_for_the_search(self, verifier, monkeypatch):
        sizes, own_boxes = [], Linear._own_boxes

        def spy(engine, graph, x, *rest):
            sizes.append(len(x))
            return own_boxes(engine, graph, x, *rest)

        monkeypatch.setattr(Linear, "_own_boxes", spy)
        graph = random_net(3)
        found = certify(graph, labelled(graph, 40), Box(0.12), verifier=verifier, attack=ATTACK)
        last = VERIFIERS[verifier][-1].name
        searched = sum(verdict.stage == last for verdict in found)
        assert searched > 1  # else this shows nothing
        open_ = sum(verdict.stage not in ("clean", "attack", "ibp", "crown-ibp") for verdict in found)
        assert sizes[0] == open_
        assert sum(sizes[1:]) == searched

    @pytest.mark.parametrize(
        ("verifier", "region"),
        [("cascade", Box(0.12)), ("cascade", L2Ball(0.2)), ("milp", Box(0.12)), ("milp", L1Ball(0.3))],
        ids=["cascade, inf", "cascade, 2", "milp, inf", "milp, 1"],
    )
    def test_verdicts_are_those_of_stages_that_share_nothing(self, verifier, region, monkeypatch):
        graph = random_net(3)
        examples = labelled(graph, 40)
        alone = tuple(map(self.Forgetful, VERIFIERS[verifier]))
        monkeypatch.setitem(VERIFIERS, "forgetful", alone)
        shared, apart = (
            certify(graph, examples, region, verifier=name, attack=ATTACK, time_limit=600.0)
            for name in (verifier, "forgetful")
        )
        assert len({verdict.stage for verdict in shared}) > 3
        same(shared, apart)

    @pytest.mark.usefixtures("chunks_of_two")
    def test_what_is_known_of_a_batch_is_forgotten_with_it(self, monkeypatch):
        asked = []

        @dataclass(frozen=True)
        class Watch:
            name: str = "watch"
            cheap: bool = False
            searches: bool = False

            def __call__(self, problem, y, limit):
                asked.append(weakref.ref(problem))
                assert sum(one() is not None for one in asked) == 1
                return Finding(torch.zeros_like(y, dtype=torch.bool), problem.x.new_zeros(len(y)))

        monkeypatch.setitem(VERIFIERS, "test", (*VERIFIERS["linear"], Watch()))
        graph = random_net(3)
        certify(graph, labelled(graph, 20), Box(0.12), verifier="test", attack=None)
        assert len(asked) > 2
        assert all(one() is None for one in asked)


class TestSearch:
    """Examples that have to be searched come last, few at once: a stop loses little."""

    @dataclass
    class Searching:
        """Proves nothing; of the lot that is number `stop` it never comes back."""

        sizes: list[int]
        stop: int = 99
        name: str = "searching"
        cheap: bool = False
        searches: bool = True

        def __call__(self, problem, y, limit):
            if len(self.sizes) == self.stop:
                raise KeyboardInterrupt
            self.sizes.append(len(y))
            seconds = problem.x.new_full((len(y),), 3.0)
            return Finding(
                torch.zeros_like(y, dtype=torch.bool), problem.x.new_zeros(len(y)), seconds=seconds
            )

    @pytest.fixture
    def judged(self, monkeypatch, tmp_path):
        """Certify forty examples, a search asked about three at once; `stop` as of `Searching`."""
        graph = random_net(2)
        monkeypatch.setattr("tightrope.verify.pipeline.SEARCHED", 3)

        def run(stop=99, **options):
            search = self.Searching([], stop)
            monkeypatch.setitem(VERIFIERS, "test", (*VERIFIERS["ibp"], search))
            found = None
            with nullcontext() if stop == 99 else pytest.raises(KeyboardInterrupt):
                options = {"verifier": "test", "attack": ATTACK, "out": tmp_path / "a.jsonl", **options}
                found = certify(graph, labelled(graph, 40), Box(0.05), **options)
            return search.sizes, found

        return run

    @pytest.mark.parametrize("chunk", [3, 7, 250])
    def test_it_is_asked_about_few_at_once_whatever_the_batches_before(self, chunk, judged, monkeypatch):
        monkeypatch.setattr("tightrope.verify.pipeline.CHUNK", chunk)
        sizes, found = judged()
        open_ = statuses(found).count("undecided")
        assert sizes == [3] * (open_ // 3) + [open_ % 3] * (open_ % 3 > 0)
        assert len(sizes) > 1
        assert all((v.stage == "searching") == (v.status == "undecided") for v in found)

    def test_its_time_comes_on_top(self, graph, examples):
        batch = next(iter(examples.batches([torch.arange(4)])))
        judge = Judge(graph, Box(0.1), [], None, 0, spent={1: 50.0})
        assert [verdict.seconds > 50.0 for verdict in judge(*batch)] == [False, True, False, False]

    def test_a_stop_loses_the_examples_in_work_alone(self, judged, tmp_path):
        judged(stop=1)
        done = read_verdicts(tmp_path / "a.jsonl")[1]
        sizes, found = judged(resume=True)
        left = sum(verdict.stage == "searching" for verdict in found)
        assert len(done) == 40 - left + 3
        assert sum(sizes) == left - 3
        assert set(map(repr, done)) <= set(map(repr, found))  # seconds and all
        same(found, judged(out=tmp_path / "b.jsonl")[1])

    def test_every_example_has_one_certificate(self, judged, tmp_path):
        found = judged(certificates=True)[1]
        folder = tmp_path / "a.certificates"
        files = [checker.unpack(path.read_bytes())[1] for path in folder.glob("[0-9]*")]
        assert sorted(claim["index"] for header in files for claim in header["claims"]) == list(range(40))
        assert {verdict.certificate.file for verdict in found} == {p.name for p in folder.glob("[0-9]*")}
        assert checker.recheck(tmp_path / "a.jsonl")["accepted"] == 40

    def test_verifiers_end_with_what_searches(self):
        for stages in VERIFIERS.values():
            searching = [stage.searches for stage in stages]
            assert searching == sorted(searching)


class TestSummary:
    @pytest.mark.parametrize(
        ("verifier", "attack", "said"),
        [
            ("ibp", ATTACK, "50.00% without a counterexample, 25.00% certified by ibp (1 undecided)"),
            ("ibp", None, "not attacked, 25.00% certified by ibp (2 undecided)"),
            ("none", ATTACK, "50.00% without a counterexample"),
        ],
    )
    def test_printed_it_is_one_line(self, graph, examples, verifier, attack, said):
        result = certify(graph, examples, Box(0.1), verifier=verifier, attack=attack)
        line, _, seconds = str(result).rpartition("; ")
        assert line == f"4 examples, eps 0.1 in l_inf: 75.00% correct, {said}"
        assert seconds.endswith(" s")

    def test_it_says_what_the_command_line_promises(self, graph, examples):
        result = certify(graph, examples, Box(0.1), verifier="ibp", attack=ATTACK)
        summary = result.summary()
        assert summary.pop("seconds") >= 0
        assert summary == {
            "examples": 4,
            "clean_correct": 3,
            "robust": 1,
            "falsified": 1,
            "undecided": 1,
            "certified_accuracy": 0.25,
            "clean_accuracy": 0.75,
            "attacked_accuracy": 0.5,
            "eps": 0.1,
            "norm": "inf",
            "verifier": "ibp",
        }

    def test_the_first_examples_only(self, graph, examples):
        assert len(certify(graph, examples, Box(0.1), first=2)) == 2
        assert len(certify(graph, examples, Box(0.1), first=100)) == 4


@pytest.mark.parametrize("seed", range(6))
def test_a_robust_example_withstands_a_strong_attack(seed):
    graph = random_net(seed)
    examples = labelled(graph, 100, seed)
    proved = certify(graph, examples, Box(0.03), verifier="ibp", attack=None)
    strong = Pgd(steps=30, step=0.2, restarts=3, loss="margin")
    attacked = certify(graph, examples, Box(0.03), verifier="none", attack=strong)
    both = list(zip(statuses(proved), statuses(attacked), strict=True))
    assert ("robust", "falsified") not in both
    assert ("robust", "undecided") in both
    assert ("undecided", "falsified") in both


def test_milp_refuses_an_l_2_ball_before_anything_is_done(tmp_path):
    net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))
    data = as_source(Split(torch.rand(3, 2), torch.zeros(3, dtype=torch.int64)))
    with pytest.raises(InputError, match="an l_2 ball"):
        certify(trace(net, (2,)), data, L2Ball(1e-6), verifier="milp", out=tmp_path / "v.jsonl")
    assert not (tmp_path / "v.jsonl").exists()


@pytest.mark.parametrize("region", [Box(0.2), L2Ball(0.3), L1Ball(0.5)], ids=lambda region: region.norm)
def test_a_witness_read_from_its_file_lies_in_the_region_and_is_misclassified_in_float64(region, tmp_path):
    graph, out = random_net(0), tmp_path / "certify.jsonl"
    examples = labelled(graph, 40)
    result = certify(graph, examples, region, attack=ATTACK, out=out)
    _, verdicts = read_verdicts(out)
    assert timeless(verdicts) == timeless(result)
    falsified = [verdict for verdict in verdicts if verdict.witness is not None]
    assert falsified
    exact = copy.deepcopy(graph.module).double()
    ((x, y, _),) = examples.batches([torch.tensor([verdict.index for verdict in falsified])])
    points = torch.stack([verdict.witness.point for verdict in falsified])
    assert (region.contains(x.double(), points) == 0).all()
    answers = exact(points).argmax(1)
    assert (answers != y).all()
    assert answers.tolist() == [verdict.witness.predicted for verdict in falsified]


class TestNetwork:
    """Which function is judged, and that the caller's network stays as it was."""

    @staticmethod
    def with_batch_norm():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))
        net[1].running_mean.uniform_(-0.5, 0.5)
        net[1].running_var.uniform_(0.5, 2)
        return net

    def test_a_network_in_training_mode_is_judged_as_in_evaluation(self):
        net = self.with_batch_norm()
        examples = labelled(trace(net.eval(), (4,)), 50)
        wanted = certify(trace(net, (4,)), examples, Box(0.02), attack=ATTACK)
        assert len(set(statuses(wanted))) > 1
        assert timeless(certify(trace(net.train(), (4,)), examples, Box(0.02), attack=ATTACK)) == timeless(
            wanted
        )

    def test_the_callers_network_is_left_alone(self):
        net = self.with_batch_norm()
        examples = labelled(trace(net.eval(), (4,)), 10)
        net.train()
        net[3].eval()
        net(torch.rand(5, 4)).sum().backward()
        before = copy.deepcopy(net)
        gradients = [parameter.grad.clone() for parameter in net.parameters()]
        certify(trace(net, (4,)), examples, Box(0.02), attack=ATTACK)
        assert [m.training for m in net.modules()] == [m.training for m in before.modules()]
        for name, tensor in net.state_dict().items():
            assert torch.equal(tensor, before.state_dict()[name])
            assert tensor.dtype == before.state_dict()[name].dtype
        assert all(parameter.requires_grad for parameter in net.parameters())
        for parameter, gradient in zip(net.parameters(), gradients, strict=True):
            assert torch.equal(parameter.grad, gradient)

    def test_proofs_are_made_in_float64(self, graph, examples, verifier):
        seen = set()

        def spy(problem):
            bounds = Interval()(problem)
            weights = {parameter.dtype for parameter in problem.graph.module.parameters()}
            seen.update(weights, {problem.x.dtype, problem.spec.rows.dtype, bounds.lower.dtype})
            return bounds

        certify(graph, examples, Box(0.1), verifier=verifier(spy))
        assert seen == {torch.float64}


class TestSoundnessViolation:
    """An example that is certified and attacked at once stops everything."""

    @staticmethod
    def optimist(problem):
        bounds = Interval()(problem)
        return replace(bounds, lower=bounds.lower + 1.0, upper=bounds.upper + 1.0)

    def test_it_is_raised_and_the_example_saved_beside_the_file(self, graph, examples, verifier, tmp_path):
        out = tmp_path / "run" / "certify.jsonl"
        with pytest.raises(SoundnessViolation, match="example 1 was certified by test and attacked") as error:
            certify(graph, examples, Box(0.1), verifier=verifier(self.optimist), attack=ATTACK, out=out)
        assert error.value.exit_code == 3
        saved = tmp_path / "run" / "soundness-violation-1.safetensors"
        assert str(saved) in str(error.value)
        tensors, facts = load_tensors(saved)
        wanted = {"index": 1, "label": 0, "predicted": 1, "stage": "test", "eps": 0.1, "norm": "inf"}
        assert facts == wanted
        x, witness = tensors["x"], tensors["witness"]
        assert x.tolist() == pytest.approx([0.55, 0.45, 0.0])
        assert Box(0.1).contains(x[None], witness[None]).item() == 0
        assert handmade().double()(witness).argmax() == 1

    def test_no_verdict_of_that_batch_is_written(self, graph, examples, verifier, tmp_path, chunks_of_two):
        out = tmp_path / "certify.jsonl"
        with pytest.raises(SoundnessViolation):
            certify(graph, examples, Box(0.1), verifier=verifier(self.optimist), attack=ATTACK, out=out)
        assert read_verdicts(out)[1] == []

    def test_without_a_file_it_is_saved_where_one_stands(
        self, graph, examples, verifier, tmp_path, monkeypatch
    ):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SoundnessViolation):
            certify(graph, examples, Box(0.1), verifier=verifier(self.optimist), attack=ATTACK)
        assert (tmp_path / "soundness-violation-1.safetensors").is_file()


class TestBatches:
    """What is found out about an example does not depend on which others are judged with it."""

    @pytest.mark.parametrize("size", [1, 7])
    @pytest.mark.parametrize("seed", range(2))
    def test_verdicts_are_the_same_in_batches_of_any_size(self, size, seed, monkeypatch):
        graph = random_net(seed)
        examples = labelled(graph, 30, seed)
        wanted = certify(graph, examples, Box(0.08), attack=ATTACK)
        monkeypatch.setattr("tightrope.verify.pipeline.CHUNK", size)
        same(certify(graph, examples, Box(0.08), attack=ATTACK), wanted)
        assert len(set(statuses(wanted))) > 1


class TestFile:
    """The file that verdicts are written to."""

    def test_it_says_what_the_verdicts_rest_on(self, graph, examples, tmp_path):
        out = tmp_path / "certify.jsonl"
        certify(graph, examples, Box(0.1), attack=ATTACK, out=out, seed=3, about={"data": "digits"})
        header, _ = read_verdicts(out)
        identity = header["identity"]
        assert header["format"] == "tightrope-certify/1"
        assert header["data"] == "digits"
        assert len(identity.pop("weights")) == len(identity.pop("network")) == 64
        assert identity == {
            "data": examples.identity(),
            "eps": 0.1,
            "norm": "inf",
            "domain": [0.0, 1.0],
            "verifier": "cascade",
            "attack": {
                "name": "pgd",
                "steps": 4,
                "step": 1.0,
                "restarts": 1,
                "loss": "margin",
                "keep_best": True,
                "decay": 1.0,
            },
            "seed": 3,
            "time_limit": 60.0,
        }


class TestErrors:
    """Requests that make no sense."""

    @pytest.mark.parametrize("first", [0, -1])
    def test_no_examples_asked_for(self, graph, examples, first):
        with pytest.raises(InputError, match=f"must be a whole number from 1 up, got {first}"):
            certify(graph, examples, Box(0.1), first=first)

    def test_a_verifier_that_there_is_not(self, graph, examples, tmp_path):
        out = tmp_path / "certify.jsonl"
        with pytest.raises(InputError, match="there is no verifier 'magic'"):
            certify(graph, examples, Box(0.1), verifier="magic", out=out)
        assert not out.exists()

    def test_a_radius_for_each_example(self, graph, examples):
        with pytest.raises(InputError, match="one radius for all examples"):
            certify(graph, examples, Box(torch.full((4,), 0.1)))

    def test_inputs_outside_the_domain(self, graph, examples):
        with pytest.raises(InputError, match=r"domain \(0\.2, 0\.8\), got 0 to 1"):
            certify(graph, examples, Box(0.1, domain=(0.2, 0.8)))

    def test_inputs_that_are_no_numbers(self, graph):
        class Broken:
            def __len__(self):
                return 1

            def identity(self):
                return ""

            def batches(self, order):
                return ((torch.full((1, 3), torch.nan), torch.zeros(1, dtype=torch.int64), i) for i in order)

        with pytest.raises(InputError, match="must be numbers"):
            certify(graph, Broken(), Box(0.1, domain=None))

    def test_inputs_of_another_shape(self, graph):
        wide = as_source(Split(torch.rand(2, 5), torch.zeros(2, dtype=torch.int64)))
        with pytest.raises(InputError, match="shape"):
            certify(graph, wide, Box(0.1))

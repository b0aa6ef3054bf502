"""The checker by itself: what it computes, what it accepts, and what it rejects."""

import copy
import json
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tightrope import checker
from tightrope.bounds import Interval, Linear, Problem
from tightrope.graph import recast, trace
from tightrope.models import build
from tightrope.region import Box, L1Ball, L2Ball
from tightrope.spec import Spec
from tightrope.verify.certificates import UnknownError, export

from .referee import case, smallest_margin
from .tampering import PLAIN, SEALED, Files, NothingToChange, examples, is_rejected, pack, store

SCRIPT = Path(checker.__file__)


class Odd(nn.Module):
    """Every operator that is written in its own way, or as a matrix."""

    def __init__(self):
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(2), nn.Conv2d(2, 4, 3, (2, 1), 1, groups=2)
        self.circular = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular", bias=False)
        self.after, self.pool, self.last = nn.BatchNorm2d(4), nn.AvgPool2d(2), nn.Linear(8, 3)
        self.register_buffer("scale", torch.rand(2, 1, 1) + 0.5)

    def forward(self, x):
        z = torch.relu(self.norm((x - 0.3) / self.scale))
        z = nn.functional.leaky_relu(self.after(self.conv(z)), 0.2)
        z = torch.relu(self.circular(z)) - 0.5 * z
        z = self.pool(z).flatten(1)
        return self.last(torch.cat([z, 2 * z], 1))


def odd():
    torch.manual_seed(0)
    net = Odd()
    for norm in (net.norm, net.after):
        norm.running_var.uniform_(0.5, 2)
        norm.running_mean.normal_()
    return recast(trace(net.eval(), (2, 5, 3)), torch.float64)


def behind(layer, features, shape):
    net = nn.Sequential(layer, nn.ReLU(), nn.Flatten(), nn.Linear(features, 2))
    return trace(net.double().eval().requires_grad_(False), shape)


GRAPHS = {
    **{str(seed): lambda seed=seed: case(seed).graph for seed in range(5)},
    "odd": odd,
    "dilated": lambda: behind(nn.Conv2d(1, 3, (2, 3), dilation=2), 24, (1, 6, 6)),
    "one dimension": lambda: behind(nn.Conv1d(2, 3, 3), 9, (2, 5)),
}


def chain(inputs, layers):
    """A network of dense layers, each a weight and perhaps a bias, and "relu"."""
    nodes, tensors = [{"op": "input", "inputs": [], "shape": [inputs]}], {}
    for number, layer in enumerate(layers, start=1):
        node = {"inputs": [number - 1], "shape": nodes[-1]["shape"]}
        if layer == "relu":
            node |= {"op": "relu", "left": 0.0}
        else:
            node |= {"op": "dense", "shape": [len(layer[0])]}
            named = zip(("weight", "bias"), layer, strict=False)
            tensors |= {f"{number}.{name}": np.array(value) for name, value in named}
        nodes.append(node)
    return checker.Network(pack(tensors, {"format": checker.FORMAT, "nodes": nodes}))


def network(graph):
    return checker.Network(export(graph).content())


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Files of certificates in each norm, with every status but undecided."""
    folder, found = tmp_path_factory.mktemp("originals"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tightrope.verify.pipeline.CHUNK", 3)
        for seed, norm in ((0, Box), (5, Box), (2, Box), (3, L1Ball), (1, L2Ball)):
            path = folder / f"{seed}.jsonl"
            store(*examples(seed, 6, norm), path)
            found.append(path)
    statuses = {record["status"] for path in found for record in Files.read(path).records}
    assert statuses >= {"robust", "falsified", "misclassified"}
    assert any(
        name.endswith("splits") for path in found for t, _ in Files.read(path).batches.values() for name in t
    )
    return found


class TestWhatItComputes:
    """Against torch, and against the exact minimum."""

    @pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
    def test_its_logits_are_those_of_torch(self, graph):
        graph = graph()
        x = torch.rand(7, *graph.input_shape, dtype=torch.float64)
        ours = network(graph).run(x.flatten(1).numpy())
        np.testing.assert_allclose(ours, graph.run(x)[0].numpy(), rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("name", GRAPHS)
    @pytest.mark.parametrize("norm", [Box, L2Ball, L1Ball])
    def test_its_bounds_are_those_of_the_engines_less_what_rounding_may_do(self, name, norm):
        graph = GRAPHS[name]()
        x = torch.rand(1, *graph.input_shape, dtype=torch.float64)
        spec = Spec.margins(torch.zeros(1, dtype=torch.int64), graph.classes, x)
        problem, rows = Problem(graph, x, norm(0.1), spec), spec.rows.numpy()
        point = checker.Region(x.flatten(1).numpy(), 0.1, norm.norm, [0.0, 1.0])
        reach = checker.Reach(network(graph), point)
        ours = {
            rule: reach.lower(reach.network.end, rows, reach.around(rule))
            for rule in ("adaptive", "parallel")
        }
        ours["ibp"] = reach.lower(reach.network.end, rows, reach.constants())
        reach.tighten("adaptive")
        ours["crown"] = reach.lower(reach.network.end, rows, reach.around("adaptive"))
        engines = {
            "adaptive": Linear("adaptive", "interval"),
            "parallel": Linear("parallel", "interval"),
            "ibp": Interval(),
            "crown": Linear("adaptive", "linear"),
        }
        for rule, engine in engines.items():
            theirs = problem.bounds(engine).lower.numpy()
            assert (ours[rule] >= theirs - 1e-9).all()
            # Where two inputs of an operator are one, what is merged into a matrix is tighter.
            assert (ours[rule] <= theirs + 1e-12).all() or name == "odd"
        for _ in range(100):
            margins = rows @ graph.run(problem.region.sample(x))[0].numpy()[:, :, None]
            assert all((bound <= margins[..., 0] + 1e-12).all() for bound in ours.values())

    @pytest.mark.parametrize("seed", range(20))
    def test_no_bound_exceeds_the_exact_minimum(self, seed):
        asked = case(seed, L1Ball if seed % 4 > 1 else Box)
        exact, label = smallest_margin(asked), int(asked.y)
        x, eps, norm = asked.x.flatten(1).numpy(), asked.region.eps, asked.region.norm
        reach = checker.Reach(network(asked.graph), checker.Region(x, eps, norm, [0.0, 1.0]))
        rows = (np.eye(asked.graph.classes)[label] - np.eye(asked.graph.classes))[None]
        rows = np.delete(rows, label, 1)
        random = np.random.default_rng(seed)
        for rule in ("adaptive", "parallel"):
            assert reach.lower(reach.network.end, rows, reach.constants()).min() <= exact
            lines = {
                i: checker.around(node, *reach.boxes[i], rule, random.uniform(-1, 2, reach.boxes[i][0].shape))
                for i, node in enumerate(reach.network.nodes)
                if node["op"] == "relu"
            }
            assert reach.lower(reach.network.end, rows, lines).min() <= exact
            reach.tighten(rule)
            assert reach.lower(reach.network.end, rows, reach.around(rule)).min() <= exact

    @pytest.mark.parametrize("norm", ["inf", "2", "1"])
    def test_the_squares_of_small_rows_are_not_missing(self, norm):
        region = checker.Region(np.zeros((1, 1)), 0.5, norm, [0.0, 1.0])
        for scale in (1e-150, 1e-170, 1e-293):
            least, rounding = region.least(np.array([[[-scale]]]))
            assert (least - rounding).item() <= -0.5 * scale
            assert least.item() >= -0.5 * scale - rounding.item()

    def test_rounding_is_paid_for(self):
        """On badly scaled networks, against fractions; there, what float64 computes is often too large."""
        random, too_large = np.random.default_rng(0), 0
        for _ in range(60):
            sizes = ((3, 6), (6, 6), (6, 2))
            layers = [(random.normal(size=s[::-1]) * 2.0 ** random.integers(-25, 25, s[::-1])) for s in sizes]
            nodes, tensors = [{"op": "input", "inputs": [], "shape": [3]}], {}
            for weight in layers:
                tensors[f"{len(nodes)}.weight"] = weight
                nodes.append({"op": "dense", "inputs": [len(nodes) - 1], "shape": [len(weight)]})
                nodes.append({"op": "relu", "left": 0.0, "inputs": [len(nodes) - 1], "shape": [len(weight)]})
            nodes.pop()
            program = checker.Network(pack(tensors, {"format": checker.FORMAT, "nodes": nodes}))
            x = random.random((1, 3))
            z = [Fraction(value) for value in x[0]]
            for k, weight in enumerate(layers):
                z = [max(v, 0) if k else v for v in z]
                z = [sum(Fraction(w) * v for w, v in zip(row, z, strict=True)) for row in weight]
            logits = program.run(x)[0]
            too_large += logits[0] - logits[1] > z[0] - z[1]
            reach = checker.Reach(program, checker.Region(x, 0.0, "inf", None))
            for rule in ("ibp", "adaptive", "crown"):
                if rule == "crown":
                    reach.tighten("adaptive")
                lines = reach.constants() if rule == "ibp" else reach.around("adaptive")
                bound = float(reach.lower(program.end, np.array([[[1.0, -1.0]]]), lines)[0, 0])
                assert Fraction(bound) <= z[0] - z[1]
        assert too_large > 10

    @pytest.mark.parametrize("rule", checker.RULES)
    @pytest.mark.parametrize("name", ["underflow", "overflow"])
    def test_what_float64_cannot_hold_is_not_taken_for_zero(self, name, rule):
        """The logits are 1 - relu(1e200 x - 1) and 0, then 1 - relu(1e309 (relu(x_0) - relu(x_1))) and 0."""
        last = ([[-1.0], [0.0]], [1.0, 0.0])
        if name == "underflow":
            layers = [([[1e-200]],), ([[1e-200]],), ([[1e300]],), ([[1e300]], [-1.0]), "relu", last]
            x, eps = np.array([[0.5]]), 0.1
        else:
            layers = [([[1e155, 0.0], [0.0, 1e155]],), "relu", ([[1e154, -1e154]],), "relu", last]
            x, eps = np.zeros((1, 2)), 1e-307
        region = checker.Region(x, eps, "inf", None)
        with np.errstate(all="ignore"), pytest.raises(checker.RejectedError, match="only proved to exceed"):
            checker.prove(chain(x.size, layers), region, 0, rule, {})

    def test_of_a_box_that_is_not_known_no_line_is(self):
        box = np.array([[np.nan]]), np.array([[1.0]])
        for rule in ("adaptive", "parallel"):
            assert np.isnan(checker.around({"left": 0.0}, *box, rule)[0])

    def test_operators_that_it_does_not_know_are_refused(self):
        with pytest.raises(UnknownError, match="Sigmoid"):
            export(trace(nn.Sequential(nn.Linear(2, 2), nn.Sigmoid(), nn.Linear(2, 2)).double(), (2,)))

    def test_a_network_for_images_is_understood(self):
        torch.manual_seed(0)
        graph = recast(trace(build("dm-small", (1, 28, 28), 10), (1, 28, 28)), torch.float64)
        x = torch.rand(2, 1, 28, 28, dtype=torch.float64)
        np.testing.assert_allclose(
            network(graph).run(x.flatten(1).numpy()), graph.run(x)[0].numpy(), atol=1e-12
        )


class TestCells:
    """Trees of splits, and what is stored for them."""

    def test_a_tree_is_read_root_first(self):
        found = checker.leaves([4, 7], [2, -1, 0, -1, -1, -1])
        assert found == [(4, [(2, 1)]), (4, [(2, -1), (0, 1)]), (4, [(2, -1), (0, -1)]), (7, [])]

    @pytest.mark.parametrize("splits", [[], [2], [2, -1], [2, -1, -1, -1], [-1, -1]])
    def test_a_tree_that_does_not_cover_the_region_is_rejected(self, splits):
        with pytest.raises(checker.RejectedError, match="splits"):
            checker.leaves([1], splits)

    def test_stored_numbers_are_not_trusted(self, originals):
        """Whatever slopes, multipliers and trees say, a falsified example is not proved."""
        random, tried = np.random.default_rng(0), 0
        for path in originals:
            files = Files.read(path)
            for record in files.records:
                if record["status"] != "falsified":
                    continue
                tensors, _, place = files.claim(record)
                about = files.header["identity"]
                region = checker.Region(
                    tensors["x"].reshape(len(tensors["x"]), -1)[[place]].astype("f8"),
                    *(about[key] for key in ("eps", "norm", "domain")),
                )
                program = checker.Network(files.raw["network.safetensors"])
                for _ in range(20):
                    tried += 1
                    with pytest.raises(checker.RejectedError, match="only proved to exceed"):
                        checker.prove(program, region, record["label"], "crown", cells(program, random))
        assert tried >= 60


def cells(program, random):
    """A random tree for every class, with random numbers, some of them far out."""
    rivals, splits, weights, leaves = range(program.size[-1]), [], [], 0
    for _ in rivals:
        stack = [0]
        while stack:
            depth = stack.pop()
            if depth < 4 and random.random() < 0.6:
                splits.append(int(random.integers(program.neurons)))
                stack += [depth + 1, depth + 1]
            else:
                splits.append(-1)
                leaves += 1
                weights += list(random.normal(size=1 + depth) * random.choice([0.0, 1.0, 1e3, 1e12]))
    neurons = np.arange(program.neurons)
    slopes = random.normal(0.5, 2, (leaves, program.neurons))
    names = {"neurons": neurons, "rivals": np.array(rivals), "splits": np.array(splits), "slopes": slopes}
    return {**names, "weights": np.array(weights)}


class TestWhatItRejects:
    def test_nothing_of_what_was_written(self, originals):
        for path in originals:
            report = checker.recheck(path)
            assert report["rejected"] == []
            assert report["accepted"] == report["examples"] == 6

    @pytest.mark.parametrize("change", [*PLAIN, *SEALED], ids=lambda change: change.__name__)
    def test_whatever_claims_something_else(self, originals, change, tmp_path, capsys):
        done = 0
        for number, original in enumerate(originals * 4):
            files, random = Files.read(original), np.random.default_rng(number)
            try:
                change(files, random)
            except NothingToChange:
                continue
            path = tmp_path / f"{number}.jsonl"
            files.write(path, sealed=change in SEALED)
            assert is_rejected(path), f"{original.name}, seed {number}"
            done += 1
        assert done >= 4

    def test_sealing_alone_changes_nothing(self, originals, tmp_path):
        for original in originals:
            path = tmp_path / original.name
            Files.read(original).write(path, sealed=True)
            assert not is_rejected(path)

    @pytest.mark.parametrize(
        "change",
        [
            {"op": "softmax"},
            {"op": "relu", "left": -0.5},
            {"op": "relu", "left": 2.0},
            {"op": "relu", "left": 0.0, "inputs": [0]},
            {"inputs": [5]},
            {"inputs": [-1]},
            {"op": "add", "inputs": [0, 1], "sign": 1},
            {"op": "add", "inputs": [1, 1], "sign": 5},
            {"op": "add", "inputs": [1], "sign": 1},
            {"op": "scale", "divide": False, "inputs": [0]},
            {"op": "dense"},
            {"op": "conv"},
        ],
        ids=str,
    )
    def test_a_network_that_does_not_add_up(self, originals, change):
        program, header = Files.read(originals[0]).network
        assert [node["op"] for node in header["nodes"][:3]] == ["input", "dense", "relu"]
        nodes = copy.deepcopy(header["nodes"])
        nodes[2].update(change)
        with pytest.raises((checker.RejectedError, LookupError, AttributeError)):
            checker.Network(pack(program, {**header, "nodes": nodes}))

    def test_a_convolution_whose_weight_is_cut_up_in_another_way(self):
        """As many entries, in another shape: its sums would be taken for shorter ones than they are."""
        settings = {"padding": [0, 0], "stride": [1, 1], "dilation": [1, 1], "groups": 1, "of": [16, 1, 1]}
        nodes = [
            {"op": "input", "inputs": [], "shape": [16]},
            {"op": "conv", "inputs": [0], "shape": [1, 1, 1], **settings},
        ]
        header = {"format": checker.FORMAT, "nodes": nodes}
        checker.Network(pack({"1.weight": np.ones((1, 16, 1, 1))}, header))
        with pytest.raises(checker.RejectedError, match="a bad node"):
            checker.Network(pack({"1.weight": np.ones((4, 4, 1, 1))}, header))

    @pytest.mark.parametrize("shape", [(1,), (1, 6), (3, 6), (6, 6)])
    def test_factors_of_another_shape(self, shape):
        nodes = [
            {"op": "input", "inputs": [], "shape": [6]},
            {"op": "scale", "inputs": [0], "shape": [6], "divide": False},
        ]
        header = {"format": checker.FORMAT, "nodes": nodes}
        checker.Network(pack({"1.weight": np.ones(6)}, header))
        with pytest.raises(checker.RejectedError, match="a bad node"):
            checker.Network(pack({"1.weight": np.ones(shape)}, header))


def test_a_masked_class_makes_no_other_answer_right():
    class Masked:
        def run(self, point):
            return np.array([[0.9, 0.1, -1e9]])

    assert checker.margin_at(Masked(), np.zeros(2), 0, 0) == pytest.approx(0.8)
    with pytest.raises(checker.RejectedError, match="does not answer 1"):
        checker.margin_at(Masked(), np.zeros(2), 0, 1)


def test_verdicts_beyond_what_was_asked_for_are_rejected(originals, tmp_path):
    files, path = Files.read(originals[0]), tmp_path / "c.jsonl"
    files.header["examples"] = 2
    files.write(path, sealed=False)
    report = checker.recheck(path)
    assert [entry["index"] for entry in report["rejected"]] == [2, 3, 4, 5]


class TestAsAScript:
    """It needs NumPy and safetensors alone."""

    def test_it_runs_where_neither_can_be_imported(self, originals, tmp_path):
        alone = shutil.copy(SCRIPT, tmp_path / "checker.py")
        block = "import sys; sys.modules['torch'] = sys.modules['tightrope'] = None\n"
        program = f"{block}import runpy; runpy.run_path({str(alone)!r}, run_name='__main__')"
        for change, status in ((None, 0), ({"status": "robust"}, 3)):
            path = tmp_path / "c.jsonl"
            files = Files.read(originals[0])
            if change:
                next(r for r in files.records if r["status"] == "misclassified").update(change)
            files.write(path, sealed=False)
            done = subprocess.run(
                [sys.executable, "-c", program, str(path), "--json"], capture_output=True, text=True
            )
            assert done.returncode == status, done.stderr
            report = json.loads(done.stdout.splitlines()[-1])
            assert len(report["rejected"]) == bool(change)
            assert "6 of 6" in done.stderr
        done = subprocess.run([sys.executable, "-c", program, str(alone)], capture_output=True, text=True)
        assert done.returncode == 2
        assert "holds no certificates" in done.stderr

"""What certify stores for the checker, and that it stores it before it says anything."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn

from tightrope import checker
from tightrope.errors import IdentityError, InputError, TightropeError
from tightrope.graph import trace
from tightrope.region import Box, L1Ball, L2Ball
from tightrope.verify import VERIFIERS, BoundStage, certify, read_verdicts
from tightrope.verify.certificates import export
from tightrope.verify.proof import Leaf, Proof
from tightrope.verify.stages import CROWN

from .conftest import POINTS, labelled, random_net
from .referee import case, smallest_margin
from .tampering import examples, is_rejected, store

PROVERS = [name for name in VERIFIERS if name not in ("none", "milp")]


def run(graph, examples, out, eps=0.1, **options):
    return certify(graph, examples, Box(eps), out=out, certificates=True, **{"verifier": "ibp", **options})


class Exact:
    """Examples as they are, in whatever precision."""

    def __init__(self, x):
        self.x = x

    def __len__(self):
        return len(self.x)

    def identity(self):
        return "exact"

    def batches(self, order):
        return ((self.x[index], torch.zeros(len(index), dtype=torch.int64), index) for index in order)


class TestProofs:
    @pytest.mark.parametrize("verifier", PROVERS)
    def test_every_proof_is_stored_and_accepted(self, verifier, tmp_path):
        proved = 0
        for seed, norm in enumerate((Box, Box, L1Ball, L2Ball, Box)):
            asked, out = case(seed + 5, norm), tmp_path / f"{seed}.jsonl"
            (verdict,) = store(asked.graph, asked.x, asked.y, asked.region, out, verifier)
            report = checker.recheck(out)
            assert (report["accepted"], report["rejected"]) == (1, [])
            assert report["robust"] == (verdict.status == "robust") == (verdict.certificate.proof is not None)
            proved += report["robust"]
            if report["robust"] and norm is not L2Ball:
                assert smallest_margin(asked) > 0
        assert proved

    def test_the_cells_of_a_search_are_stored_and_accepted(self, tmp_path):
        graph, x, y, region = examples(0, 40)
        out, sizes = tmp_path / "c.jsonl", Counter()
        store(graph, x, y, Box(region.eps * 1.5), out, "complete")
        assert checker.recheck(out)["accepted"] == 40
        for path in out.with_suffix(".certificates").glob("0*"):
            tensors, _ = checker.unpack(path.read_bytes())
            sizes.update((value > -1).sum() for name, value in tensors.items() if name.endswith("/splits"))
        assert sum(count for size, count in sizes.items() if size > 1) > 2

    def test_what_a_solver_proved_has_none(self, tmp_path, monkeypatch):
        graph, x, y, region = examples(0, 12)
        monkeypatch.setitem(VERIFIERS, "milp", VERIFIERS["milp"][-1:])
        verdicts = store(graph, x, y, region, tmp_path / "c.jsonl", "milp")
        robust = sum(verdict.status == "robust" for verdict in verdicts)
        report = checker.recheck(tmp_path / "c.jsonl")
        assert robust > 0
        assert (report["robust"], report["without_certificate"]) == (0, robust)
        assert report["accepted"] == 12 - robust
        assert f"NOT checked: {robust} robust" in checker.summary(report)

    def test_what_the_checker_cannot_repeat_has_none(self, graph, examples, tmp_path, monkeypatch):
        monkeypatch.setitem(VERIFIERS, "test", (BoundStage("test", CROWN, rule="ibp"),))
        result = run(graph, examples, tmp_path / "c.jsonl", verifier="test")
        assert [v.certificate.proof for v in result if v.status == "robust"] == ["ibp", None]
        assert result.summary()["without_certificate"] == 1
        assert checker.recheck(tmp_path / "c.jsonl")["without_certificate"] == 1

    def test_a_network_that_the_checker_does_not_know_has_none(self, tmp_path):
        graph = random_net(0, layer=nn.Tanh)
        result = run(graph, labelled(graph, 10), tmp_path / "c.jsonl", 0.01)
        assert result.summary()["without_certificate"] == result.summary()["robust"] > 0
        assert not (tmp_path / "c.certificates").exists()
        with pytest.raises(ValueError, match="does not know Tanh"):
            checker.recheck(tmp_path / "c.jsonl")

    @pytest.mark.parametrize("seed", range(10))
    def test_trees_are_written_so_that_the_checker_reads_the_same_cells(self, seed):
        random, leaves = np.random.default_rng(seed), []
        for rival in (1, 4):
            stack = [{}]
            while stack:
                signs = stack.pop()
                free = sorted(set(range(9)) - set(signs))
                if len(signs) < 6 and random.random() < 0.7:
                    neuron = int(random.choice(free))
                    stack += [signs | {neuron: 1}, signs | {neuron: -1}]
                else:
                    number = float(len(leaves))
                    multipliers = {neuron: number + neuron / 10 for neuron in signs}
                    leaves.append(Leaf(rival, signs, np.full(2, number / 64), number, multipliers))
        random.shuffle(leaves)
        found = Proof("crown", np.array([3, 5]), tuple(leaves)).tensors("<f2")
        read = checker.leaves(found["rivals"].tolist(), found["splits"].tolist())
        weights = found["weights"].tolist()
        assert len(read) == len(leaves)
        for (rival, path), slopes in zip(read, found["slopes"], strict=True):
            (leaf,) = (one for one in leaves if one.weight == slopes[0] * 64)
            assert (rival, dict(path)) == (leaf.rival, leaf.signs)
            weight, *multipliers = (weights.pop(0) for _ in range(1 + len(path)))
            assert weight == leaf.weight
            assert multipliers == pytest.approx([leaf.multipliers[neuron] for neuron, _ in path])
        assert weights == []


class TestFiles:
    """Beside the verdicts, and never behind them."""

    def test_certificates_are_there_before_the_verdicts(self, graph, examples, tmp_path, monkeypatch):
        def full(*_):
            raise TightropeError("no space left")

        out = tmp_path / "c.jsonl"
        with monkeypatch.context() as patch:
            patch.setattr("tightrope.verify.resumable.append_lines", full)
            with pytest.raises(TightropeError):
                run(graph, examples, out)
        assert read_verdicts(out)[1] == []
        assert len(list((tmp_path / "c.certificates").glob("0*"))) == 1
        assert is_rejected(out)
        run(graph, examples, out, resume=True)
        assert checker.recheck(out)["accepted"] == 4

    def test_a_run_that_was_cut_off_anywhere_goes_on(self, graph, examples, tmp_path, chunks_of_two):
        out = tmp_path / "c.jsonl"
        run(graph, examples, out)
        content = out.read_bytes()
        header = content.index(b"\n") + 1
        for length in {*range(header, len(content), 97), len(content) - 1}:
            out.write_bytes(content[:length])
            assert is_rejected(out) or length == len(content) - 1
            run(graph, examples, out, resume=True)
            report = checker.recheck(out)
            assert (report["accepted"], report["rejected"]) == (4, [])

    def test_more_examples_may_be_added(self, graph, examples, tmp_path):
        out = tmp_path / "c.jsonl"
        run(graph, examples, out, first=1)
        assert checker.recheck(out)["examples"] == 1
        run(graph, examples, out, resume=True)
        assert checker.recheck(out)["accepted"] == 4
        out.write_text("".join(out.read_text().splitlines(keepends=True)[:3]))
        assert [entry["index"] for entry in checker.recheck(out)["rejected"]] == [2, 3]

    def test_whoever_resumes_asks_for_certificates_too(self, graph, examples, tmp_path):
        run(graph, examples, tmp_path / "c.jsonl")
        with pytest.raises(IdentityError, match="certificates"):
            certify(graph, examples, Box(0.1), verifier="ibp", out=tmp_path / "c.jsonl", resume=True)

    def test_a_folder_of_other_verdicts_is_refused(self, graph, examples, tmp_path):
        run(graph, examples, tmp_path / "c.jsonl")
        (tmp_path / "c.jsonl").unlink()
        with pytest.raises(InputError, match="holds certificates of other verdicts"):
            run(graph, examples, tmp_path / "c.jsonl")

    def test_they_need_a_file_of_verdicts(self, graph, examples):
        with pytest.raises(InputError, match="--out FILE"):
            run(graph, examples, None)

    def test_verdicts_do_not_depend_on_them(self, graph, examples, tmp_path):
        with_, without = (
            run(graph, examples, tmp_path / "c.jsonl"),
            certify(graph, examples, Box(0.1), verifier="ibp"),
        )
        assert [(v.status, v.stage, v.margin) for v in with_] == [
            (v.status, v.stage, v.margin) for v in without
        ]
        assert all(verdict.certificate is None for verdict in without)
        assert "without_certificate" not in without.summary()

    def test_inputs_that_float32_holds_are_stored_in_it(self, graph, tmp_path):
        for kind, x in (
            ("float32", torch.tensor(POINTS)),
            ("float64", torch.tensor(POINTS).double() * (1 - 1e-12)),
        ):
            out = tmp_path / f"{kind}.jsonl"
            run(graph, Exact(x), out)
            (path,) = out.with_suffix(".certificates").glob("0*")
            assert str(checker.unpack(path.read_bytes())[0]["x"].dtype) == kind

    def test_a_file_of_verdicts_without_is_no_file_of_certificates(self, graph, examples, tmp_path):
        certify(graph, examples, Box(0.1), verifier="ibp", out=tmp_path / "c.jsonl")
        with pytest.raises(ValueError, match="holds no certificates"):
            checker.recheck(tmp_path / "c.jsonl")
        for content in ("", "{}", "[]\n[]\n", json.dumps({"certificates": 3, "identity": {}})):
            (tmp_path / "other").write_text(content)
            with pytest.raises(ValueError, match="holds no certificates"):
                checker.recheck(tmp_path / "other")

    def test_the_last_node_of_a_network_may_be_read_by_others(self):
        class Twice(nn.Module):
            def __init__(self):
                super().__init__()
                self.net = nn.Linear(2, 2)

            def forward(self, x):
                z = self.net(x)
                return nn.functional.relu(z) + z

        assert export(trace(Twice().double(), (2,))).nodes[-1]["op"] == "add"

    def test_logits_of_large_numbers_that_cancel_may_differ_by_their_rounding(self, monkeypatch):
        first, second = nn.Linear(64, 128, bias=False), nn.Linear(128, 2, bias=False)
        factors = torch.linspace(1e8, 2e8, 64) / 3
        with torch.no_grad():
            first.weight.copy_(torch.cat([torch.eye(64), torch.eye(64).flip(0)]))
            second.weight.copy_(torch.zeros(2, 128))
            second.weight[0] = torch.cat([factors, -factors.flip(0)])  # its margin is 0, but for rounding
        net = nn.Sequential(first, nn.ReLU(), second).double()
        program = export(trace(net, (64,)))
        run = checker.Network.run
        monkeypatch.setattr(checker.Network, "run", lambda network, x: run(network, x) + 1e-2)
        with pytest.raises(TightropeError, match="computes something else"):
            export(trace(net, (64,)))
        assert len(program.nodes) == 4

"""`tr.recheck` and `tightrope recheck`: also against the network and the data that a file names."""

import json
import sys

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import tightrope as tr
from tightrope import checker, cli
from tightrope.data import load
from tightrope.errors import InputError
from tightrope.targets import make_model

from .verify.tampering import Files

NETS = """
from torch import nn
def dense(): return nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
def conv():
    return nn.Sequential(nn.Conv2d(1, 4, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2))
def steep(): return nn.Sequential(nn.Flatten(), nn.Linear(4, 1), nn.Linear(1, 2)).double()
def smooth(): return nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.Sigmoid(), nn.Linear(8, 2))
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with networks, weights and data, all at random."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(NETS)
    torch.manual_seed(0)
    for name in ("dense", "conv", "smooth"):
        save_file(make_model(f"nets:{name}").state_dict(), tmp_path / f"{name}.safetensors")
    random = np.random.default_rng(0)
    x, y = random.random((20, 1, 2, 2), np.float32), random.integers(0, 2, 20)
    np.savez(tmp_path / "data.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    yield tmp_path
    sys.modules.pop("nets", None)


def command(*arguments):
    """Exit status, stdout and stderr."""
    done = CliRunner().invoke(cli.cli, list(map(str, arguments)))
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout, done.stderr


def certified(name="dense", out="c.jsonl", eps="0.02"):
    weights = f"{name}.safetensors"
    return command(
        "certify", f"nets:{name}", "--weights", weights, "--data", "data.npz", "--eps", eps,
        "--certificates", "--out", out,
    )  # fmt: skip


class TestWhatItIsComparedWith:
    @pytest.mark.parametrize("name", ["dense", "conv"])
    def test_the_network_and_the_data_that_the_file_names(self, here, name):
        assert "certificates: c.certificates" in certified(name)[2]
        result = tr.recheck("c.jsonl")
        assert sum(result.accepted.values()) == result.examples == 20
        assert result.rejected == ()
        assert result.accepted["robust"] > 0
        said = (f"the network is that of nets:{name}", "the inputs and labels are those of data.npz")
        assert result.compared == said

    def test_a_network_that_has_changed_is_not_the_one_that_was_certified(self, here):
        certified()
        weights = load_file("dense.safetensors")
        weights["1.weight"][0, 0] += 1e-5
        save_file(weights, "dense.safetensors")
        result = tr.recheck("c.jsonl")
        assert sum(result.accepted.values()) == 0
        assert result.rejected == (
            {"index": None, "reason": "the stored network is not the one in nets:dense"},
        )

    def test_what_is_nearly_the_network_proves_nothing(self, here):
        """A share of 1e-12 of large weights, which cancel in the end, would turn the answers."""
        weights = {
            "1.weight": [[40.0, 0.0, 0.0, 0.0]],
            "1.bias": [1e13],
            "2.weight": [[1.0], [0.0]],
            "2.bias": [-1e13 - 18, 0.0],
        }
        tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in weights.items()}
        save_file(tensors, "steep.safetensors")
        x, y = np.full((20, 1, 2, 2), 0.5, np.float32), np.arange(20) % 2
        np.savez("data.npz", x_train=x, y_train=y, x_test=x, y_test=y)
        certified("steep", eps="0.1")
        files = Files.read(here / "c.jsonl")
        record = next(record for record in files.records if record["status"] == "falsified")
        (bias,) = (value for value in files.network[0].values() if value.tolist() == [1e13])
        bias *= 1 + 9e-13
        files.set(record, status="robust", stage="ibp", margin=1e-3, witness=None, proof={"rule": "ibp"})
        record["certificate"]["proof"] = "ibp"
        files.write(here / "c.jsonl", sealed=True)
        assert checker.recheck(here / "c.jsonl")["robust"] == 1  # of the network stored there
        result = tr.recheck("c.jsonl")
        assert result.accepted["robust"] == 0
        assert "only proved to exceed -2" in result.rejected[0]["reason"]
        assert result.compared[0] == "the network is that of nets:steep"

    def test_a_network_of_another_kind_is_not_the_one_that_was_certified(self, here):
        certified()
        (here / "nets.py").write_text(NETS.replace("nn.ReLU()", "nn.Sigmoid()"))
        sys.modules.pop("nets", None)
        (rejected,) = tr.recheck("c.jsonl").rejected
        assert "Sigmoid" in rejected["reason"]

    def test_a_run_that_was_moved_is_compared_with_itself(self, here):
        run = here / "run"
        arguments = ("--data", "data.npz", "--model", "nets:dense", "--method", "ibp", "--eps", "0.02")
        for name, seed in (("run", 0), ("other-run", 1)):
            assert command("train", *arguments, "--epochs", 1, "--seed", seed, "--out", name)[0] == 0
        assert command("certify", "run", "--certificates")[0] == 0
        run.rename("moved")
        (here / "other-run").rename("run")
        (file,) = (here / "moved").glob("certify-*.jsonl")
        status, out, _ = command("recheck", file)
        assert status == 0
        assert f"the network is that of {file.parent}" in out

    def test_where_the_network_is_gone_it_says_so(self, here):
        certified()
        (here / "dense.safetensors").unlink()
        result = tr.recheck("c.jsonl")
        assert result.rejected == ()
        assert "NOT compared: dense.safetensors is missing" in result.compared[0]

    def test_where_the_data_are_others_it_says_so(self, here):
        certified()
        content = dict(np.load("data.npz"))
        content["x_test"] = content["x_test"][::-1]
        np.savez("data.npz", **content)
        result = tr.recheck("c.jsonl")
        assert result.rejected == ()
        assert "NOT compared with data: data.npz here is another" in result.compared[1]

    def test_an_input_that_is_not_the_data_sets_is_rejected(self, here):
        certified()
        files = Files.read(here / "c.jsonl")
        record = next(record for record in files.records if record["status"] == "robust")
        tensors, _, place = files.claim(record)
        tensors["x"] = tensors["x"].copy()
        tensors["x"][place] = np.nextafter(tensors["x"][place], np.float32(0.5))
        files.write(here / "c.jsonl", sealed=True)
        result = tr.recheck("c.jsonl")
        reason = "its input or label is not that of data.npz"
        assert result.rejected == ({"index": record["index"], "reason": reason},)
        assert sum(result.accepted.values()) == 19

    def test_the_inputs_that_are_compared_are_those_that_were_checked(self, here):
        """Even where a file of another folder, with the right inputs, is named beside a checked one."""
        certified()
        files = Files.read(here / "c.jsonl")
        record = files.records[0]
        name = record["certificate"]["file"]
        (here / "decoy").mkdir()
        (here / "decoy" / name).write_bytes(files.raw[name])
        tensors, _, place = files.claim(record)
        tensors["x"] = tensors["x"].copy()
        tensors["x"][place] = np.nextafter(tensors["x"][place], np.float32(0.5))
        files.write(here / "c.jsonl", sealed=True)
        path = here / "c.jsonl"
        path.write_text(path.read_text().replace(f'"file": "{name}"', f'"file": "../decoy/{name}"'))
        (rejected,) = tr.recheck("c.jsonl").rejected
        assert rejected == {"index": 0, "reason": "its input or label is not that of data.npz"}

    def test_a_blank_line_is_no_verdict(self, here):
        certified()
        path = here / "c.jsonl"
        path.write_text(path.read_text().replace("\n", "\n\n", 1))
        assert sum(tr.recheck("c.jsonl").accepted.values()) == 20

    @pytest.mark.parametrize("key", ["weights", "target"])
    def test_where_the_file_does_not_say_which_network_it_says_so(self, here, key):
        certified()
        files = Files.read(here / "c.jsonl")
        del files.header[key]
        files.write(here / "c.jsonl", sealed=False)
        result = tr.recheck("c.jsonl")
        assert sum(result.accepted.values()) == 20
        assert "NOT compared" in result.compared[0]

    @pytest.mark.parametrize(
        ("index", "reason"),
        [
            (-1, "-1 is not the index of an example"),
            (0.5, "0.5 is not the index of an example"),
            (20, "data.npz has no such example"),
            (21, "21 is not the index of an example"),
        ],
    )
    def test_an_example_that_the_data_set_does_not_have_is_rejected(self, here, index, reason):
        certified()
        files = Files.read(here / "c.jsonl")
        record = next(r for r in files.records if r["status"] == "misclassified")
        _, claim, _ = files.claim(record)
        record["index"] = claim["index"] = index
        files.header["examples"] = 21
        files.write(here / "c.jsonl", sealed=True)
        assert {"index": index, "reason": reason} in tr.recheck("c.jsonl").rejected

    def test_of_a_file_that_was_cut_off_the_verdicts_before_are_checked(self, here):
        certified()
        path = here / "c.jsonl"
        content = path.read_bytes()
        whole = content[: content[:-1].rfind(b"\n") + 1]
        for tail in (content[len(whole) : len(whole) + 30], b"\0" * 30):
            path.write_bytes(whole + tail)
            found = tr.recheck(path)
            assert sum(found.accepted.values()) == 19
            assert len(found.rejected) == 1
            assert "cut off" in found.rejected[0]["reason"]
        path.write_bytes(content[:-1])  # an editor may take the last newline
        assert sum(tr.recheck(path).accepted.values()) == 20

    def test_a_file_from_python_names_neither(self, here):
        net = make_model("nets:dense")
        tr.certify(net, load("data.npz").test, tr.Box(0.02), out="c.jsonl", certificates=True, device="cpu")
        result = tr.recheck(here / "c.jsonl")
        assert sum(result.accepted.values()) == 20
        assert [("NOT compared" in line) for line in result.compared] == [True, True]


class TestCommand:
    def test_exit_status_0_where_all_is_accepted(self, here):
        certified()
        status, out, err = command("recheck", "c.jsonl")
        assert status == 0
        assert "accepted 20 of 20" in out
        assert "20 of 20 examples" in err

    def test_exit_status_3_where_a_claim_fails(self, here):
        certified()
        files = Files.read(here / "c.jsonl")
        next(r for r in files.records if r["status"] == "misclassified")["status"] = "robust"
        files.write(here / "c.jsonl", sealed=False)
        status, out, err = command("recheck", "c.jsonl", "--json")
        assert status == 3
        report = json.loads(out)
        assert report["accepted"] == 19
        assert "status: the certificate says 'misclassified'" in report["rejected"][0]["reason"]
        assert "rejected: example" in err

    def test_exit_status_2_where_there_is_nothing_to_check(self, here):
        assert "none (the checker does not know Sigmoid)" in certified("smooth")[2]
        for path in ("c.jsonl", "data.npz", "nothing.jsonl"):
            with pytest.raises(InputError) as error:
                command("recheck", path)
            assert error.value.exit_code == 2

    def test_exit_status_2_where_the_certificates_are_left_behind(self, here):
        certified()
        (here / "c.certificates").rename("elsewhere")
        with pytest.raises(InputError, match=r"folder c\.certificates, which is to be beside it, has none"):
            command("recheck", "c.jsonl")

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"identity": None}, "damaged"),
            ({"format": "tightrope-certify/2"}, "its format is 'tightrope-certify/2'"),
            ({"format": None}, "its format is None"),
        ],
    )
    def test_exit_status_2_where_the_header_is_another(self, here, change, said):
        certified()
        header, rest = (here / "c.jsonl").read_text().split("\n", 1)
        (here / "c.jsonl").write_text(json.dumps(json.loads(header) | change) + "\n" + rest)
        with pytest.raises(InputError, match=said):
            command("recheck", "c.jsonl")

    def test_exit_status_2_where_brackets_never_close(self, here):
        (here / "c.jsonl").write_text("[" * 100_000)
        with pytest.raises(InputError, match="damaged"):
            command("recheck", "c.jsonl")

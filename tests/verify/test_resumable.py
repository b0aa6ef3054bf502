"""Records of all examples in a file, written as they come; looked at through `certify`."""

import errno
import itertools
import json
import os
from dataclasses import replace

import pytest
import torch
from filelock import FileLock
from torch import nn

from tightrope.attacks import Pgd
from tightrope.errors import IdentityError, InputError, TightropeError
from tightrope.files import append_lines
from tightrope.graph import trace
from tightrope.region import Box, L2Ball
from tightrope.verify import Judge, certify, read_verdicts
from tightrope.verify.records import VERDICTS
from tightrope.verify.resumable import Rest, go_through, share

from .conftest import handmade, labelled, random_net, timeless

ATTACK = Pgd(steps=4, step=1.0, loss="margin")


class Shifted(nn.Module):
    """A network behind a shift that a file of weights does not hold: a buffer, or a plain attribute."""

    def __init__(self, network, by, persistent):
        super().__init__()
        self.network = network
        if persistent is None:
            self.by = by
        else:
            self.register_buffer("by", by, persistent=persistent)

    def forward(self, x):
        return self.network(x + self.by)


class Passed:
    """Examples whose batches go through a function."""

    def __init__(self, examples, function):
        self.examples, self.function, self.shape = examples, function, examples.shape

    def __len__(self):
        return len(self.examples)

    def identity(self):
        return self.examples.identity()

    def batches(self, order):
        return self.function(self.examples.batches(order))


class TestResume:
    """A stopped certification goes on to the verdicts that it would have come to anyway."""

    def test_from_wherever_the_file_was_cut_off(self, graph, examples, tmp_path, chunks_of_two):
        out = tmp_path / "certify.jsonl"

        def run(resume):
            return timeless(certify(graph, examples, Box(0.1), attack=ATTACK, out=out, resume=resume))

        wanted = run(resume=False)
        content = out.read_bytes()
        lines = content.splitlines(keepends=True)
        ends = list(itertools.accumulate(map(len, lines)))
        beside = {end + by for end in ends for by in (-1, 0, 1)}  # within a line one place is like another
        for length in sorted({*range(ends[0], ends[-1], 40), *beside} & {*range(ends[0], ends[-1] + 1)}):
            out.write_bytes(content[:length])
            assert run(resume=True) == wanted
            header, verdicts = read_verdicts(out)
            assert header == json.loads(lines[0])
            assert sorted(timeless(verdicts), key=lambda record: record["index"]) == wanted

    def test_after_an_interruption(self, graph, examples, tmp_path, chunks_of_two):
        out = tmp_path / "certify.jsonl"

        def interrupted(batches):
            yield next(batches)
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            certify(graph, Passed(examples, interrupted), Box(0.1), attack=ATTACK, out=out)
        done = read_verdicts(out)[1]
        assert [verdict.index for verdict in done] == [0, 1]
        result = certify(graph, examples, Box(0.1), attack=ATTACK, out=out, resume=True)
        assert next(iter(result)) == done[0]  # seconds and all: what is done is not done again
        assert timeless(result) == timeless(certify(graph, examples, Box(0.1), attack=ATTACK))

    def test_with_more_examples(self, graph, examples, tmp_path):
        out = tmp_path / "certify.jsonl"
        certify(graph, examples, Box(0.1), first=1, out=out)
        assert len(certify(graph, examples, Box(0.1), out=out, resume=True)) == 4
        assert len(certify(graph, examples, Box(0.1), first=2, out=out, resume=True)) == 2
        header, verdicts = read_verdicts(out)
        assert [verdict.index for verdict in verdicts] == [0, 1, 2, 3]
        assert header["examples"] == 4  # all that was ever asked for: fewer would be an unfinished file

    def test_not_where_an_example_is_another_by_now(self, graph, examples, tmp_path):
        """Also one that a data set's identity, which may look at some examples only, does not tell."""
        out = tmp_path / "certify.jsonl"
        certify(graph, examples, Box(0.1), first=3, out=out)
        _, *before = out.read_text().splitlines()

        def changed(batches):
            for x, y, index in batches:
                yield torch.where((index == 1).view(-1, 1), 1 - x, x), y, index

        with pytest.raises(IdentityError, match="example 1 is not the one that was judged before"):
            certify(graph, Passed(examples, changed), Box(0.1), out=out, resume=True)
        assert sorted(out.read_text().splitlines()[1:]) == sorted(before)
        assert len(certify(graph, examples, Box(0.1), out=out, resume=True)) == 4

    def test_of_a_file_from_before_inputs_were_noted(self, graph, examples, tmp_path):
        out = tmp_path / "certify.jsonl"
        certify(graph, examples, Box(0.1), first=3, out=out)
        header, *records = map(json.loads, out.read_text().splitlines())
        assert all(len(record.pop("input")) == 16 for record in records)
        out.write_text("".join(json.dumps(line) + "\n" for line in (header, *records)))
        assert len(certify(graph, examples, Box(0.1), out=out, resume=True)) == 4

    def test_of_a_file_that_is_not_there_yet(self, graph, examples, tmp_path):
        out = tmp_path / "new" / "certify.jsonl"
        assert len(certify(graph, examples, Box(0.1), out=out, resume=True)) == 4

    @staticmethod
    def other_weights():
        net = handmade()
        net[0].bias.data[0] += 1e-7
        return net

    @staticmethod
    def other_activation():
        net = handmade()
        net[1] = nn.LeakyReLU(0.1)
        return net

    @pytest.mark.parametrize("persistent", [False, None])
    def test_a_network_with_another_tensor_that_is_not_saved_is_another(self, examples, tmp_path, persistent):
        def shifted(by):
            net = Shifted(handmade(), torch.full((3,), by), persistent)
            return trace(net, (3,))

        out = tmp_path / "certify.jsonl"
        certify(shifted(0.0), examples, Box(0.1), verifier="ibp", out=out, first=2)
        assert len(certify(shifted(0.0), examples, Box(0.1), verifier="ibp", out=out, resume=True)) == 4
        with pytest.raises(IdentityError, match=r"other settings:\n  weights: "):
            certify(shifted(0.5), examples, Box(0.1), verifier="ibp", out=out, resume=True)

    @pytest.mark.parametrize(
        ("key", "change"),
        [
            ("weights", lambda: {"graph": trace(TestResume.other_weights(), (3,))}),
            ("network", lambda: {"graph": trace(TestResume.other_activation(), (3,))}),
            ("data", lambda: {"examples": labelled(random_net(0, inputs=3), 4)}),
            ("eps", lambda: {"region": Box(0.1 + 1e-12)}),
            ("norm", lambda: {"region": L2Ball(0.1)}),
            ("domain", lambda: {"region": Box(0.1, domain=None)}),
            ("verifier", lambda: {"verifier": "none"}),
            ("attack", lambda: {"attack": replace(ATTACK, steps=5)}),
            ("attack", lambda: {"attack": None}),
            ("seed", lambda: {"seed": 1}),
            ("time_limit", lambda: {"time_limit": 1.0}),
        ],
    )
    def test_what_was_made_otherwise_is_refused_by_name(self, graph, examples, tmp_path, key, change):
        settings = {
            "graph": graph,
            "examples": examples,
            "region": Box(0.1),
            "verifier": "ibp",
            "attack": ATTACK,
        }
        settings["out"] = tmp_path / "certify.jsonl"
        certify(**settings)
        before = settings["out"].read_bytes()
        with pytest.raises(
            IdentityError, match=rf"certify\.jsonl was made with other settings:\n  {key}: .*\n"
        ):
            certify(**settings | change(), resume=True)
        assert settings["out"].read_bytes() == before

    def test_what_a_stopped_run_had_done_is_not_done_again(self, graph, examples, tmp_path, monkeypatch):
        out, seen = tmp_path / "certify.jsonl", []
        certify(graph, examples, Box(0.1), first=3, verifier="ibp", out=out)
        lines = out.read_text().splitlines(keepends=True)
        out.write_text("".join((lines[0], lines[2])))  # of three, the second alone

        def watched(judge, x, y, index):
            seen.extend(index.tolist())
            return call(judge, x, y, index)

        call = Judge.__call__
        monkeypatch.setattr(Judge, "__call__", watched)
        certify(graph, examples, Box(0.1), verifier="ibp", out=out, resume=True)
        assert seen == [0, 2, 3]


class TestFile:
    """The file that records are written to."""

    def test_one_that_exists_is_neither_overwritten_nor_continued_unasked(self, graph, examples, tmp_path):
        out = tmp_path / "certify.jsonl"
        out.write_text("precious")
        with pytest.raises(InputError, match=r"already exists: resume it \(--resume, in Python"):
            certify(graph, examples, Box(0.1), out=out)
        assert out.read_text() == "precious"

    def test_a_second_writer_is_refused(self, graph, examples, tmp_path):
        out = tmp_path / "certify.jsonl"
        with (
            FileLock(tmp_path / ".certify.jsonl.lock"),
            pytest.raises(InputError, match="another process is writing to"),
        ):
            certify(graph, examples, Box(0.1), out=out)
        assert not out.exists()
        assert len(certify(graph, examples, Box(0.1), out=out)) == 4

    def test_a_second_writer_leaves_the_certificates_of_the_first_alone(self, graph, examples, tmp_path):
        out = tmp_path / "certify.jsonl"
        with FileLock(tmp_path / ".certify.jsonl.lock"), pytest.raises(InputError, match="another process"):
            certify(graph, examples, Box(0.1), out=out, certificates=True)
        assert not out.with_suffix(".certificates").exists()

    def test_one_that_cannot_be_written(self, graph, examples, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(InputError, match=r"cannot write .*certify\.jsonl\.lock: File exists; check"):
            certify(graph, examples, Box(0.1), out=tmp_path / "file" / "certify.jsonl")

    def test_a_full_disk_keeps_what_was_written(self, graph, examples, tmp_path, chunks_of_two, monkeypatch):
        out, syncs = tmp_path / "certify.jsonl", iter([None, None])  # the header and two examples fit

        def full(descriptor, sync=os.fsync):
            if next(syncs, errno.ENOSPC) is not None:
                os.write(descriptor, b'{"index": 2, "lab')
                raise OSError(errno.ENOSPC, "No space left on device")
            sync(descriptor)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(TightropeError, match=r"no space left to write .*certify\.jsonl; .*Free some"):
                certify(graph, examples, Box(0.1), attack=ATTACK, out=out)
        assert [verdict.index for verdict in read_verdicts(out)[1]] == [0, 1]
        assert out.read_bytes().endswith(b"\n")
        result = certify(graph, examples, Box(0.1), attack=ATTACK, out=out, resume=True)
        assert timeless(result) == timeless(certify(graph, examples, Box(0.1), attack=ATTACK))

    @pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux")  # noqa: PTH110
    def test_a_really_full_device(self, tmp_path):
        (tmp_path / "file").symlink_to("/dev/full")
        with pytest.raises(TightropeError, match="no space left"):
            append_lines(tmp_path / "file", [{"index": 0}])


@pytest.mark.parametrize(
    ("examples", "workers", "wanted"),
    [(250, 8, 8), (1000, 8, 32), (10_000, 8, 250), (100, 1, 250), (3, 8, 1), (0, 8, 1), (9, 2, 2)],
)
def test_several_workers_have_batches_to_the_end(examples, workers, wanted):
    assert share(250, examples, workers) == wanted


def test_what_is_left_to_the_end_has_a_progress_of_its_own(examples, monkeypatch, capsys):
    monkeypatch.setattr("tightrope.progress.QUIET_SECONDS", 0.0)
    monkeypatch.setattr("tightrope.progress.CROWDED_SECONDS", 0.0)
    verdicts = dict(enumerate(certify(trace(handmade(), (3,)), examples, Box(0.1), verifier="ibp")))

    def at_first(x, y, index):
        return [replace(verdicts[i], status="undecided") for i in index.tolist()]

    def at_last(left):
        return lambda x, y, index: [verdicts[i] for i in index.tolist()]

    rest = Rest("search", lambda verdict: verdict.status == "undecided", at_last, batch=2)
    shared = {"label": "certify", "first": None, "batch": 3, "out": None, "resume": False}
    capsys.readouterr()
    records = go_through(examples, at_first, VERDICTS, {}, **shared, rest=rest)
    assert records == tuple(verdicts.values())
    lines = [line.split(",")[0] for line in capsys.readouterr().err.splitlines()]
    assert lines == ["certify: 3/4", "certify: 4/4", "search: 2/4", "search: 4/4"]

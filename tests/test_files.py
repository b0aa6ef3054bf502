"""Files that survive a crash, and errors that say which file and what to do."""

import errno
import hashlib
import json
import math
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, TypeAdapter

from tightrope.errors import FileError, InputError, TightropeError
from tightrope.files import (
    append_lines,
    check_line,
    fingerprint,
    load_tensors,
    locked,
    read_json,
    read_lines,
    save_tensors,
    to_json,
    write_atomically,
)

TENSORS = {
    "float": torch.linspace(-1, 1, 7),
    "double": torch.tensor([[math.pi]], dtype=torch.float64),
    "half": torch.tensor([1.0, 2.0], dtype=torch.bfloat16),
    "scalar": torch.tensor(5),
    "empty": torch.zeros(0, 3),
    "turned": torch.arange(6.0).view(2, 3).T,
    "parameter": torch.nn.Parameter(torch.ones(2)),
}


class Crash(BaseException):
    """The process is gone."""


def failing(error):
    def fsync(_descriptor):
        raise error

    return fsync


def of(code):
    return OSError(code, os.strerror(code))


# ------------------------------------------------------------------------------------------ writing


@pytest.mark.parametrize("content", ["old and new\n", b"\0\xff", "", "grüße"])
def test_a_file_is_written_whole(tmp_path, content):
    path = tmp_path / "made" / "on the way" / "file"
    write_atomically(path, content)
    write_atomically(path, content)
    assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert [p.name for p in path.parent.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "error", [Crash(), of(errno.ENOSPC), of(errno.EDQUOT), of(errno.EIO), of(errno.EROFS)]
)
def test_whatever_happens_while_writing_the_old_file_stays(tmp_path, monkeypatch, error):
    path = tmp_path / "file"
    write_atomically(path, "old")
    monkeypatch.setattr(os, "fsync", failing(error))
    with pytest.raises((Crash, TightropeError)):
        write_atomically(path, "new and longer")
    assert path.read_text() == "old"
    monkeypatch.undo()
    write_atomically(path, "new")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "new"


@pytest.mark.parametrize("write", [lambda p: write_atomically(p, "x"), lambda p: append_lines(p, [{"a": 1}])])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_line_that_says_what_to_do(tmp_path, monkeypatch, write, code):
    monkeypatch.setattr(os, "fsync", failing(of(code)))
    with pytest.raises(TightropeError, match=r"no space left to write .*file; .*Free some space") as full:
        write(tmp_path / "file")
    assert full.value.exit_code == 1


def test_a_file_error_is_a_user_s_error():
    assert issubclass(FileError, InputError)
    assert FileError.exit_code == 2


def test_a_place_that_cannot_be_written_to_is_a_file_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match=r"cannot write .*file/below: .*check the path"):
        write_atomically(tmp_path / "file" / "below", "x")
    with pytest.raises(FileError, match="cannot write "):
        append_lines(tmp_path, [{"a": 1}])


# ------------------------------------------------------------------------------------------- locks

TAKEN = InputError("somebody else is there")


def test_a_lock_is_held_by_one_at_a_time(tmp_path):
    path = tmp_path / "new" / ".lock"
    with locked(path, TAKEN), pytest.raises(InputError, match="somebody else is there"), locked(path, TAKEN):
        pytest.fail("two hold the lock")
    with locked(path, TAKEN):
        pass


def test_a_lock_is_given_back_when_what_it_was_held_for_fails(tmp_path):
    with pytest.raises(TimeoutError, match="of another kind"), locked(tmp_path / ".lock", TAKEN):
        raise TimeoutError("of another kind")
    with locked(tmp_path / ".lock", TAKEN):
        pass


@pytest.mark.parametrize("place", ["file", "/proc"])
def test_a_lock_that_the_system_refuses_is_not_called_taken(tmp_path, place):
    (tmp_path / "file").write_text("")
    if not (tmp_path / place).exists():
        pytest.skip(f"there is no {place}")
    message = r"cannot write .*/\.lock: (File exists|No such file|Permission denied)"
    with pytest.raises(InputError, match=message), locked(tmp_path / place / ".lock", TAKEN):
        pytest.fail("there is no lock")


# ------------------------------------------------------------------------------------------- lines

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
RECORDS = st.lists(st.dictionaries(st.text(), JSON, max_size=4), max_size=4)


@settings(max_examples=30)
@given(RECORDS, RECORDS)
def test_lines_come_back_as_they_were_appended(tmp_path_factory, first, second):
    path = tmp_path_factory.mktemp("lines") / "file"
    append_lines(path, first)
    append_lines(path, second)
    assert [json.loads(line) for line in read_lines(path)] == first + second
    assert path.read_bytes().count(b"\n") == len(first + second)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_json_has_no_nan_and_a_bad_record_writes_none_of_its_batch(tmp_path, bad):
    with pytest.raises(ValueError, match="JSON"):
        to_json({"loss": bad})
    append_lines(tmp_path / "file", [{"a": 1}])
    with pytest.raises(ValueError, match="JSON"):
        append_lines(tmp_path / "file", [{"a": 2}, {"a": bad}])
    assert read_lines(tmp_path / "file") == [b'{"a": 1}']


def test_an_append_that_fails_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "file"
    append_lines(path, [{"a": 1}])
    monkeypatch.setattr(os, "fsync", failing(of(errno.ENOSPC)))
    with pytest.raises(TightropeError, match="no space left"):
        append_lines(path, [{"a": 2}, {"a": 3}])
    assert path.read_text() == '{"a": 1}\n'


@pytest.mark.parametrize(
    ("content", "lines"),
    [(b"", []), (b'{"a": 1}\n{"a"', [b'{"a": 1}']), (b'{"a": 1}\n{"a": 2}', [b'{"a": 1}', b'{"a": 2}'])],
)
def test_a_last_line_that_was_cut_off_is_left_out(tmp_path, content, lines):
    (tmp_path / "file").write_bytes(content)
    assert read_lines(tmp_path / "file") == lines


class Point(BaseModel):
    x: int


def test_a_checked_line_is_its_value_or_an_error_with_file_line_and_key(tmp_path):
    kind = TypeAdapter(Point)
    assert check_line(kind, b'{"x": 1}', tmp_path / "file", 3) == Point(x=1)
    for line, place in ((b'{"x": "one"}', "file, line 3: x: "), (b"{", "file, line 3: Invalid JSON")):
        with pytest.raises(FileError, match=place):
            check_line(kind, line, tmp_path / "file", 3)


# ------------------------------------------------------------------------------------------ reading


def test_json_objects_come_back(tmp_path):
    record = {"name": "grün", "shape": [1, 28, 28], "mean": None}
    write_atomically(tmp_path / "file", to_json(record, indent=2))
    assert read_json(tmp_path / "file") == record


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": ', "file is not valid JSON .*delete it or restore it"),
        (b"\xff\xfe", "file is not valid JSON"),
        (b"[1]", "file should hold a JSON object"),
        (None, "file is missing"),
        (..., "cannot read .*file: Is a directory"),
    ],
    ids=["cut off", "no text", "a list", "missing", "a folder"],
)
def test_what_is_no_json_object_is_a_file_error(tmp_path, content, message):
    path = tmp_path / "file"
    if content is ...:
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(FileError, match=message):
        read_json(path)


# ------------------------------------------------------------------------------------------ tensors


def test_tensors_and_header_come_back_bit_by_bit(tmp_path):
    header = {"step": 3, "seconds": 0.1 + 0.2, "sums": {"natural": [1.0, 2]}}
    save_tensors(tmp_path / "file", TENSORS, header)
    tensors, found = load_tensors(tmp_path / "file")
    assert found == header
    assert set(tensors) == set(TENSORS)
    for name, tensor in tensors.items():
        assert tensor.dtype == TENSORS[name].dtype
        assert torch.equal(tensor, TENSORS[name])


def test_tensors_that_share_memory_can_be_saved(tmp_path):
    whole = torch.arange(4.0)
    save_tensors(tmp_path / "file", {"a": whole, "b": whole[:2], "c": whole})
    tensors, header = load_tensors(tmp_path / "file")
    assert header == {}
    assert torch.equal(tensors["b"], whole[:2])


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_truncated_file_is_a_file_error(tmp_path, keep):
    path = tmp_path / "file"
    save_tensors(path, TENSORS)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(
        FileError, match=r"file is corrupt or not a safetensors file .*delete it or restore it"
    ):
        load_tensors(path)


def test_not_a_byte_may_change(tmp_path):
    path = tmp_path / "file"
    save_tensors(path, {"a": torch.rand(3), "b": torch.arange(2)}, {"step": 7})
    written = path.read_bytes()
    # Without these names there is no digest to ask for, as in files of others.
    names = {
        i for name in (b"header", b"sha256") for i in range(len(written)) if name in written[i - 5 : i + 6]
    }
    for place in sorted({*range(len(written))} - names):
        changed = bytearray(written)
        changed[place] ^= 1
        path.write_bytes(changed)
        with pytest.raises(FileError, match="is corrupt"):
            load_tensors(path)


def test_files_that_others_wrote_have_no_digest(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.ones(2)}, tmp_path / "file")
    assert load_tensors(tmp_path / "file")[0]["a"].tolist() == [1, 1]


def test_a_header_that_is_no_json_is_a_file_error(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.ones(1)}, tmp_path / "file", {"header": "{"})
    with pytest.raises(FileError, match="is corrupt"):
        load_tensors(tmp_path / "file")


def test_missing_and_unreadable_files_are_file_errors(tmp_path):
    with pytest.raises(FileError, match="nothing is missing"):
        load_tensors(tmp_path / "nothing")
    for read in (load_tensors, read_lines):
        with pytest.raises(FileError, match="cannot read "):
            read(tmp_path)


def test_a_fingerprint_tells_names_types_shapes_and_values_apart():
    base = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3])}
    others = [
        {"a": torch.tensor([1.0, 2.0])},
        {"a": base["a"], "c": base["b"]},
        {"a": torch.tensor([1.0, 2.0], dtype=torch.float64), "b": base["b"]},
        {"a": torch.tensor([[1.0, 2.0]]), "b": base["b"]},
        {"a": torch.tensor([1.0, 2.0 + 1e-6]), "b": base["b"]},
        {"a": torch.tensor([2.0, 1.0]), "b": base["b"]},
        {},
    ]
    prints = {fingerprint(tensors) for tensors in (base, *others)}
    assert len(prints) == len(others) + 1
    assert fingerprint(dict(reversed(base.items()))) == fingerprint(base)


def test_a_fingerprint_is_of_the_values_however_they_lie_in_memory():
    turned = TENSORS["turned"]
    assert fingerprint({"a": turned}) == fingerprint({"a": turned.contiguous()})
    assert len(fingerprint(TENSORS)) == 64
    by_hand = hashlib.sha256(b"a|torch.int64|(3,)|" + torch.arange(3).numpy().tobytes())
    assert fingerprint({"a": torch.arange(3)}) == by_hand.hexdigest()

import base64
import json
import math

import pytest
import torch

from tightrope.errors import InputError
from tightrope.verify import Verdict, Witness, read_verdicts
from tightrope.verify.records import to_record

HEADER = {
    "format": "tightrope-certify/1",
    "identity": {"eps": 0.3, "norm": "inf", "verifier": "ibp", "attack": None},
    "data": "mnist",
}
POINT = torch.tensor([[1 / 3, -0.0], [math.nextafter(0.5, 1), 5e-324]], dtype=torch.float64)
VERDICTS = [
    Verdict(0, 7, 7, "robust", "ibp", 0.1 + 0.2, 1e-5),
    Verdict(5, 7, 7, "falsified", "attack", -0.25, 0.001, Witness(POINT, 3)),
]


def write(folder, *records, tail=""):
    path = folder / "certify.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + tail)
    return path


def test_verdicts_are_read_back_bit_for_bit(tmp_path):
    header, found = read_verdicts(write(tmp_path, HEADER, *map(to_record, VERDICTS)))
    assert header == HEADER
    assert found[0] == VERDICTS[0]
    assert found[1].witness.predicted == 3
    assert found[1].witness.point.dtype == torch.float64
    assert found[1].witness.point.numpy().tobytes() == POINT.numpy().tobytes()
    assert found[1].witness.point.shape == POINT.shape


def test_verdicts_are_read_by_index_in_whatever_order_they_were_written(tmp_path):
    _, found = read_verdicts(write(tmp_path, HEADER, *map(to_record, reversed(VERDICTS))))
    assert [verdict.index for verdict in found] == [verdict.index for verdict in VERDICTS]


def test_numbers_are_little_endian_on_every_machine():
    record = to_record(VERDICTS[1])["witness"]
    assert base64.b64decode(record["float64"])[:8] == b"UUUUUU\xd5?"


def test_a_file_cut_off_anywhere_holds_its_whole_lines(tmp_path):
    path = write(tmp_path, HEADER, *map(to_record, VERDICTS))
    content = path.read_bytes()
    ends = [place for place, byte in enumerate(content) if byte == ord("\n")]
    for length in range(ends[0], len(content) + 1):
        path.write_bytes(content[:length])
        whole = sum(end <= length for end in ends)  # a line that only lacks its newline is whole
        assert len(read_verdicts(path)[1]) == whole - 1


@pytest.mark.parametrize("length", [0, 1, 20])
def test_a_file_cut_off_in_its_header_is_an_error(tmp_path, length):
    path = write(tmp_path, HEADER)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(InputError, match="line 1: the header is missing; delete the file"):
        read_verdicts(path)


def test_a_file_that_is_missing(tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*certify\.jsonl: No such file"):
        read_verdicts(tmp_path / "certify.jsonl")


def test_keys_that_a_header_has_besides_are_kept(tmp_path):
    header = HEADER | {"environment": {"threads": 2}}
    assert read_verdicts(write(tmp_path, header))[0] == header


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "tightrope-certify/9"}, "line 1: format"),
        ({"format": None}, "line 1: format"),
        ({"identity": None}, "line 1: identity"),
        ({"identity": HEADER["identity"] | {"eps": -1}}, "line 1: identity.eps"),
        ({"identity": HEADER["identity"] | {"attack": "pgd"}}, "line 1: identity.attack"),
        ({"data": 3}, "line 1: data"),
    ],
)
def test_a_header_that_is_none(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        read_verdicts(write(tmp_path, HEADER | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"status": "fine"}, "line 2: status"),
        ({"index": -1}, "line 2: index"),
        ({"index": 0.5}, "line 2: index"),
        ({"predicted": None}, "line 2: predicted"),
        ({"seconds": "0"}, "line 2: seconds"),
        ({"seconds": -1.0}, "line 2: seconds"),
        ({"margin": math.nan}, "line 2: margin"),
        ({"margin": None}, "line 2: margin"),
        ({"witness": {"shape": [1], "float64": "AAAAAAAA8D8="}}, "line 2: witness.predicted"),
        (
            {"witness": {"shape": [2], "float64": "AAAAAAAA8D8=", "predicted": 3}},
            r"line 2: a witness of shape \[2\] needs 16 bytes, got 8",
        ),
        ({"witness": {"shape": [1], "float64": "?", "predicted": 3}}, "line 2: the witness is not base64"),
        ({"witness": {"shape": [-1], "float64": "", "predicted": 3}}, r"line 2: witness\.shape"),
    ],
)
def test_a_verdict_that_is_none(tmp_path, changes, message):
    with pytest.raises(InputError, match=message) as error:
        read_verdicts(write(tmp_path, HEADER, to_record(VERDICTS[1]) | changes))
    assert "certify.jsonl" in str(error.value)


def test_a_broken_line_that_others_follow(tmp_path):
    with pytest.raises(InputError, match=r"certify\.jsonl, line 2: Invalid JSON"):
        read_verdicts(write(tmp_path, HEADER, tail="{broken\n" + json.dumps(to_record(VERDICTS[0])) + "\n"))


def test_an_example_that_stands_there_twice(tmp_path):
    records = [to_record(VERDICTS[0])] * 2
    with pytest.raises(InputError, match="line 3: example 0 already stands on line 2"):
        read_verdicts(write(tmp_path, HEADER, *records))

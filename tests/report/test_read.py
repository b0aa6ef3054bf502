from pathlib import Path

import numpy as np
import pytest

from tightrope.errors import InputError
from tightrope.report import counts, read_metrics, read_verdicts
from tightrope.report.read import Witness, witness_values

GOOD_EPOCH = '{"epoch": 1, "losses": {"natural": 0.3}}\n'
HEADER = '{"format": "tightrope-certify/1", "identity": {"eps": 0.3, "verifier": "ibp"}, "data": "mnist"}\n'
VERDICT = (
    '{"index": 0, "label": 7, "predicted": 7, "status": "robust", "stage": "ibp", '
    '"margin": 1, "seconds": 0}\n'
)


def write(folder: Path, text: str) -> Path:
    path = folder / "file.jsonl"
    path.write_text(text)
    return path


def test_metrics_are_read_in_order_and_keep_keys_of_later_versions(tmp_path):
    path = write(tmp_path, GOOD_EPOCH + '{"epoch": 2, "new": [1]}\n')
    assert read_metrics(path) == [{"epoch": 1, "losses": {"natural": 0.3}}, {"epoch": 2, "new": [1]}]


@pytest.mark.parametrize("tail", ['{"epoch": 2, "lo', "{", '{"epoch": 2, "losses": {"natural": 0.1}'])
def test_a_half_written_last_line_is_ignored(tmp_path, tail):
    assert [epoch["epoch"] for epoch in read_metrics(write(tmp_path, GOOD_EPOCH + tail))] == [1]


def test_a_character_cut_in_half_is_ignored_too(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(GOOD_EPOCH.encode() + '{"é'.encode()[:-1])
    assert len(read_metrics(path)) == 1


def test_a_last_line_that_only_lacks_its_newline_counts(tmp_path):
    assert len(read_metrics(write(tmp_path, GOOD_EPOCH + '{"epoch": 2}'))) == 2


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        "",
        "[]",
        "{}",
        '{"epoch": "two"}',
        '{"epoch": 2, "losses": 3}',
        '{"epoch": 2, "layers": [{}]}',
    ],
)
def test_any_other_broken_line_is_named_with_its_file(tmp_path, line):
    path = write(tmp_path, f"{GOOD_EPOCH}{line}\n{GOOD_EPOCH}")
    with pytest.raises(InputError, match=r"file\.jsonl, line 2: .*make it again"):
        read_metrics(path)


def test_verdicts_come_with_their_header(tmp_path):
    header, rows = read_verdicts(
        write(tmp_path, HEADER + VERDICT + VERDICT.replace('"index": 0', '"index": 5'))
    )
    assert header["identity"]["verifier"] == "ibp"
    assert [row["index"] for row in rows] == [0, 5]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: the header is missing"),
        (HEADER[:20], "line 1: the header is missing"),
        (VERDICT, "line 1: format"),
        (HEADER.replace("certify/1", "certify/9"), "line 1: format"),
        (HEADER + VERDICT.replace("robust", "fine"), "line 2: status"),
        (HEADER + VERDICT.replace('"index": 0', '"index": -1'), "line 2: index"),
        (HEADER + VERDICT.replace('"seconds": 0', '"seconds": "0"'), "line 2: seconds"),
        (HEADER + VERDICT + VERDICT, "line 3: example 0 already stands on line 2"),
    ],
)
def test_a_broken_certify_file_is_an_error_that_says_where(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        read_verdicts(write(tmp_path, text))


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*metrics\.jsonl"):
        read_metrics(tmp_path / "metrics.jsonl")


def rows(*statuses):
    return [{"status": status} for status in statuses]


def test_falsified_and_misclassified_both_count_against_attacked_accuracy():
    verdicts = rows(*["robust"] * 5, "undecided", "undecided", "falsified", "misclassified", "misclassified")
    assert counts(verdicts, attacked=True) == {
        "examples": 10,
        "clean_correct": 8,
        "robust": 5,
        "falsified": 1,
        "undecided": 2,
        "clean_accuracy": 0.8,
        "attacked_accuracy": 0.7,
        "certified_accuracy": 0.5,
    }


def test_without_an_attack_there_is_no_attacked_accuracy():
    assert counts(rows("robust"), attacked=False)["attacked_accuracy"] is None


def test_of_no_examples_nothing_is_known():
    assert counts([], attacked=True)["clean_accuracy"] is None


def test_a_witness_is_decoded_to_its_shape():
    values = witness_values(Witness(shape=[1, 2], float64="AAAAAAAA8D8AAAAAAADgPw=="))
    np.testing.assert_array_equal(values, [[1.0, 0.5]])


@pytest.mark.parametrize(("shape", "text"), [([1, 3], "AAAAAAAA8D8AAAAAAADgPw=="), ([1], "?")])
def test_a_broken_witness_is_an_error(shape, text):
    with pytest.raises(InputError, match="witness"):
        witness_values(Witness(shape=shape, float64=text))

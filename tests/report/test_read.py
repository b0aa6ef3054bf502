from pathlib import Path

import pytest

from tightrope.errors import InputError
from tightrope.report.read import read_metrics

GOOD_EPOCH = '{"epoch": 1, "losses": {"natural": 0.3}}\n'


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
        '{"epoch": 2, "notes": {"cosine": "high"}}',
        '{"epoch": 2, "layers": [{}]}',
    ],
)
def test_any_other_broken_line_is_named_with_its_file(tmp_path, line):
    path = write(tmp_path, f"{GOOD_EPOCH}{line}\n{GOOD_EPOCH}")
    with pytest.raises(InputError, match=r"file\.jsonl, line 2: .*make it again"):
        read_metrics(path)


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*metrics\.jsonl"):
        read_metrics(tmp_path / "metrics.jsonl")

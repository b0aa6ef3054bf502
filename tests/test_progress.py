"""Progress on stderr, with a clock that the tests turn."""

import io
import time
from contextlib import redirect_stderr

import pytest

from tightrope import progress
from tightrope.progress import QUIET_SECONDS, Progress


@pytest.fixture
def clock(monkeypatch):
    """A list whose one entry is the time."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_note_is_a_line_with_the_time_left(clock, capsys):
    with Progress("train ibp", total=100) as shown:
        for _ in range(10):
            clock[0] += 2
            shown.advance()
        shown.note("epoch 1/10: natural 0.5")
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "train ibp: epoch 1/10: natural 0.5, 3m00s left\n"


def test_the_time_left_of_a_resumed_run_counts_only_what_this_run_did(clock, capsys):
    shown = Progress("train", total=100, done=80)
    clock[0] += 10
    shown.advance(10)
    shown.note("later")
    assert capsys.readouterr().err == "train: later, 0m10s left\n"


@pytest.mark.parametrize("done", [0, 100])
def test_no_time_is_foretold_before_the_first_step_or_after_the_last(clock, capsys, done):
    shown = Progress("train", total=100)
    clock[0] += 5
    shown.advance(done)
    shown.note("note")
    assert capsys.readouterr().err == "train: note\n"


def test_where_nothing_else_is_said_a_line_comes_now_and_then(clock, capsys):
    shown = Progress("certify", total=1000, unit="example")
    for _ in range(100):
        clock[0] += QUIET_SECONDS / 10
        shown.advance()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10
    assert lines[0] == "certify: 10/1000, 49m30s left"
    assert lines[-1].startswith("certify: 100/1000, ")


def test_also_where_one_unit_takes_long(monkeypatch, capsys):
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.03)
    monkeypatch.setattr(progress, "CROWDED_SECONDS", 0.03)
    monkeypatch.setattr(progress, "LOOK_SECONDS", 0.01)
    with Progress("search", total=8, slow=True):
        time.sleep(0.3)
    lines = capsys.readouterr().err.splitlines()
    assert 1 < len(lines) < 12
    assert set(lines) == {"search: 0/8"}


def test_its_lines_go_where_they_went_at_the_beginning(clock, capsys):
    shown = Progress("tune", total=10)
    with redirect_stderr(io.StringIO()) as elsewhere:
        clock[0] += QUIET_SECONDS
        shown.advance()
    assert elsewhere.getvalue() == ""
    assert capsys.readouterr().err.startswith("tune: 1/10")


def test_a_note_puts_the_next_line_off(clock, capsys):
    shown = Progress("train", total=10)
    clock[0] += QUIET_SECONDS - 1
    shown.note("said")
    clock[0] += QUIET_SECONDS - 1
    shown.advance()
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_terminal_gets_a_bar_that_notes_do_not_break():
    terminal = Terminal()
    with redirect_stderr(terminal), Progress("train ibp", total=10, done=4) as shown:
        shown.advance(3)
        shown.note("epoch 1/2")
    text = terminal.getvalue()
    assert "train ibp:  40%" in text
    assert "4/10" in text
    assert "train ibp: epoch 1/2\n" in text


def test_the_bar_goes_away_even_if_the_work_fails():
    terminal = Terminal()
    with pytest.raises(KeyboardInterrupt), redirect_stderr(terminal), Progress("train", total=10):
        raise KeyboardInterrupt
    assert terminal.getvalue().endswith(" \r")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0m00s"), (59.6, "1m00s"), (61, "1m01s"), (3599.4, "59m59s"), (3600, "1h00m"), (90061, "25h01m")],
)
def test_durations(seconds, text):
    assert progress.duration(seconds) == text

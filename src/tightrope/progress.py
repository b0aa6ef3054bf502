"""Progress on stderr: a bar with ETA on a terminal, a line now and then otherwise."""

from __future__ import annotations

import sys
import time
from threading import Event, Thread
from types import TracebackType
from typing import Self

from tqdm import tqdm

QUIET_SECONDS = 30.0
CROWDED_SECONDS = 2.0
LOOK_SECONDS = 5.0


class Progress:
    """Counts towards `total`; `note` puts a lasting line on the screen.

    Args:
        label: what is going on.
        total: how many units there are.
        done: how many a resumed run had done before.
        unit: what is counted.
        slow: whether a unit may take so long that lines have to come between two of them.
    """

    def __init__(self, label: str, total: int, done: int = 0, unit: str = "step", slow: bool = False) -> None:
        self._label, self._total, self._done, self._start_at = label, total, done, done
        self._started = self._printed = time.monotonic()
        self._ended, self._thread = Event(), Thread(target=self._say_now_and_then, daemon=True)
        self._slow, self._stream = slow, sys.stderr
        self._bar = (
            tqdm(total=total, initial=done, desc=label, unit=unit, leave=False)
            if sys.stderr.isatty()
            else None
        )

    def __enter__(self) -> Self:
        if self._slow and self._bar is None:
            self._thread.start()
        return self

    def _say_now_and_then(self) -> None:
        while not self._ended.wait(LOOK_SECONDS):
            self._say()

    def _say(self) -> None:
        if time.monotonic() - self._printed >= QUIET_SECONDS:
            self.note(f"{self._done}/{self._total}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._thread.ident is not None:  # it was started
            self._thread.join()
        if self._bar is not None:
            self._bar.close()

    def advance(self, count: int = 1) -> None:
        """Count this many more units as done."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        else:
            self._say()

    def note(self, text: str) -> None:
        """A line that stays, with the time left where there is no bar to show it.

        Without a terminal, a line that follows another within two seconds is left out, except the
        last one: a log is read later, and should not be longer than what it tells.
        """
        if self._bar is not None:
            tqdm.write(f"{self._label}: {text}", file=sys.stderr)
            return
        if time.monotonic() - self._printed < CROWDED_SECONDS and self._done < self._total:
            return
        self._printed = time.monotonic()
        rate = (self._done - self._start_at) / max(self._printed - self._started, 1e-9)
        left = (
            f", {duration((self._total - self._done) / rate)} left"
            if rate > 0 and self._done < self._total
            else ""
        )
        print(f"{self._label}: {text}{left}", file=self._stream, flush=True)


def duration(seconds: float) -> str:
    """A time as people write it: `59m59s`, `25h01m`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"

"""The page on a search: the front, and every trial behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tightrope.report import figures
from tightrope.report.figures import Plot
from tightrope.report.page import render
from tightrope.report.text import commit_text, date_text, duration_text, eps_text
from tightrope.tune import Found, Trial


@dataclass(frozen=True)
class TrialRow:
    """A trial as a line of a table."""

    number: int
    run: str
    clean: str
    certified: str
    values: list[str]
    epochs: int
    time: str
    state: str
    reason: str


def write_search(found: Found, out: Path) -> None:
    """Write one self-contained HTML page on a search.

    Args:
        found: the search; where no trial is finished, the page lists those that ended, without a picture.
        out: the HTML file to write.

    Raises:
        InputError: if `out` cannot be written.
    """
    about, front = found.about, found.front
    environment: dict[str, Any] = about["environment"]
    best = {trial.number for trial in front}
    others = [trial for trial in found.trials if trial.number not in best]
    keys = list(found.ranges)
    total = sum(trial.seconds for trial in found.trials)
    counts = ", ".join(f"{found.count(state)} {state}" for state in ("finished", "pruned", "failed"))
    eps, held_out = eps_text(about["test_eps"]), about["held_out"]
    render(
        out,
        "search.html.j2",
        title=f"Search: {found.folder.resolve().name}",
        lead=f"{about['data']} · {about['model']} · {about['method']}",
        facts=[
            ("Trials", counts),
            ("Certified at eps", eps),
            ("Held-out training examples", f"{held_out:,}"),
            ("Training time of all trials", duration_text(total)),
            ("Seed", about["seed"]),
            ("Commit", commit_text(environment["commit"])),
            ("Date", date_text(environment["date"])),
        ],
        wide_facts=[("Machine", environment["machine"]), ("Command", environment["command"])],
        caution=f"Both accuracies are shares of {held_out:,} training examples that were set aside; one is "
        f"{100 / held_out:.2g} points. The best of many trials looks better there than it is: judge the one "
        "you choose on the test set. Certified accuracy comes from the method's own bounds in float32: it "
        "guides the search, and is no verdict.",
        plots=[_picture(found, front, others), *_slices(found)] if front else [],
        keys=keys,
        front=[_row(trial, keys, found.folder) for trial in front],
        others=[_row(trial, keys, found.folder) for trial in others],
        ranges=found.ranges,
    )


def _picture(found: Found, front: Sequence[Trial], others: Sequence[Trial]) -> Plot:
    said = "; ".join(f"trial {trial.number}: {_words(trial)}" for trial in front)
    words = (
        "To the right and up is better. Along the line lie the trials that no other one beats; whatever is "
        "below and to the left of it is reached already. On the right the same, near the line. Point at a "
        "circle to see which trial it is."
    )
    if found.count("pruned"):
        words += " Hollow circles are trials that were stopped early, where they stood then."
    failed = [str(trial.number) for trial in others if trial.point is None]
    if failed:
        words += f" Without a point, because they failed in their first epoch: {', '.join(failed)}."
    points = {
        trial.number: (trial.point.clean, trial.point.certified, trial.state == "finished", _hover(trial))
        for trial in found.trials
        if trial.point is not None
    }
    best = [trial.number for trial in front]
    return Plot("Clean against certified", figures.front(points, best, "front", f"The front: {said}."), words)


def _slices(found: Found) -> list[Plot]:
    """What each searched number did to both accuracies."""
    finished = [trial for trial in found.trials if trial.state == "finished" and trial.point is not None]
    numbers = [
        key
        for key in found.ranges
        if all(
            isinstance(t.values[key], int | float) and not isinstance(t.values[key], bool) for t in finished
        )
        and len({trial.values[key] for trial in finished}) > 2
    ]
    if not numbers:
        return []
    columns = {
        key: [
            (trial.values[key], trial.point.clean, trial.point.certified) for trial in finished if trial.point
        ]
        for key in numbers
    }
    logarithmic = {key for key in numbers if found.ranges[key].endswith("log")}
    svg = figures.slices(columns, logarithmic, "slices", f"Both accuracies against {', '.join(numbers)}.")  # type: ignore[arg-type]
    words = "Each finished trial once in every panel. All other values vary at the same time."
    return [Plot("Accuracy by value", svg, words)]


def _hover(trial: Trial) -> str:
    values = ", ".join(f"{key} {_text(value)}" for key, value in trial.values.items())
    return f"trial {trial.number} ({trial.state}): {_words(trial)}; {values}"


def _words(trial: Trial) -> str:
    point = trial.point
    return (
        "" if point is None else f"clean {100 * point.clean:.1f} %, certified {100 * point.certified:.1f} %"
    )


def _row(trial: Trial, keys: Sequence[str], folder: Path) -> TrialRow:
    point = trial.point
    return TrialRow(
        trial.number,
        f"{folder}/trials/{trial.number:04d}",
        "n/a" if point is None else f"{100 * point.clean:.1f} %",
        "n/a" if point is None else f"{100 * point.certified:.1f} %",
        [_text(trial.values[key]) for key in keys],
        trial.epochs,
        duration_text(trial.seconds),
        trial.state,
        trial.reason,
    )


def _text(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)

import base64
import json
import re
import types
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from markupsafe import Markup, escape

from tightrope.report import write_report


def verdict(index: int, status: str, **changes: Any) -> dict[str, Any]:
    """One line of a certify file."""
    stage = {"misclassified": "clean", "falsified": "attack"}.get(status, "ibp")
    margin = 2.0 if status == "robust" else -1.0
    record = {"index": index, "label": 7, "predicted": 7, "status": status, "stage": stage, "margin": margin}
    return record | {"seconds": 0.002, "witness": None} | changes


def witness(values: np.ndarray, predicted: int = 3) -> dict[str, Any]:
    return {
        "predicted": predicted,
        "shape": list(values.shape),
        "float64": base64.b64encode(values.astype("<f8").tobytes()).decode(),
    }


def header(**changes: Any) -> dict[str, Any]:
    identity = {"weights": "0" * 64, "data": "1" * 64, "eps": 0.3, "norm": "inf", "verifier": "ibp"}
    identity |= {"attack": {"name": "pgd", "steps": 40}} | changes
    return {"format": "tightrope-certify/1", "identity": identity, "data": "digits", "environment": {}}


def write_radii(folder: Path, radii: list[float | None], suffix: str = "", **changes: Any) -> Path:
    """A file of radii in a run folder; None is misclassified."""
    identity = {"weights": "0" * 64, "data": "1" * 64, "norm": "inf", "verifier": "ibp"}
    identity |= {"largest": 0.6, "tolerance": 0.001} | changes
    lines: list[dict[str, Any]] = [{"format": "tightrope-radius/1", "identity": identity, "data": "digits"}]
    for index, radius in enumerate(radii):
        status = "misclassified" if radius is None else "robust" if radius else "undecided"
        record = {"index": index, "label": 7, "predicted": 7, "status": status, "radius": radius or 0.0}
        lines.append(record | {"seconds": 0.5})
    name = f"radius-{identity['verifier']}-{identity['norm']}{suffix}.jsonl"
    return write_lines(folder / name, lines)


def epoch(number: int, **changes: Any) -> dict[str, Any]:
    record = {"epoch": number, "step": 10 * number, "seconds": 30.0 * number, "eps": 0.1, "lr": 0.001}
    record |= {"losses": {"natural": 1 / number, "robust": 2.0}, "weights": {"natural": 1.0, "robust": 0.5}}
    record |= {"held_out": {"examples": 100, "eps": 0.3, "clean": 0.97, "certified": 0.5}}
    record |= {"layers": [{"name": "relu", "dead": 0.1, "active": 0.2, "unstable": 0.7, "width": 0.8}]}
    return record | changes


def write_lines(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


TEN = [
    *(verdict(index, "robust") for index in range(6)),
    verdict(6, "undecided"),
    verdict(7, "falsified"),
    verdict(8, "falsified"),
    verdict(9, "misclassified", predicted=3),
]

RECIPE = """
data = "digits"
model = "dm-small"
seed = 0
test_eps = 0.3

[method]
name = "ibp"
eps = 0.4
kappa = 0.5

[training]
epochs = 3
"""

MakeRun = Callable[..., Path]


@pytest.fixture
def drawn() -> None:
    """Ask for real plots."""


@pytest.fixture(autouse=True)
def _quick_plots(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave plots empty but for their description, unless a test asks for them: drawing takes the time."""

    def empty(figure: object, key: str, alt: str) -> Markup:
        return Markup(f'<svg role="img" aria-label="{escape(alt)}"></svg>')

    if "drawn" not in request.fixturenames:
        monkeypatch.setattr("tightrope.report.figures._svg", empty)


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Make a run folder: of 10 examples 6 robust, 1 undecided, 2 falsified, 1 misclassified."""

    def make(
        name: str = "a", verdicts: list[dict[str, Any]] | None = None, metrics: bool = False, **changes: Any
    ) -> Path:
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "recipe.toml").write_text(RECIPE)
        (folder / "environment.json").write_text(
            json.dumps(
                {"commit": "abc1234", "machine": "the lab's machine", "date": "2026-11-20T12:00:00+00:00"}
                | {"command": "tightrope train r.toml", "parameters": 340000, "tightrope": "0.1.0"}
            )
        )
        if metrics:
            write_lines(folder / "metrics.jsonl", [epoch(number) for number in (1, 2, 3)])
        write_lines(
            folder / "certify-ibp.jsonl", [header(**changes), *(TEN if verdicts is None else verdicts)]
        )
        return folder

    return make


VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """A page taken apart: its text, its elements, and whether every element is closed in turn."""

    def __init__(self, source):
        super().__init__()
        self.source, self.open, self.elements, self.words = source, [], [], []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.words))

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture
def report(tmp_path):
    def report(*runs):
        write_report(runs, tmp_path / "out" / "report.html")
        return Page((tmp_path / "out" / "report.html").read_text())

    return report


@pytest.fixture
def digits(monkeypatch):
    """A data set of ten grey 4 x 4 images, all of class 7, in place of the real ones."""

    class Test:
        y = torch.full((10,), 7)
        shape = (1, 4, 4)

        def __len__(self):
            return 10

        def images(self, index):
            return torch.full((len(index), *self.shape), 0.5)

    data = types.SimpleNamespace(test=Test(), class_names=tuple("0123456789"))
    monkeypatch.setattr("tightrope.report.examples.load_data", lambda name, root=None, download=True: data)
    return data

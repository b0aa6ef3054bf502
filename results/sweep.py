"""Train every method on one network under one budget, and certify what comes out.

    python results/sweep.py train FOLDER [NAME ...]    one run folder per row of ROWS; finished ones stay
    python results/sweep.py certify FOLDER [NAME ...]  the cascade on the first 1,000 test images of each run

The budget is the time of PLAIN_EPOCHS epochs of plain cross-entropy training: a method whose step costs
seven plain steps gets a seventh of the epochs. Network, batch, optimiser and learning rates are the same for
all, and what a row does not name is the method's default.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from tightrope.api import find_device, prepare, resolve
from tightrope.data import as_source, load
from tightrope.models import build
from tightrope.recipes import override, parse_recipe
from tightrope.train.predict import predict_seconds

PLAIN_EPOCHS = 36
TIME_LIMIT = 1.0  # seconds per image and stage of the cascade
COMMON: dict[str, Any] = {
    "data": "mnist",
    "model": "dm-small-bn",
    "test_eps": 0.1,
    "training": {
        "epochs": 1,
        "batch": 128,
        "optimiser": "adam",
        "clip": 10.0,
        "lr": {"shape": "step", "start": 1e-3, "factor": 0.2, "at": [0.7, 0.9]},
    },
}
BOX = {"eps": 0.2}  # the field trains bounds at twice the test eps 0.1 on MNIST (methods.md, section 12)
ROWS: dict[str, tuple[dict[str, Any], dict[str, dict[str, Any]]]] = {
    "standard": ({}, {}),
    "fgsm": ({"eps": 0.1}, {}),
    "pgd": ({"eps": 0.1}, {}),
    "trades": ({"eps": 0.1}, {}),
    "mart": ({"eps": 0.1}, {}),
    "relu-stability": ({"eps": 0.1}, {}),
    "ibp": (BOX, {}),
    "shi-ibp": (BOX, {}),
    "crown-ibp": (BOX | {"fusion": True}, {}),
    "wong-kolter": ({"eps": 0.1, "projections": 10}, {}),
    "advibp": (BOX, {}),
    "advcrown-ibp": (BOX, {}),
    "sabr": (BOX, {}),
    "mtl-ibp": (BOX, {}),
    "cc-ibp": (BOX, {}),
    "exp-ibp": (BOX, {}),
    "taps": (BOX, {}),
    "staps": (BOX, {}),
    "diffai": ({"eps": 0.1}, {}),
    "shi-ibp+reweight": (BOX, {"reweight": {}}),
    "shi-ibp+auto-eps": (BOX, {"auto-eps": {}}),
    "shi-ibp+reweight+auto-eps": (BOX, {"reweight": {}, "auto-eps": {}}),
    "crown-ibp+shi-reg": (BOX | {"fusion": True}, {"shi-reg": {}}),
    "mtl-ibp+reweight": (BOX, {"reweight": {}}),
    "sabr+reweight": (BOX, {"reweight": {}}),
}


def train(folder: Path, name: str) -> None:
    """Train one row for as many epochs as the budget buys."""
    options, modifiers = ROWS[name]
    content = {**COMMON, "method": {"name": name.partition("+")[0], **options}, "modifiers": modifiers}
    recipe = folder / f"{name}.toml"
    if not recipe.exists():
        plain = seconds_per_epoch({**COMMON, "method": {"name": "standard"}})
        ratio = seconds_per_epoch(content) / plain
        override(content, [f"training.epochs={max(1, round(PLAIN_EPOCHS / ratio))}"])
        text = parse_recipe(content, name).to_toml()
        recipe.write_text(f"# a step costs {ratio:.2f} plain steps; {PLAIN_EPOCHS} plain epochs\n{text}")
    run = folder / name
    resume = ["--resume"] if (run / "checkpoint").exists() else []
    command("train", recipe, "--out", run, *resume)


def seconds_per_epoch(content: dict[str, Any]) -> float:
    """What an epoch of this recipe takes here."""
    recipe = parse_recipe(content, "sweep")
    method = recipe.build_method()
    dataset = load("mnist", download=False)
    source = as_source(dataset.train, find_device("cpu"))
    recipe = resolve(recipe, method, source)
    graph, index, held_out = prepare(recipe, build(COMMON["model"], dataset.train.shape, 10), source)
    return predict_seconds(graph, method, recipe.training, len(index), held_out, 0.1)


def certify(folder: Path, name: str) -> None:
    """Certify one run; what is certified already is kept."""
    file = folder / name / "certify-cascade-inf-0.1.jsonl"
    resume = ["--resume"] if file.exists() else []
    command("certify", folder / name, "--first", "1000", "--time-limit", str(TIME_LIMIT), *resume)


def command(*arguments: object) -> None:
    """Run tightrope in a process of its own."""
    subprocess.run([sys.executable, "-m", "tightrope", *map(str, arguments)], check=True)


if __name__ == "__main__":
    what, into, names = {"train": train, "certify": certify}[sys.argv[1]], Path(sys.argv[2]), sys.argv[3:]
    into.mkdir(parents=True, exist_ok=True)
    for each in names or ROWS:
        if what is train and (into / each / "model.safetensors").exists():
            continue
        what(into, each)

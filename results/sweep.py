"""Train every method on one network under one budget, and certify what comes out.

    python results/sweep.py train FOLDER [NAME ...]    one run folder per row of ROWS; finished ones stay
    python results/sweep.py certify FOLDER [NAME ...]  the cascade on the first 1,000 test images of each run
    python results/sweep.py table FOLDER               results/sweep.json, of the runs that are certified

A NAME with #SEED behind it is that row once more with another seed than 0.

The budget is the time of PLAIN_EPOCHS epochs of plain cross-entropy training: a method whose step costs
seven plain steps gets a seventh of the epochs. Network, batch, optimiser and learning rates are the same for
all, and what a row does not name is the method's default.
"""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

from tightrope.api import find_device, prepare, resolve
from tightrope.data import as_source, load
from tightrope.files import read_json, to_json, write_atomically
from tightrope.models import build
from tightrope.recipes import override, parse_recipe
from tightrope.train.predict import predict_seconds
from tightrope.verify import read_verdicts, summarise

PLAIN_EPOCHS = 36
EXAMPLES = 1000  # the first of the test set
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
# METHOD, METHOD@EPS or METHOD+MODIFIER+...: its options, and those of its modifiers
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
    "ibp@0.1": ({"eps": 0.1}, {}),
    "shi-ibp@0.1": ({"eps": 0.1}, {}),
    "exp-ibp@0.1": ({"eps": 0.1}, {}),
    "shi-ibp+reweight": (BOX, {"reweight": {}}),
    "shi-ibp+auto-eps": (BOX, {"auto-eps": {}}),
    "shi-ibp+reweight+auto-eps": (BOX, {"reweight": {}, "auto-eps": {}}),
    "crown-ibp+shi-reg": (BOX | {"fusion": True}, {"shi-reg": {}}),
    "mtl-ibp+reweight": (BOX, {"reweight": {}}),
    "sabr+reweight": (BOX, {"reweight": {}}),
}


def train(folder: Path, run_name: str) -> None:
    """Train one row for as many epochs as the budget buys; all its seeds for as many."""
    name, _, seed = run_name.partition("#")
    options, modifiers = ROWS[name]
    content = {**COMMON, "method": {"name": re.split("[+@]", name)[0], **options}, "modifiers": modifiers}
    recipe = folder / f"{name}.toml"
    if not recipe.exists():
        plain = seconds_per_epoch({**COMMON, "method": {"name": "standard"}})
        ratio = seconds_per_epoch(content) / plain
        override(content, [f"training.epochs={max(1, round(PLAIN_EPOCHS / ratio))}"])
        text = parse_recipe(content, name).to_toml()
        recipe.write_text(f"# a step costs {ratio:.2f} plain steps; {PLAIN_EPOCHS} plain epochs\n{text}")
    run = folder / run_name
    if (run / "checkpoint").exists():
        command("train", "--out", run, "--resume")
    else:
        command("train", recipe, "--out", run, "--seed", seed or 0)


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
    command("certify", folder / name, "--first", EXAMPLES, "--time-limit", TIME_LIMIT, *resume)


def table(folder: Path) -> None:
    """Write what the runs of a folder reached, the best certified row first and its seeds in order."""
    rows = []
    for file in folder.glob("*/certify-cascade-inf-0.1.jsonl"):
        header, verdicts = read_verdicts(file)
        summary, made = summarise(verdicts), read_json(file.parent / "environment.json")
        if summary["examples"] < EXAMPLES:
            continue
        name = file.parent.name.partition("#")[0]
        recipe = tomllib.loads((file.parent / "recipe.toml").read_text())
        ratio = re.match(r"# a step costs ([\d.]+) plain", (folder / f"{name}.toml").read_text())
        rows.append(
            {
                "name": name,
                "epochs": recipe["training"]["epochs"],
                "plain_steps_per_step": float(ratio[1]) if ratio else None,
                **{key: summary[key] for key in ("clean_correct", "robust", "falsified", "undecided")},
                "by_ibp": sum(v.status == "robust" and v.stage == "ibp" for v in verdicts),
                "recipe": recipe,
                "trained": {key: made[key] for key in ("commit", "date")},
                "certified": {key: header["environment"][key] for key in ("commit", "date")},
                "machine": made["machine"],
            }
        )
    proved: dict[str, list[int]] = {row["name"]: [] for row in rows}
    for row in rows:
        proved[row["name"]].append(row["robust"])
    rows.sort(key=lambda row: (-statistics.mean(proved[row["name"]]), row["name"], row["recipe"]["seed"]))
    content = {
        "format": "tightrope-sweep/1",
        "train": "python results/sweep.py train FOLDER",
        "certify": "python results/sweep.py certify FOLDER",
        "plain_epochs": PLAIN_EPOCHS,
        "model": COMMON["model"],
        "eps": COMMON["test_eps"],
        "examples": EXAMPLES,
        "time_limit": TIME_LIMIT,
        "rows": rows,
    }
    write_atomically(Path(__file__).parent / "sweep.json", to_json(content, indent=2) + "\n")


def command(*arguments: object) -> None:
    """Run tightrope in a process of its own."""
    subprocess.run([sys.executable, "-m", "tightrope", *map(str, arguments)], check=True)


if __name__ == "__main__":
    what, into, names = sys.argv[1], Path(sys.argv[2]), sys.argv[3:] or list(ROWS)
    if what == "table":
        table(into)
        sys.exit()
    into.mkdir(parents=True, exist_ok=True)
    for each in names:
        trained = (into / each / "model.safetensors").exists()
        if what == "train" and not trained:
            train(into, each)
        elif what == "certify" and trained:
            certify(into, each)

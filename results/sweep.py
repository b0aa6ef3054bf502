"""Train every method on one network under one budget, and certify what comes out.

    python results/sweep.py train EPS FOLDER [NAME ...]    one run folder per row; finished ones stay
    python results/sweep.py certify EPS FOLDER [NAME ...]  the cascade on the first 1,000 test images of each
    python results/sweep.py table EPS FOLDER               add the certified runs to results/sweep-EPS.json

EPS is the test eps, 0.1 or 0.3. A NAME with #SEED behind it is that row once more with another seed than 0;
it gets the epochs of the row's first run, which may have been made elsewhere.

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
    "training": {
        "epochs": 1,
        "batch": 128,
        "optimiser": "adam",
        "clip": 10.0,
        "lr": {"shape": "step", "start": 1e-3, "factor": 0.2, "at": [0.7, 0.9]},
    },
}
# Layer by layer in little time: short attacks, few projections, and most of the epochs behind the input.
LAYERWISE: dict[str, Any] = {
    "attack": {"steps": 4, "step": 0.5, "projections": 10},
    "stages": {"lengths": [8, 3, 1]},
}
# What the field trains bounds at on MNIST, by test eps (methods.md, section 12).
TRAIN_EPS = {0.1: 0.2, 0.3: 0.4}


def rows(eps: float) -> dict[str, tuple[dict[str, Any], dict[str, dict[str, Any]]]]:
    """METHOD, METHOD@EPS or METHOD+MODIFIER+...: its options, and those of its modifiers."""
    test, box = {"eps": eps}, {"eps": TRAIN_EPS[eps]}
    return {
        "standard": ({}, {}),
        "fgsm": (test, {}),
        "pgd": (test, {}),
        "trades": (test, {}),
        "mart": (test, {}),
        "relu-stability": (test, {}),
        "ibp": (box, {}),
        "shi-ibp": (box, {}),
        "crown-ibp": (box | {"fusion": True}, {}),
        "wong-kolter": (test | {"projections": 10}, {}),
        "advibp": (box, {}),
        "advcrown-ibp": (box, {}),
        "sabr": (box, {}),
        "mtl-ibp": (box, {}),
        "cc-ibp": (box, {}),
        "exp-ibp": (box, {}),
        "taps": (box, {}),
        "staps": (box, {}),
        "diffai": (test, {}),
        "colt": (test | LAYERWISE, {}),
        "mat": (test | LAYERWISE, {}),
        "maar": (test | LAYERWISE, {}),
        f"ibp@{eps:g}": (test, {}),
        f"shi-ibp@{eps:g}": (test, {}),
        f"exp-ibp@{eps:g}": (test, {}),
        "shi-ibp+reweight": (box, {"reweight": {}}),
        "shi-ibp+auto-eps": (box, {"auto-eps": {}}),
        "shi-ibp+reweight+auto-eps": (box, {"reweight": {}, "auto-eps": {}}),
        "crown-ibp+shi-reg": (box | {"fusion": True}, {"shi-reg": {}}),
        "mtl-ibp+reweight": (box, {"reweight": {}}),
        "sabr+reweight": (box, {"reweight": {}}),
    }


def train(eps: float, folder: Path, run_name: str) -> None:
    """Train one row for as many epochs as the budget buys; all its seeds for as many."""
    name, _, seed = run_name.partition("#")
    options, modifiers = rows(eps)[name]
    method, common = re.split("[+@]", name)[0], {**COMMON, "test_eps": eps}
    content = {**common, "method": {"name": method, **options}, "modifiers": modifiers}
    recipe = folder / f"{name}.toml"
    if not recipe.exists():
        before = [row for row in written(eps) if row["name"] == name]
        # What a step costs does not depend on eps: a row gets the epochs that it has in the other table.
        elsewhere = [row for other in TRAIN_EPS for row in written(other) if row["name"] == name]
        if before:
            content, ratio = before[0]["recipe"], before[0]["plain_steps_per_step"]
        else:
            if elsewhere:
                ratio = elsewhere[0]["plain_steps_per_step"]
            else:
                plain = seconds_per_epoch({**common, "method": {"name": "standard"}})
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
    network = build(COMMON["model"], dataset.train.shape, 10)
    graph, index, held_out = prepare(recipe, method, network, source)
    return predict_seconds(graph, method, recipe.training, len(index), held_out, content["test_eps"])


def certify(eps: float, folder: Path, name: str) -> None:
    """Certify one run; what is certified already is kept."""
    file = folder / name / f"certify-cascade-inf-{eps:g}.jsonl"
    resume = ["--resume"] if file.exists() else []
    command("certify", folder / name, "--first", EXAMPLES, "--time-limit", TIME_LIMIT, *resume)


def written(eps: float) -> list[dict[str, Any]]:
    """The rows that the table has so far."""
    file = table_file(eps)
    return list(read_json(file)["rows"]) if file.exists() else []


def table_file(eps: float) -> Path:
    """Where the table lies."""
    return Path(__file__).parent / f"sweep-{eps:g}.json"


def table(eps: float, folder: Path) -> None:
    """Add what the runs of a folder reached: the best certified row comes first, its seeds in order."""
    found: list[dict[str, Any]] = []
    for file in folder.glob(f"*/certify-cascade-inf-{eps:g}.jsonl"):
        header, verdicts = read_verdicts(file)
        summary, made = summarise(verdicts), read_json(file.parent / "environment.json")
        if summary["examples"] < EXAMPLES:
            continue
        name = file.parent.name.partition("#")[0]
        recipe = tomllib.loads((file.parent / "recipe.toml").read_text())
        ratio = re.match(r"# a step costs ([\d.]+) plain", (folder / f"{name}.toml").read_text())
        found.append(
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
    made_now = {(row["name"], row["recipe"]["seed"]) for row in found}
    found += [row for row in written(eps) if (row["name"], row["recipe"]["seed"]) not in made_now]
    proved: dict[str, list[int]] = {row["name"]: [] for row in found}
    for row in found:
        proved[row["name"]].append(row["robust"])
    found.sort(key=lambda row: (-statistics.mean(proved[row["name"]]), row["name"], row["recipe"]["seed"]))
    content = {
        "format": "tightrope-sweep/1",
        "train": f"python results/sweep.py train {eps:g} FOLDER",
        "certify": f"python results/sweep.py certify {eps:g} FOLDER",
        "plain_epochs": PLAIN_EPOCHS,
        "model": COMMON["model"],
        "eps": eps,
        "examples": EXAMPLES,
        "time_limit": TIME_LIMIT,
        "rows": found,
    }
    write_atomically(table_file(eps), to_json(content, indent=2) + "\n")


def command(*arguments: object) -> None:
    """Run tightrope in a process of its own."""
    subprocess.run([sys.executable, "-m", "tightrope", *map(str, arguments)], check=True)


if __name__ == "__main__":
    what, test_eps, into, names = sys.argv[1], float(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:]
    if what == "table":
        table(test_eps, into)
        sys.exit()
    into.mkdir(parents=True, exist_ok=True)
    for each in names or rows(test_eps):
        trained = (into / each / "model.safetensors").exists()
        if what == "train" and not trained:
            train(test_eps, into, each)
        elif what == "certify" and trained:
            certify(test_eps, into, each)

"""Collect finished and certified runs into a results folder, and write the pages of results anew.

    python results/make.py NAME RUN [RUN ...]     one run per seed; RUN holds certify-VERIFIER-inf-EPS.jsonl
    python results/make.py NAME VERDICTS.jsonl    what the cascade decided of the network NAME, and when; or
                                                  how many of the first images its claim's verifier proves
    python results/make.py                        only docs/results.md, docs/comparison.md and the pictures

The first run's weights are the ones that are kept. The paper's figures, and the verifier if it is not
ibp, come from results/papers.toml.
"""

from __future__ import annotations

import json
import re
import shutil
import statistics
import sys
import tomllib
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from textwrap import fill
from typing import Any

from tightrope.files import read_json, to_json, write_atomically
from tightrope.recipes import parse_recipe
from tightrope.report import figures
from tightrope.report.read import read_metrics
from tightrope.verify import Verdict, read_verdicts, summarise

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "results.md"
OURS = ("notes", "cost", "verifier", "weights")  # in papers.toml, what the papers do not say
FIRST = 1000  # images whose figure tests compare, where all would take too long
SHOWN = 0.8  # rows of the comparison of which more is certified stand in the picture, too
STAGES = ("ibp", "crown-ibp", "crown", "alpha-crown", "complete")
# The last two as report.html.j2 has them by day.
COLOURS = figures.PALETTE | {"axis": "#545c6b", "grid": "#e4e7ec"}
ERRORS = {
    "verified_error": "certified_accuracy",
    "clean_error": "clean_accuracy",
    "attacked_error": "attacked_accuracy",
}


def collect(name: str, runs: list[Path]) -> None:
    """Write results/NAME from one run folder per seed."""
    recipes = [_recipe(run) for run in runs]
    environments = [read_json(run / "environment.json") for run in runs]
    different = [
        key for key in recipes[0] if key != "seed" and any(r.get(key) != recipes[0][key] for r in recipes)
    ]
    if different:
        sys.exit(f"the runs differ in more than the seed: {different}")
    eps = recipes[0]["test_eps"]
    papers = tomllib.loads((HERE / "papers.toml").read_text()).get(name, {})
    verifier = papers.get("verifier", "ibp")
    certificates = [read_verdicts(run / f"certify-{verifier}-inf-{eps:.4g}.jsonl") for run in runs]
    summaries = [summarise(verdicts) for _, verdicts in certificates]
    seconds = [json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["seconds"] for run in runs]
    ours: dict[str, Any] = {
        error: _spread([100 * (1 - summary[accuracy]) for summary in summaries])
        for error, accuracy in ERRORS.items()
    }
    result = {
        "format": "tightrope-result/1",
        "name": name,
        "paper": {
            key: value for key, value in papers.items() if key not in ("notes", "cost", "verifier", "weights")
        },
        "ours": {
            **ours,
            "unit": "per cent of all test examples",
            "examples": summaries[0]["examples"],
            "verifier": verifier,
            "attack": certificates[0][0]["identity"]["attack"],
            "robust_of_first_seed": summaries[0]["robust"],
            f"robust_of_its_first_{FIRST}": _robust(certificates[0][1][:FIRST]),
            "linear_of_its_first_20": sum(
                verdict.status == "robust" and verdict.stage in ("ibp", "crown-ibp", "crown")
                for verdict in certificates[0][1][:20]
            ),
        },
        "seeds": [recipe["seed"] for recipe in recipes],
        "epochs": recipes[0]["training"]["epochs"],
        "seconds": [round(s) for s in seconds],
        "cost_in_plain_epochs": papers.get("cost"),
        "notes": papers.get("notes", []),
        "train": f"tightrope train results/{name}/recipe.toml --seed SEED",
        "certify": f"tightrope certify results/{name} --data mnist --eps {eps:g}"
        f" --verifier {verifier}{_limits(certificates[0][0]['identity'], summaries[0]['examples'])} --json",
        "commit": ", ".join(dict.fromkeys(environment["commit"] for environment in environments)),
        **{key: environments[0][key] for key in ("machine", "threads", "torch", "parameters")},
        "dates": [environment["date"] for environment in environments],
    }
    folder = HERE / name
    folder.mkdir(exist_ok=True)
    weights = ["model.safetensors"] * papers.get("weights", True)
    for file in ("recipe.toml", "model.json", "metrics.jsonl", *weights):
        shutil.copyfile(runs[0] / file, folder / file)
    write_atomically(folder / "result.json", to_json(result, indent=2) + "\n")


def _recipe(run: Path) -> dict[str, Any]:
    """A run's recipe, with the options that came after it at their defaults."""
    content = tomllib.loads((run / "recipe.toml").read_text())
    return tomllib.loads(parse_recipe(content, str(run)).to_toml())


def decided(name: str, file: Path) -> None:
    """Write results/NAME/cascade.json: how many images each stage of the cascade certified, in what time."""
    header, verdicts = read_verdicts(file)
    robust = [verdict.stage for verdict in verdicts if verdict.status == "robust"]
    seconds = sorted(verdict.seconds for verdict in verdicts)
    summary = summarise(verdicts)
    content = {
        "format": "tightrope-cascade/1",
        "name": name,
        **{key: summary[key] for key in ("examples", "clean_correct", "robust", "falsified", "undecided")},
        "eps": header["identity"]["eps"],
        "stages": {stage: robust.count(stage) for stage in STAGES},
        "seconds": {
            "all": round(sum(seconds), 1),
            "median": round(statistics.median(seconds), 3),
            "percentile_95": round(statistics.quantiles(seconds, n=20)[-1], 3),
            "longest": round(seconds[-1], 1),
        },
        "certify": f"tightrope certify results/{name} --data mnist --eps {header['identity']['eps']:g}"
        f"{_limits(header['identity'], len(verdicts))}",
        **{key: header["environment"][key] for key in ("commit", "machine", "threads", "torch", "date")},
    }
    write_atomically(HERE / name / "cascade.json", to_json(content, indent=2) + "\n")


def repeated(name: str, file: Path) -> None:
    """Add to results/NAME/result.json how many of the first images the verdicts behind its claim prove."""
    path = HERE / name / "result.json"
    result, verdicts = read_json(path), read_verdicts(file)[1]
    ours = result["ours"]
    found, wanted = (len(verdicts), _robust(verdicts)), (ours["examples"], ours["robust_of_first_seed"])
    if found != wanted:
        sys.exit(
            f"{file} proves {found[1]} of {found[0]} examples, and the claim is {wanted[1]} of {wanted[0]}"
        )
    ours[f"robust_of_its_first_{FIRST}"] = _robust(verdicts[:FIRST])
    write_atomically(path, to_json(result, indent=2) + "\n")


def _robust(verdicts: Sequence[Verdict]) -> int:
    return sum(verdict.status == "robust" for verdict in verdicts)


def _limits(identity: dict[str, Any], examples: int) -> str:
    """What else the command must say so that it asks the same."""
    first = "" if examples == 10_000 else f" --first {examples}"
    searched = identity["verifier"] in ("cascade", "complete", "milp", "alpha-crown", "zonotope")
    return first + (f" --time-limit {identity['time_limit']:g}" if searched else "")


def _spread(values: list[float]) -> dict[str, Any]:
    return {
        "mean": round(statistics.mean(values), 3),
        "deviation": round(statistics.stdev(values), 3) if len(values) > 1 else None,
        "each": [round(value, 3) for value in values],
    }


def page() -> str:
    """docs/results.md, made of every result.json."""
    lines = [
        "# Results",
        "",
        "Written by `python results/make.py` from `results/*/result.json`; do not edit.",
        "",
        "Errors in per cent of the whole test set, or of its first images where the verifier's column says",
        "so: *verified* by the row's verifier in float64, *attacked* by the attack that `result.json` names.",
        "A folder with weights is a TARGET: its `certify` command gives the claim of the first seed again.",
        "Since commit df9f0c4 the attack's random start depends on the example and not on its batch: an",
        "attacked error found before may come out differently by about 0.2 (DM-small, first 500 images).",
        "The others come from their training command.",
        "",
        "| result | verifier | verified | clean | attacked | seeds | epochs | s/run "
        "| paper: verified / clean |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    notes = []
    for file in sorted(HERE.glob("*/result.json")):
        result = read_json(file)
        ours, paper = result["ours"], result["paper"]
        cells = [_cell(ours[error]) for error in ERRORS]
        theirs = f"{paper['verified_error']} / {paper['clean_error']}" if "verified_error" in paper else "—"
        has_weights = (HERE / result["name"] / "model.safetensors").exists()
        kept = "" if has_weights else ", once it is trained: its weights are not kept here"
        looked = "" if ours["examples"] == 10_000 else f", first {ours['examples']:,}"
        lines.append(
            f"| `{result['name']}` | {ours['verifier']}{looked} | {' | '.join(cells)} "
            f"| {len(result['seeds'])} | {result['epochs']} "
            f"| {round(statistics.mean(result['seconds']))} | {theirs} |"
        )
        notes += [
            f"## {result['name']}",
            "",
            f"- Train: `{result['train']}` (seeds {', '.join(map(str, result['seeds']))})",
            f"- Certify: `{result['certify']}`{kept}",
            f"- Commit {result['commit']}; {', '.join(result['dates'])}",
            f"- {result['machine']}, {result['threads']} threads, torch {result['torch']}",
            f"- Paper: {paper.get('source', 'no figure')}",
            *(f"- {note}" for note in result["notes"]),
            "",
        ]
    return "\n".join([*lines, "", *_layerwise(), *_cascades(), *notes]).rstrip() + "\n"


def _layerwise() -> list[str]:
    return [
        "## Layer by layer",
        "",
        "![Verified error and clean accuracy by epoch](layerwise.svg)",
        "",
        "As in maar.txt, figures 2 and 5: on held-out training images, the first seed of each. *Verified",
        "error* is the share of right answers that an attack turns behind the layer in work: an estimate, no",
        "proof. Dashed lines are where a stage ends; across a line the attack is another one.",
        "",
    ]


def layerwise_picture() -> str:
    """docs/layerwise.svg: the results that were trained layer by layer, made of every metrics.jsonl."""
    runs = {
        file.parent.name.removeprefix("mnist-convmed-").removesuffix("-0.1"): read_metrics(file)
        for file in sorted(HERE.glob("*/metrics.jsonl"))
    }
    found = {name: epochs[-1].get("held_out") for name, epochs in runs.items()}
    staged = {
        name: last["verified_error"] for name, last in found.items() if last and "verified_error" in last
    }
    alt = "; ".join(f"{name} {100 * end:.1f} %" for name, end in staged.items())
    shown = {name: runs[name] for name in staged}
    return _standalone(figures.stages(shown, "layerwise", f"Verified error at the end: {alt}"))


def _cascades() -> list[str]:
    """The table of what the cascade decided of each network, made of every cascade.json."""
    found = [read_json(file) for file in sorted(HERE.glob("*/cascade.json"))]
    lines = [
        "## Certification to the end",
        "",
        "Verdicts of `certify --verifier cascade --first 1000 --time-limit 60`, in images; each stage sees",
        "only what the ones before it left open. *Attacked*: correct, and not changed by the attacks. The",
        "seconds are per image, one thread of a two-core machine on which other work ran.",
        "",
        f"| result | eps | correct | attacked | {' | '.join(f'by {stage}' for stage in STAGES)} "
        "| certified | undecided | median s | 95th pct. s | all s |",
        "|---|---|---|---|" + "---|" * (len(STAGES) + 5),
    ]
    for each in found:
        seconds = each["seconds"]
        lines.append(
            f"| `{each['name']}` | {each['eps']:g} | {each['clean_correct']} "
            f"| {each['clean_correct'] - each['falsified']} "
            f"| {' | '.join(str(each['stages'][stage]) for stage in STAGES)} | {each['robust']} "
            f"| {each['undecided']} | {seconds['median']:.3f} | {seconds['percentile_95']:.3f} "
            f"| {round(seconds['all'])} |"
        )
    made: dict[str, list[str]] = {}
    for each in found:
        made.setdefault(f"commit {each['commit'][:7]}, {each['date'][:10]}", []).append(f"`{each['name']}`")
    notes = [f"- Made by {when}: {', '.join(names)}." for when, names in sorted(made.items())]
    return [*lines, "", *notes, ""] if found else []


def sweep_page() -> str:
    """docs/comparison.md, made of every sweep-EPS.json."""
    sweeps = _sweeps()
    first = sweeps[0]
    lines = [
        "# Methods under one budget",
        "",
        "Written by `python results/make.py` from `results/sweep-*.json`; do not edit.",
        "",
        fill(
            f"One network (`{first['model']}`, MNIST), one seed, or as many as a row says, with mean ± "
            f"deviation; and one budget: the time of {first['plain_epochs']} epochs of plain cross-entropy "
            "training on one CPU core. A method whose step costs seven plain steps gets a seventh of the "
            "epochs. Batch, optimiser and learning rate are the same for all; methods that train on bounds "
            "have the larger eps that the field trains at (0.2 for the test eps 0.1, 0.4 for 0.3), except "
            "`diffai`, `wong-kolter`, `colt`, `mat`, `maar` and the rows with an @EPS in their name; other "
            "options are each method's defaults, but for `crown-ibp`'s loss fusion, the 10 projections of "
            "`wong-kolter`, and what `colt`, `mat` and `maar` do to need less time: attacks of 4 steps, 10 "
            "projections, and most epochs behind the input ([results/sweep.py](../results/sweep.py)).",
            width=110,
        ),
        "",
        fill(
            f"Per cent of the first {first['examples']:,} test images: *certified* by the cascade with "
            f"{first['time_limit']:g} s per image and stage, *undecided* what it leaves open in that time, "
            "*by ibp* what intervals prove. A standard error of a share near 95 % is 0.7 %, so neighbours in "
            "a table are not told apart. What a step costs was timed before each run at 0.1, while "
            "other work ran, and is not exact: the two runs of `ibp` at 0.1 had 3.1 and 2.7, those of "
            "`exp-ibp` 4.5 and 3.6, those of `shi-ibp` 2.7 and 3.6 (on two machines). A row has the "
            "same cost and epochs at both eps, but for `fgsm`, `pgd`, `colt`, `mat` and `maar`, which "
            "were timed at each. With one to three epochs `wong-kolter`, `taps`, `staps` and `mat` come to "
            "give one answer to everything at 0.3.",
            width=110,
        ),
        "",
    ]
    for sweep in sweeps:
        lines += _sweep_section(sweep)
    return "\n".join(lines).rstrip() + "\n"


def _sweeps() -> list[dict[str, Any]]:
    return [read_json(file) for file in sorted(HERE.glob("sweep-*.json"))]


def _sweep_section(found: dict[str, Any]) -> list[str]:
    """The table of one test eps."""
    rows = _by_name(found)
    shares = {name: _shares(found, runs) for name, runs in rows.items()}
    front = _front(shares)
    best = [
        f"`{name}` ({shares[name][2]:.1%} certified, {shares[name][0]:.1%} clean)"
        for name in rows
        if name in front
    ]
    lines = [
        f"## Test eps {found['eps']:g}",
        "",
        f"![Clean, attacked and certified accuracy of each method](comparison-{found['eps']:g}.svg)",
        "",
        fill(
            f"Rows that no other one matches in both certified and clean accuracy, the most certified first: "
            f"{', '.join(best)}. They are in bold below; which is best depends on what the one is worth in "
            f"terms of the other. The picture has the rows of which more than {SHOWN:.0%} is certified.",
            width=110,
            break_on_hyphens=False,
        ),
        "",
        "| method | train eps | clean | attacked | certified | undecided | by ibp | epochs "
        "| plain steps per step |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, runs in rows.items():
        counts = zip(*map(_counts, runs), strict=True)
        cells = " | ".join(_share(count, found["examples"]) for count in counts)
        radius = runs[0]["recipe"]["method"].get("eps", "")
        several = f" ({len(runs)} seeds)" if len(runs) > 1 else ""
        cost = f"{runs[0]['epochs']} | {runs[0]['plain_steps_per_step']:.1f}"
        shown = f"**`{name}`**" if name in front else f"`{name}`"
        lines.append(f"| {shown}{several} | {radius} | {cells} | {cost} |")
    made = sorted({row["trained"]["commit"][:7] for row in found["rows"]})
    dates = sorted({row["trained"]["date"][:10] for row in found["rows"]})
    machines = sorted({row["machine"] for row in found["rows"]})
    return [
        *lines,
        "",
        f"Made by `{found['train']}` and `{found['certify']}`; commit {', '.join(made)}; {', '.join(dates)};"
        f" {', '.join(machines)}.",
        "",
    ]


def _by_name(found: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The runs of every row, one for each of its seeds."""
    return {name: list(seeds) for name, seeds in groupby(found["rows"], key=lambda row: row["name"])}


def _shares(found: dict[str, Any], runs: list[dict[str, Any]]) -> list[float]:
    """What `_counts` counts, as shares of all images, of all seeds together."""
    examples = len(runs) * found["examples"]
    return [sum(counts) / examples for counts in zip(*map(_counts, runs), strict=True)]


def _front(shares: dict[str, list[float]]) -> set[str]:
    """The rows that no other one equals or beats in both clean and certified accuracy."""

    def matched(name: str) -> bool:
        clean, _, certified, *_ = shares[name]
        others = (shares[other] for other in shares if other != name)
        return any(other[0] >= clean and other[2] >= certified for other in others)

    return {name for name in shares if not matched(name)}


def sweep_pictures() -> dict[str, str]:
    """docs/comparison-EPS.svg: the shares of every sweep-EPS.json, of all seeds together."""
    return {f"comparison-{found['eps']:g}.svg": _sweep_picture(found) for found in _sweeps()}


def _sweep_picture(found: dict[str, Any]) -> str:
    rows = {}
    for name, runs in _by_name(found).items():
        shares = _shares(found, runs)
        if shares[2] > SHOWN:  # the others would leave no room to tell these apart
            rows[name] = dict(zip(("clean", "attacked", "certified"), shares, strict=False))
    alt = "; ".join(f"{name} certified {100 * row['certified']:.1f} %" for name, row in rows.items())
    costs = {"cost_in_plain_epochs": None}
    return _standalone(figures.compared(list(rows), [row | costs for row in rows.values()], "sweep", alt))


def _standalone(picture: str) -> str:
    """A report's picture as a file of its own, which has no page to take its colours from."""
    coloured = re.sub(r"var\(--(\w+)\)", lambda match: COLOURS[match[1]], picture)
    return coloured.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" style="background: #fff" ', 1)


def _counts(run: dict[str, Any]) -> tuple[int, ...]:
    """Of how many images it is right, withstands the attack, is proved, is open, is proved by intervals."""
    attacked = run["clean_correct"] - run["falsified"]
    return run["clean_correct"], attacked, run["robust"], run["undecided"], run["by_ibp"]


def _share(counts: Sequence[int], examples: int) -> str:
    shares = [100 * count / examples for count in counts]
    deviation = f" ± {statistics.stdev(shares):.1f}" if len(shares) > 1 else ""
    return f"{statistics.mean(shares):.1f}{deviation}"


def _cell(spread: dict[str, Any]) -> str:
    deviation = "" if spread["deviation"] is None else f" ± {spread['deviation']:.2f}"
    return f"{spread['mean']:.2f}{deviation}"


if __name__ == "__main__":
    if len(sys.argv) > 2 and sys.argv[2].endswith(".jsonl"):
        name, file = sys.argv[1], Path(sys.argv[2])
        how = read_verdicts(file)[0]["identity"]["verifier"]
        (decided if how == "cascade" else repeated)(name, file)
    elif len(sys.argv) > 2:
        collect(sys.argv[1], [Path(run) for run in sys.argv[2:]])
    write_atomically(PAGE, page())
    write_atomically(PAGE.with_name("layerwise.svg"), layerwise_picture())
    write_atomically(PAGE.with_name("comparison.md"), sweep_page())
    for picture, drawn in sweep_pictures().items():
        write_atomically(PAGE.with_name(picture), drawn)

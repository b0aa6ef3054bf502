"""What is known of a run besides its verdicts: its recipe, where and when it ran, what was recorded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tightrope.report.read import Epoch, Run
from tightrope.report.text import commit_text, date_text, duration_text, eps_text, norm_text, number_text
from tightrope.train.schedules import last


def facts_of(run: Run) -> dict[str, str]:
    """Short facts by their titles, in the order of the page; those that are not known are left out."""
    recipe: Mapping[str, Any] = run.recipe or {"method": {}}
    method = recipe["method"]
    data = [one.data for one in run.certificates] + [one.data for one in run.radii]
    where = "" if recipe.get("norm", "inf") == "inf" else f" ({norm_text(recipe)})"
    tested = dict.fromkeys(eps_text(one.identity["eps"]) for one in run.certificates)
    parameters = _fact(run, "parameters")
    finished: Epoch | dict[str, Any] = run.epochs[-1] if run.epochs else {}
    facts = {
        "Data": recipe.get("data") or next(iter(data), None),
        "Model": recipe.get("model"),
        "Parameters": f"{parameters:,}" if isinstance(parameters, int) else None,
        "Method": "+".join([method["name"], *recipe.get("modifiers", {})]) if "name" in method else None,
        "Training eps": eps_text(last(method["eps"])) + where if "eps" in method else None,
        "Test eps": eps_text(recipe["test_eps"]) + where if "test_eps" in recipe else ", ".join(tested),
        "Epochs": finished.get("epoch"),
        "Training time": duration_text(finished["seconds"]) if "seconds" in finished else None,
        "Seed": recipe.get("seed", _fact(run, "seed")),
        "Commit": commit_text(_fact(run, "commit")),
        "Date": date_text(_fact(run, "date")),
        "Device": _fact(run, "device"),
    }
    return {name: str(value) for name, value in facts.items() if value is not None and value != ""}


def summary_of(facts: Mapping[str, str]) -> str:
    """Data, model, method and training eps in one line."""
    known = [facts[name] for name in ("Data", "Model", "Method") if name in facts]
    known += [f"trained at eps {facts['Training eps']}"] if "Training eps" in facts else []
    return " · ".join(known)


def wide_facts_of(run: Run) -> Iterator[tuple[str, str]]:
    """Facts that need a line of their own, by their titles."""
    versions = [f"{name} {_fact(run, name)}" for name in ("tightrope", "torch", "python") if _fact(run, name)]
    machine = [str(_fact(run, "machine") or "")]
    threads = _fact(run, "threads")
    machine += [number_text(threads, "thread")] if isinstance(threads, int) else []
    if any(machine):
        yield "Machine", ", ".join(filter(None, machine))
    if versions:
        yield "Versions", ", ".join(versions)
    if _fact(run, "command"):
        yield "Command", str(_fact(run, "command"))


def _fact(run: Run, key: str) -> Any:
    return run.environment.get(key, run.result.get(key))


def recorded_of(run: Run) -> Iterator[tuple[str, str]]:
    """What `result.json` says of the paper and of our runs, as it stands there."""
    for part in ("paper", "ours"):
        yield from _flat(run.result.get(part), part)


def _flat(value: object, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _flat(part, f"{name} · {key}")
    elif isinstance(value, list):
        yield name, ", ".join(map(str, value))
    elif value is not None:
        yield name, f"{value:.6g}" if isinstance(value, float) else str(value)

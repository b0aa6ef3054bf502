"""Runs side by side: the table, and plots that lay them over each other."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tightrope.report import figures
from tightrope.report.facts import facts_of, summary_of
from tightrope.report.figures import Plot
from tightrope.report.read import Certificate, Run
from tightrope.report.text import eps_text, norm_text, number_text, unlike_text
from tightrope.report.training import layerwise
from tightrope.report.verdicts import Headline, attack_text, beyond_text, headlines, setting_text


@dataclass(frozen=True)
class Row:
    """One line of a comparison: a certify file, what a results folder records, or a run without either.

    Args:
        run: what the run is called.
        anchor: where it is described.
        summary: data, model and method in one line.
        facts: what was asked, and what came out: shares in [0, 1], None where it is not known.
        setting: what was asked, in words; "" if nothing is certified yet.
        headlines: what came out, in words: clean, attacked, certified.
        judged: which examples; comparisons need the same.
        unfinished: what is missing, if the certification was stopped.
    """

    run: str
    anchor: str
    summary: str
    facts: dict[str, Any]
    setting: str = ""
    headlines: list[Headline] = field(default_factory=list)
    judged: Hashable = None
    unfinished: str = ""

    @property
    def cost(self) -> str:
        """Cost in epochs of plain training."""
        cost = self.facts["cost_in_plain_epochs"]
        return "" if cost is None else f"{cost:,.0f}"


_FIGURES = ("eps", "norm", "verifier", "examples", "clean", "attacked", "certified", "source")


def comparison(runs: Mapping[str, Run]) -> list[Row]:
    """A line for every certify file of each run, or for what its `result.json` records, or for neither."""
    rows: list[Row] = []
    for place, (label, run) in enumerate(runs.items(), start=1):
        anchor, facts = f"run{place}", facts_of(run)
        summary = summary_of(facts)
        known = {"run": label, "method": facts.get("Method"), "data": facts.get("Data")}
        known |= {"cost_in_plain_epochs": run.result.get("cost_in_plain_epochs")}
        found = [_certified_row(label, anchor, summary, known, one) for one in run.certificates]
        if not found and isinstance(run.result.get("ours"), dict):
            found = [_recorded_row(label, anchor, summary, known, run)]
        rows += found or [Row(label, anchor, summary, known | dict.fromkeys(_FIGURES))]
    return rows


def _certified_row(label: str, anchor: str, summary: str, known: Mapping[str, Any], one: Certificate) -> Row:
    counts, identity = one.counts, one.identity
    facts = {
        **known,
        "data": one.data,
        "eps": identity["eps"],
        "norm": identity["norm"],
        "verifier": identity["verifier"],
        "examples": counts["examples"],
        "clean": counts["clean_accuracy"],
        "attacked": counts["attacked_accuracy"],
        "certified": None if identity["verifier"] == "none" else counts["certified_accuracy"],
        "source": one.path.name,
    }
    judged = frozenset(verdict.index for verdict in one.verdicts)
    return Row(label, anchor, summary, facts, setting_text(one), headlines(one), judged, one.unfinished)


def _recorded_row(label: str, anchor: str, summary: str, known: Mapping[str, Any], run: Run) -> Row:
    """What `result.json` says: means over seeds, of errors in per cent."""
    recipe: Mapping[str, Any] = run.recipe or {}
    ours, eps, norm = run.result["ours"], recipe.get("test_eps"), recipe.get("norm", "inf")
    seeds = number_text(len(run.result.get("seeds", [])) or 1, "seed")
    shown, shares = [], {}
    for name, key in (("clean", "clean"), ("attacked", "attacked"), ("certified", "verified")):
        found = ours.get(f"{key}_error")
        title = f"{name.capitalize()} accuracy"
        if isinstance(found, dict) and isinstance(found.get("mean"), int | float):
            shares[name] = (100 - found["mean"]) / 100
            deviation = found.get("deviation")
            spread = f"± {deviation:.2f}, " if isinstance(deviation, int | float) else ""
            shown.append(Headline(title, f"{100 - found['mean']:.2f} %", f"{spread}{seeds}"))
        else:
            shown.append(Headline(title, "n/a", "not recorded"))
    count, verifier = ours.get("examples"), ours.get("verifier")
    facts = {**known, **dict.fromkeys(_FIGURES), **shares, "source": "result.json"}
    facts |= {"eps": None if eps is None else float(eps), "norm": norm, "verifier": verifier}
    setting = [f"verifier {verifier}", f"eps {eps_text(eps)}" if eps is not None else ""]
    setting += [number_text(count, "test example")] if isinstance(count, int) else []
    setting += ["recorded in result.json"]
    judged = frozenset(range(count)) if isinstance(count, int) else None
    facts["examples"] = count
    return Row(label, anchor, summary, facts, ", ".join(filter(None, setting)), shown, judged)


def differences(rows: Sequence[Row]) -> str:
    """A warning if rows are unfinished, or do not measure the same thing; "" if all is well."""
    stopped = [f"{row.run}: {row.unfinished}" for row in rows if row.unfinished]
    unlike = unlike_text(
        {**{name: row.facts[name] for name in ("data", "eps", "norm")}, "examples": row.judged}
        for row in rows
        if row.setting
    )
    return " ".join(filter(None, [*stopped, unlike]))


def picture(rows: Sequence[Row]) -> Plot:
    """The rows as points on one axis."""
    shown = [row for row in rows if row.setting]
    names = [row.run for row in shown]
    labels = [
        f"{row.run}\n{row.facts['verifier']}, "
        f"eps {eps_text(row.facts['eps'] or 0.0)} ({norm_text(row.facts)})"
        if names.count(row.run) > 1
        else row.run
        for row in shown
    ]
    said = "; ".join(
        f"{row.run}: " + ", ".join(f"{line.name.lower()} {line.value}" for line in row.headlines)
        for row in shown
    )
    cost = ""
    if any(row.cost for row in shown):
        cost = " Cost is counted in epochs of plain training, for the runs that record it."
    return Plot(
        "Clean, attacked and certified",
        figures.compared(labels, [row.facts for row in shown], "compared", said),
        "Shares of the examples that were looked at. The true robust accuracy lies between certified and "
        f"attacked: the thick line between those two points is what is not decided yet.{cost}",
    )


def margins_compared(runs: Mapping[str, Run]) -> Iterator[Plot]:
    """A plot for every question that certify files of at least two runs answer."""
    alike: dict[Hashable, dict[str, list[Certificate]]] = defaultdict(lambda: defaultdict(list))
    for label, run in runs.items():
        for one in run.certificates:
            asked = tuple(one.identity.get(name) for name in ("data", "eps", "norm", "verifier"))
            alike[one.data, asked][label].append(one)
    for place, found in enumerate(found for found in alike.values() if len(found) > 1):
        files = {
            label + (f" ({one.path.name})" if len(several) > 1 else ""): one
            for label, several in found.items()
            for one in several
        }
        yield _compare_margins(files, f"overlay-margins{place}")


def _compare_margins(files: Mapping[str, Certificate], key: str) -> Plot:
    verdicts = {name: one.verdicts for name, one in files.items()}
    medians = ", ".join(
        f"{name} (median {statistics.median(verdict.margin for verdict in found):.3g})"
        for name, found in verdicts.items()
    )
    alt = f"Histograms of the margins of {medians}."
    svg, beyond = figures.margins_compared(verdicts, key, alt)
    first = next(iter(files.values()))
    words = (
        f"Verifier {first.identity['verifier']}, eps {eps_text(first.identity['eps'])} "
        f"({norm_text(first.identity)}), {first.data}. Each line is the histogram of one run's margins, in "
        "shares of its examples. What lies right of zero is safe. A hump at zero means many examples that a "
        "small change of eps or of the network turns; re-weighting is meant to move them away from it. "
        "Margins are in logits, whose scale is each network's own: compare how much lies on either side of "
        "zero before how far."
    )
    unlike = unlike_text(
        (
            {
                "examples": frozenset(verdict.index for verdict in one.verdicts),
                "attack": attack_text(one.identity["attack"]),
            }
            for one in files.values()
        ),
        "lines",
    )
    return Plot("Margins compared", svg, words + beyond_text(beyond) + (f" {unlike}" if unlike else ""))


def held_out_compared(runs: Mapping[str, Run]) -> Plot | None:
    """Held-out accuracies of all runs, if any noted them."""
    curves = {
        label: run.epochs for label, run in runs.items() if any(epoch.get("held_out") for epoch in run.epochs)
    }
    if not curves:
        return None
    alt = f"Held-out accuracies by epoch of {number_text(len(curves), 'run')}: {', '.join(curves)}."
    return Plot(
        "Held-out accuracy",
        figures.accuracies(curves, "overlay", alt),
        "Accuracy on training examples that were set aside, after each epoch; certified accuracy from each "
        "method's quickest bounds. Compare where the curves end, and how early they rise; what counts is the "
        "table above.",
    )


def stages_compared(runs: Mapping[str, Run]) -> Plot | None:
    """Verified errors of all runs that were trained layer by layer, if there are any."""
    staged = {label: run.epochs for label, run in runs.items() if any("stage" in e for e in run.epochs)}
    return layerwise(staged, "overlay-stages") if staged else None


def sensitivity(runs: Sequence[Run]) -> Plot | None:
    """Accuracies against the one number in which the runs' methods differ, if it is one."""
    if len(runs) < 3 or any(run.recipe is None for run in runs):
        return None
    tables = [_numbers(run.recipe) for run in runs if run.recipe is not None]
    differing = {name for table in tables for name in table if len({t.get(name) for t in tables}) > 1}
    differing.discard("seed")
    if len(differing) != 1:
        return None
    (name,) = differing
    points: dict[float, tuple[float, float]] = {}
    settings = set()
    for table, run in zip(tables, runs, strict=True):
        value = table.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not run.certificates:
            return None
        one = run.certificates[-1]
        counts = one.counts
        settings.add(setting_text(one))
        points[value] = (counts["clean_accuracy"], counts["certified_accuracy"])
    if len(settings) != 1 or len(points) != len(runs):
        return None
    (setting,) = settings
    alt = "; ".join(f"{name} {v:g}: clean {c:.1%}, certified {r:.1%}" for v, (c, r) in sorted(points.items()))
    return Plot(
        f"Sensitivity to {name}",
        figures.sensitivity(points, name, "sensitivity", alt),
        f"The runs differ in {name} alone. {setting[0].upper()}{setting[1:]}.",
    )


def _numbers(table: Mapping[str, Any], prefix: str = "") -> dict[str, Hashable]:
    """A recipe's entries by their dotted names."""
    found: dict[str, Hashable] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            found |= _numbers(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value if isinstance(value, Hashable) else str(value)
    return found

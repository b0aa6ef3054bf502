"""Put the page together: what each run says, in words, numbers and plots."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from scipy.special import betaincinv

from tightrope.errors import InputError
from tightrope.files import write_atomically
from tightrope.report import figures
from tightrope.report.examples import Example, Load, examples, loader
from tightrope.report.figures import STATUS_COLOURS
from tightrope.report.read import Certificate, Epoch, RadiusFile, Run, read_run
from tightrope.report.text import commit_text as _commit
from tightrope.report.text import date_text as _date
from tightrope.report.text import duration_text as _duration
from tightrope.report.text import number_text as _number
from tightrope.train.schedules import last
from tightrope.verify import Radii, Verdict

_NORMS = {"inf": "l∞", "2": "l2", "1": "l1"}


@dataclass(frozen=True)
class Headline:
    """One large number: a share in per cent, or "none" with the reason in `detail`."""

    name: str
    value: str
    detail: str
    interval: str = ""


@dataclass(frozen=True)
class Plot:
    """A figure with a title, and words on how to read it."""

    title: str
    svg: Markup
    words: str


@dataclass(frozen=True)
class StageRow:
    """A line of the verdict table."""

    status: str
    stage: str
    count: int
    share: str
    total: str
    median: str


@dataclass(frozen=True)
class CertificateView:
    """A certify file as the page shows it."""

    file: str
    title: str
    setting: str
    attack: str
    headlines: list[Headline]
    between: str
    shares: list[tuple[str, int, float]]
    stages: list[StageRow]
    margins: Plot


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
    """

    run: str
    anchor: str
    summary: str
    facts: dict[str, Any]
    setting: str = ""
    headlines: list[Headline] = field(default_factory=list)
    judged: Hashable = None

    @property
    def cost(self) -> str:
        """Cost in epochs of plain training."""
        cost = self.facts["cost_in_plain_epochs"]
        return "" if cost is None else f"{cost:,.0f}"


@dataclass(frozen=True)
class RadiusRow:
    """A file of radii as a line of a table."""

    name: str
    file: str
    setting: str
    mean: str
    median: str
    at_largest: str
    total: str


@dataclass(frozen=True)
class RadiiView:
    """Files of radii as the page shows them: one plot, and one table."""

    plot: Plot
    rows: list[RadiusRow]
    unlike: str


@dataclass(frozen=True)
class LayerRow:
    """What is known of the network as a stage left it."""

    stage: str
    setting: str
    clean: str
    certified: str


@dataclass(frozen=True)
class RunView:
    """A run as the page shows it."""

    anchor: str
    name: str
    facts: list[tuple[str, str]]
    wide_facts: list[tuple[str, str]]
    missing: list[str]
    recorded: list[tuple[str, str]]
    recipe: str
    certificates: list[CertificateView] = field(default_factory=list)
    radii: RadiiView | None = None
    attacks: int = 0
    examples: list[Example] = field(default_factory=list)
    no_examples: str = ""
    plots: list[Plot] = field(default_factory=list)
    layers: list[LayerRow] = field(default_factory=list)

    @property
    def summary(self) -> str:
        """Data, model, method and training eps in one line."""
        facts = dict(self.facts)
        known = [facts[name] for name in ("Data", "Model", "Method") if name in facts]
        return " · ".join(
            known + ([f"trained at eps {facts['Training eps']}"] if "Training eps" in facts else [])
        )


def write_report(runs: Sequence[Path], out: Path, data_root: Path | None = None) -> None:
    """Write one self-contained HTML page on one or several run or results folders.

    The page needs no network and no other file. Nothing is downloaded: where the data set of a successful
    attack is not at hand, the page says so. `out` is replaced only once the page is complete.

    Args:
        runs: the folders, in the order in which the page shows them.
        out: the HTML file to write; its folder is made if need be.
        data_root: where data sets lie, as for `tightrope.data.load`.

    Raises:
        InputError: no folder is given, one is not a run folder, a file in it is broken, or `out` cannot be
            written.

    Example:
        write_report([Path("runs/a"), Path("runs/b")], Path("report.html"))
    """
    read = _read(runs)
    load = loader(data_root)
    views = [
        _run(label, run, f"run{place}", load) for place, (label, run) in enumerate(read.items(), start=1)
    ]
    several = len(views) > 1
    title = "Comparison of robustness runs" if several else f"Robustness report: {views[0].name}"
    _write(out, title, read, views, compared=several)


def compare(runs: Sequence[Path], out: Path | None = None) -> list[Row]:
    """Run or results folders side by side: a line for every certify file, or for what `result.json` records.

    Args:
        runs: the folders, in the order in which they are shown.
        out: an HTML file for the table and one picture of it; None writes none.

    Raises:
        InputError: no folder is given, one is not a run folder, a file in it is broken, or `out` cannot be
            written.
    """
    read = _read(runs)
    if out is not None:
        _write(out, "Comparison of robustness runs", read, [], compared=True)
    return _rows(read)


def _read(runs: Sequence[Path]) -> dict[str, Run]:
    if not runs:
        raise InputError("no run folder was given; give at least one that `tightrope train --out` made")
    return dict(zip(_labels(runs), map(read_run, runs), strict=True))


def _write(
    out: Path, title: str, read: Mapping[str, Run], views: Sequence[RunView], *, compared: bool
) -> None:
    """Write the page: the comparison, if there is one, and what is said of each run."""
    rows = _rows(read) if compared else []
    render(
        out,
        "report.html.j2",
        title=title,
        runs=views,
        count=_number(len(read), "run"),
        compared=compared,
        rows=rows,
        costs=any(row.cost for row in rows),
        unlike=differences(rows),
        picture=_picture(rows) if any(row.setting for row in rows) else None,
        curves=_overlay(read) if compared else None,
        staged=_staged(read) if compared else None,
        sensitivity=_sensitivity(list(read.values())),
        margins=list(_margins_compared(read)),
        all_radii=_radii_of_all(read) if compared else None,
        statuses=STATUS_COLOURS,
    )


def render(out: Path, template: str, **content: Any) -> None:
    """Fill a template of this folder, and write the page.

    Raises:
        InputError: if `out` cannot be written.
    """
    templates = Environment(
        loader=PackageLoader("tightrope.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = templates.get_template(template).render(content)
    try:
        write_atomically(out, page)
    except OSError as error:
        raise InputError(f"cannot write the report to {out}: {error.strerror}; give another --out") from None


def eps_text(eps: float) -> str:
    """Write eps as people do: 0.3 stays 0.3, and 0.031372549 is 8/255.

    Example:
        eps_text(2 / 255) == "2/255"
    """
    steps = eps * 255
    if not math.isclose(eps, round(eps, 4), abs_tol=1e-9) and math.isclose(steps, round(steps), abs_tol=1e-4):
        return f"{round(steps)}/255"
    return f"{eps:.4g}"


def clopper_pearson(successes: int, trials: int, level: float = 0.95) -> tuple[float, float]:
    """Exact confidence interval of a proportion, both ends in [0, 1]."""
    tail = (1 - level) / 2
    low = 0.0 if successes == 0 else float(betaincinv(successes, trials - successes + 1, tail))
    high = 1.0 if successes == trials else float(betaincinv(successes + 1, trials - successes, 1 - tail))
    return low, high


def _labels(runs: Sequence[Path]) -> list[str]:
    """Folder names; whole paths where two folders have the same name."""
    names = [path.resolve().name for path in runs]
    labels = [
        name if names.count(name) == 1 else str(path.resolve())
        for name, path in zip(names, runs, strict=True)
    ]
    if len(set(labels)) < len(labels):
        raise InputError(f"a run folder was given twice among {', '.join(map(str, runs))}; give each once")
    return labels


def _run(label: str, run: Run, anchor: str, load: Load) -> RunView:
    attacks = {verdict.index for one in run.certificates for verdict in one.verdicts if verdict.witness}
    drawn, why_none = examples(run.certificates, load)
    return RunView(
        anchor=anchor,
        name=label,
        facts=list(_facts(run)),
        wide_facts=list(_wide_facts(run)),
        missing=run.missing,
        recorded=[
            (name, value) for part in ("paper", "ours") for name, value in _flat(run.result.get(part), part)
        ],
        recipe=run.recipe_text,
        certificates=[
            _certificate(one, f"{anchor}-certificate{place}") for place, one in enumerate(run.certificates)
        ],
        radii=_radii(list(_named(run.radii)), anchor) if run.radii else None,
        attacks=len(attacks),
        examples=drawn,
        no_examples=why_none,
        plots=list(_training(run.epochs, anchor)),
        layers=list(_layer_rows(run)),
    )


def _layer_rows(run: Run) -> Iterator[LayerRow]:
    """Certified and latent robustness of the network after each stage, and of the finished one."""
    parts = [*((f"after stage {part.path.name}", part) for part in run.stages), ("finished", run)]
    if not any(part.certificates or part.latent for part in run.stages):
        return
    for name, part in parts:
        for one in part.certificates:
            counts = one.counts
            total = counts["examples"]
            clean, certified = _percent(counts["clean_correct"], total), _percent(counts["robust"], total)
            yield LayerRow(name, _setting(one), clean, certified)
        for found in part.latent:
            total = found["examples"]
            yield LayerRow(
                name,
                f"latent attack behind {found['node']}, eps {eps_text(found['eps'])}, "
                f"{_number(total, 'test example')}: not a proof",
                _percent(found["clean_correct"], total),
                f"withstood by {_percent(found['withstood'], total)}",
            )


def _facts(run: Run) -> Iterator[tuple[str, str]]:
    recipe: Mapping[str, Any] = run.recipe or {"method": {}}
    method = recipe["method"]
    data = [one.data for one in run.certificates] + [one.data for one in run.radii]
    tested = dict.fromkeys(eps_text(one.identity["eps"]) for one in run.certificates)
    parameters = _fact(run, "parameters")
    finished: Epoch | dict[str, Any] = run.epochs[-1] if run.epochs else {}
    facts = {
        "Data": recipe.get("data") or next(iter(data), None),
        "Model": recipe.get("model"),
        "Parameters": f"{parameters:,}" if isinstance(parameters, int) else None,
        "Method": method.get("name"),
        "Training eps": eps_text(last(method["eps"])) if "eps" in method else None,
        "Test eps": eps_text(recipe["test_eps"]) if "test_eps" in recipe else ", ".join(tested),
        "Epochs": finished.get("epoch"),
        "Training time": _duration(finished["seconds"]) if "seconds" in finished else None,
        "Seed": recipe.get("seed", _fact(run, "seed")),
        "Commit": _commit(_fact(run, "commit")),
        "Date": _date(_fact(run, "date")),
        "Device": _fact(run, "device"),
    }
    for name, value in facts.items():
        if value is not None and value != "":
            yield name, str(value)


def _wide_facts(run: Run) -> Iterator[tuple[str, str]]:
    versions = [f"{name} {_fact(run, name)}" for name in ("tightrope", "torch", "python") if _fact(run, name)]
    machine = [str(_fact(run, "machine") or "")]
    threads = _fact(run, "threads")
    machine += [_number(threads, "thread")] if isinstance(threads, int) else []
    if any(machine):
        yield "Machine", ", ".join(filter(None, machine))
    if versions:
        yield "Versions", ", ".join(versions)
    if _fact(run, "command"):
        yield "Command", str(_fact(run, "command"))


def _fact(run: Run, key: str) -> Any:
    return run.environment.get(key, run.result.get(key))


def _flat(value: object, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _flat(part, f"{name} · {key}")
    elif isinstance(value, list):
        yield name, ", ".join(map(str, value))
    elif value is not None:
        yield name, f"{value:.6g}" if isinstance(value, float) else str(value)


def _certificate(certificate: Certificate, key: str) -> CertificateView:
    counts, verdicts, identity = certificate.counts, certificate.verdicts, certificate.identity
    total = counts["examples"]
    between = ""
    if counts["undecided"]:
        low, high = counts["robust"], counts["robust"] + counts["undecided"]
        between = (
            "The true robust accuracy on these examples lies between "
            f"{_percent(low, total)} and {_percent(high, total)}: "
            f"for {_number(counts['undecided'], 'example')} neither a proof nor a counterexample was found."
        )
    return CertificateView(
        file=certificate.path.name,
        title=f"Result with verifier {identity['verifier']}, eps {eps_text(identity['eps'])}",
        setting=_setting(certificate),
        attack=_attack(identity["attack"]),
        headlines=_headlines(certificate),
        between=between,
        shares=[
            (status, count, 100 * count / total)
            for status in STATUS_COLOURS
            if (count := sum(verdict.status == status for verdict in verdicts))
        ],
        stages=_stages(verdicts),
        margins=_margins(verdicts, key),
    )


def _headlines(certificate: Certificate) -> list[Headline]:
    counts = certificate.counts
    total = counts["examples"]
    return [
        _headline("Clean accuracy", counts["clean_correct"], total),
        _headline("Attacked accuracy", counts["robust"] + counts["undecided"], total)
        if certificate.attacked
        else Headline("Attacked accuracy", "n/a", "no attack was run"),
        Headline("Certified accuracy", "n/a", "no verifier was run")
        if certificate.identity["verifier"] == "none"
        else _headline("Certified accuracy", counts["robust"], total),
    ]


def _setting(certificate: Certificate) -> str:
    identity = certificate.identity
    return (
        f"verifier {identity['verifier']}, eps {eps_text(identity['eps'])} ({_norm(identity)}), "
        f"{_number(len(certificate.verdicts), 'test example')} of {certificate.data}"
    )


def _attack(attack: Mapping[str, Any] | None) -> str:
    if attack is None:
        return ""
    options = [
        key.replace("_", " ") + ("" if value is True else f" {value}")
        for key, value in attack.items()
        if key != "name"
    ]
    return ", ".join([attack.get("name", "unnamed"), *options])


def _headline(name: str, count: int, total: int) -> Headline:
    low, high = clopper_pearson(count, total)
    digits = _decimals(total)
    return Headline(
        name,
        _percent(count, total),
        f"{count:,} of {total:,}",
        f"95 % interval {100 * low:.{digits}f} to {100 * high:.{digits}f} %",
    )


def _stages(verdicts: Sequence[Verdict]) -> list[StageRow]:
    groups: dict[tuple[str, str], list[float]] = defaultdict(list)
    for verdict in verdicts:
        groups[verdict.status, verdict.stage].append(verdict.seconds)
    statuses: list[str] = list(STATUS_COLOURS)
    order = sorted(groups, key=lambda group: (statuses.index(group[0]), -len(groups[group]), group[1]))

    def line(status: str, stage: str, seconds: list[float]) -> StageRow:
        share = _percent(len(seconds), len(verdicts))
        return StageRow(
            status, stage, len(seconds), share, _duration(sum(seconds)), _duration(statistics.median(seconds))
        )

    return [line(*group, groups[group]) for group in order] + [
        line("all", "", [verdict.seconds for verdict in verdicts])
    ]


def _margins(verdicts: Sequence[Verdict], key: str) -> Plot:
    alt = "Histogram of the margins of " + _number(len(verdicts), "example") + ", coloured by verdict."
    svg, beyond = figures.margins(verdicts, f"{key}-margins", alt)
    words = (
        "The margin is how far the true class stays ahead of every other class, in logits. For robust and "
        "undecided examples it is the verifier's guaranteed minimum over all allowed inputs, for falsified "
        "ones the margin at the counterexample, for misclassified ones that of the unchanged input. "
        "Undecided bars close to zero could turn robust with a tighter verifier or a little more training; "
        "bars far to the left could not."
    )
    return Plot("Margins", svg, words + _beyond(beyond))


def _margins_compared(runs: Mapping[str, Run]) -> Iterator[Plot]:
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
        f"({_norm(first.identity)}), {first.data}. Each line is the histogram of one run's margins, in "
        "shares of its examples. What lies right of zero is safe. A hump at zero means many examples that a "
        "small change of eps or of the network turns; re-weighting is meant to move them away from it. "
        "Margins are in logits, whose scale is each network's own: compare how much lies on either side of "
        "zero before how far."
    )
    unlike = _differences(
        (
            {
                "examples": frozenset(verdict.index for verdict in one.verdicts),
                "attack": _attack(one.identity["attack"]),
            }
            for one in files.values()
        ),
        "lines",
    )
    return Plot("Margins compared", svg, words + _beyond(beyond) + (f" {unlike}" if unlike else ""))


def _beyond(count: int) -> str:
    return f" {_number(count, 'example')} beyond the ends are counted in the outermost bars." if count else ""


def _named(files: Sequence[RadiusFile], run: str = "") -> Iterator[tuple[str, RadiusFile]]:
    """The files with what a legend calls them: the verifier, and the file where that is not enough."""
    askings = [(one.identity["verifier"], one.identity["norm"]) for one in files]
    for asking, one in zip(askings, files, strict=True):
        yield run + asking[0] + (f" ({one.path.name})" if askings.count(asking) > 1 else ""), one


def _radii_of_all(runs: Mapping[str, Run]) -> RadiiView | None:
    files = [named for label, run in runs.items() for named in _named(run.radii, f"{label}, ")]
    return _radii(files, "overlay") if files else None


def _radii(files: Sequence[tuple[str, RadiusFile]], key: str) -> RadiiView:
    files = sorted(files, key=lambda named: list(_NORMS).index(named[1].identity["norm"]))
    curves: dict[str, dict[str, Radii]] = defaultdict(dict)
    for name, one in files:
        curves[_norm(one.identity)][name] = one.radii
    rows = [_radius_row(name, one) for name, one in files]
    means = "; ".join(f"{row.name}, mean radius {row.mean} ({row.setting})" for row in rows)
    plot = Plot(
        "Certified accuracy against eps",
        figures.radii(curves, f"{key}-radii", f"Certified accuracy against eps: {means}."),
        "For every eps, the share of all test examples proved robust at that eps or a larger one; at eps 0 "
        "it is the clean accuracy. What is robust at one eps is robust at every smaller one, so every point "
        "of a line is proved, and the true robust accuracy lies on the line or above it.",
    )
    unlike = _differences(
        {"data": one.data, "examples": frozenset(radius.index for radius in one.radii)} for _, one in files
    )
    return RadiiView(plot, rows, unlike)


def _radius_row(name: str, one: RadiusFile) -> RadiusRow:
    summary = one.radii.summary()
    return RadiusRow(
        name,
        one.path.name,
        f"{_norm(one.identity)}, {_number(summary['examples'], 'test example')} of {one.data}, "
        f"to within {summary['tolerance']:.4g}",
        f"{summary['mean_radius']:#.4g}",
        f"{summary['median_radius']:#.4g}",
        f"{summary['at_largest']:,} at {eps_text(summary['largest'])}",
        _duration(summary["seconds"]),
    )


def _norm(identity: Mapping[str, Any]) -> str:
    return _NORMS.get(identity["norm"], str(identity["norm"]))


def _training(epochs: Sequence[Epoch], key: str) -> Iterator[Plot]:
    if any(epoch.get("held_out") for epoch in epochs):
        ending = _last_held_out(epochs)
        svg = figures.accuracies({"": epochs}, f"{key}-accuracies", f"Accuracies by epoch. {ending}")
        yield Plot(
            "Held-out accuracy",
            svg,
            f"{ending} These are training examples set aside and never trained on; they guide decisions "
            "during training. Certified accuracy here comes from the method's quickest bounds, in float32: "
            "it is a progress indicator, not a verdict.",
        )
    if any("stage" in epoch for epoch in epochs):
        yield _layerwise({"": epochs}, f"{key}-stages")
    if any(epoch.get("losses") for epoch in epochs):
        yield Plot(
            "Losses",
            figures.losses(epochs, f"{key}-losses", "Loss and weight of each term by epoch."),
            "One line for each term of the training objective. A robust loss that rises while eps grows is "
            "expected; one that stays near ln(number of classes) means that the network learns nothing it "
            "can prove. A term with weight zero is measured but does not train the network.",
        )
    if any(epoch.get("eps") is not None or epoch.get("lr") is not None for epoch in epochs):
        yield Plot(
            "Schedules",
            figures.schedules(epochs, f"{key}-schedules", "Training eps and learning rate by epoch."),
            "Certified training raises eps slowly. The learning rate should not fall before eps has reached "
            "its final value.",
        )
    yield from _notes(epochs, key)
    if any(epoch.get("layers") for epoch in epochs):
        yield Plot(
            "Layers",
            figures.layers(
                epochs,
                f"{key}-layers",
                "Unstable share, dead share and mean bound width of each layer by epoch.",
            ),
            "A neuron is unstable when its bounds lie on both sides of zero: each one loosens the proof. It "
            "is dead when it is zero for every allowed input: many dead neurons waste capacity. Bounds that "
            "stay narrow towards the output are what certified training works for.",
        )


def _notes(epochs: Sequence[Epoch], key: str) -> Iterator[Plot]:
    """Plots of what only some methods and modifiers note."""
    notes = {name for epoch in epochs for name in epoch.get("notes", {})}
    if "agree" in notes:
        yield Plot(
            "How the two gradients are combined",
            figures.combination(
                epochs,
                f"{key}-combination",
                "Shares of steps led by both gradients, the adversarial or the robust one; cosine and FOSC; "
                "the two gradients' coefficients, by epoch.",
            ),
            "Where the averaged gradients of the adversarial and the robust loss agree (cosine above zero), "
            "both lead: the step goes between them. Where they do not, one leads, less what would undo the "
            "other: the adversarial one if the attack is strong, that is, if FOSC (zero where no step "
            "improves the attack; measured in these steps only) is at most a threshold, else the robust one. "
            "The coefficients are what the two gradients are multiplied by before they are added.",
        )
    words = []
    if "mean radius" in notes:
        words.append(
            "Examples that cannot be proved are trained at less than the schedule's eps: the further the "
            "mean radius stays below it, the more there are, or the more hopeless they are. While eps grows, "
            "part of the gap is only that eps is an epoch's last and the radius a mean over the epoch."
        )
    if any(name.startswith(figures.SHARE) for name in notes):
        words.append(
            "The effective share is how many of a batch's examples count after weighting, (Σw)² / (n Σw²): "
            "100 % where all count alike; close to zero, a few examples drown out the others."
        )
    if words:
        yield Plot(
            "Single examples",
            figures.single_examples(
                epochs, f"{key}-examples", "Training radius and effective share of the examples by epoch."
            ),
            " ".join(words),
        )


def _last_held_out(epochs: Sequence[Epoch]) -> str:
    epoch, held_out = next(
        (epoch["epoch"], found) for epoch in reversed(epochs) if (found := epoch.get("held_out"))
    )
    words = f"After epoch {epoch}: clean {100 * held_out['clean']:.1f} %"
    certified = held_out.get("certified")
    if certified is not None:
        words += f", certified {100 * certified:.1f} %"
        words += f" at eps {eps_text(held_out['eps'])}" if "eps" in held_out else ""
    return words + (f", on {held_out['examples']:,} examples." if "examples" in held_out else ".")


def _overlay(runs: Mapping[str, Run]) -> Plot | None:
    curves = {
        label: run.epochs for label, run in runs.items() if any(epoch.get("held_out") for epoch in run.epochs)
    }
    if not curves:
        return None
    alt = f"Held-out accuracies by epoch of {_number(len(curves), 'run')}: {', '.join(curves)}."
    return Plot(
        "Held-out accuracy",
        figures.accuracies(curves, "overlay", alt),
        "Accuracy on training examples that were set aside, after each epoch; certified accuracy from each "
        "method's quickest bounds. Compare where the curves end, and how early they rise; what counts is the "
        "table above.",
    )


def _layerwise(runs: Mapping[str, Sequence[Epoch]], key: str) -> Plot:
    held_out = {label or "this run": epochs[-1].get("held_out") for label, epochs in runs.items()}
    ends = "; ".join(
        f"{label} {100 * found['verified_error']:.1f} %"
        for label, found in held_out.items()
        if found and "verified_error" in found
    )
    alt = f"Verified error and clean accuracy by epoch. Verified error at the end: {ends}."
    return Plot(
        "Layer by layer",
        figures.stages(runs, key, alt),
        "Verified error is the share of right answers on held-out training examples that an attack turns "
        "inside the latent region that the run is working on; it is an estimate, not a proof. Dashed lines "
        "are where a stage ends: the region moves one layer on, and the layers before it are frozen. Across "
        "a line the attack is another one, so compare within a stage.",
    )


def _staged(runs: Mapping[str, Run]) -> Plot | None:
    staged = {label: run.epochs for label, run in runs.items() if any("stage" in e for e in run.epochs)}
    return _layerwise(staged, "overlay-stages") if staged else None


def _sensitivity(runs: Sequence[Run]) -> Plot | None:
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
        settings.add(_setting(one))
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


def _rows(runs: Mapping[str, Run]) -> list[Row]:
    rows: list[Row] = []
    for place, (label, run) in enumerate(runs.items(), start=1):
        anchor, facts = f"run{place}", dict(_facts(run))
        names = [facts[name] for name in ("Data", "Model", "Method") if name in facts]
        names += [f"trained at eps {facts['Training eps']}"] if "Training eps" in facts else []
        summary = " · ".join(names)
        known = {"run": label, "method": facts.get("Method"), "data": facts.get("Data")}
        known |= {"cost_in_plain_epochs": run.result.get("cost_in_plain_epochs")}
        found = [_certified_row(label, anchor, summary, known, one) for one in run.certificates]
        if not found and isinstance(run.result.get("ours"), dict):
            found = [_recorded_row(label, anchor, summary, known, run)]
        rows += found or [Row(label, anchor, summary, known | dict.fromkeys(_FIGURES))]
    return rows


_FIGURES = ("eps", "norm", "verifier", "examples", "clean", "attacked", "certified", "source")


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
    return Row(label, anchor, summary, facts, _setting(one), _headlines(one), judged)


def _recorded_row(label: str, anchor: str, summary: str, known: Mapping[str, Any], run: Run) -> Row:
    """What `result.json` says: means over seeds, of errors in per cent."""
    ours, eps = run.result["ours"], run.recipe.get("test_eps") if run.recipe else None
    seeds = _number(len(run.result.get("seeds", [])) or 1, "seed")
    headlines, shares = [], {}
    for name, key in (("clean", "clean"), ("attacked", "attacked"), ("certified", "verified")):
        found = ours.get(f"{key}_error")
        title = f"{name.capitalize()} accuracy"
        if isinstance(found, dict) and isinstance(found.get("mean"), int | float):
            shares[name] = (100 - found["mean"]) / 100
            deviation = found.get("deviation")
            spread = f"± {deviation:.2f}, " if isinstance(deviation, int | float) else ""
            headlines.append(Headline(title, f"{100 - found['mean']:.2f} %", f"{spread}{seeds}"))
        else:
            headlines.append(Headline(title, "n/a", "not recorded"))
    count, verifier = ours.get("examples"), ours.get("verifier")
    facts = {**known, **dict.fromkeys(_FIGURES), **shares, "source": "result.json"}
    facts |= {"eps": None if eps is None else float(eps), "norm": "inf", "verifier": verifier}
    setting = [f"verifier {verifier}", f"eps {eps_text(eps)}" if eps is not None else ""]
    setting += [_number(count, "test example") if isinstance(count, int) else "", "recorded in result.json"]
    judged = frozenset(range(count)) if isinstance(count, int) else None
    facts["examples"] = count
    return Row(label, anchor, summary, facts, ", ".join(filter(None, setting)), headlines, judged)


def differences(rows: Sequence[Row]) -> str:
    """A warning if the rows of a comparison do not measure the same thing; "" if they do."""
    return _differences(
        {**{name: row.facts[name] for name in ("data", "eps", "norm")}, "examples": row.judged}
        for row in rows
        if row.setting
    )


def _picture(rows: Sequence[Row]) -> Plot:
    shown = [row for row in rows if row.setting]
    names = [row.run for row in shown]
    labels = [
        f"{row.run}\n{row.facts['verifier']}, eps {eps_text(row.facts['eps'] or 0.0)}"
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
        "Shares of all test examples. The true robust accuracy lies between certified and attacked: the "
        f"thick line between those two points is what is not decided yet.{cost}",
    )


def _differences(rows: Iterable[Mapping[str, Hashable]], what: str = "rows") -> str:
    found: dict[str, set[Hashable]] = defaultdict(set)
    for row in rows:
        for name, value in row.items():
            found[name].add(value)
    unlike = [name for name, values in found.items() if len(values) > 1]
    if not unlike:
        return ""
    return f"The {what} differ in {' and '.join(unlike)}: compare only {what} that agree."


def _percent(count: int, total: int) -> str:
    return f"{100 * count / total:.{_decimals(total)}f} %"


def _decimals(total: int) -> int:
    """Digits that show a single example's share: 1 for up to a thousand examples, 2 for more."""
    return 1 if total <= 1000 else 2

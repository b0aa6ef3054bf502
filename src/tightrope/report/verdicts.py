"""What a certify file shows: accuracies, verdicts by stage, margins."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scipy.special import betaincinv

from tightrope.report import figures
from tightrope.report.figures import STATUS_COLOURS, Plot
from tightrope.report.read import Certificate, Run
from tightrope.report.text import decimals, duration_text, eps_text, norm_text, number_text, percent_text
from tightrope.verify import Verdict


@dataclass(frozen=True)
class Headline:
    """One large number: a share in per cent, or "none" with the reason in `detail`."""

    name: str
    value: str
    detail: str
    interval: str = ""


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
class LayerRow:
    """What is known of the network as a stage left it."""

    stage: str
    setting: str
    clean: str
    certified: str


def certificate_view(certificate: Certificate, key: str) -> CertificateView:
    """A certify file; `key` begins the plot's ids."""
    counts, verdicts, identity = certificate.counts, certificate.verdicts, certificate.identity
    total = counts["examples"]
    between = ""
    if counts["undecided"]:
        low, high = counts["robust"], counts["robust"] + counts["undecided"]
        between = (
            "The true robust accuracy on these examples lies between "
            f"{percent_text(low, total)} and {percent_text(high, total)}: "
            f"for {number_text(counts['undecided'], 'example')} "
            "neither a proof nor a counterexample was found."
        )
    return CertificateView(
        file=certificate.path.name,
        title=f"Result with verifier {identity['verifier']}, eps {eps_text(identity['eps'])}",
        setting=setting_text(certificate),
        attack=attack_text(identity["attack"]),
        headlines=headlines(certificate),
        between=between,
        shares=[
            (status, count, 100 * count / total)
            for status in STATUS_COLOURS
            if (count := sum(verdict.status == status for verdict in verdicts))
        ],
        stages=_stages(verdicts),
        margins=_margins(verdicts, key),
    )


def headlines(certificate: Certificate) -> list[Headline]:
    """Clean, attacked and certified accuracy."""
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


def _headline(name: str, count: int, total: int) -> Headline:
    low, high = clopper_pearson(count, total)
    digits = decimals(total)
    return Headline(
        name,
        percent_text(count, total),
        f"{count:,} of {total:,}",
        f"95 % interval {100 * low:.{digits}f} to {100 * high:.{digits}f} %",
    )


def clopper_pearson(successes: int, trials: int, level: float = 0.95) -> tuple[float, float]:
    """Exact confidence interval of a proportion, both ends in [0, 1]."""
    tail = (1 - level) / 2
    low = 0.0 if successes == 0 else float(betaincinv(successes, trials - successes + 1, tail))
    high = 1.0 if successes == trials else float(betaincinv(successes + 1, trials - successes, 1 - tail))
    return low, high


def setting_text(certificate: Certificate) -> str:
    """What was asked, in words."""
    identity = certificate.identity
    return (
        f"verifier {identity['verifier']}, eps {eps_text(identity['eps'])} ({norm_text(identity)}), "
        f"{number_text(len(certificate.verdicts), 'test example')} of {certificate.data}"
    )


def attack_text(attack: Mapping[str, Any] | None) -> str:
    """An attack with its options; "" if there was none."""
    if attack is None:
        return ""
    options = [
        key.replace("_", " ") + ("" if value is True else f" {value}")
        for key, value in attack.items()
        if key != "name"
    ]
    return ", ".join([attack.get("name", "unnamed"), *options])


def _stages(verdicts: Sequence[Verdict]) -> list[StageRow]:
    groups: dict[tuple[str, str], list[float]] = defaultdict(list)
    for verdict in verdicts:
        groups[verdict.status, verdict.stage].append(verdict.seconds)
    statuses: list[str] = list(STATUS_COLOURS)
    order = sorted(groups, key=lambda group: (statuses.index(group[0]), -len(groups[group]), group[1]))

    def line(status: str, stage: str, seconds: list[float]) -> StageRow:
        count, median = len(seconds), statistics.median(seconds)
        share = percent_text(count, len(verdicts))
        return StageRow(status, stage, count, share, duration_text(sum(seconds)), duration_text(median))

    return [line(*group, groups[group]) for group in order] + [
        line("all", "", [verdict.seconds for verdict in verdicts])
    ]


def _margins(verdicts: Sequence[Verdict], key: str) -> Plot:
    alt = "Histogram of the margins of " + number_text(len(verdicts), "example") + ", coloured by verdict."
    svg, beyond = figures.margins(verdicts, f"{key}-margins", alt)
    if any(verdict.status == "undecided" and verdict.stage == "attack" for verdict in verdicts):
        left = "undecided examples it is the smallest one that the attack found, since no verifier was asked"
    else:
        left = "robust and undecided examples it is the verifier's guaranteed minimum over all allowed inputs"
    words = (
        f"The margin is how far the true class stays ahead of every other class, in logits. For {left}, "
        "for falsified ones the margin at the counterexample, for misclassified ones that of the unchanged "
        "input. "
        "Undecided bars close to zero could turn robust with a tighter verifier or a little more training; "
        "bars far to the left could not."
    )
    return Plot("Margins", svg, words + beyond_text(beyond))


def beyond_text(count: int) -> str:
    """What the outermost bars of a histogram hide, as a sentence; "" if nothing."""
    if count == 0:
        return ""
    are = "is" if count == 1 else "are"
    return f" {number_text(count, 'example')} beyond the ends {are} counted in the outermost bars."


def layer_rows(run: Run) -> Iterator[LayerRow]:
    """Certified and latent robustness of the network after each stage, and of the finished one."""
    parts = [*((f"after stage {part.path.name}", part) for part in run.stages), ("finished", run)]
    if not any(part.certificates or part.latent for part in run.stages):
        return
    for name, part in parts:
        for one in part.certificates:
            counts = one.counts
            total = counts["examples"]
            clean, certified = (percent_text(counts[key], total) for key in ("clean_correct", "robust"))
            yield LayerRow(name, setting_text(one), clean, certified)
        for found in part.latent:
            total = found["examples"]
            yield LayerRow(
                name,
                f"latent attack behind {found['node']}, eps {eps_text(found['eps'])}, "
                f"{number_text(total, 'test example')}: not a proof",
                percent_text(found["clean_correct"], total),
                f"withstood by {percent_text(found['withstood'], total)}",
            )

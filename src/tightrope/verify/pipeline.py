"""Certification: clean, attack, then the verifier's stages, each on what is still open.

Verdicts are computed in float64 on a copy of the network in evaluation mode, and appended to a file
as they come, so that a stopped run goes on where it was.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tightrope.attacks import Pgd
from tightrope.bounds import Problem
from tightrope.bounds.rounding import plain_sums
from tightrope.errors import InputError, SoundnessViolation
from tightrope.examples import Examples
from tightrope.files import fingerprint, save_tensors
from tightrope.given import positive, whole
from tightrope.graph import Graph, recast
from tightrope.parallel import Workers
from tightrope.region import Region
from tightrope.spec import Spec
from tightrope.verify.bab import BranchAndBound
from tightrope.verify.certificates import Certificates, UnknownError, export
from tightrope.verify.encode import check_linear
from tightrope.verify.milp import Milp
from tightrope.verify.proof import Proof
from tightrope.verify.records import FORMAT, VERDICTS
from tightrope.verify.resumable import ALONE, Rest, go_through
from tightrope.verify.stages import Stage, answer, attack_stage
from tightrope.verify.verdict import Status, Verdict, Witness, summarise
from tightrope.verify.verifiers import VERIFIERS, find_verifier

CHUNK = 250  # examples per batch at most, and between two writes
SEARCHED = 8  # likewise, where each may take as long as its time limit allows


@dataclass(frozen=True, repr=False)
class Certification:
    """Verdicts on a data set; iterate over it to read them one by one, print it for the result in a line.

    Args:
        verdicts: one per example, by index.
        header: what they rest on: weights, data, radius, verifier, attack.
        seconds: time spent on all of them.
    """

    verdicts: tuple[Verdict, ...]
    header: dict[str, Any]
    seconds: float

    def __iter__(self) -> Iterator[Verdict]:
        return iter(self.verdicts)

    def __len__(self) -> int:
        return len(self.verdicts)

    def __repr__(self) -> str:
        """What `summary` says, in a line."""
        summary, verifier = self.summary(), self.header["identity"]["verifier"]
        parts = [f"{summary['clean_accuracy']:.2%} correct"]
        attacked = summary["attacked_accuracy"]
        parts.append("not attacked" if attacked is None else f"{attacked:.2%} without a counterexample")
        if VERIFIERS[verifier]:
            undecided = f"({summary['undecided']} undecided)"
            parts.append(f"{summary['certified_accuracy']:.2%} certified by {verifier} {undecided}")
        where = f"{summary['examples']} examples, eps {summary['eps']:.4g} in l_{summary['norm']}"
        return f"{where}: {', '.join(parts)}; {self.seconds:.1f} s"

    def summary(self) -> dict[str, Any]:
        """Counts and accuracies, and what they rest on."""
        identity, bare = self.header["identity"], {}
        if "certificates" in self.header:
            robust = [verdict for verdict in self.verdicts if verdict.status == "robust"]
            missing = [v for v in robust if v.certificate is None or v.certificate.proof is None]
            bare = {"without_certificate": len(missing)}
        return {
            **summarise(self.verdicts, attacked=identity["attack"] is not None),
            **bare,
            "eps": identity["eps"],
            "norm": identity["norm"],
            "verifier": identity["verifier"],
            "seconds": round(self.seconds, 3),
        }


@plain_sums()
def certify(
    graph: Graph,
    examples: Examples,
    region: Region,
    *,
    verifier: str = "cascade",
    attack: Pgd | None = None,
    first: int | None = None,
    time_limit: float = 60.0,
    out: Path | None = None,
    resume: bool = False,
    seed: int = 0,
    workers: Workers = ALONE,
    certificates: bool = False,
    about: dict[str, Any] | None = None,
) -> Certification:
    """Judge every example of a data set.

    Args:
        graph: the network; a float64 copy in evaluation mode is judged.
        examples: the data set.
        region: where each input may move; one radius for all.
        verifier: a name in `VERIFIERS`.
        attack: what to look for witnesses with; None looks for none.
        first: judge only the first so many examples.
        time_limit: seconds that each example may take in each stage.
        out: file to append verdicts to, JSON lines; None keeps them in memory only.
        resume: go on from that file.
        seed: of the attack's random starts.
        workers: who judges; see `go_through`.
        certificates: store what a checker needs to repeat the proofs, in a folder beside `out`.
        about: further facts for the file's header.

    Raises:
        InputError: if the verifier is unknown, `first` or `time_limit` is no positive number, eps differs
            from example to example, an input lies outside the region's domain, the file cannot be written,
            or it already exists and `resume` is not asked for.
        IdentityError: if the file to resume from was made with another network, data or settings.
        SoundnessViolation: if an example is both certified and attacked; the example is saved.
    """
    if isinstance(region.eps, Tensor):
        raise InputError("a certification has one radius for all examples: give eps as a number")
    time_limit = positive(time_limit, "the time limit in seconds")
    first = None if first is None else whole(first, "the number of examples", 1)
    stages = find_verifier(verifier)
    if any(isinstance(stage, Milp) for stage in stages):
        check_linear(region)
    identity = {
        **identify(graph, examples, region),
        "eps": region.eps,
        "verifier": verifier,
        "attack": None if attack is None else {"name": type(attack).__name__.lower(), **vars(attack)},
        "seed": seed,
        "time_limit": time_limit,
    }
    count = min(first or len(examples), len(examples))
    header = {"format": FORMAT, "identity": identity, "examples": count, **(about or {})}
    keeper = None
    if certificates:
        keeper = _certificates(graph, out, identity, header)
    searches = [stage for stage in stages if stage.searches]
    judge = Judge(
        graph,
        region,
        [stage for stage in stages if not stage.searches],
        attack,
        seed,
        time_limit,
        keeper,
        leaves=bool(searches),
    )

    def search(verdicts: dict[int, Verdict]) -> Judge:
        spent = {index: verdict.seconds for index, verdict in verdicts.items()}
        return Judge(graph, region, searches, None, seed, time_limit, keeper, spent=spent)

    rest = (
        Rest("certify, search", lambda verdict: verdict.status == "undecided", search, SEARCHED)
        if searches
        else None
    )
    with stop_at_contradictions(out):
        verdicts = go_through(
            examples,
            judge,
            VERDICTS,
            header,
            label="certify" if stages else "attack",
            first=first,
            batch=CHUNK,
            out=out,
            resume=resume,
            workers=workers,
            rest=rest,
            begin=None if keeper is None or out is None else partial(keeper.begin, out),
        )
    return Certification(verdicts, header, sum(verdict.seconds for verdict in verdicts))


def _certificates(
    graph: Graph, out: Path | None, identity: dict[str, Any], header: dict[str, Any]
) -> Certificates | None:
    """Where certificates go, as header and identity say; None if the checker does not know the network.

    Raises:
        InputError: if there is no file of verdicts that they could lie beside.
    """
    if out is None:
        raise InputError("certificates lie beside a file of verdicts: say where, --out FILE")
    try:
        network = export(recast(graph, torch.float64)).content()
    except UnknownError as error:
        header["certificates"] = {"none": f"the checker does not know {error}"}
        return None
    facts = {name: identity[name] for name in ("eps", "norm", "domain", "data")}
    keeper = Certificates(out.with_suffix(".certificates"), network, facts)
    identity["certificates"] = keeper.digest
    header["certificates"] = {"folder": keeper.folder.name}
    return keeper


def _in_float32(graph: Graph) -> Graph:
    """The network in float32, if that holds all of its numbers; else as it is."""
    try:
        return recast(graph, torch.float32)
    except InputError:
        return graph


class Judge:
    """Judges batches of examples of one network.

    Args:
        graph: the network.
        region: where each input may move.
        stages: what tries to prove, in order.
        attack: what tries to falsify, first.
        seed: of the attack's random starts.
        limit: seconds that each example may take in each stage.
        certificates: where to write what the proofs are made of, if anywhere.
        leaves: whether others go on with what it leaves undecided: that gets no certificate.
        spent: seconds that others spent on examples before, by index.
    """

    def __init__(
        self,
        graph: Graph,
        region: Region,
        stages: Sequence[Stage],
        attack: Pgd | None,
        seed: int,
        limit: float = math.inf,
        certificates: Certificates | None = None,
        leaves: bool = False,
        spent: Mapping[int, float] | None = None,
    ) -> None:
        if certificates is not None:
            stages = [replace(s, keep=True) if isinstance(s, BranchAndBound) else s for s in stages]
        self.certificates = certificates
        self.exact = recast(graph, torch.float64)
        self.fast = _in_float32(self.exact) if attack else self.exact
        self.region, self.stages, self.attack, self.seed = region, stages, attack, seed
        self.limit, self.leaves, self.spent = limit, leaves, spent or {}

    def __call__(self, x: Tensor, y: Tensor, index: Tensor) -> list[Verdict]:
        """Verdicts on a batch.

        Raises:
            InputError: if an input is NaN or lies outside the region's domain.
            Contradiction: if an example is both certified and attacked.
        """
        x = exact_inputs(x, self.region)
        verdicts = self._look(x, y, index)
        if self.attack is not None:
            self._falsify(verdicts, self.attack, x, y)
        proofs: dict[int, Proof] = {}
        self._prove(verdicts, x, y, proofs)
        return verdicts if self.certificates is None else self._certified(verdicts, x, proofs)

    def _certified(self, verdicts: list[Verdict], x: Tensor, proofs: dict[int, Proof]) -> list[Verdict]:
        assert self.certificates is not None
        final = [row for row, v in enumerate(verdicts) if v.status != "undecided" or not self.leaves]
        if not final:
            return verdicts
        certified = self.certificates.write([verdicts[row] for row in final], x[final], proofs)
        known = dict(zip(final, certified, strict=True))
        return [known.get(row, verdict) for row, verdict in enumerate(verdicts)]

    def _look(self, x: Tensor, y: Tensor, index: Tensor) -> list[Verdict]:
        began = time.perf_counter()
        clean = answer(self.exact, x, y)
        columns = [column.tolist() for column in (index, y, clean.predicted, clean.margin)]
        seconds = (time.perf_counter() - began) / max(len(y), 1)
        return [
            Verdict(
                number,
                label,
                predicted,
                status="undecided" if margin > 0 else "misclassified",
                stage="clean",
                margin=margin,
                seconds=seconds + self.spent.get(number, 0.0),
            )
            for number, label, predicted, margin in zip(*columns, strict=True)
        ]

    def _falsify(self, verdicts: list[Verdict], attack: Pgd, x: Tensor, y: Tensor) -> None:
        rows = [row for row, verdict in enumerate(verdicts) if verdict.status == "undecided"]
        if not rows:
            return
        began = time.perf_counter()
        chosen = torch.tensor(rows, device=x.device)
        seeds = [self.seed + verdicts[row].index for row in rows]
        found = attack_stage(attack, self.fast, self.exact, x[chosen], y[chosen], self.region, seeds)
        margins, predicted, points = found.margin.tolist(), found.predicted.tolist(), found.point.cpu()
        seconds = (time.perf_counter() - began) / len(rows)
        for i, row in enumerate(rows):
            witness = Witness(points[i].clone(), predicted[i]) if margins[i] <= 0 else None
            verdicts[row] = replace(
                verdicts[row],
                status="falsified" if witness else "undecided",
                stage="attack",
                margin=margins[i],
                seconds=verdicts[row].seconds + seconds,
                witness=witness,
            )

    def _prove(self, verdicts: list[Verdict], x: Tensor, y: Tensor, proofs: dict[int, Proof]) -> None:
        """Ask stage after stage about what is open; each finds the bounds that those before it computed."""
        rows = [row for row, verdict in enumerate(verdicts) if verdict.status != "misclassified"]
        chosen = torch.tensor(rows, dtype=torch.int64, device=x.device)
        x, y = x[chosen], y[chosen]
        problem = Problem(self.exact, x, self.region, Spec.margins(y, self.exact.classes, x))
        for stage in self.stages:
            wanted = ("undecided", "falsified") if stage.cheap else ("undecided",)
            kept = [i for i, row in enumerate(rows) if verdicts[row].status in wanted]
            if not kept:
                return
            if len(kept) < len(rows):
                chosen = torch.tensor(kept, device=x.device)
                problem, y, rows = problem.at(chosen), y[chosen], [rows[i] for i in kept]
            self._ask(verdicts, stage, problem, y, rows, proofs)

    def _ask(
        self,
        verdicts: list[Verdict],
        stage: Stage,
        problem: Problem,
        y: Tensor,
        rows: list[int],
        proofs: dict[int, Proof],
    ) -> None:
        began = time.perf_counter()
        found = stage(problem, y, self.limit)
        replayed = None
        if found.point is not None:
            point = self.region.project(problem.x, found.point.nan_to_num())
            replayed = answer(self.exact, point, y)
        alone = torch.zeros_like(found.margin) if found.seconds is None else found.seconds
        seconds = (alone + (time.perf_counter() - began - float(alone.sum())) / len(rows)).tolist()
        proved, margins = found.proved.tolist(), found.margin.tolist()
        for i, row in enumerate(rows):
            verdict = replace(verdicts[row], seconds=verdicts[row].seconds + seconds[i])
            if verdict.status == "undecided":
                status: Status = "robust" if proved[i] else "undecided"
                verdict = replace(verdict, status=status, stage=stage.name, margin=margins[i])
                if status == "robust" and found.proofs is not None and i in found.proofs:
                    proofs[verdict.index] = found.proofs[i]
                if replayed is not None and replayed.margin[i] <= 0:
                    witness = Witness(replayed.point[i].cpu().clone(), int(replayed.predicted[i]))
                    verdict = replace(
                        verdict, status="falsified", margin=float(replayed.margin[i]), witness=witness
                    )
            if proved[i] and verdict.status == "falsified":
                raise Contradiction(stage.name, verdict, problem.x[i].cpu(), self.region)
            verdicts[row] = verdict


class Contradiction(Exception):
    """An example was certified and attacked at once; whoever asked a `Judge` stops at it.

    Args:
        stage: what certified it.
        verdict: what was found, with the witness.
        x: the example.
        region: where it may move.
    """

    def __init__(self, stage: str, verdict: Verdict, x: Tensor, region: Region) -> None:
        super().__init__(stage, verdict, x, region)  # what a worker hands back it is made of again
        self.stage, self.verdict, self.x, self.region = stage, verdict, x, region


@contextmanager
def stop_at_contradictions(out: Path | None = None) -> Iterator[None]:
    """Save an example that a `Judge` found to be certified and attacked at once, and stop.

    Args:
        out: the file beside which it is saved; None saves it where one stands.

    Raises:
        SoundnessViolation: if there is one; the message says where it is.
    """
    try:
        yield
    except Contradiction as found:
        stage, verdict, region = found.stage, found.verdict, found.region
        assert verdict.witness is not None
        folder = Path() if out is None else out.parent
        path = folder / f"soundness-violation-{verdict.index}.safetensors"
        facts = {
            "index": verdict.index,
            "label": verdict.label,
            "predicted": verdict.witness.predicted,
            "stage": stage,
            "eps": region.eps,
            "norm": region.norm,
        }
        save_tensors(path, {"x": found.x, "witness": verdict.witness.point}, facts)
        raise SoundnessViolation(
            f"example {verdict.index} was certified by {stage} and attacked at once: one of them is wrong. "
            f"Both points are in {path}; no verdict of this program is to be trusted until this is explained"
        ) from None


def exact_inputs(x: Tensor, region: Region) -> Tensor:
    """The inputs in float64.

    Raises:
        InputError: if one is NaN or lies outside the region's domain.
    """
    x = x.double()
    if not torch.equal(x, region.clip(x)) or bool(x.isnan().any()):
        raise InputError(
            f"the inputs must be numbers in the region's domain {region.domain}, "
            f"got {float(x.min()):.4g} to {float(x.max()):.4g}; scale them"
        )
    return x


def identify(graph: Graph, examples: Examples, region: Region) -> dict[str, Any]:
    """What tells this network, this data and this kind of region from others, whatever the radius."""
    return {
        "weights": fingerprint(graph.tensors()),
        "network": graph.structure(),
        "data": examples.identity(),
        "norm": region.norm,
        "domain": None if region.domain is None else list(region.domain),
    }

"""Certification: clean, attack, then the verifier's stages, each on what is still open.

Verdicts are computed in float64 on a copy of the network in evaluation mode, and appended to a file
as they come, so that a stopped run goes on where it was.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from tightrope.attacks import Pgd
from tightrope.errors import IdentityError, InputError, SoundnessViolation
from tightrope.examples import Examples
from tightrope.files import append_lines, fingerprint, save_tensors, to_json, write_atomically
from tightrope.graph import Graph
from tightrope.identity import check_identity
from tightrope.progress import Progress
from tightrope.region import Region
from tightrope.verify.stages import BoundStage, attack_stage, find_verifier, point_margin
from tightrope.verify.verdict import Status, Verdict, summarise

FORMAT = "tightrope-certify/1"
CHUNK = 250  # examples per batch, and between two writes


@dataclass(frozen=True)
class Certification:
    """Verdicts on a data set; iterate over it to read them one by one.

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

    def summary(self) -> dict[str, Any]:
        """Counts and accuracies, and what they rest on."""
        identity = self.header["identity"]
        return {
            **summarise(self.verdicts, attacked=identity["attack"] is not None),
            "eps": identity["eps"],
            "norm": identity["norm"],
            "verifier": identity["verifier"],
            "seconds": round(self.seconds, 3),
        }


def certify(
    graph: Graph,
    examples: Examples,
    region: Region,
    *,
    verifier: str = "cascade",
    attack: Pgd | None = None,
    first: int | None = None,
    out: Path | None = None,
    resume: bool = False,
    seed: int = 0,
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
        out: file to append verdicts to, JSON lines; None keeps them in memory only.
        resume: go on from that file.
        seed: of the attack's random starts.
        about: further facts for the file's header.

    Raises:
        InputError: if the verifier is unknown, `first` is no positive number, or the file already
            exists and `resume` is not asked for.
        IdentityError: if the file to resume from was made with another network, data or settings.
        SoundnessViolation: if an example is both certified and attacked; the example is saved.
    """
    if first is not None and first < 1:
        raise InputError(f"the number of examples to certify must be positive, got {first}")
    stages = find_verifier(verifier)
    identity = {
        "weights": fingerprint(graph.module.state_dict()),
        "data": examples.identity(),
        "eps": region.eps,
        "norm": region.norm,
        "domain": None if region.domain is None else list(region.domain),
        "verifier": verifier,
        "attack": None if attack is None else vars(attack),
        "seed": seed,
    }
    header = {"format": FORMAT, "identity": identity, **(about or {})}
    known: dict[int, Verdict] = {}
    with _only_writer_of(out):
        if out is not None:
            known = _start(out, header, resume)
        total = min(first or len(examples), len(examples))
        judge = Judge(graph, region, stages, attack, seed)
        # Always the same chunks, so that a resumed run attacks from the same random starts.
        chunks = [c for c in torch.arange(total).split(CHUNK) if any(i not in known for i in c.tolist())]
        with Progress("certify", total, total - sum(map(len, chunks)), unit="example") as progress:
            for x, y, index in examples.batches(chunks):
                verdicts = [verdict for verdict in judge(x, y, index, out) if verdict.index not in known]
                known.update((verdict.index, verdict) for verdict in verdicts)
                if out is not None:
                    append_lines(out, [verdict.to_record() for verdict in verdicts])
                progress.advance(len(index))
    verdicts = [known[i] for i in range(total)]
    return Certification(tuple(verdicts), header, sum(verdict.seconds for verdict in verdicts))


class Judge:
    """Judges batches of examples of one network.

    Args:
        graph: the network.
        region: where each input may move.
        stages: what tries to prove, in order.
        attack: what tries to falsify, first.
        seed: of the attack's random starts.
    """

    def __init__(
        self, graph: Graph, region: Region, stages: Sequence[BoundStage], attack: Pgd | None, seed: int
    ) -> None:
        self.exact, self.fast = graph.to(torch.float64), graph.to(torch.float32)
        self.region, self.stages, self.attack, self.seed = region, stages, attack, seed

    def __call__(self, x: Tensor, y: Tensor, index: Tensor, out: Path | None = None) -> list[Verdict]:
        """Verdicts on a batch; `out` says beside which file a soundness violation is saved."""
        count, x = len(y), x.double()
        began = time.perf_counter()
        clean = point_margin(self.exact, x, y)
        predicted = self.exact.run(x)[0].argmax(1)
        status: list[Status] = ["undecided" if margin > 0 else "misclassified" for margin in clean.tolist()]
        stage, margin = ["clean"] * count, clean.clone()
        seconds = torch.full((count,), (time.perf_counter() - began) / count, dtype=torch.float64)
        witness: dict[int, Tensor] = {}

        correct = torch.nonzero(clean > 0).flatten()
        if self.attack is not None and len(correct):
            began = time.perf_counter()
            generator = torch.Generator(x.device).manual_seed(self.seed + int(index[0]))
            found = attack_stage(
                self.attack, self.fast, self.exact, x[correct], y[correct], self.region, generator
            )
            seconds[correct] += (time.perf_counter() - began) / len(correct)
            for row, i in enumerate(correct.tolist()):
                stage[i] = "attack"
                if found.margin[row] <= 0:
                    status[i], margin[i], witness[i] = "falsified", found.margin[row], found.point[row].cpu()

        for proof in self.stages:
            wanted = ("undecided", "falsified") if proof.cheap else ("undecided",)
            rows = [i for i in correct.tolist() if status[i] in wanted]
            if not rows:
                continue
            began = time.perf_counter()
            chosen = torch.tensor(rows, device=x.device)
            proved, lower = proof(self.exact, x[chosen], y[chosen], self.region)
            seconds[rows] += (time.perf_counter() - began) / len(rows)
            for row, i in enumerate(rows):
                if status[i] == "falsified":
                    if proved[row]:
                        self._violation(proof.name, int(index[i]), int(y[i]), x[i], witness[i], out)
                    continue
                stage[i], margin[i] = proof.name, lower[row]
                if proved[row]:
                    status[i] = "robust"
        return [
            Verdict(
                index=int(index[i]),
                label=int(y[i]),
                predicted=int(predicted[i]),
                status=status[i],
                stage=stage[i],
                margin=max(float(margin[i]), -1e300),  # JSON has no infinity
                seconds=float(seconds[i]),
                witness=witness.get(i),
            )
            for i in range(count)
        ]

    def _violation(
        self, stage: str, index: int, label: int, x: Tensor, witness: Tensor, out: Path | None
    ) -> None:
        folder = Path() if out is None else out.parent
        path = folder / f"soundness-violation-{index}.safetensors"
        facts = {
            "index": index,
            "label": label,
            "stage": stage,
            "eps": self.region.eps,
            "norm": self.region.norm,
        }
        save_tensors(path, {"x": x, "witness": witness}, facts)
        raise SoundnessViolation(
            f"example {index} was certified by {stage} and attacked at once: one of the two is wrong. The example "
            f"and the witness are in {path}; no verdict of this program is to be trusted until this is explained"
        )


@contextmanager
def _only_writer_of(out: Path | None) -> Iterator[None]:
    """Refuse to write to a file that another process is writing to."""
    if out is None:
        yield
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    lock = out.with_name(f".{out.name}.lock")
    try:
        with FileLock(lock, timeout=0):
            yield
    except Timeout:
        raise InputError(
            f"another process is writing to {out}; wait for it, or choose another --out"
        ) from None


def _start(out: Path, header: dict[str, Any], resume: bool) -> dict[int, Verdict]:
    """Begin a file of verdicts, or read what an earlier run left in it."""
    if not out.exists():
        write_atomically(out, to_json(header) + "\n")
        return {}
    if not resume:
        raise InputError(f"{out} already exists: go on with it (--resume), or write elsewhere (--out)")
    found, verdicts = read_verdicts(out)
    if found.get("format") != FORMAT:
        raise IdentityError(f"{out} has format {found.get('format')!r}; this version writes {FORMAT!r}")
    check_identity(found["identity"], header["identity"], str(out))
    # A line that was cut off by a crash must not be continued.
    lines = [to_json(found), *(to_json(verdict.to_record()) for verdict in verdicts)]
    write_atomically(out, "\n".join(lines) + "\n")
    return {verdict.index: verdict for verdict in verdicts}


def read_verdicts(path: Path) -> tuple[dict[str, Any], list[Verdict]]:
    """Header and verdicts of a file; a last line that was cut off is left out.

    Raises:
        InputError: if the file is missing, or a line in its middle is broken.
    """
    try:
        lines = path.read_text().split("\n")[:-1]
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except ValueError:
            raise InputError(
                f"line {number} of {path} is not JSON: the file is damaged; start afresh"
            ) from None
    if not records:
        raise InputError(f"{path} holds no header line; delete it and start afresh")
    try:
        return records[0], [Verdict.from_record(record) for record in records[1:]]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} holds something that is no verdict ({error}); start afresh") from error

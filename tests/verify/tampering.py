"""Files of certificates, and random changes that make them claim something else."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save

from tightrope import checker
from tightrope.attacks import Pgd
from tightrope.data import Split, as_source
from tightrope.graph import Graph
from tightrope.region import Box, Region
from tightrope.verify import certify

from .referee import case

ATTACK = Pgd(steps=10, step=0.2, loss="margin")


def store(
    graph: Graph, x: torch.Tensor, y: torch.Tensor, region: Region, out: Path, verifier: str = "cascade"
) -> list[Any]:
    """The verdicts on some examples, and a file of them with certificates."""
    examples = as_source(Split(x.float(), y))
    found = certify(graph, examples, region, verifier=verifier, attack=ATTACK, out=out, certificates=True)
    return list(found.verdicts)


def examples(
    seed: int, count: int, norm: type[Region] = Box
) -> tuple[Graph, torch.Tensor, torch.Tensor, Region]:
    """A random network, and inputs with its answers as labels, but for a wrong one."""
    asked = case(seed, norm)
    x = torch.rand(count, *asked.x.shape[1:], generator=torch.Generator().manual_seed(seed))
    y = asked.graph.run(x.double())[0].argmax(1)
    y[0] = (y[0] + 1) % asked.graph.classes
    return asked.graph, x, y, asked.region


@dataclass
class Files:
    """A file of verdicts with its certificates, in memory.

    `sealed` is whether whoever changes something goes on to state the right hashes.
    """

    header: dict[str, Any]
    records: list[dict[str, Any]]
    network: tuple[dict[str, np.ndarray], dict[str, Any]]
    batches: dict[str, tuple[dict[str, np.ndarray], dict[str, Any]]]
    raw: dict[str, bytes] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Files:
        header, *records = map(json.loads, path.read_text().splitlines())
        folder = path.with_suffix(".certificates")
        raw = {file.name: file.read_bytes() for file in folder.iterdir()}
        content = {name: checker.unpack(value) for name, value in raw.items()}
        return cls(header, records, content.pop("network.safetensors"), content, raw)

    def write(self, path: Path, sealed: bool) -> None:
        """Write all of it; if sealed, with the hashes of what is there now."""
        folder = path.with_suffix(".certificates")
        folder.mkdir(exist_ok=True)
        self.header["certificates"]["folder"] = folder.name
        raw = dict(self.raw)
        if sealed:
            raw["network.safetensors"] = pack(*self.network)
            digest = hashlib.sha256(raw["network.safetensors"]).hexdigest()
            self.header["identity"]["certificates"] = digest
            for name, (tensors, header) in self.batches.items():
                raw[name] = pack(tensors, {**header, "certificates": digest})
            for record in self.records:
                content = raw[record["certificate"]["file"]]
                record["certificate"]["sha256"] = hashlib.sha256(content).hexdigest()
        for name, content in raw.items():
            (folder / name).write_bytes(content)
        path.write_text("".join(json.dumps(line) + "\n" for line in (self.header, *self.records)))

    def claim(self, record: dict[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, Any], int]:
        """The tensors and the claim that a record names, and the claim's place."""
        tensors, header = self.batches[record["certificate"]["file"]]
        (place,) = (k for k, c in enumerate(header["claims"]) if c["index"] == record["index"])
        return tensors, header["claims"][place], place

    def set(self, record: dict[str, Any], **values: Any) -> None:
        """Change a verdict in the record and in the certificate."""
        record.update(values)
        self.claim(record)[1].update(values)


def pack(tensors: dict[str, np.ndarray], header: dict[str, Any]) -> bytes:
    plain = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    return save(plain, {"header": json.dumps(header)})


Change = Callable[[Files, np.random.Generator], None]


class NothingToChange(Exception):
    """These files have nothing that could be changed in this way."""


def one(files: Files, random: np.random.Generator, *statuses: str) -> dict[str, Any]:
    """A random record with one of these statuses."""
    found = [record for record in files.records if not statuses or record["status"] in statuses]
    if not found:
        raise NothingToChange
    return found[random.integers(len(found))]


def with_cells(files: Files, random: np.random.Generator) -> tuple[dict[str, np.ndarray], str]:
    """The tensors, and the prefix of an example's, of a random example that was proved with stored slopes."""
    found = [
        (t, name.removesuffix("splits")) for t, _ in files.batches.values() for name in t if "splits" in name
    ]
    if not found:
        raise NothingToChange
    return found[random.integers(len(found))]


# ---------------------------------------------------------------- one file changed, and no hash with it


def another_value(files: Files, random: np.random.Generator) -> None:
    record = one(files, random)
    key = random.choice(checker.CLAIM)
    others = {
        "status": [s for s in checker.STATUSES if s != record["status"]],
        "stage": [s for s in ("ibp", "crown", "complete", "milp") if s != record["stage"]],
        "margin": [record["margin"] + random.normal() + 1e-9, -record["margin"] - 1e-9],
    }
    number = [record[key] + 1, record[key] + 2] if key in ("index", "label", "predicted") else []
    chosen = others.get(key, number)
    record[key] = chosen[random.integers(len(chosen))]


def another_region(files: Files, random: np.random.Generator) -> None:
    identity = files.header["identity"]
    changes = {"eps": identity["eps"] * random.uniform(1.01, 2), "domain": [-1.0, 2.0], "data": "0" * 64}
    changes["norm"] = "2" if identity["norm"] != "2" else "1"
    key = random.choice(list(changes))
    identity[key] = changes[key]


def a_bit(files: Files, random: np.random.Generator) -> None:
    used = [*{record["certificate"]["file"] for record in files.records}, "network.safetensors"]
    name = random.choice(used)
    content = bytearray(files.raw[name])
    content[random.integers(len(content))] ^= 1 << random.integers(8)
    files.raw[name] = bytes(content)


def a_shorter_certificate(files: Files, random: np.random.Generator) -> None:
    name = random.choice(list(files.raw))
    files.raw[name] = files.raw[name][: random.integers(len(files.raw[name]))]


def another_certificate(files: Files, random: np.random.Generator) -> None:
    names = {record["certificate"]["file"]: record["certificate"] for record in files.records}
    record = one(files, random)
    others = [value for name, value in names.items() if name != record["certificate"]["file"]]
    if not others:
        raise NothingToChange
    proof = record["certificate"]["proof"]
    record["certificate"] = {**others[random.integers(len(others))], "proof": proof}


def one_verdict_twice(files: Files, random: np.random.Generator) -> None:
    files.records.append(dict(one(files, random)))


def one_verdict_less(files: Files, random: np.random.Generator) -> None:
    files.records.pop(random.integers(len(files.records)))


def no_certificate(files: Files, random: np.random.Generator) -> None:
    del one(files, random)["certificate"]


# ------------------------------------------------- changed everywhere, and sealed with the right hashes


def a_false_proof(files: Files, random: np.random.Generator) -> None:
    record = one(files, random, "falsified", "misclassified")
    rule = str(random.choice(list(checker.RULES)))
    files.set(record, status="robust", predicted=record["label"], margin=1e-5, stage=rule)
    files.claim(record)[1]["proof"] = {"rule": rule}
    record["certificate"]["proof"] = rule


def another_answer(files: Files, random: np.random.Generator) -> None:
    record = one(files, random, "robust", "undecided", "falsified")
    other = (record["label"] + 1) % files.network[1]["nodes"][-1]["shape"][0]
    files.set(record, label=other, predicted=other)


def a_larger_margin(files: Files, random: np.random.Generator) -> None:
    record = one(files, random, "robust", "falsified", "misclassified")
    files.set(record, margin=10 + 100 * abs(record["margin"]))


def an_input_of_another_class(files: Files, random: np.random.Generator) -> None:
    record = one(files, random, "robust")
    others = [r for r in files.records if r["predicted"] != record["label"]]
    if not others:
        raise NothingToChange
    tensors, _, place = files.claim(record)
    donor, _, other = files.claim(others[random.integers(len(others))])
    inputs = tensors["x"].copy()
    inputs[place] = donor["x"][other]
    tensors["x"] = inputs


def everything_as_region(files: Files, random: np.random.Generator) -> None:
    """So large a region that it holds inputs of several classes."""
    one(files, random, "robust")
    if len({r["predicted"] for r in files.records}) == 1:
        raise NothingToChange
    size = int(np.prod(files.network[1]["nodes"][0]["shape"]))
    for _, header in files.batches.values():
        header["eps"] = files.header["identity"]["eps"] = float(size)


def another_network(files: Files, random: np.random.Generator) -> None:
    one(files, random, "robust")
    tensors, header = files.network
    last = len(header["nodes"]) - 1
    for name in (f"{last}.weight", f"{last}.bias"):
        tensors[name] = -tensors[name]


def no_witness(files: Files, random: np.random.Generator) -> None:
    record = one(files, random, "falsified")
    tensors, _, place = files.claim(record)
    inside = tensors["x"][place].astype("<f8")
    far = np.full_like(inside, 2.0)
    point = (inside, far)[random.integers(2)]
    record["witness"]["float64"] = base64.b64encode(point.tobytes()).decode()


def a_leaf_less(files: Files, random: np.random.Generator) -> None:
    found = with_cells(files, random)
    tensors, prefix = found
    splits = tensors[f"{prefix}splits"]
    place = random.choice(np.flatnonzero(splits < 0))
    tensors[f"{prefix}splits"] = np.delete(splits, place)
    if random.integers(2):
        number = int((splits[:place] < 0).sum())
        tensors[f"{prefix}slopes"] = np.delete(tensors[f"{prefix}slopes"], number, 0)


def cells_of_another_class(files: Files, random: np.random.Generator) -> None:
    found = with_cells(files, random)
    tensors, prefix = found
    rivals = tensors[f"{prefix}rivals"].copy()
    index = int(prefix[:-1])
    (record,) = (r for r in files.records if r["index"] == index)
    rivals[random.integers(len(rivals))] = record["label"]
    tensors[f"{prefix}rivals"] = rivals


def no_class(files: Files, random: np.random.Generator) -> None:
    """The network's own answer, by a name under which NumPy finds it: another one than the label, then."""
    record = one(files, random, "robust")
    classes, label = files.network[1]["nodes"][-1]["shape"][0], record["label"]
    names: list[Any] = [label - classes, [label], float(label)]
    name = names[random.integers(len(names))]
    if random.random() < 0.5:
        files.set(record, status="misclassified", predicted=name, margin=-1.0, proof=None)
    else:
        tensors, _, place = files.claim(record)
        point = base64.b64encode(tensors["x"][place].astype("<f8").tobytes()).decode()
        files.set(record, status="falsified", margin=-1.0, proof=None)
        record["witness"] = {"float64": point, "predicted": name}
    record["certificate"]["proof"] = None


PLAIN: tuple[Change, ...] = (
    another_value, another_region, a_bit, a_shorter_certificate, another_certificate, one_verdict_twice,
    one_verdict_less, no_certificate,
)  # fmt: skip
SEALED: tuple[Change, ...] = (
    a_false_proof, no_class, another_answer, a_larger_margin, an_input_of_another_class, everything_as_region,
    another_network, no_witness, a_leaf_less, cells_of_another_class,
)  # fmt: skip


def is_rejected(path: Path) -> bool:
    """Whether the checker rejects a verdict, or the whole file."""
    try:
        return bool(checker.recheck(path)["rejected"])
    except ValueError:
        return True

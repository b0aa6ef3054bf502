"""Rechecking certificates: the checker's word, and whether they are about the network and data they name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tightrope import checker
from tightrope.data import as_source, load
from tightrope.errors import InputError
from tightrope.files import read_lines
from tightrope.graph import recast, trace
from tightrope.targets import load_target
from tightrope.verify.certificates import Program, UnknownError, export

ALIKE = 1e-12  # by which share weights that are computed anew may differ: those with BatchNorm folded in


@dataclass(frozen=True)
class Recheck:
    """What a recheck found.

    Args:
        examples: how many verdicts there are.
        accepted: how many of them were checked and hold, by status.
        rejected: index (None: of all) and reason of each that does not.
        without_certificate: how many robust verdicts there was nothing to check of.
        compared: with what network and data the certificates were compared, or why they were not.
        region: eps, norm and domain, about which the verdicts are.
    """

    examples: int
    accepted: dict[str, int]
    rejected: tuple[dict[str, Any], ...]
    without_certificate: int
    compared: tuple[str, ...]
    region: dict[str, Any]

    def summary(self) -> dict[str, Any]:
        """All of it as JSON values."""
        counts = {**self.accepted, "accepted": sum(self.accepted.values())}
        lists = {"rejected": list(self.rejected), "compared": list(self.compared)}
        facts = {"examples": self.examples, **self.region, "without_certificate": self.without_certificate}
        return {**facts, **counts, **lists}


def recheck(path: Path | str) -> Recheck:
    """Check the verdicts of `certify(..., certificates=True)` by a program that shares no code with it.

    They are also compared with the network and the data that the file names, where these are found.

    Args:
        path: the file of verdicts; its certificates lie in the folder beside it.

    Returns:
        What was accepted and rejected, and what it was compared with.

    Raises:
        InputError: if it is no file of verdicts with certificates.

    Example:
        >>> import tempfile, torch, tightrope as tr
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
        >>> data = torch.rand(5, 2), torch.tensor([0, 1, 0, 1, 0])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = tr.certify(net, data, tr.Box(eps=0.01), out=f"{folder}/c.jsonl", certificates=True)
        ...     tr.recheck(f"{folder}/c.jsonl").rejected
        ()
    """
    path = Path(path)
    try:
        report = checker.recheck(path)
    except OSError as error:
        raise InputError(f"cannot read {error.filename or path}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(str(error)) from None
    header, *records = (json.loads(line) for line in read_lines(path) if line.endswith(b"}"))
    folder, compared, another = path.parent / Path(header["certificates"]["folder"]).name, list[str](), None
    try:
        place, program = _compare_network(header, folder)
        compared.append(f"the network is that of {place}")
        if program is not None:  # what is proved is proved of the target's own
            report = checker.recheck(path, program.content())
    except checker.RejectedError as error:
        another = {"index": None, "reason": str(error)}
    except InputError as error:
        compared.append(f"checked against the network stored in the certificates; NOT compared: {error}")
    rejected = [another] if another else list(report["rejected"])
    left_out = {entry["index"] for entry in rejected}
    kept = [] if another else [record for record in records if record["index"] not in left_out]
    accepted = {record["index"]: record for record in kept}
    try:
        for index, reason in _compare_data(header, folder, list(accepted.values())):
            rejected.append({"index": index, "reason": reason})
            del accepted[index]
        compared.append(f"the inputs and labels are those of {header['data']}")
    except InputError as error:
        compared.append(f"the inputs and labels were NOT compared with data: {error}")
    bare = {i for i, record in accepted.items() if _is_bare(record)}
    statuses = [record["status"] for i, record in accepted.items() if i not in bare]
    counts = {status: statuses.count(status) for status in checker.STATUSES}
    region = {key: report[key] for key in ("eps", "norm", "domain")}
    return Recheck(len(records), counts, tuple(rejected), len(bare), tuple(compared), region)


def _is_bare(record: dict[str, Any]) -> bool:
    return record["status"] == "robust" and record["certificate"]["proof"] is None


def _compare_network(header: dict[str, Any], folder: Path) -> tuple[str, Program | None]:
    """Compare the stored network with the one that the file of verdicts names.

    Returns:
        Where that one is, and the network itself unless they are the same to the last bit.

    Raises:
        RejectedError: if they differ, or the stored one is damaged.
        InputError: if there is no such network.
    """
    target = header.get("target")
    if target is None:
        raise InputError("the file does not say where the network is")
    weights = header.get("weights")
    places = [(target, weights and Path(weights))]
    if (folder.parent / "model.safetensors").is_file():  # a run may have been moved, with all that is in it
        places.insert(0, (str(folder.parent), None))
    for place, its_weights in places:
        program, stored = _exported(place, its_weights, header, folder)
        if _agree(program, stored, 0.0):
            return place, None
        if _agree(program, stored, ALIKE):
            return place, program
    raise checker.RejectedError(f"the stored network is not the one in {target}")


def _exported(
    target: str, weights: Path | None, header: dict[str, Any], folder: Path
) -> tuple[Program, Program]:
    """A TARGET's network as the checker reads it, and the stored one."""
    loaded = load_target(target, weights)
    try:
        content = checker.contents(folder / "network.safetensors", header["identity"]["certificates"])
        tensors, program = checker.unpack(content)
        stored = Program(program["nodes"], tensors)
        shape = tuple(stored.nodes[0]["shape"])
        return export(recast(trace(loaded.taking(shape), shape), torch.float64)), stored
    except UnknownError as error:
        raise checker.RejectedError(
            f"{target} has an operator that the checker does not know: {error}"
        ) from None
    except (OSError, ValueError, LookupError) as error:
        raise checker.RejectedError(f"the stored network cannot be compared with {target}: {error}") from None


def _agree(one: Program, other: Program, share: float) -> bool:
    """Whether two networks are the same, but for this share of each weight."""

    def close(name: str) -> bool:
        mine, theirs = one.tensors[name], other.tensors[name]
        return mine.shape == theirs.shape and bool(np.allclose(mine, theirs, rtol=share, atol=0))

    alike = one.nodes == other.nodes and one.tensors.keys() == other.tensors.keys()
    return alike and all(map(close, one.tensors))


def _compare_data(
    header: dict[str, Any], folder: Path, records: list[dict[str, Any]]
) -> Iterator[tuple[int, str]]:
    """Index and reason for every example whose input or label is not that of the data set that is named.

    Raises:
        InputError: if there is no such data set.
    """
    if header.get("data") is None:
        raise InputError("the file does not say which")
    source = as_source(load(header["data"], download=False).test)
    if source.identity() != header["identity"]["data"]:
        raise InputError(f"{header['data']} here is another data set than the one that was certified")
    for name, members in groupby(records, key=lambda record: Path(record["certificate"]["file"]).name):
        tensors, found = checker.unpack((folder / name).read_bytes())
        row = {claim["index"]: k for k, claim in enumerate(found["claims"])}
        chosen = []
        for record in members:
            if record["index"] < len(source):
                chosen.append(record)
            else:
                yield record["index"], f"{header['data']} has no such example"
        index = torch.tensor([record["index"] for record in chosen], dtype=torch.int64)
        ((x, y, _),) = source.batches([index])
        for record, image, label in zip(chosen, x.double().flatten(1).numpy(), y.tolist(), strict=True):
            stored = tensors["x"][row[record["index"]]].ravel()
            if label != record["label"] or not np.array_equal(stored.astype("f8"), image):
                yield record["index"], f"its input or label is not that of {header['data']}"

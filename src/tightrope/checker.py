"""Rechecks the certificates of `tightrope certify --certificates`, in plain NumPy.

    python checker.py FILE.jsonl [--json]

It shares no code with what made them, and trusts no number in them for soundness: boxes, lines and bounds are
computed anew, and every bound is lowered by what rounding may have added to it. docs/certificates.md has the
format, docs/soundness.md the argument.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load

FORMAT = "tightrope-certificate/1"
UNIT = 2.0**-53  # unit roundoff
FLOOR = 1e-7  # what a bound must exceed: far more than underflow can hide
LOOSE = 1e-4  # how far a margin that a record states may lie above the one that is found here, as a share
ROWS, CELLS, EXAMPLES = 512, 64, 32  # done at once, so as to need little memory

RULES: dict[str, tuple[str, str] | None] = {
    "ibp": None,
    "crown-ibp": ("interval", "adaptive"),
    "crown": ("linear", "adaptive"),
    "fast-lin": ("linear", "parallel"),
}
"""How boxes are found, and which slopes lines have where none are stored."""

CLAIM = ("index", "label", "predicted", "status", "stage", "margin")

Array = Any  # numpy's arrays; shapes are (batch, size) for values and (batch, rows, size) for rows
Lines = tuple[Array, Array, Array, Array]  # low, its value at 0, high, its value at 0


class RejectedError(Exception):
    """Why a claim is not accepted."""


class UnusableError(Exception):
    """Why a file cannot be checked at all."""


def gamma(terms: int) -> float:
    """The error of a sum of so many rounded terms, as a share of the sum of their sizes (twice over)."""
    return 2 * (terms + 20) * UNIT


def dot(rows: Array, vector: Array) -> Array:
    """`<row, vector>` for every row of every example."""
    return (rows @ vector[..., None])[..., 0]


class Network:
    """A network as a list of nodes; values are vectors, whatever shape they stand for.

    Args:
        content: of a file of certificates' `network.safetensors`.
    """

    def __init__(self, content: bytes) -> None:
        tensors, header = unpack(content)
        self.nodes: list[dict[str, Any]] = header["nodes"]
        self.shapes = [tuple(node["shape"]) for node in self.nodes]
        self.size = [int(np.prod(shape)) for shape in self.shapes]
        self.relus = [i for i, node in enumerate(self.nodes) if node["op"] == "relu"]
        starts = np.cumsum([0, *(self.size[i] for i in self.relus)])
        self.neurons = int(starts[-1])
        self.part = {i: slice(*starts[k : k + 2]) for k, i in enumerate(self.relus)}
        for i, node in enumerate(self.nodes[1:], start=1):
            if not all(0 <= j < i for j in node["inputs"]):
                raise RejectedError("a node of the stored network reads what comes after it")
            if node["op"] == "relu" and not 0 <= node["left"] <= 1:
                raise RejectedError("an activation of the stored network has a slope outside [0, 1]")
            sizes = {self.size[j] for j in node["inputs"]}
            if node["op"] in ("relu", "add", "scale") and sizes != {self.size[i]}:
                raise RejectedError("a node of the stored network changes sizes that it should keep")
        tensors = {name: value.astype(np.float64) for name, value in tensors.items()}
        self.weight = [None if "weight" not in node else tensors[node["weight"]] for node in self.nodes]
        self.bias = [np.zeros(n) for n in self.size]
        for i, node in enumerate(self.nodes):
            if "bias" in node:
                bias = tensors[node["bias"]]
                self.bias[i] = np.broadcast_to(bias.repeat(self.size[i] // bias.size), self.size[i])
        # Terms of the longest sum at a node, forwards and back, and of a sum over its values.
        self.terms = [size + len(self.nodes) for size in self.size]
        for i, weight in enumerate(self.weight):
            if weight is not None and weight.ndim > 1:
                self.terms[i] += weight[0].size + weight.size // weight.shape[1]

    def multiply(self, i: int, values: list[Array], absolute: bool = False) -> Array:
        """`W z`, or `|W| z`, of an affine node."""
        node, weight, z = self.nodes[i], self.weight[i], values[0]
        if absolute and weight is not None:
            weight = np.abs(weight)
        if node["op"] == "add":
            return z + (1 if absolute else node["sign"]) * values[1]
        if node["op"] == "scale":
            return z if weight is None else z / weight if node["divide"] else z * weight
        if node["op"] == "dense":
            assert weight is not None
            return z @ weight.T
        return self._convolve(i, z, weight, back=False)

    def transpose(self, i: int, rows: Array) -> list[Array]:
        """`rows W`: coefficients of each input of an affine node."""
        node, weight = self.nodes[i], self.weight[i]
        if node["op"] == "add":
            return [rows, node["sign"] * rows]
        if node["op"] == "scale":
            return [rows if weight is None else rows / weight if node["divide"] else rows * weight]
        if node["op"] == "dense":
            return [rows @ weight]
        return [
            self._convolve(i, rows.reshape(-1, rows.shape[-1]), weight, back=True).reshape(
                *rows.shape[:-1], -1
            )
        ]

    def _convolve(self, i: int, z: Array, weight: Array, back: bool) -> Array:
        """A convolution or its transpose, one entry of the kernel after the other."""
        node, groups = self.nodes[i], self.nodes[i]["groups"]
        if node["op"] != "conv":
            raise RejectedError(f"the stored network has an operator that is not known: {node['op']!r}")
        (top, left), (s, t), (d, e) = node["padding"], node["stride"], node["dilation"]
        (out, p, q), (channels, high, wide) = self.shapes[i], node["of"]
        kernel = weight.reshape(groups, out // groups, channels // groups, *weight.shape[2:])
        padded = np.zeros((len(z), groups, channels // groups, high + 2 * top, wide + 2 * left))
        inside = padded[..., top : top + high, left : left + wide]
        if not back:
            inside[:] = z.reshape(inside.shape)
        found = (
            z.reshape(len(z), groups, -1, p * q) if back else np.zeros((len(z), groups, out // groups, p * q))
        )
        for a in range(weight.shape[2]):
            for b in range(weight.shape[3]):
                seen = padded[..., a * d : a * d + s * (p - 1) + 1 : s, b * e : b * e + t * (q - 1) + 1 : t]
                if back:
                    seen += (kernel[..., a, b].swapaxes(1, 2) @ found).reshape(seen.shape)
                else:
                    found += kernel[..., a, b] @ seen.reshape(*seen.shape[:3], p * q)
        return (inside if back else found).reshape(len(z), -1)

    def run(self, x: Array) -> Array:
        """The logits."""
        values = [x]
        for i, node in enumerate(self.nodes[1:], start=1):
            inputs = [values[j] for j in node["inputs"]]
            relu = node["op"] == "relu"
            values.append(bend(node, inputs[0]) if relu else self.multiply(i, inputs) + self.bias[i])
        return values[-1]


def bend(node: dict[str, Any], z: Array) -> Array:
    """ReLU, or LeakyReLU with a slope in [0, 1] left of 0."""
    return np.maximum(z, node["left"] * z)


class Region:
    """`{x' : ||x' - x||_norm <= eps}`, cut with the domain; `low` and `high` are the corners of a box around it."""

    def __init__(self, x: Array, eps: float, norm: str, domain: list[float] | None) -> None:
        self.x, self.eps, self.norm = x, eps, norm
        lowest, highest = (-np.inf, np.inf) if domain is None else domain
        if not (np.isfinite(x).all() and eps >= 0 and norm in ("inf", "2", "1")):
            raise RejectedError("an input is not finite, or there is no such region")
        if not ((x >= lowest) & (x <= highest)).all():
            raise RejectedError(f"an input lies outside the domain {domain}")
        self.low = np.clip(np.nextafter(x - eps, -np.inf), lowest, highest)
        self.high = np.clip(np.nextafter(x + eps, np.inf), lowest, highest)
        self.middle = (self.low + self.high) / 2
        self.radius = (self.high - self.low) / 2 + 8 * UNIT * (np.abs(self.low) + np.abs(self.high))

    def least(self, rows: Array) -> tuple[Array, Array]:
        """A lower bound of `<row, x'>`, and by how much rounding may have raised it."""
        size = np.abs(rows)
        error = gamma(2 * rows.shape[-1]) * dot(
            size, np.abs(self.x) + np.abs(self.middle) + self.radius + self.eps
        )
        if self.norm == "inf":
            return dot(rows, self.middle) - dot(size, self.radius), error
        longest = np.sqrt(np.square(size).sum(-1)) if self.norm == "2" else size.max(-1)
        return dot(rows, self.x) - self.eps * longest, error

    def holds(self, point: Array) -> bool:
        """Whether a point lies in the region, to within rounding."""
        step = np.abs(point - self.x)
        length = {"inf": step.max(), "2": np.sqrt(np.square(step).sum()), "1": step.sum()}[self.norm]
        inside = ((self.low <= point) & (point <= self.high)).all()
        return bool(inside and length <= self.eps * (1 + 1e-12) + 1e-12)


class Reach:
    """How far the values of a network reach over regions, by intervals.

    `boxes` hold what enters each ReLU; `size[i]` bounds the sum of the sizes of all that is added up in node i.
    """

    def __init__(self, network: Network, region: Region) -> None:
        self.network, self.region = network, region
        self.boxes: dict[int, tuple[Array, Array]] = {}
        self.size: dict[int, Array] = {}
        centre, radius = [region.middle], [region.radius]
        for i, node in enumerate(network.nodes[1:], start=1):
            c, r = ([values[j] for j in node["inputs"]] for values in (centre, radius))
            if node["op"] == "relu":
                self.size[i] = np.abs(c[0]) + r[0]
                rounding = 4 * UNIT * self.size[i]
                low, high = self.boxes[i] = c[0] - r[0] - rounding, c[0] + r[0] + rounding
                low, high = bend(node, low), bend(node, high)
                centre.append((low + high) / 2)
                radius.append((high - low) / 2 + 8 * UNIT * (np.abs(low) + np.abs(high)))
                continue
            largest = [np.abs(a) + b for a, b in zip(c, r, strict=True)]
            self.size[i] = network.multiply(i, largest, absolute=True) + np.abs(network.bias[i])
            centre.append(network.multiply(i, c) + network.bias[i])
            rounding = 2 * gamma(network.terms[i]) * self.size[i]
            radius.append(network.multiply(i, r, absolute=True) + rounding)

    def lower(
        self, end: int, rows: Array, lines: dict[int, Lines], push: dict[int, Array] | None = None
    ) -> Array:
        """A lower bound of `<row, value of a node>` that holds in real arithmetic, by one pass back.

        Each step replaces coefficients by others whose function is no larger. What rounding changed in
        them, times the largest value of what they multiply, is added up, and twice that is taken off.

        Args:
            end: the node.
            rows: coefficients of its value.
            lines: around each ReLU before it.
            push: subtract this much of each ReLU's input: what is not negative in a cell.
        """
        network, pending = self.network, {end: rows}
        total, error = np.zeros((1, 1)), np.zeros((1, 1))
        for i in range(end, 0, -1):
            if i not in pending:
                continue
            rows, node = pending.pop(i), network.nodes[i]
            size, largest = np.abs(rows), self.size[i]
            if node["op"] == "relu":
                low, low_at, high, high_at = lines[i]
                below = np.minimum(rows, 0)
                above = rows - below
                step = dot(above, low_at) + dot(below, high_at)
                parts = [above * low[:, None] + below * high[:, None]]
                largest = largest + np.abs(low_at) + np.abs(high_at)
                if push is not None:
                    parts = [parts[0] - push[i][:, None]]
                    error = error + 4 * UNIT * dot(np.abs(push[i])[:, None], self.size[i])
            else:
                step, parts = rows @ network.bias[i], network.transpose(i, rows)
            total = total + step
            error = error + gamma(network.terms[i]) * dot(size, largest) + 2 * UNIT * np.abs(total)
            for j, part in zip(node["inputs"], parts, strict=True):
                pending[j] = pending[j] + part if j in pending else part
        if 0 in pending:
            least, rounding = self.region.least(pending[0])
            total = total + least
            error = error + rounding + 2 * UNIT * np.abs(total)
        return total - 2 * error

    def constants(self) -> dict[int, Lines]:
        """Lines of slope 0 around every ReLU: with them a bound is that of intervals."""
        found = {}
        for i, (low, high) in self.boxes.items():
            zero, node = np.zeros_like(low), self.network.nodes[i]
            low, high = bend(node, low), bend(node, high)
            found[i] = zero, low - 4 * UNIT * np.abs(low), zero, high + 4 * UNIT * np.abs(high)
        return found

    def around(self, rule: str) -> dict[int, Lines]:
        """Lines over all boxes."""
        return {i: around(self.network.nodes[i], *box, rule) for i, box in self.boxes.items()}

    def tighten(self, rule: str) -> None:
        """Bound every neuron of unknown sign by a pass of its own, one ReLU after the other; for one example."""
        lines: dict[int, Lines] = {}
        for i, (low, high) in list(self.boxes.items()):
            low, high = low.copy(), high.copy()
            (source,) = self.network.nodes[i]["inputs"]
            unstable = np.flatnonzero((low[0] < 0) & (high[0] > 0))
            if not lines and self.region.norm == "inf":
                unstable = unstable[:0]  # in front of the first ReLU, intervals are exact
            for start in range(0, len(unstable), ROWS):
                some = unstable[start : start + ROWS]
                unit = np.zeros((1, len(some), low.shape[1]))
                unit[0, np.arange(len(some)), some] = 1
                least = self.lower(source, np.concatenate([unit, -unit], 1), lines)[0]
                low[0, some] = np.maximum(low[0, some], least[: len(some)])
                high[0, some] = np.minimum(high[0, some], -least[len(some) :])
            self.boxes[i] = low, high
            lines[i] = around(self.network.nodes[i], low, high, rule)


def around(node: dict[str, Any], low: Array, high: Array, rule: str, slopes: Array | None = None) -> Lines:
    """Lines that hold a ReLU between them over a box: below through 0, with any slope in [left, 1].

    Above, the chord, or with the rule "parallel" the same slope. The lines are valid for the rounded numbers.
    """
    left, is_open = node["left"], (low < 0) & (high > 0)
    known = np.where(low >= 0, 1.0, left)
    chord = np.clip(left + (1 - left) * (high / np.where(is_open, high - low, 1.0)), left, 1)
    if slopes is None:
        slopes = chord if rule == "parallel" else np.where(high > -low, 1.0, left)
    below = np.where(is_open, np.clip(slopes, left, 1), known)
    above = below if rule == "parallel" else np.where(is_open, chord, known)
    highest = np.maximum(left * low - above * low, high - above * high)
    zero = np.zeros_like(highest)
    return below, zero, above, np.where(is_open, highest + 8 * UNIT * (high - low), zero)


def rows_of(labels: Array, classes: int) -> Array:
    """The margins of each label over every class, as rows."""
    unit = np.eye(classes)
    return unit[labels][:, None] - unit


def leaves(rivals: Array, splits: Array) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """The cells of each rival's tree, as class and signs of neurons. The trees are written root first.

    A number is the neuron that a cell is split at (what follows first has it positive), or -1: no split. So
    the cells of a tree that can be read to its end cover the region.
    """
    place, count = 0, len(splits)
    for rival in rivals.tolist():
        stack: list[list[tuple[int, int]]] = [[]]
        while stack:
            path = stack.pop()
            if place == count:
                raise RejectedError("a tree of splits is cut off: its cells do not cover the region")
            neuron, place = int(splits[place]), place + 1
            if neuron < 0:
                yield rival, path
            else:
                stack += [[*path, (neuron, -1)], [*path, (neuron, 1)]]
    if place != count:
        raise RejectedError("more splits are stored than the trees have")


def proved_by_cells(reach: Reach, rule: str, label: int, stored: dict[str, Array]) -> set[int]:
    """The classes over which the margin is positive in every cell of their tree."""
    network, found = reach.network, list(leaves(stored["rivals"], stored["splits"]))
    slopes, weights = (stored[name].astype(np.float64) for name in ("slopes", "weights"))
    neurons, ends = stored["neurons"], np.cumsum([1 + len(path) for _, path in found])
    if len(slopes) != len(found) or len(weights) != (ends[-1] if found else 0):
        raise RejectedError("slopes or multipliers are missing, or there are too many")
    basis = np.concatenate([lines[0] for lines in reach.around(rule).values()], 1)
    failed: set[int] = set()
    for start in range(0, len(found), CELLS):
        some = found[start : start + CELLS]
        low = np.repeat(basis, len(some), 0)
        low[:, neurons] = slopes[start : start + CELLS]
        sign, push = np.zeros_like(low), np.zeros_like(low)
        rows = np.zeros((len(some), 1, network.size[-1]))
        for k, (rival, path) in enumerate(some):
            weight = np.maximum(weights[ends[start + k] - 1 - len(path) : ends[start + k]], 0)
            rows[k, 0] = weight[0] * rows_of(np.array([label]), network.size[-1])[0, rival]
            for (neuron, side), multiplier in zip(path, weight[1:], strict=True):
                sign[k, neuron] = side
                push[k, neuron] += side * multiplier
        lines = {}
        for i, box in reach.boxes.items():
            part, node = network.part[i], network.nodes[i]
            given, exact = sign[:, part], np.where(sign[:, part] > 0, 1.0, node["left"])
            below, zero, above, offset = around(node, *box, rule, low[:, part])
            below, above = (np.where(given == 0, slope, exact) for slope in (below, above))
            lines[i] = below, zero, above, np.where(given == 0, offset, 0.0)
        pushed = {i: push[:, network.part[i]] for i in network.relus}
        least = reach.lower(len(network.nodes) - 1, rows, lines, pushed)[:, 0]
        failed |= {rival for (rival, _), value in zip(some, least, strict=True) if not FLOOR < value < np.inf}
    return {rival for rival, _ in found} - failed


def bound_margins(
    network: Network,
    region: Region,
    labels: Array,
    proof: dict[str, Any],
    stored: dict[str, Array] | None = None,
) -> Array:
    """Lower bounds of the margins over every class; infinity where cells prove one, and over the label itself."""
    if proof["rule"] not in RULES:
        raise RejectedError(f"there is no rule {proof['rule']!r}")
    how, reach, end = RULES[proof["rule"]], Reach(network, region), len(network.nodes) - 1
    rows = rows_of(labels, network.size[-1])
    least = reach.lower(end, rows, reach.constants())
    if how is not None:
        if how[0] == "linear":
            reach.tighten(how[1])
        least = np.maximum(least, reach.lower(end, rows, reach.around(how[1])))
        if stored is not None:
            least[0, list(proved_by_cells(reach, how[1], int(labels[0]), stored))] = np.inf
    least[np.arange(len(least)), labels] = np.inf
    return np.where(np.isnan(least), -np.inf, least)


def check_batch(
    network: Network, header: dict[str, Any], tensors: dict[str, Array], witnesses: dict[int, dict[str, Any]]
) -> dict[int, str | None]:
    """By index, why the claim on an example is not accepted; None where it is."""
    found: dict[int, str | None] = {}
    claims, inputs = header["claims"], tensors["x"].astype(np.float64).reshape(len(tensors["x"]), -1)
    if len(claims) != len(inputs) or inputs.shape[1] != network.size[0]:
        raise RejectedError("there is not one input of the network's size for each claim")
    by_rule: dict[str, list[int]] = {}
    for k, claim in enumerate(claims):
        try:
            region = Region(inputs[k : k + 1], header["eps"], header["norm"], header["domain"])
            check_answers(network, region, claim, witnesses.get(claim["index"]))
            found[claim["index"]] = None
            if claim["status"] == "robust" and claim["proof"] is not None:
                together = claim["proof"]["rule"] in ("ibp", "crown-ibp") and "cells" not in claim["proof"]
                key = claim["proof"]["rule"] if together else f"{k}"
                by_rule.setdefault(key, []).append(k)
        except RejectedError as error:
            found[claim["index"]] = str(error)
    for members in by_rule.values():
        for start in range(0, len(members), EXAMPLES):
            some = members[start : start + EXAMPLES]
            found |= check_proofs(network, header, tensors, inputs, some)
    return found


def check_proofs(
    network: Network, header: dict[str, Any], tensors: dict[str, Array], inputs: Array, members: list[int]
) -> dict[int, str | None]:
    """`check_batch` of robust examples with the same rule; those with cells come alone."""
    claims = [header["claims"][k] for k in members]
    proof, labels = claims[0]["proof"], np.array([claim["label"] for claim in claims])
    prefix = f"{claims[0]['index']}/"
    stored = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    region = Region(inputs[members], header["eps"], header["norm"], header["domain"])
    try:
        cells = stored if "cells" in proof else None
        margins = bound_margins(network, region, labels, proof, cells).min(1)
    except RejectedError as error:
        return {claim["index"]: str(error) for claim in claims}
    found: dict[int, str | None] = {}
    for claim, margin in zip(claims, margins.tolist(), strict=True):
        if not margin > FLOOR:
            found[claim["index"]] = f"the smallest margin is only proved to exceed {margin:.6g}"
        elif cells is None and claim["margin"] > margin + LOOSE * (1 + abs(margin)):
            found[claim["index"]] = f"a margin of {claim['margin']:.6g} is stated, {margin:.6g} is proved"
        else:
            found[claim["index"]] = None
    return found


def check_answers(
    network: Network, region: Region, claim: dict[str, Any], witness: dict[str, Any] | None
) -> None:
    """Check what can be seen by running the network: on the input, and on the witness."""
    label, status, predicted = claim["label"], claim["status"], claim["predicted"]
    if not 0 <= label < network.size[-1] > 1 or status not in (
        "robust",
        "falsified",
        "undecided",
        "misclassified",
    ):
        raise RejectedError(f"there is no class {label!r}, or no status {status!r}")

    def margin_at(point: Array, rival: int) -> tuple[float, float]:
        logits = network.run(point)[0]
        rounding = 1e-9 * (1 + float(np.abs(logits).max()))
        margin = logits[label] - np.delete(logits, label).max()
        if not np.isfinite(margin) or (rival != label and logits[label] - logits[rival] > margin + rounding):
            raise RejectedError(f"the network does not answer {rival}, as is claimed")
        return float(margin), rounding

    margin, rounding = margin_at(region.x, predicted)
    wrong = status == "misclassified"
    if (predicted != label) is not wrong or (margin > rounding if wrong else margin < -rounding):
        raise RejectedError(f"on the input itself the margin is {margin:.6g}, and it is called {status}")
    if status == "falsified":
        if witness is None:
            raise RejectedError("the witness is missing")
        point = np.frombuffer(base64.b64decode(witness["float64"], validate=True), "<f8")
        if point.size != region.x.size or not region.holds(point.reshape(1, -1)):
            raise RejectedError("the witness lies outside the region")
        margin, rounding = margin_at(point.reshape(1, -1), witness["predicted"])
        if margin > rounding or witness["predicted"] == label:
            raise RejectedError(f"the witness changes no answer: the margin there is {margin:.6g}")
    highest = margin + LOOSE * rounding * 1e9
    exact = status in ("falsified", "misclassified")
    if not (claim["margin"] <= highest or status == "undecided"):
        raise RejectedError(f"a margin of {claim['margin']:.6g} is stated, but there is one of {margin:.6g}")
    if exact and claim["margin"] < 2 * margin - highest:
        raise RejectedError(f"a margin of {claim['margin']:.6g} is stated, it is {margin:.6g}")
    if status == "robust" and not claim["margin"] > 0:
        raise RejectedError("a margin that is not positive proves nothing")


def unpack(content: bytes) -> tuple[dict[str, Array], dict[str, Any]]:
    """The tensors and the JSON header of a safetensors file; an error if its format is not known."""
    try:
        tensors = load(content)
        size = int.from_bytes(content[:8], "little")
        header = json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["header"])
    except Exception as error:
        raise RejectedError(f"not a safetensors file with a header ({error})") from None
    if header.get("format") != FORMAT:
        raise RejectedError(f"its format is {header.get('format')!r}, not {FORMAT}")
    return tensors, header


def read(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The header and the records of a file of verdicts."""
    try:
        header, *records = (json.loads(line) for line in path.read_text().split("\n") if line)
        identity, about = header["identity"], header.get("certificates", {})
        places = [record["index"] for record in records]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UnusableError(f"{path} is no file of verdicts, or is damaged: {error!r}") from None
    if "folder" not in about or "certificates" not in identity or len(set(map(type, places))) > 1:
        raise UnusableError(
            f"{path} has no certificates: {about.get('none', 'make it with certify --certificates')}"
        )
    return header, records


def recheck(path: Path, progress: bool = True) -> dict[str, Any]:
    """Check every verdict of a file; counts, and why each that is not accepted is rejected.

    Args:
        path: a file of verdicts, beside which the folder of certificates lies that it names.
        progress: say on stderr how far it is.

    Raises:
        UnusableError: if it is no such file.
    """
    header, records = read(path)
    folder, wanted = path.parent / Path(header["certificates"]["folder"]).name, header["identity"]
    rejected: list[dict[str, Any]] = []
    counts = dict.fromkeys(("robust", "falsified", "undecided", "misclassified", "without_certificate"), 0)
    try:
        network = Network(contents(folder, "network.safetensors", wanted["certificates"]))
    except (RejectedError, *DAMAGED) as error:
        reason = f"the network: {describe(error)}"
        return {
            **counts,
            "accepted": 0,
            "rejected": [{"index": r["index"], "reason": reason} for r in records],
        }
    by_file: dict[str, list[dict[str, Any]]] = {
        path.name: [] for path in sorted(folder.glob("[0-9]*.safetensors"))
    }
    seen: set[int] = set()
    for record in records:
        name = (record.get("certificate") or {}).get("file")
        if record["index"] in seen or not isinstance(name, str):
            reason = (
                "the example stands there twice" if record["index"] in seen else "no certificate is named"
            )
            rejected.append({"index": record["index"], "reason": reason})
        else:
            by_file.setdefault(name, []).append(record)
        seen.add(record["index"])
    done = 0
    for name, members in by_file.items():
        reasons = check_file(folder, name, members, network, wanted)
        for record in members:
            reason = reasons.pop(record["index"], None)
            if reason is not None:
                rejected.append({"index": record["index"], "reason": reason})
            elif record["status"] == "robust" and record["certificate"]["proof"] is None:
                counts["without_certificate"] += 1
            else:
                counts[record["status"]] += 1
        missing = [i for i in reasons if i not in seen]
        rejected += [
            {"index": i, "reason": "it has a certificate but no verdict: the file is cut off"}
            for i in missing
        ]
        done += len(members)
        if progress:
            print(f"recheck: {done} of {len(records)} examples", file=sys.stderr)
    absent = sorted(set(range(header["certificates"]["examples"])) - seen - {r["index"] for r in rejected})
    rejected += [{"index": i, "reason": "the header speaks of it, but it has no verdict"} for i in absent]
    accepted = sum(count for status, count in counts.items() if status != "without_certificate")
    return {**counts, "accepted": accepted, "rejected": rejected}


def check_file(
    folder: Path, name: str, records: list[dict[str, Any]], network: Network, wanted: dict[str, Any]
) -> dict[int, str | None]:
    """By index, why a record is rejected; None if it is not. Examples of the file without a record are in it too."""
    try:
        hashes: set[str | None] = {record["certificate"].get("sha256") for record in records}
        tensors, header = unpack(
            contents(folder, name, hashes.pop() if len(hashes) == 1 else None if records else "")
        )
        claims = {claim["index"]: claim for claim in header["claims"]}
        if not records:  # a leftover: it only says which examples were judged
            return dict.fromkeys(claims)
        unlike = [
            key for key in ("certificates", "eps", "norm", "domain", "data") if header[key] != wanted[key]
        ]
        if unlike or len(claims) != len(header["claims"]):
            raise RejectedError(f"it was made for another {', '.join(unlike) or 'set of examples'}")
        witnesses = {record["index"]: record["witness"] for record in records if record.get("witness")}
        found = check_batch(network, header, tensors, witnesses)
    except (RejectedError, *DAMAGED) as error:
        return {record["index"]: f"{name}: {describe(error)}" for record in records}
    for record in records:
        claim = claims.get(record["index"], {})
        rule = (claim.get("proof") or {}).get("rule")
        unlike = [key for key in CLAIM if key not in claim or claim[key] != record.get(key)]
        if unlike or record["certificate"].get("proof") != rule:
            found[record["index"]] = f"{', '.join(unlike) or 'proof'}: the certificate says something else"
    return found


DAMAGED = (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, MemoryError)


def describe(error: Exception) -> str:
    return str(error) if isinstance(error, RejectedError) else f"damaged ({error!r})"


def contents(folder: Path, name: str, digest: str | None) -> bytes:
    """A file's bytes, if they have the SHA-256 that is stated; "" states none."""
    content = (folder / Path(name).name).read_bytes()
    if digest != "" and hashlib.sha256(content).hexdigest() != digest:
        raise RejectedError("its SHA-256 is not the one that is stated")
    return content


def main() -> int:
    """The command line; 0 if every claim is accepted, 3 if one is rejected, 2 if nothing can be checked."""
    parser = argparse.ArgumentParser(description="Recheck a file of tightrope certify --certificates.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--json", action="store_true", help="print a JSON object as the last line")
    options = parser.parse_args()
    try:
        report = recheck(options.file)
    except UnusableError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(*summary(report), sep="\n")
    if options.json:
        print(json.dumps(report))
    return 3 if report["rejected"] else 0


def summary(report: dict[str, Any]) -> list[str]:
    """What to tell a reader."""
    lines = [f"rejected: example {entry['index']}: {entry['reason']}" for entry in report["rejected"]]
    counts = ", ".join(
        f"{report[key]} {key}" for key in ("robust", "falsified", "undecided", "misclassified")
    )
    lines.append(f"accepted {report['accepted']} ({counts}), rejected {len(report['rejected'])}")
    if report["without_certificate"]:
        lines.append(f"not checked: {report['without_certificate']} robust examples without certificate")
    return lines


if __name__ == "__main__":
    sys.exit(main())

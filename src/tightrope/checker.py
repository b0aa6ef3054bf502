"""Rechecks the verdicts of `tightrope certify --certificates` in plain NumPy.

    python checker.py FILE.jsonl [--json]

It shares no code with what made them, and trusts no number in them for soundness: boxes, lines and bounds are
computed anew, and every bound is lowered by what rounding may have added. Whatever goes wrong, a claim that
was not checked to its end is rejected. docs/certificates.md has the format, docs/soundness.md the argument.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load

FORMAT = "tightrope-certificate/1"
UNIT = 2.0**-53  # unit roundoff
TINY = 2.0**-960  # no size counts as less: a share of it is more than what any sum loses to underflow
FLOOR = 1e-7  # what a bound must exceed
LOOSE = 1e-4  # by which share a stated margin may lie above the one that is found here
ROWS, CELLS = 32, 64  # done at once: what a processor works on without waiting for its memory

CLAIM = ("index", "label", "predicted", "status", "stage", "margin")
STATUSES = ("robust", "falsified", "undecided", "misclassified")

# How boxes are found ("linear": by a pass of its own for each neuron), and slopes where none are stored.
RULES = {
    "ibp": ("interval", ""),
    "crown-ibp": ("interval", "adaptive"),
    "crown": ("linear", "adaptive"),
    "fast-lin": ("linear", "parallel"),
}

Json = dict[str, Any]
Array = Any  # values are (batch, size), rows of coefficients (batch, rows, size)
Lines = tuple[Array, Array, Array, Array]  # slope below, its value at 0, slope above, its value at 0


class RejectedError(Exception):
    """Why something is not accepted."""


def require(condition: Any, reason: str) -> None:
    """Reject what does not meet a condition."""
    if not condition:
        raise RejectedError(reason)


def gamma(terms: int) -> float:
    """At least twice the error of a sum of so many rounded products, as a share of the sum of their sizes."""
    return 2 * (terms + 20) * UNIT


def dot(rows: Array, vector: Array) -> Array:
    """`<row, vector>` for every row."""
    return (rows @ vector[..., None])[..., 0]


def length(values: Array) -> Array:
    """The l_2 norm of every row."""
    return np.linalg.norm(values, axis=-1, keepdims=True)


class Network:
    """A network as a list of nodes, of which the last is the output; values are vectors."""

    def __init__(self, content: bytes) -> None:
        tensors, header = unpack(content)
        tensors = {name: value.astype(np.float64) for name, value in tensors.items()}
        self.nodes: list[Json] = header["nodes"]
        self.size = [int(np.prod(node["shape"])) for node in self.nodes]
        self.weight: list[Array] = [tensors.get(f"{i}.weight") for i in range(len(self.nodes))]
        self.sizes: list[Array] = [None if w is None else np.abs(w) for w in self.weight]
        self.bias, self.terms, self.part, count = [np.zeros(self.size[0])], [0], dict[int, slice](), 0
        for i, node in enumerate(self.nodes[1:], start=1):
            size, weight = self.size[i], self.weight[i]
            require(all(0 <= j < i for j in node["inputs"]) and self.is_known(i), f"a bad node: {node}")
            bias = tensors.get(f"{i}.bias", np.zeros(1))
            self.bias.append(np.broadcast_to(bias.repeat(size // bias.size), size))
            # Terms of the longest sum at the node, forwards and back, and of one over its values.
            sums = weight is not None and weight.ndim > 1
            longest = weight[0].size + weight.size // weight.shape[1] if sums else 0
            self.terms.append(longest + size + len(self.nodes))
            if node["op"] == "relu":
                self.part[i] = slice(count, count := count + size)  # its neurons, among those of all
        self.neurons, self.end = count, len(self.nodes) - 1

    def is_known(self, i: int) -> bool:
        """Whether a node is as the other methods take it to be."""
        node, size, weight = self.nodes[i], self.size[i], self.weight[i]
        op, before = node["op"], [self.size[j] for j in node["inputs"]]
        if op == "relu":
            return before == [size] and bool(0 <= node["left"] <= 1)
        if op == "add":
            return before == [size, size] and node["sign"] in (1, -1)
        if op == "scale":
            return before == [size] and (weight is None or weight.shape == (size,))
        if op == "dense":
            return len(before) == 1 and weight.shape == (size, before[0])
        of, out = node.get("of", [0]), node["shape"][0]
        return op == "conv" and [*before, *weight.shape[:-2]] == [np.prod(of), out, of[0] // node["groups"]]

    def affine(self, i: int, values: list[Array], absolute: bool = False) -> Array:
        """`W z`, or `|W| z`."""
        node, weight, z = self.nodes[i], (self.sizes if absolute else self.weight)[i], values[0]
        if node["op"] == "add":
            return z + (1 if absolute else node["sign"]) * values[1]
        if node["op"] == "scale":
            return z if weight is None else z / weight if node["divide"] else z * weight
        return z @ weight.T if node["op"] == "dense" else self.convolve(i, z, weight, back=False)

    def transpose(self, i: int, rows: Array) -> list[Array]:
        """`rows W`: coefficients of each input."""
        node, weight = self.nodes[i], self.weight[i]
        if node["op"] == "add":
            return [rows, node["sign"] * rows]
        if node["op"] == "scale":
            return [rows if weight is None else rows / weight if node["divide"] else rows * weight]
        if node["op"] == "dense":
            return [rows @ weight]
        flat = self.convolve(i, rows.reshape(-1, rows.shape[-1]), weight, back=True)
        return [flat.reshape(*rows.shape[:-1], -1)]

    def convolve(self, i: int, z: Array, weight: Array, back: bool) -> Array:
        """A convolution or its transpose, one entry of the kernel after the other."""
        node = self.nodes[i]
        (top, left), (s, t), (d, e), groups = (node[k] for k in ("padding", "stride", "dilation", "groups"))
        (out, p, q), (channels, high, wide), count = node["shape"], node["of"], len(z)
        kernel = weight.reshape(groups, out // groups, channels // groups, *weight.shape[2:])
        padded = np.zeros((count, groups, channels // groups, high + 2 * top, wide + 2 * left))
        inside = padded[..., top : top + high, left : left + wide]
        found = np.zeros((count, groups, out // groups, p * q))
        (found if back else inside)[:] = z.reshape((found if back else inside).shape)
        for a, b in np.ndindex(*weight.shape[2:]):
            seen = padded[..., a * d : a * d + s * (p - 1) + 1 : s, b * e : b * e + t * (q - 1) + 1 : t]
            if back:
                seen += (kernel[..., a, b].swapaxes(1, 2) @ found).reshape(seen.shape)
            else:
                found += kernel[..., a, b] @ seen.reshape(*seen.shape[:3], p * q)
        return (inside if back else found).reshape(count, -1)

    def run(self, x: Array) -> Array:
        """The logits."""
        values = [x]
        for i, node in enumerate(self.nodes[1:], start=1):
            z = [values[j] for j in node["inputs"]]
            values.append(bend(node, z[0]) if node["op"] == "relu" else self.affine(i, z) + self.bias[i])
        return values[-1]


def bend(node: Json, z: Array) -> Array:
    """ReLU, or LeakyReLU with a slope in [0, 1] left of 0."""
    return np.maximum(z, node["left"] * z)


class Region:
    """`{x' : ||x' - x||_norm <= eps}` cut with the domain, in a box of which `low` and `high` are corners."""

    def __init__(self, x: Array, eps: float, norm: str, domain: list[float] | None) -> None:
        self.x, self.eps, self.norm = x, eps, norm
        least, most = domain or (-np.inf, np.inf)
        require(np.isfinite(x).all() and eps >= 0 and norm in ("inf", "2", "1"), "there is no such region")
        require(((x >= least) & (x <= most)).all(), f"the input lies outside the domain {domain}")
        self.low = np.clip(np.nextafter(x - eps, -np.inf), least, most)
        self.high = np.clip(np.nextafter(x + eps, np.inf), least, most)
        self.middle = (self.low + self.high) / 2
        self.radius = (self.high - self.low) / 2 + 8 * UNIT * (np.abs(self.low) + np.abs(self.high)) + TINY

    def least(self, rows: Array) -> tuple[Array, Array]:
        """A lower bound of `<row, x'>`, and how far rounding may be off."""
        size = np.abs(rows)
        farthest = np.abs(self.x) + np.abs(self.middle) + self.radius + 2 * self.eps
        error = gamma(2 * rows.shape[-1]) * dot(size + TINY, farthest)
        if self.norm == "inf":
            return dot(rows, self.middle) - dot(size, self.radius), error
        room = np.where(rows > 0, self.x - self.low, self.high - self.x)
        return dot(rows, self.x) - self.fall(size, room), error

    def fall(self, size: Array, room: Array) -> Array:
        """The most, or more, that `<size, step>` can be for a step in the ball and between 0 and `room`."""
        if self.norm == "1":  # the largest coefficients first
            order = np.argsort(-size, -1)
            size, room = (np.take_along_axis(value, order, -1) for value in (size, room))
            return (size * np.clip(self.eps - (room.cumsum(-1) - room), 0, room)).sum(-1)
        # Any multiplier m >= 0 yields such a bound. Squares of small sizes are 0: the largest counts as 1.
        scale = np.where(size.any(-1), size.max(-1), 1.0)[..., None]
        size = size / scale
        m = length(size) / max(self.eps, TINY)
        for _ in range(3):
            full = size > m * room
            left = np.maximum(self.eps**2 - length(room * full) ** 2, TINY)
            m = np.minimum(m, length(size * ~full) / np.sqrt(left))
        step = np.minimum(size / np.maximum(m, TINY), room)
        most = (size * step).sum(-1, keepdims=True) + m / 2 * (self.eps**2 - length(step) ** 2)
        return (scale * most)[..., 0]

    def holds(self, point: Array) -> bool:
        """Whether a point lies in the region, to within rounding."""
        step = np.abs(point - self.x)
        length = {"inf": step.max(), "2": np.sqrt(np.square(step).sum()), "1": step.sum()}[self.norm]
        inside = (self.low <= point) & (point <= self.high)
        return bool(inside.all() and length <= self.eps * (1 + 1e-12) + 1e-12)


class Reach:
    """How far the values of a network reach over a region.

    `boxes` hold what enters each ReLU; `size[i]` bounds the sizes of all that is added up in node i together.
    """

    def __init__(self, network: Network, region: Region) -> None:
        # Intervals in front of the first ReLU are those of the whole ball.
        self.network, self.region = network, Region(region.x, region.eps, region.norm, None)
        self.boxes: dict[int, tuple[Array, Array]] = {}
        self.size: dict[int, Array] = {}
        centre, radius, affine = [region.middle], [region.radius], {0}
        for i, node in enumerate(network.nodes[1:], start=1):
            c, r = ([values[j] for j in node["inputs"]] for values in (centre, radius))
            if node["op"] == "relu":
                self.size[i] = np.abs(c[0]) + r[0] + TINY
                wide = r[0] + 8 * UNIT * self.size[i]
                self.boxes[i] = c[0] - wide, c[0] + wide
                if region.norm != "inf" and node["inputs"][0] in affine:
                    self.narrow(i, np.arange(network.size[i]), {})
                low, high = (bend(node, side) for side in self.boxes[i])
                centre.append((low + high) / 2)
                radius.append((high - low) / 2 + 8 * UNIT * (np.abs(low) + np.abs(high)) + TINY)
            else:
                affine |= {i} if affine.issuperset(node["inputs"]) else set()
                largest = [np.abs(a) + b for a, b in zip(c, r, strict=True)]
                self.size[i] = network.affine(i, largest, absolute=True) + np.abs(network.bias[i]) + TINY
                centre.append(network.affine(i, c) + network.bias[i])
                wide = network.affine(i, r, absolute=True)
                radius.append(wide + 2 * gamma(network.terms[i]) * self.size[i])
        self.region = region

    def lower(self, end: int, rows: Array, lines: dict[int, Lines], push: Array | None = None) -> Array:
        """A lower bound of `<row, value of a node>` in real arithmetic, by one pass back to the input.

        Each step goes over to coefficients whose function is nowhere larger, so the bound holds for the
        numbers as they are. What rounding changed in them, times the size of what they multiply, is added
        up, and twice that is taken off. `push` is taken off the coefficients of every ReLU's input.
        """
        network, pending = self.network, {end: rows}
        total, error = np.zeros((1, 1)), np.zeros((1, 1))
        for i in range(end, 0, -1):
            if i not in pending:
                continue
            rows, node, largest = pending.pop(i), network.nodes[i], self.size[i]
            if node["op"] == "relu":
                low, low_at, high, high_at = lines[i]
                below = np.minimum(rows, 0)
                above = rows - below
                step = dot(above, low_at) + dot(below, high_at)
                parts = [above * low[:, None] + below * high[:, None]]
                largest = largest + np.abs(low_at) + np.abs(high_at)
                if push is not None:
                    away = push[:, None, network.part[i]]
                    parts = [parts[0] - away]
                    error = error + 4 * UNIT * dot(np.abs(away), self.size[i])
            else:
                step, parts = rows @ network.bias[i], network.transpose(i, rows)
            total = total + step
            error = error + 2 * UNIT * np.abs(total)
            error = error + gamma(network.terms[i]) * dot(np.abs(rows) + TINY, largest)
            for j, part in zip(node["inputs"], parts, strict=True):
                pending[j] = pending[j] + part if j in pending else part
        if 0 in pending:
            least, rounding = self.region.least(pending[0])
            total = total + least
            error = error + rounding + 2 * UNIT * np.abs(total)
        return total - 2 * error

    def narrow(self, i: int, neurons: Array, lines: dict[int, Lines]) -> None:
        """Bound some neurons of a ReLU, each by a pass of its own."""
        (source,), (low, high) = self.network.nodes[i]["inputs"], self.boxes[i]
        for some in (neurons[start : start + ROWS] for start in range(0, len(neurons), ROWS)):
            unit = (np.arange(low.shape[1]) == some[:, None])[None].astype(np.float64)
            least = self.lower(source, np.concatenate([unit, -unit], 1), lines)[0]
            low[0, some] = np.maximum(low[0, some], least[: len(some)])
            high[0, some] = np.minimum(high[0, some], -least[len(some) :])

    def constants(self) -> dict[int, Lines]:
        """Lines of slope 0 around every ReLU: with them a bound is that of intervals."""
        found = {}
        for i, box in self.boxes.items():
            low, high = (bend(self.network.nodes[i], side) for side in box)
            zero = np.zeros_like(low)
            found[i] = zero, low - 4 * UNIT * np.abs(low), zero, high + 4 * UNIT * np.abs(high)
        return found

    def around(self, rule: str) -> dict[int, Lines]:
        """Lines over all boxes."""
        return {i: around(self.network.nodes[i], *box, rule) for i, box in self.boxes.items()}

    def tighten(self, rule: str) -> None:
        """Bound every neuron of open sign by a pass of its own, one ReLU after the other."""
        lines: dict[int, Lines] = {}
        for i, (low, high) in list(self.boxes.items()):
            if (
                lines or self.region.norm != "inf"
            ):  # in front of the first ReLU, intervals are exact for a box
                self.narrow(i, np.flatnonzero((low[0] < 0) & (high[0] > 0)), lines)
            lines[i] = around(self.network.nodes[i], low, high, rule)

    def cells(self, rule: str, margins: Array, stored: dict[str, Array]) -> set[int]:
        """The classes over which the margin is positive in every cell of their tree.

        In a cell, what is pushed is not negative: so no point of it has a margin of 0 or less if the margin
        times a weight, less that, is positive all over the region. An empty cell is closed by a weight of 0.
        """
        network, found = self.network, leaves(stored["rivals"].tolist(), stored["splits"].tolist())
        slopes, weights = stored["slopes"].astype(np.float64), stored["weights"].astype(np.float64)
        starts = np.cumsum([0, *(1 + len(path) for _, path in found)])
        require(len(slopes) == len(found) and len(weights) == starts[-1], "slopes or multipliers are missing")
        usual = np.concatenate([lines[0] for lines in self.around(rule).values()], 1)
        failed = set[int]()
        for start in range(0, len(found), CELLS):
            numbers = range(start, min(start + CELLS, len(found)))
            low = np.repeat(usual, len(numbers), 0)
            low[:, stored["neurons"]] = slopes[numbers]
            signs, push, rows = np.zeros_like(low), np.zeros_like(low), []
            for k, number in enumerate(numbers):
                rival, path = found[number]
                weight, *multipliers = np.maximum(weights[starts[number] : starts[number + 1]], 0)
                rows.append(weight * margins[0, rival])
                for (neuron, side), multiplier in zip(path, multipliers, strict=True):
                    signs[k, neuron] = side
                    push[k, neuron] += side * multiplier
            lines = {}
            for i, box in self.boxes.items():
                part, node = network.part[i], network.nodes[i]
                below, zero, above, offset = around(node, *box, rule, low[:, part])
                is_free, exact = signs[:, part] == 0, np.where(signs[:, part] > 0, 1.0, node["left"])
                below, above = np.where(is_free, below, exact), np.where(is_free, above, exact)
                lines[i] = below, zero, above, np.where(is_free, offset, 0.0)
            least = self.lower(network.end, np.stack(rows)[:, None], lines, push)[:, 0]
            failed |= {
                found[n][0] for n, bound in zip(numbers, least, strict=True) if not FLOOR < bound < np.inf
            }
        return {rival for rival, _ in found} - failed


def around(node: Json, low: Array, high: Array, rule: str, slopes: Array | None = None) -> Lines:
    """Lines around a ReLU over a box: below through 0 with any slope in [left, 1], above the chord.

    With the rule "parallel", both have one slope. They hold for the rounded numbers that they are made of.
    """
    left, is_open = node["left"], (low < 0) & (high > 0)
    known = np.where(low >= 0, 1.0, np.where(high <= 0, left, np.nan))  # of a box of NaN nothing is known
    chord = np.clip(left + (1 - left) * (high / np.where(is_open, high - low, 1.0)), left, 1)
    if slopes is None:
        slopes = chord if rule == "parallel" else np.where(high > -low, 1.0, left)
    below = np.where(is_open, np.clip(slopes, left, 1), known)
    above = below if rule == "parallel" else np.where(is_open, chord, known)
    highest = np.maximum(left * low - above * low, high - above * high) + 8 * UNIT * (high - low)
    return below, np.zeros_like(highest), above, np.where(is_open, highest, 0.0)


def leaves(rivals: list[int], splits: list[int]) -> list[tuple[int, list[tuple[int, int]]]]:
    """The cells of each class's tree, as the class and the signs of neurons.

    A tree is written root first: the neuron that a cell is split at, its positive half, its negative half; -1
    where it is not split. So the cells of a tree that can be read to its end cover the region.
    """
    found, place = [], 0
    for rival in rivals:
        stack: list[list[tuple[int, int]]] = [[]]
        while stack:
            path = stack.pop()
            require(place < len(splits), "a tree of splits is cut off: its cells do not cover the region")
            neuron, place = splits[place], place + 1
            if neuron < 0:
                found.append((rival, path))
            else:
                stack += [[*path, (neuron, -1)], [*path, (neuron, 1)]]
    require(place == len(splits), "there are more splits than the trees have")
    return found


def check(
    network: Network, header: Json, claim: Json, x: Array, tensors: dict[str, Array], witness: Json
) -> None:
    """Check the claim on one example; a RejectedError, or another, if it is not accepted."""
    label, status, classes = claim["label"], claim["status"], network.size[-1]
    region = Region(x, header["eps"], header["norm"], header["domain"])
    require(is_class(label, classes) and status in STATUSES, f"there is no class {label!r}, or no {status!r}")
    require(
        (claim["predicted"] != label) is (status == "misclassified"), f"{status}, but taken for another class"
    )
    margin = margin_at(network, x, label, claim["predicted"])
    if status == "falsified":
        point = np.frombuffer(base64.b64decode(witness["float64"], validate=True), "<f8").reshape(x.shape)
        require(region.holds(point), "the witness lies outside the region")
        require(witness["predicted"] != label, "the witness does not change the answer")
        margin = margin_at(network, point, label, witness["predicted"])
    if status == "robust" and claim["proof"] is not None:
        bound = prove(network, region, label, claim["proof"]["rule"], tensors)
        require(claim["margin"] > 0, "the margin that is stated is not positive")
        margin = min(margin, bound)
    if status != "undecided":
        stated = f"a margin of {claim['margin']:.6g} is stated, but {margin:.6g} is found"
        require(claim["margin"] <= margin + LOOSE * (1 + abs(margin)), stated)


def margin_at(network: Network, point: Array, label: int, predicted: int) -> float:
    """The margin at a point where the network answers as it is said to, to within rounding."""
    logits = network.run(point)[0]
    require(is_class(predicted, len(logits)), f"there is no class {predicted!r}")
    least = logits.max() - 1e-9 * (1 + abs(logits.max()))  # of the largest: other classes may be masked
    require(logits[predicted] >= least, f"the network does not answer {predicted}, as is said")
    return float(logits[label] - np.delete(logits, label).max())


def is_class(number: Any, classes: int) -> bool:
    """Whether it is the number of a class, and not what NumPy would take for one."""
    return type(number) is int and 0 <= number < classes > 1


def prove(network: Network, region: Region, label: int, rule: str, tensors: dict[str, Array]) -> float:
    """Prove the margins over all other classes positive; the smallest of those that need no cells."""
    require(rule in RULES, f"there is no rule {rule!r}")
    boxes, slopes = RULES[rule]
    reach, unit = Reach(network, region), np.eye(network.size[-1])
    margins = unit[None, label] - unit[None]
    bound = reach.lower(network.end, margins, reach.constants())[0]
    if boxes == "linear":
        reach.tighten(slopes)
    if slopes:
        bound = np.maximum(bound, reach.lower(network.end, margins, reach.around(slopes))[0])
    proved = {label} | (reach.cells(slopes, margins, tensors) if tensors else set())
    open_ = [t for t in range(len(bound)) if t not in proved]
    for t in open_:
        require(
            FLOOR < bound[t] < np.inf, f"its margin over class {t} is only proved to exceed {bound[t]:.6g}"
        )
    return min([np.inf, *(float(bound[t]) for t in open_)])


def unpack(content: bytes) -> tuple[dict[str, Array], Json]:
    """The tensors and the JSON header of a safetensors file."""
    tensors, size = load(content), int.from_bytes(content[:8], "little")
    header = json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["header"])
    require(header["format"] == FORMAT, f"its format is {header['format']!r}, not {FORMAT}")
    return tensors, header


def contents(path: Path, digest: str) -> bytes:
    """A file's bytes, if they have the SHA-256 that is stated."""
    content = path.read_bytes()
    require(hashlib.sha256(content).hexdigest() == digest, f"{path.name} is not the file that was written")
    return content


class Batch:
    """A file of certificates, made for the same network, data and region as the verdicts."""

    def __init__(self, path: Path, digest: str, wanted: Json) -> None:
        self.tensors, self.header = unpack(contents(path, digest))
        for key in ("certificates", "eps", "norm", "domain", "data"):
            require(self.header[key] == wanted[key], f"{path.name} was made for another {key}")
        self.x = self.tensors["x"].astype(np.float64).reshape(len(self.tensors["x"]), -1)
        self.row = {claim["index"]: k for k, claim in enumerate(self.header["claims"])}

    def check(self, network: Network, record: Json) -> None:
        """Check a verdict."""
        k, start = self.row[record["index"]], f"{record['index']}/"
        claim = self.header["claims"][k]
        for key in CLAIM:
            require(claim[key] == record[key], f"{key}: the certificate says {claim[key]!r}")
        rule = claim["proof"] and claim["proof"]["rule"]
        require(record["certificate"]["proof"] == rule, "the certificate has another proof")
        stored = {name.removeprefix(start): v for name, v in self.tensors.items() if name.startswith(start)}
        check(network, self.header, claim, self.x[k : k + 1], stored, record["witness"])


def recheck(path: Path, content: bytes | None = None) -> Json:
    """Check every verdict of a file: counts, and why those that are not accepted are rejected.

    `content` is that of a file with a network, about which it is to be proved instead of the stored one.
    A ValueError says that it is no such file.
    """
    try:
        # A line that was cut off is none: its example has no verdict.
        header, *records = (json.loads(line) for line in path.read_text().split("\n") if line.endswith("}"))
        about, identity = header["certificates"], dict(header["identity"])
        require(header["format"] == "tightrope-certify/1", f"its format is {header['format']!r}")
        require("none" not in about, about.get("none"))
        folder, expected = path.parent / Path(about["folder"]).name, range(header["examples"])
        require(all(isinstance(record, dict) for record in records), "a line holds no verdict")
        stored = folder / "network.safetensors"
        require(content or stored.is_file(), f"the folder {folder.name}, which is to be beside it, has none")
    except (RejectedError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        reason = error if isinstance(error, RejectedError) else "damaged, or not from certify --certificates"
        raise ValueError(f"{path} holds no certificates ({reason})") from None
    counts, rejected = dict.fromkeys((*STATUSES, "without_certificate"), 0), list[Json]()
    network, batches, seen = None, dict[tuple[Path, str], Batch](), set[int]()
    for done, record in enumerate(records):
        try:
            index = record["index"]
            require(type(index) is int and index in expected, f"{index!r} is not the index of an example")
            require(index not in seen, "the example stands there twice")
            seen.add(index)
            network = network or Network(content or contents(stored, identity["certificates"]))
            key = folder / Path(record["certificate"]["file"]).name, record["certificate"]["sha256"]
            if key not in batches:
                batches = {key: Batch(*key, identity)}
            batches[key].check(network, record)
            unproved = record["status"] == "robust" and record["certificate"]["proof"] is None
            counts["without_certificate" if unproved else record["status"]] += 1
        except Exception as error:  # whatever it is, the claim was not checked
            said = isinstance(error, RejectedError | OSError)
            rejected.append({"index": record.get("index"), "reason": str(error) if said else repr(error)})
        if done % 100 == 99 or done == len(records) - 1:
            print(f"recheck: {done + 1} of {len(records)} examples", file=sys.stderr)
    reason = "it has no verdict: the file was cut off, or is not finished (certify --resume)"
    missing = sorted(set(expected) - seen)
    rejected += [{"index": i, "reason": reason} for i in missing]
    region = {key: identity.get(key) for key in ("eps", "norm", "domain")}
    accepted = sum(counts[status] for status in STATUSES)
    return {"examples": len(records), **region, "accepted": accepted, **counts, "rejected": rejected}


def summary(report: Json) -> str:
    """What to tell a reader."""
    found = [(entry["index"], entry["reason"]) for entry in report["rejected"]]
    lines = [f"rejected: {'all' if i is None else f'example {i}'}: {reason}" for i, reason in found]
    counts = ", ".join(f"{report[status]} {status}" for status in STATUSES)
    where = "eps {eps} in l_{norm}, inputs in {domain}".format(**report)
    lines.append(
        f"{where}: accepted {report['accepted']} of {report['examples']} ({counts}), rejected {len(lines)}"
    )
    if report["without_certificate"]:
        lines.append(f"NOT checked: {report['without_certificate']} robust verdicts without certificate")
    return "\n".join(lines)


def main() -> int:
    """The command line; 0 if no claim is rejected, 3 if one is, 2 if nothing can be checked."""
    parser = argparse.ArgumentParser(description="Recheck a file of tightrope certify --certificates.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--json", action="store_true", help="print a JSON object as the last line")
    options = parser.parse_args()
    try:
        report = recheck(options.file)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(summary(report), *([json.dumps(report)] if options.json else []), sep="\n")
    return 3 if report["rejected"] else 0


if __name__ == "__main__":
    sys.exit(main())

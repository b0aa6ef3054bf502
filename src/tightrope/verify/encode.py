"""A ReLU network over a region as linear constraints, with a 0/1 variable where a neuron needs one.

Every variable is scaled to `[-1, 1]` or `[0, 1]`: the input by how far it may move, and an unstable neuron,
whose input z lies in `[l, u]`, by its two parts: `z = u p + l n` (divided by the larger of u and -l, as a
constraint). Then `max(z, slope z) = u p + slope l n`, the triangle of Ehlers (2017) is `p + n <= 1`, and the
neuron itself is `p <= s, n <= 1 - s` with s in {0, 1}.
Everything else is an affine function of these variables and is written out, so that a stable neuron costs
neither a variable nor a constraint. Sources: seeds.md, section 5; maar.txt, A.3; Tjeng et al. 2019.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from scipy import sparse
from torch import Tensor
from torch.nn import functional as F

from tightrope.bounds.alpha import left_slope
from tightrope.bounds.base import Boxes
from tightrope.bounds.patches import is_plain
from tightrope.errors import InputError
from tightrope.graph import Graph
from tightrope.graph.ops import Affine, Conv, Kinked
from tightrope.region import Box, L1Ball, Region

NARROWEST = 1e-6  # an unstable neuron's box reaches this share of its larger side to the other one at least
ROWS = 512  # of an operator's matrix that are pulled back at once


@dataclass(frozen=True)
class Form:
    """Affine functions of variables: `matrix v + offset`."""

    matrix: sparse.csr_array
    offset: Float[ndarray, "values"]

    def __add__(self, other: Form) -> Form:
        return Form(self.matrix + other.matrix, self.offset + other.offset)

    def of(self, inner: Form) -> Form:
        """This form of the values of another one."""
        return Form(self.matrix @ inner.matrix, self.matrix @ inner.offset + self.offset)


Layers = dict[int, tuple[Form, ...]]
"""By node number of each affine operator, what it makes of each of its inputs; the first has its constant."""


def layers_of(graph: Graph) -> Layers:
    """The affine operators of a network as sparse matrices.

    Raises:
        InputError: if an activation is not ReLU or LeakyReLU; all of them are named.
    """
    unfit = [
        f"{type(node.op).__name__} ({node.name})"
        for _, node in graph.activations()
        if not isinstance(node.op, Kinked)
    ]
    if unfit:
        raise InputError(
            f"the verifier milp encodes ReLU and LeakyReLU, this network has {', '.join(unfit)}: "
            "use the verifier cascade"
        )
    return {
        i: _forms(node.op, [graph.nodes[j].shape for j in node.inputs])
        for i, node in enumerate(graph.nodes)
        if isinstance(node.op, Affine)
    }


def _forms(op: Affine, shapes: Sequence[torch.Size]) -> tuple[Form, ...]:
    constant = op.apply(*[torch.zeros(1, *shape, dtype=torch.float64) for shape in shapes])
    out = constant.shape[1:]
    matrices = [_convolution(op, shapes[0])] if is_plain(op) else _pulled_back(op, shapes, out)
    offsets = [constant.flatten().numpy(), *[np.zeros(constant.numel())] * (len(shapes) - 1)]
    return tuple(map(Form, matrices, offsets))


def _pulled_back(op: Affine, shapes: Sequence[torch.Size], out: torch.Size) -> list[sparse.csr_array]:
    """The matrices of any affine operator, row by row: to push columns would lose digits to the constant."""
    size = out.numel()
    parts: list[list[sparse.csr_array]] = [[] for _ in shapes]
    for numbers in torch.arange(size).split(ROWS):
        rows = torch.zeros(len(numbers), size, dtype=torch.float64).scatter_(1, numbers.unsqueeze(1), 1.0)
        pulled = op.transpose(rows.view(1, len(numbers), *out), shapes)
        for part, found in zip(pulled, parts, strict=True):
            found.append(sparse.csr_array(part.flatten(2)[0].numpy()))
    return [sparse.vstack(part, "csr") for part in parts]


def _convolution(op: Conv, shape: torch.Size) -> sparse.csr_array:
    """The matrix of a plain convolution: cutting out numbers of entries says which of them it reads."""
    weight, (stride, padding, dilation) = op.weight(), op.geometry()
    numbers = torch.arange(1, 1 + shape.numel(), dtype=torch.float64).view(1, *shape)
    read = F.unfold(numbers, weight.shape[2:], dilation, padding, stride)[0].long() - 1
    values = weight.flatten(1).unsqueeze(2).expand(-1, *read.shape)
    rows = torch.arange(len(weight) * read.shape[1]).view(len(weight), 1, -1).expand_as(values)
    inside = (values != 0) & (read >= 0)  # zeros that the convolution pads with have no number
    entries = values[inside].numpy(), (rows[inside].numpy(), read.expand_as(values)[inside].numpy())
    return sparse.csr_array(entries, (len(weight) * read.shape[1], shape.numel()))


@dataclass(frozen=True)
class Neurons:
    """Unstable neurons, and their variables.

    Args:
        node: node number of each one's activation.
        place: its number in there.
        lower: lower bound l of its input.
        upper: upper bound u.
        gap: by how much the triangle may exceed it.
        positive: number of its variable p.
        negative: number of its variable n.
    """

    node: Int[ndarray, "neurons"]
    place: Int[ndarray, "neurons"]
    lower: Float[ndarray, "neurons"]
    upper: Float[ndarray, "neurons"]
    gap: Float[ndarray, "neurons"]
    positive: Int[ndarray, "neurons"]
    negative: Int[ndarray, "neurons"]

    def __len__(self) -> int:
        return len(self.node)

    def of(self, node: int) -> Neurons:
        """Those of one activation."""
        own = self.node == node
        return Neurons(*(column[own] for column in vars(self).values()))

    def parts(self, shape: tuple[int, int], slope: float) -> sparse.csr_array:
        """`u p + slope l n` in the rows of a layer that belong to these neurons."""
        return _entries(shape, self.place, (self.positive, self.upper), (self.negative, slope * self.lower))


@dataclass(frozen=True)
class Encoding:
    """`least <= matrix v <= most` and `lower <= v <= upper`, for a network over a region around one input.

    Args:
        matrix: a row for each constraint.
        least: what it is at least.
        most: what it is at most.
        lower: lower bounds of the variables.
        upper: upper bounds.
        binary: which variables are 0 or 1.
        input: the network's input.
        output: its logits.
        neurons: the unstable ones.
    """

    matrix: sparse.csr_array
    least: Float[ndarray, "rows"]
    most: Float[ndarray, "rows"]
    lower: Float[ndarray, "variables"]
    upper: Float[ndarray, "variables"]
    binary: Bool[ndarray, "variables"]
    input: Form
    output: Form
    neurons: Neurons

    def point(self, variables: Float[ndarray, "variables"]) -> Float[ndarray, "inputs"]:
        """The network's input for some values of the variables."""
        point: ndarray = self.input.matrix @ variables + self.input.offset
        return point

    def switched(self, chosen: Int[ndarray, "chosen"]) -> Encoding:
        """The same with a 0/1 variable s for some of the unstable neurons: `p <= s` and `n <= 1 - s`."""
        count, width = len(chosen), self.matrix.shape[1]
        ones, lines = np.ones(count), np.arange(count)

        def pick(columns: Int[ndarray, "chosen"]) -> sparse.csr_array:
            return sparse.csr_array((ones, (lines, columns)), (count, width))

        unit = sparse.eye_array(count)
        rows = sparse.block_array(
            [
                [self.matrix, None],
                [pick(self.neurons.positive[chosen]), -unit],
                [pick(self.neurons.negative[chosen]), unit],
            ],
            format="csr",
        )
        return replace(
            self,
            matrix=rows,
            least=np.concatenate([self.least, np.full(2 * count, -np.inf)]),
            most=np.concatenate([self.most, 0 * ones, ones]),
            lower=np.concatenate([self.lower, 0 * ones]),
            upper=np.concatenate([self.upper, ones]),
            binary=np.concatenate([self.binary, ones > 0]),
            input=_widened(self.input, count),
            output=_widened(self.output, count),
        )


def encode(
    graph: Graph, layers: Layers, x: Float[Tensor, "1 *shape"], region: Region, boxes: Boxes
) -> Encoding:
    """The triangle relaxation of a network over a region around one input.

    Args:
        graph: the network, at fixed statistics and in float64.
        layers: its `layers_of`.
        x: the input.
        region: where it may move.
        boxes: of the activations' inputs over that region; finite.

    Raises:
        InputError: if the region is neither an l_inf nor an l_1 ball.
    """
    check_linear(region)
    start, lower, ball = _start(x, region)
    neurons = _neurons(graph, boxes, first=len(lower))
    count = len(neurons)
    forms, parts = {0: _widened(start, 2 * count)}, list[Form]()
    for i, node in enumerate(graph.nodes[1:], start=1):
        inputs = [forms[j] for j in node.inputs]
        if i in layers:
            forms[i] = reduce(Form.__add__, map(Form.of, layers[i], inputs))
            continue
        (z,), (low, _), own = inputs, _flat(boxes[i]), neurons.of(i)
        slope = left_slope(graph, i)
        kept = np.where(low >= 0, 1.0, slope)
        kept[own.place] = 0
        bent = own.parts(z.matrix.shape, slope)
        forms[i] = Form(sparse.diags_array(kept) @ z.matrix + bent, kept * z.offset)
        forms[i].matrix.eliminate_zeros()  # of dead neurons: what reads them costs nothing
        split = own.parts(z.matrix.shape, 1.0) - z.matrix
        # Tolerances are absolute: what is off by one is off by the same share of every neuron's box.
        shrunk = sparse.diags_array(1 / np.maximum(-own.lower, own.upper))
        parts.append(Form(shrunk @ split[own.place], shrunk @ z.offset[own.place]))
    lines = np.arange(count)
    triangle = _entries(
        (count, len(lower) + 2 * count), lines, (neurons.positive, 1.0), (neurons.negative, 1.0)
    )
    values = np.concatenate([np.zeros(0), *(part.offset for part in parts)])
    free = np.full(ball.shape[0], -np.inf), np.full(count, -np.inf)
    rows = [_widen(ball, 2 * count), *(part.matrix for part in parts), triangle]
    return Encoding(
        matrix=sparse.vstack(rows, "csr"),
        least=np.concatenate([free[0], values, free[1]]),
        most=np.concatenate([np.ones(ball.shape[0]), values, np.ones(count)]),
        lower=np.concatenate([lower, np.zeros(2 * count)]),
        upper=np.ones(len(lower) + 2 * count),
        binary=np.zeros(len(lower) + 2 * count, bool),
        input=forms[0],
        output=forms[len(graph.nodes) - 1],
        neurons=neurons,
    )


def _neurons(graph: Graph, boxes: Boxes, first: int) -> Neurons:
    """The unstable neurons, whose variables begin with a given number."""
    none = np.zeros(0)
    columns = [(none.astype(int), none.astype(int), none, none, none)]
    for i, box in boxes.items():
        low, up = _flat(box)
        places = ((low < 0) & (up > 0)).nonzero()[0]
        low, up = low[places], up[places]
        side = NARROWEST * np.maximum(-low, up)
        low, up = np.minimum(low, -side), np.maximum(up, side)
        gap = (1 - left_slope(graph, i)) * up * low / (low - up)
        columns.append((np.full(len(places), i), places, low, up, gap))
    node, place, low, up, gap = map(np.concatenate, zip(*columns, strict=True))
    positive = first + np.arange(len(node))
    return Neurons(node, place, low, up, gap, positive, positive + len(node))


def _start(
    x: Float[Tensor, "1 *shape"], region: Region
) -> tuple[Form, Float[ndarray, "variables"], sparse.csr_array]:
    """The input by its variables, their lower bounds (the upper ones are 1), and rows that are at most 1."""
    lower, upper = (corner.flatten().numpy() for corner in region.corners(x))
    if isinstance(region, Box):
        form = Form(sparse.diags_array((upper - lower) / 2, format="csr"), (lower + upper) / 2)
        return form, np.full(len(lower), -1.0), sparse.csr_array((0, len(lower)))
    if isinstance(region, L1Ball):  # one variable for each way that an entry may move
        centre = x.flatten().numpy()
        ways = np.concatenate([upper - centre, lower - centre])
        both = sparse.hstack([sparse.diags_array(way) for way in np.split(ways, 2)], "csr")
        eps = float(torch.as_tensor(region.eps))
        shares = np.abs(ways) / eps if eps else 0 * ways
        return Form(both, centre), np.zeros(len(ways)), sparse.csr_array(shares[None])
    raise AssertionError(region.norm)


def check_linear(region: Region) -> None:
    """Refuse a region that no linear constraints describe.

    Raises:
        InputError: if it is neither an l_inf nor an l_1 ball.
    """
    if not isinstance(region, Box | L1Ball):
        raise InputError(
            f"the verifier milp takes l_inf and l_1 balls, this region is an l_{region.norm} ball, whose "
            "edge is not linear: use the verifier cascade"
        )


def _flat(box: tuple[Tensor, Tensor]) -> tuple[Float[ndarray, "neurons"], Float[ndarray, "neurons"]]:
    lower, upper = box
    return lower.flatten().numpy(), upper.flatten().numpy()


def _entries(
    shape: tuple[int, int], rows: Int[ndarray, "rows"], *entries: tuple[ndarray, ndarray | float]
) -> sparse.csr_array:
    """A matrix with entries in some of its rows: for each of them a column and a value, or several."""
    parts = [
        sparse.csr_array((np.broadcast_to(values, rows.shape), (rows, columns)), shape)
        for columns, values in entries
    ]
    return reduce(add, parts)


def _widened(form: Form, more: int) -> Form:
    """The same functions of more variables, which they do not depend on."""
    return replace(form, matrix=_widen(form.matrix, more))


def _widen(matrix: sparse.csr_array, more: int) -> sparse.csr_array:
    rows, columns = matrix.shape
    return sparse.csr_array((matrix.data, matrix.indices, matrix.indptr), (rows, columns + more))

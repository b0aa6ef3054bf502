"""Backward passes from the neurons of a convolution: their coefficients fill a small window, a patch.

All channels of one location look at the same windows of the layers before. So a location of an example is
to patches what an example is to whole values: its windows of slopes are cut out once for all its neurons.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import TypeGuard

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from tightrope.bounds.relax import Slopes, Step
from tightrope.graph import Graph
from tightrope.graph.ops import BatchNorm, Conv, Dropout, Identity, Operator, Scale, Shift, spread
from tightrope.region import Region

Pair = tuple[int, int]
NARROW = 8
"""Input channels up to which `spread` beats `conv_transpose2d` on windows."""


@dataclass(frozen=True)
class Window:
    """What a neuron depends on: per axis, `size` entries from `stride * location + start` on."""

    size: Pair = (1, 1)
    stride: Pair = (1, 1)
    start: Pair = (0, 0)

    def before(self, conv: Conv) -> Window:
        """The window in the convolution's input, where this one is in its output."""
        axes = zip(*astuple(self), conv.weight().shape[2:], *conv.geometry(), strict=True)
        size, stride, start = zip(
            *(((n - 1) * s + d * (k - 1) + 1, a * s, b * s - p) for n, a, b, k, s, p, d in axes), strict=True
        )
        return Window(size, stride, start)


@dataclass(frozen=True)
class Windows:
    """Where the windows of all locations of all examples lie in a value.

    Args:
        size: height and width of a window.
        padding: by how much windows stick out of the value: left, right, top, bottom.
        corners: number of the first pixel of each location's window.
        offsets: from there to each of the window's pixels.
    """

    size: Pair
    padding: tuple[int, int, int, int]
    corners: Int[Tensor, "locations"]
    offsets: Int[Tensor, "window"]

    @classmethod
    def of(
        cls, window: Window, grid: Sequence[int], value: Float[Tensor, "batch channels height width"]
    ) -> Windows:
        """The windows that a grid of neurons has in a value."""
        axes = zip(*astuple(window), grid, value.shape[2:], strict=True)
        (top, bottom), (left, right) = ((-b, max(0, (g - 1) * a + b + n - size)) for n, a, b, g, size in axes)
        height, width = value.shape[2] + top + bottom, value.shape[3] + left + right

        def steps(count: int, by: int) -> Tensor:
            return by * torch.arange(count, device=value.device)

        def pixels(lines: Tensor, columns: Tensor) -> Tensor:
            numbers: Tensor = lines.unsqueeze(-1) * width + columns
            return numbers.flatten()

        lines = steps(len(value), height).unsqueeze(1) + steps(grid[0], window.stride[0])
        corners = pixels(lines, steps(grid[1], window.stride[1]))
        offsets = pixels(steps(window.size[0], 1), steps(window.size[1], 1))
        return cls(window.size, (left, right, top, bottom), corners, offsets)

    def pixels(self, value: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "pixels channels"]:
        """The value with zeros around it and the channels of each pixel side by side."""
        padded: Tensor = F.pad(value, self.padding)
        return padded.permute(0, 2, 3, 1).flatten(0, 2)

    def cut(
        self, pixels: Float[Tensor, "pixels channels"], locations: Int[Tensor, "chosen"]
    ) -> Float[Tensor, "chosen height width channels"]:
        """The windows of some locations."""
        index = self.corners[locations].unsqueeze(1) + self.offsets
        return pixels.index_select(0, index.flatten()).view(len(locations), *self.size, -1)


@dataclass(frozen=True)
class CutSlopes:
    """Slopes laid out for being cut into windows; zero where a window sticks out of the value."""

    windows: Windows
    laid_out: Slopes

    @classmethod
    def of(cls, slopes: Slopes, windows: Windows) -> CutSlopes:
        """The slopes, laid out."""
        return cls(windows, slopes.map(windows.pixels))

    def at(self, locations: Int[Tensor, "chosen"]) -> Slopes:
        """The slopes in the windows of some locations."""
        return self.laid_out.map(lambda pixels: self.windows.cut(pixels, locations))


@dataclass(frozen=True)
class Patches:
    """The way from the neurons of a convolution back to the input, window by window.

    Args:
        locations: locations of one example.
        width: coefficients that a neuron has at most in one layer.
        region: where each input may move.
        mirrored: whether all lines are parallel, so that one pass serves the neurons and the neurons negated.
        steps: the convolution and what lies before it.
        windows: those of the network's input.
        pixels: the inputs, laid out.
        inside: 1 for every pixel of an input, 0 around it.
    """

    locations: int
    width: int
    region: Region
    mirrored: bool
    steps: tuple[Conv | CutSlopes, ...]
    windows: Windows
    pixels: Float[Tensor, "pixels channels"]
    inside: Float[Tensor, "pixels channels"]

    @classmethod
    def to(
        cls,
        graph: Graph,
        x: Float[Tensor, "batch *shape"],
        region: Region,
        node: int,
        seen: Mapping[int, Step],
        mirrored: bool,
    ) -> Patches | None:
        """The way to a node, or None where there is none or whole rows would be smaller.

        There is one if all that comes before is 2d convolutions, without groups and copied padding, each
        followed by functions of single entries.

        Args:
            graph: the network at fixed statistics.
            x: inputs.
            region: where each input may move.
            node: whose neurons are meant.
            seen: every activation before the node, seen from one path through the network.
            mirrored: whether all their lines are parallel.
        """
        grid, window, windows = graph.nodes[node].shape[1:], Window(), None
        steps: list[Conv | CutSlopes] = []
        width, patches, whole, i = 0, 0, 0, node
        while i > 0:
            op, inputs = graph.nodes[i].op, graph.nodes[i].inputs
            value = x.new_ones(len(x), *graph.nodes[inputs[0]].shape)
            if is_plain(op) and not (steps and isinstance(steps[-1], Conv)):
                steps.append(op)
                window = window.before(op)
                windows = Windows.of(window, grid, value)
                size = len(windows.offsets) * value.shape[1]
                width, patches, whole = max(width, size), patches + size, whole + value[0].numel()
            elif windows is not None and (slopes := _slopes(op, seen.get(i), value)):
                steps.append(CutSlopes.of(slopes, windows))
            elif not isinstance(op, Identity | Dropout):
                return None
            i = inputs[0]
        if windows is None or patches >= whole:
            return None
        image, inside = windows.pixels(x), windows.pixels(torch.ones_like(x))
        return cls(grid.numel(), width, region, mirrored, tuple(steps), windows, image, inside)

    def lower_bound(
        self, locations: Int[Tensor, "chosen"], channels: Int[Tensor, "chosen count"]
    ) -> Float[Tensor, "chosen rows"]:
        """Lower bounds of the neurons in some channels of some locations, and then of the neurons negated.

        Counted from where the path ends.
        """
        first, *steps = self.steps
        assert isinstance(first, Conv)
        weight = _window_of(first)
        bound = weight.new_zeros(len(channels), 2 * channels.shape[1])
        if not self.mirrored:
            channels, weight = torch.cat([channels, channels + len(weight)], 1), torch.cat([weight, -weight])
        rows = F.embedding(channels, weight.flatten(1)).unflatten(2, weight.shape[1:])
        for step in steps:
            if isinstance(step, Conv):
                rows = _transpose(step, rows)
            else:
                rows, offset = pull(step.at(locations), rows, self.mirrored)
                bound = bound + offset
        region = self.region.at(locations // self.locations)
        if any(self.windows.padding):
            rows = rows * self.windows.cut(self.inside, locations).unsqueeze(1)
        return bound + descend(region, self.windows.cut(self.pixels, locations), rows, self.mirrored)


def pull(
    step: Step, rows: Float[Tensor, "batch rows *out"], mirrored: bool
) -> tuple[Float[Tensor, "batch rows *in"], Float[Tensor, "batch bounds"]]:
    """Pull rows through an activation; if mirrored, with the offsets of the rows negated after theirs."""
    if not mirrored:
        return step.pull(rows)
    assert isinstance(step, Slopes)
    return step.pull_mirrored(rows)


def descend(
    region: Region, x: Float[Tensor, "batch *shape"], rows: Float[Tensor, "batch rows *shape"], mirrored: bool
) -> Float[Tensor, "batch bounds"]:
    """The smallest `<row, x' - middle>`; if mirrored, those of the rows negated after them."""
    least = region.descend(x, rows)
    return torch.cat([least, region.descend(x, -rows)], 1) if mirrored else least


def is_plain(op: Operator | None) -> TypeGuard[Conv]:
    """Whether it is a 2d convolution without groups, which pads with nothing but zeros on both sides."""
    return (
        isinstance(op, Conv)
        and op.weight().ndim == 4
        and op.groups == 1
        and not op.pad
        and not isinstance(op.padding, str)
    )


def _slopes(op: Operator | None, step: Step | None, ones: Tensor) -> Slopes | None:
    """The slopes of a function of single entries, if it is one."""
    if isinstance(step, Slopes):
        return step
    if not isinstance(op, BatchNorm | Scale | Shift) or op.apply(ones).shape != ones.shape:
        return None
    slope = op.transpose(ones.unsqueeze(1), [ones.shape[1:]])[0].squeeze(1)
    return Slopes(slope, slope, torch.zeros_like(ones))


def _window_of(conv: Conv) -> Float[Tensor, "channels height width less"]:
    """A convolution's weight with zeros between its dilated taps."""
    weight, (_, _, dilation) = conv.weight().permute(0, 2, 3, 1), conv.geometry()
    if dilation == (1, 1):
        return weight
    height, width = (d * (k - 1) + 1 for d, k in zip(dilation, weight.shape[1:3], strict=True))
    window = weight.new_zeros(len(weight), height, width, weight.shape[3])
    window[:, :: dilation[0], :: dilation[1]] = weight
    return window


def _transpose(
    conv: Conv, rows: Float[Tensor, "chosen rows height width channels"]
) -> Float[Tensor, "chosen rows taller wider less"]:
    """As `Conv.transpose`, for windows: nothing is cut off at their edges, and channels come last."""
    weight, (stride, _, dilation) = conv.weight(), conv.geometry()
    flat = rows.flatten(0, 1)
    if weight.shape[1] <= NARROW:
        pulled = spread(flat, weight, stride, dilation)
    else:
        channels_first = flat.permute(0, 3, 1, 2)
        pulled = F.conv_transpose2d(channels_first, weight, None, stride, dilation=dilation)
        pulled = pulled.permute(0, 2, 3, 1)
    whole: Tensor = pulled.unflatten(0, rows.shape[:2])
    return whole

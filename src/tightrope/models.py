"""The networks of the papers, as data: one row of a table per network, and one builder.

A row names the hidden layers; every layer is followed by a ReLU, and the builder adds the last linear
layer. A chain's name with `-bn` after it is the same network with BatchNorm before every ReLU.

To add a network: one row in `_TABLE`, one row in the tests.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tightrope.errors import InputError

Shape = tuple[int, ...]


class Normalise(nn.Module):
    """`(x - mean) / std` per channel, as the network's first operator, so that eps stays in pixel units.

    Args:
        mean: one number per channel, or one for all, in pixel units.
        std: likewise, positive.
        dims: how many dimensions an input has: 3 for an image, 1 for a vector.

    Raises:
        InputError: if a number is not finite, or `std` is not positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float], dims: int = 3) -> None:
        super().__init__()
        if not all(map(math.isfinite, (*mean, *std))) or min(std) <= 0:
            raise InputError(
                f"normalisation needs finite means and positive deviations, got {mean} and {std}"
            )
        shape = (-1, *[1] * (dims - 1))
        self.register_buffer("mean", torch.tensor([float(m) for m in mean]).view(shape))
        self.register_buffer("std", torch.tensor([float(s) for s in std]).view(shape))

    def forward(self, x: Tensor) -> Tensor:
        """The normalised batch, of the same shape."""
        return (x - self.mean) / self.std


class ResidualBlock(nn.Module):
    """Two convolutions, a ReLU between them, beside a linear skip: Wong & Kolter's block up to its last ReLU.

    Args:
        before: channels of the input.
        channels: channels of the output.
        halve: whether the block halves the image (kernel 4 and stride 2) or keeps it (3 and 1).
    """

    def __init__(self, before: int, channels: int, halve: bool) -> None:
        super().__init__()
        kernel, stride, skip = (4, 2, 2) if halve else (3, 1, 1)
        self.first = nn.Conv2d(before, channels, kernel, stride, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        self.skip = nn.Conv2d(before, channels, skip, stride)

    def forward(self, x: Tensor) -> Tensor:
        """The sum of both branches."""
        deep: Tensor = self.second(torch.relu(self.first(x)))
        skipped: Tensor = self.skip(x)
        return deep + skipped


@dataclass(frozen=True)
class Conv:
    """A convolution with bias."""

    channels: int
    kernel: int
    stride: int
    padding: int

    def __str__(self) -> str:
        return f"Conv({self.channels},{self.kernel},{self.stride},{self.padding})"

    def output(self, shape: Shape) -> Shape:
        """Shape of its output; a side below 1 means that the image is too small."""
        return self.channels, *((d + 2 * self.padding - self.kernel) // self.stride + 1 for d in shape[1:])

    def module(self, shape: Shape) -> nn.Module:
        """The layer for inputs of that shape."""
        return nn.Conv2d(shape[0], self.channels, self.kernel, self.stride, self.padding)


@dataclass(frozen=True)
class Residual:
    """A `ResidualBlock`."""

    channels: int
    halve: bool = False

    def __str__(self) -> str:
        return f"Residual({self.channels}{',halve' if self.halve else ''})"

    def output(self, shape: Shape) -> Shape:
        """Shape of its output; a side below 1 means that the image is too small."""
        return self.channels, *(d // 2 if self.halve else d for d in shape[1:])

    def module(self, shape: Shape) -> nn.Module:
        """The layer for inputs of that shape."""
        return ResidualBlock(shape[0], self.channels, self.halve)


@dataclass(frozen=True)
class Fc:
    """A linear layer with bias, on flattened inputs."""

    features: int

    def __str__(self) -> str:
        return f"FC{self.features}"

    def output(self, _shape: Shape) -> Shape:
        """Shape of its output."""
        return (self.features,)

    def module(self, shape: Shape) -> nn.Module:
        """The layer for inputs of that shape."""
        return nn.Linear(shape[0], self.features)


Layer = Conv | Residual | Fc


@dataclass(frozen=True)
class Network:
    """A row of the table: where the network comes from, and its hidden layers."""

    source: str
    layers: tuple[Layer, ...]
    batch_norm: bool = False

    @property
    def is_chain(self) -> bool:
        """Whether every layer reads only the one before."""
        return not any(isinstance(layer, Residual) for layer in self.layers)


# --------------------------------------------------------------------------------------- the table


def _padded(network: Network) -> Network:
    layers = (replace(layer, padding=1) if isinstance(layer, Conv) else layer for layer in network.layers)
    return Network(f"{network.source}, padding 1", tuple(layers))


def _crown2(source: str, width: int, features: int) -> Network:
    return Network(source, (Conv(4 * width, 4, 2, 1), Conv(8 * width, 4, 2, 1), Fc(features)))


def _crown3(source: str, kernel: int, width: int, features: int) -> Network:
    first, second = Conv(4 * width, kernel, 1, 1), Conv(8 * width, kernel, 1, 1)
    return Network(source, (first, second, Conv(8 * width, 4, 4, 0), Fc(features)))


def _crown4(source: str, width: int, features: int) -> Network:
    first = Conv(4 * width, 3, 1, 1), Conv(4 * width, 4, 2, 1)
    second = Conv(8 * width, 3, 1, 1), Conv(8 * width, 4, 2, 1)
    return Network(source, (*first, *second, Fc(features), Fc(features)))


_DM = {
    "dm-small": Network("Gowal et al. small", (Conv(16, 4, 2, 0), Conv(32, 4, 1, 0), Fc(100))),
    "dm-medium": Network(
        "Gowal et al. medium",
        (Conv(32, 3, 1, 0), Conv(32, 4, 2, 0), Conv(64, 3, 1, 0), Conv(64, 4, 2, 0), Fc(512), Fc(512)),
    ),
    "dm-large": Network(
        "Gowal et al. large",
        (
            Conv(64, 3, 1, 0),
            Conv(64, 3, 1, 0),
            Conv(128, 3, 2, 0),
            Conv(128, 3, 1, 0),
            Conv(128, 3, 1, 0),
            Fc(512),
        ),
    ),
}

_SMALL = "CROWN-IBP small, MNIST"
_LARGE = "CROWN-IBP large, MNIST"
_CIFAR = "CROWN-IBP large, CIFAR-10"

_TABLE: dict[str, Network] = {
    "digits-cnn": Network("for 8x8 images", (Conv(16, 3, 1, 1), Conv(32, 3, 2, 1), Fc(100))),
    "2x100": Network("Wong & Kolter", (Fc(100), Fc(100))),
    "small": Network("Wong & Kolter", (Conv(16, 4, 2, 1), Conv(32, 4, 2, 1), Fc(100))),
    "large": Network(
        "Wong & Kolter",
        (Conv(32, 3, 1, 1), Conv(32, 4, 2, 1), Conv(64, 3, 1, 1), Conv(64, 4, 2, 1), Fc(512), Fc(512)),
    ),
    "resnet": Network(
        "Wong & Kolter, N = 1, factor 1",
        (
            Conv(16, 3, 1, 1),
            Residual(16),
            Residual(16),
            Residual(32, halve=True),
            Residual(64, halve=True),
            Fc(1000),
        ),
    ),
    **_DM,
    **{f"{name}-pad1": _padded(network) for name, network in _DM.items()},
    "cnn5": Network("CTBench cnn_5layer", (Conv(16, 3, 1, 1), Conv(16, 4, 2, 1), Conv(32, 4, 2, 1), Fc(512))),
    "cnn7": Network(
        "Shi et al. CNN7",
        (
            Conv(64, 3, 1, 1),
            Conv(64, 3, 1, 1),
            Conv(128, 3, 2, 1),
            Conv(128, 3, 1, 1),
            Conv(128, 3, 1, 1),
            Fc(512),
        ),
    ),
    "convmed": Network("COLT ConvMed(2,2,100)", (Conv(32, 5, 2, 2), Conv(64, 4, 2, 1), Fc(100))),
    "convmed-2-4-250": Network("COLT ConvMed(2,4,250)", (Conv(32, 5, 2, 2), Conv(128, 4, 2, 1), Fc(250))),
    "convmedbig": Network(
        "COLT ConvMedBig(2,2,4,250)", (Conv(32, 3, 1, 1), Conv(32, 4, 2, 1), Conv(128, 4, 2, 1), Fc(250))
    ),
    "crown-small-a": _crown2(_SMALL, 1, 128),
    "crown-small-b": _crown2(_SMALL, 2, 256),
    "crown-small-c": _crown3(_SMALL, 3, 1, 64),
    "crown-small-d": _crown3(_SMALL, 3, 2, 128),
    "crown-small-e": _crown3(_SMALL, 5, 1, 64),
    "crown-small-f": _crown3(_SMALL, 5, 2, 128),
    "crown-small-g": _crown4(_SMALL, 1, 256),
    "crown-small-h": _crown4(_SMALL, 2, 256),
    "crown-small-i": _crown4(_SMALL, 1, 512),
    "crown-small-j": _crown4(_SMALL, 2, 512),
    "crown-large-1": _crown4(_LARGE, 4, 512),
    "crown-large-2": _crown4(_LARGE, 4, 512),  # its configuration lists the same network twice
    "crown-large-3": _crown4(_LARGE, 8, 512),
    "crown-large-4": _crown4(_LARGE, 16, 512),
    "crown-large-5": _crown3(_LARGE, 5, 16, 512),
    "crown-large-6": _crown3(_LARGE, 5, 8, 512),
    "crown-large-7": _crown3(_LARGE, 5, 4, 512),
    "crown-large-8": _crown3(_LARGE, 3, 8, 512),
    "crown-cifar-large-1": _crown2(_CIFAR, 8, 128),
    "crown-cifar-large-2": _crown2(_CIFAR, 16, 256),
    "crown-cifar-large-3": _crown4(_CIFAR, 8, 256),
    "crown-cifar-large-4": _crown4(_CIFAR, 16, 256),
    "crown-cifar-large-5": _crown4(_CIFAR, 8, 512),
    "crown-cifar-large-6": _crown4(_CIFAR, 16, 512),
    "crown-cifar-large-7": _crown3(_CIFAR, 3, 8, 256),
    "crown-cifar-large-8": _crown3(_CIFAR, 3, 16, 512),
}


# -------------------------------------------------------------------------------------- the builder


def names() -> list[str]:
    """Every network's name, in the order of the table; each chain also exists with `-bn` after its name."""
    return list(_TABLE)


def describe(name: str) -> str:
    """A network in one line: its source and hidden layers, `Conv(channels,kernel,stride,padding)` and `FCn`.

    Raises:
        InputError: if there is no such network.

    Example:
        >>> describe("dm-small")
        'Gowal et al. small: Conv(16,4,2,0) Conv(32,4,1,0) FC100'
    """
    network = _find(name)
    norm = " (BatchNorm before each ReLU)" if network.batch_norm else ""
    return f"{network.source}: {' '.join(map(str, network.layers))}{norm}"


def build(
    name: str,
    input_shape: Sequence[int],
    classes: int,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Sequential:
    """A network of the table, with torch's default initialisation, for inputs with pixels in [0, 1].

    Args:
        name: one of `names()`, or a chain's name with `-bn` after it.
        input_shape: shape of one input, without the batch: `(channels, height, width)`, or for an MLP any.
        classes: number of logits.
        mean: per channel, or one for all, in pixel units; with `std`, the network begins by normalising.
        std: likewise.

    Raises:
        InputError: if there is no such network, it does not fit the inputs, or a number makes no sense.

    Example:
        >>> sum(p.numel() for p in build("small", (1, 28, 28), 10).parameters())
        166406
    """
    network = _find(name)
    shape = tuple(input_shape)
    if not shape or min(shape) < 1:
        raise InputError(f"a network needs inputs of at least one number, got the input shape {shape}")
    if classes < 2:
        raise InputError(f"a classifier needs at least two classes, got {classes}")
    if not isinstance(network.layers[0], Fc) and len(shape) != 3:
        raise InputError(
            f"'{name}' is convolutional and takes images (channels, height, width), "
            f"got inputs of shape {shape}; reshape them, or use an MLP such as '2x100'"
        )
    modules = _normalisation(shape, mean, std)
    for number, layer in enumerate(network.layers, start=1):
        after = layer.output(shape)
        if min(after) < 1:
            raise InputError(
                f"inputs of shape {tuple(input_shape)} are too small for '{name}': layer {number}, {layer}, "
                f"would get only {shape[1]}x{shape[2]} pixels; use larger images, or 'digits-cnn' or '2x100'"
            )
        modules += _affine(layer, shape)
        if network.batch_norm:
            modules.append(nn.BatchNorm2d(after[0]) if len(after) == 3 else nn.BatchNorm1d(after[0]))
        modules.append(nn.ReLU())
        shape = after
    return nn.Sequential(*modules, *_affine(Fc(classes), shape))


def _find(name: str) -> Network:
    base = name.removesuffix("-bn")
    if name in _TABLE:
        return _TABLE[name]
    if base in _TABLE and _TABLE[base].is_chain:
        return replace(_TABLE[base], batch_norm=True)
    if base in _TABLE:
        raise InputError(
            f"there is no '{name}': -bn is for plain chains, and '{base}' has skip connections; use '{base}'"
        )
    known = [*_TABLE, *(f"{row}-bn" for row, network in _TABLE.items() if network.is_chain)]
    nearest = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0)[0]
    raise InputError(
        f"unknown model '{name}'; the nearest is '{nearest}' (tightrope list models shows them; plain chains "
        "also go by NAME-bn, with BatchNorm)"
    )


def _normalisation(
    shape: Shape, mean: Sequence[float] | None, std: Sequence[float] | None
) -> list[nn.Module]:
    if mean is None and std is None:
        return []
    if mean is None or std is None:
        raise InputError(f"normalisation needs both a mean and a deviation, got mean={mean}, std={std}")
    if not {len(mean), len(std)} <= {1, shape[0]}:
        raise InputError(
            f"normalisation needs one number, or one for each of {shape[0]} channels, got {mean} and {std}"
        )
    return [Normalise(mean, std, len(shape))]


def _affine(layer: Layer, shape: Shape) -> Iterable[nn.Module]:
    if isinstance(layer, Fc) and len(shape) > 1:
        return nn.Flatten(), layer.module((math.prod(shape),))
    return (layer.module(shape),)

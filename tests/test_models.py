import pytest
import torch
from torch import nn

from tightrope.errors import InputError
from tightrope.graph import trace
from tightrope.models import Normalise, build, describe, names

MNIST, CIFAR, DIGITS = (1, 28, 28), (3, 32, 32), (1, 8, 8)

# name, input shape, number of parameters, values after each hidden layer as channels x height x width
TABLE = [
    ("digits-cnn", DIGITS, 57_110, "16x8x8 32x4x4 100"),
    ("2x100", MNIST, 89_610, "100 100"),
    ("2x100", CIFAR, 318_410, "100 100"),
    ("small", MNIST, 166_406, "16x14x14 32x7x7 100"),
    ("small", CIFAR, 214_918, "16x16x16 32x8x8 100"),
    ("large", MNIST, 1_974_762, "32x28x28 32x14x14 64x14x14 64x7x7 512 512"),
    ("large", CIFAR, 2_466_858, "32x32x32 32x16x16 64x16x16 64x8x8 512 512"),
    ("resnet", MNIST, 3_254_562, "16x28x28 16x28x28 16x28x28 32x14x14 64x7x7 1000"),
    ("resnet", CIFAR, 4_214_850, "16x32x32 16x32x32 16x32x32 32x16x16 64x8x8 1000"),
    ("dm-small", MNIST, 329_606, "16x13x13 32x10x10 100"),
    ("dm-small", CIFAR, 470_918, "16x15x15 32x12x12 100"),
    ("dm-medium", MNIST, 893_418, "32x26x26 32x12x12 64x10x10 64x4x4 512 512"),
    ("dm-medium", CIFAR, 1_188_906, "32x30x30 32x14x14 64x12x12 64x5x5 512 512"),
    ("dm-large", MNIST, 3_623_498, "64x26x26 64x24x24 128x11x11 128x9x9 128x7x7 512"),
    ("dm-large", CIFAR, 5_721_802, "64x30x30 64x28x28 128x13x13 128x11x11 128x9x9 512"),
    ("dm-small-pad1", MNIST, 550_406, "16x14x14 32x13x13 100"),
    ("dm-small-pad1", CIFAR, 730_118, "16x16x16 32x15x15 100"),
    ("dm-medium-pad1", MNIST, 1_974_762, "32x28x28 32x14x14 64x14x14 64x7x7 512 512"),
    ("dm-medium-pad1", CIFAR, 2_466_858, "32x32x32 32x16x16 64x16x16 64x8x8 512 512"),
    ("dm-large-pad1", MNIST, 13_257_290, "64x28x28 64x28x28 128x14x14 128x14x14 128x14x14 512"),
    ("dm-large-pad1", CIFAR, 17_190_602, "64x32x32 64x32x32 128x16x16 128x16x16 128x16x16 512"),
    ("cnn5", MNIST, 820_954, "16x28x28 16x14x14 32x7x7 512"),
    ("cnn5", CIFAR, 1_067_002, "16x32x32 16x16x16 32x8x8 512"),
    ("cnn5-bn", CIFAR, 1_068_154, "16x32x32 16x16x16 32x8x8 512"),
    ("cnn7", MNIST, 13_257_290, "64x28x28 64x28x28 128x14x14 128x14x14 128x14x14 512"),
    ("cnn7", CIFAR, 17_190_602, "64x32x32 64x32x32 128x16x16 128x16x16 128x16x16 512"),
    ("cnn7-bn", CIFAR, 17_192_650, "64x32x32 64x32x32 128x16x16 128x16x16 128x16x16 512"),
    ("convmed", MNIST, 348_374, "32x14x14 64x7x7 100"),
    ("convmed-2-4-250", MNIST, 1_637_256, "32x14x14 128x7x7 250"),
    ("convmed-2-4-250", CIFAR, 2_118_856, "32x16x16 128x8x8 250"),
    ("convmedbig", CIFAR, 2_133_736, "32x32x32 32x16x16 128x8x8 250"),
    ("crown-small-a", MNIST, 52_182, "4x14x14 8x7x7 128"),
    ("crown-small-b", MNIST, 205_730, "8x14x14 16x7x7 256"),
    ("crown-small-c", MNIST, 27_170, "4x28x28 8x28x28 8x7x7 64"),
    ("crown-small-d", MNIST, 107_130, "8x28x28 16x28x28 16x7x7 128"),
    ("crown-small-e", MNIST, 21_090, "4x26x26 8x24x24 8x6x6 64"),
    ("crown-small-f", MNIST, 82_682, "8x26x26 16x24x24 16x6x6 128"),
    ("crown-small-g", MNIST, 170_598, "4x28x28 4x14x14 8x14x14 8x7x7 256 256"),
    ("crown-small-h", MNIST, 275_714, "8x28x28 8x14x14 16x14x14 16x7x7 256 256"),
    ("crown-small-i", MNIST, 470_630, "4x28x28 4x14x14 8x14x14 8x7x7 512 512"),
    ("crown-small-j", MNIST, 676_098, "8x28x28 8x14x14 16x14x14 16x7x7 512 512"),
    ("crown-large-1", MNIST, 1_096_442, "16x28x28 16x14x14 32x14x14 32x7x7 512 512"),
    ("crown-large-2", MNIST, 1_096_442, "16x28x28 16x14x14 32x14x14 32x7x7 512 512"),
    ("crown-large-3", MNIST, 1_974_762, "32x28x28 32x14x14 64x14x14 64x7x7 512 512"),
    ("crown-large-4", MNIST, 3_881_930, "64x28x28 64x14x14 128x14x14 128x7x7 512 512"),
    ("crown-large-5", MNIST, 2_833_802, "64x26x26 128x24x24 128x6x6 512"),
    ("crown-large-6", MNIST, 1_302_986, "32x26x26 64x24x24 64x6x6 512"),
    ("crown-large-7", MNIST, 625_130, "16x26x26 32x24x24 32x6x6 512"),
    ("crown-large-8", MNIST, 1_695_690, "32x28x28 64x28x28 64x7x7 512"),
    ("crown-cifar-large-1", CIFAR, 560_106, "32x16x16 64x8x8 128"),
    ("crown-cifar-large-2", CIFAR, 2_234_314, "64x16x16 128x8x8 256"),
    ("crown-cifar-large-3", CIFAR, 1_218_602, "32x32x32 32x16x16 64x16x16 64x8x8 256 256"),
    ("crown-cifar-large-4", CIFAR, 2_569_290, "64x32x32 64x16x16 128x16x16 128x8x8 256 256"),
    ("crown-cifar-large-5", CIFAR, 2_466_858, "32x32x32 32x16x16 64x16x16 64x8x8 512 512"),
    ("crown-cifar-large-6", CIFAR, 4_866_122, "64x32x32 64x16x16 128x16x16 128x8x8 512 512"),
    ("crown-cifar-large-7", CIFAR, 1_136_394, "32x32x32 64x32x32 64x8x8 256"),
    ("crown-cifar-large-8", CIFAR, 4_537_866, "64x32x32 128x32x32 128x8x8 512"),
]


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def kinds(net: nn.Sequential) -> list[str]:
    return [type(module).__name__ for module in net]


@pytest.mark.parametrize(("name", "shape", "count", "hidden"), TABLE)
def test_every_network_has_its_published_layers(name, shape, count, hidden):
    with torch.device("meta"):
        net, x = build(name, shape, 10), torch.empty(2, *shape)
        seen = []
        for module in net:
            x = module(x)
            if isinstance(module, nn.ReLU):
                seen.append("x".join(map(str, x.shape[1:])))
    assert parameters(net) == count
    assert " ".join(seen) == hidden
    assert x.shape == (2, 10)
    assert isinstance(net[-1], nn.Linear)


def test_the_table_covers_every_network():
    assert {name.removesuffix("-bn") for name, *_ in TABLE} == set(names())


@pytest.mark.parametrize(
    ("name", "shape", "count"),
    [
        ("2x100", MNIST, (784 + 1) * 100 + (100 + 1) * 100 + (100 + 1) * 10),
        ("small", MNIST, (16 + 1) * 16 + (16 * 16 + 1) * 32 + (1568 + 1) * 100 + 1010),
        ("dm-small", MNIST, (16 + 1) * 16 + (16 * 16 + 1) * 32 + (3200 + 1) * 100 + 1010),
        ("dm-small", CIFAR, (3 * 16 + 1) * 16 + (16 * 16 + 1) * 32 + (4608 + 1) * 100 + 1010),
        ("convmed", MNIST, (25 + 1) * 32 + (32 * 16 + 1) * 64 + (3136 + 1) * 100 + 1010),
        ("crown-small-e", MNIST, (25 + 1) * 4 + (4 * 25 + 1) * 8 + (8 * 16 + 1) * 8 + 289 * 64 + 650),
        (
            "resnet",
            CIFAR,
            (27 + 1) * 16
            + 2 * ((16 * 9 + 1) * 16 + (16 * 9 + 1) * 16 + (16 + 1) * 16)  # keep: 3x3, 3x3, skip 1x1
            + (16 * 16 + 1) * 32 + (32 * 9 + 1) * 32 + (16 * 4 + 1) * 32  # halve: 4x4, 3x3, skip 2x2
            + (32 * 16 + 1) * 64 + (64 * 9 + 1) * 64 + (32 * 4 + 1) * 64
            + (4096 + 1) * 1000 + 1001 * 10,
        ),
    ],
)  # fmt: skip
def test_parameter_counts_by_hand(name, shape, count):
    with torch.device("meta"):
        assert parameters(build(name, shape, 10)) == count


@pytest.mark.parametrize(
    ("name", "mnist", "cifar"),
    [
        ("dm-small", 3200, 4608),
        ("dm-medium", 1024, 1600),
        ("dm-large", 6272, 10368),
        ("dm-large-pad1", 128 * 14**2, 128 * 16**2),
        ("cnn7", 128 * 14**2, 128 * 16**2),
    ],
)
def test_flattened_features_as_the_papers_code_has_them(name, mnist, cifar):
    with torch.device("meta"):
        for shape, features in ((MNIST, mnist), (CIFAR, cifar)):
            first = next(module for module in build(name, shape, 10) if isinstance(module, nn.Linear))
            assert first.in_features == features


def test_relu_after_every_layer_but_the_last():
    assert kinds(build("digits-cnn", DIGITS, 10)) == [
        *["Conv2d", "ReLU"] * 2,
        "Flatten",
        *["Linear", "ReLU"],
        "Linear",
    ]


def test_a_flat_input_needs_no_flatten():
    assert kinds(build("2x100", (64,), 10)) == ["Linear", "ReLU", "Linear", "ReLU", "Linear"]


# ------------------------------------------------------------------------------------- batch norm


def test_bn_puts_batch_norm_before_every_relu_and_keeps_the_biases():
    net = build("digits-cnn-bn", DIGITS, 10)
    assert kinds(net) == [
        *["Conv2d", "BatchNorm2d", "ReLU"] * 2,
        "Flatten",
        *["Linear", "BatchNorm1d", "ReLU"],
        "Linear",
    ]
    assert all(module.bias is not None for module in net if isinstance(module, nn.Conv2d | nn.Linear))


@pytest.mark.parametrize("name", [name for name in names() if name != "resnet"])
def test_every_chain_accepts_bn(name):
    with torch.device("meta"):
        plain, normed = build(name, CIFAR, 10), build(f"{name}-bn", CIFAR, 10)
    relus = sum(isinstance(module, nn.ReLU) for module in plain)
    assert sum(isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) for module in normed) == relus


def test_bn_is_refused_where_the_network_is_no_chain():
    with pytest.raises(InputError, match=r"no 'resnet-bn'.*use 'resnet'"):
        build("resnet-bn", CIFAR, 10)


# ---------------------------------------------------------------------------------- normalisation


def test_normalisation_is_the_first_operator_and_changes_no_weight():
    mean, std = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
    torch.manual_seed(0)
    plain = build("small", (3, 8, 8), 10)
    torch.manual_seed(0)
    net = build("small", (3, 8, 8), 10, mean, std)
    x = torch.rand(4, 3, 8, 8)
    by_hand = torch.stack([(x[:, c] - mean[c]) / std[c] for c in range(3)], dim=1)
    assert isinstance(net[0], Normalise)
    assert net[0].mean.shape == net[0].std.shape == (3, 1, 1)
    torch.testing.assert_close(net(x), plain(by_hand))
    assert {"0.mean", "0.std"} <= set(net.state_dict())
    assert parameters(net) == parameters(plain)


def test_one_number_normalises_all_channels_and_flat_inputs():
    assert build("small", CIFAR, 10, [0.5], [0.25])(torch.rand(2, *CIFAR)).shape == (2, 10)
    assert build("2x100", (64,), 10, [0.5], [0.25])(torch.rand(2, 64)).shape == (2, 10)


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ([0.5], None, "both"),
        (None, [0.5], "both"),
        ([0.5, 0.5], [0.2, 0.2], "each of 3 channels"),
        ([0.5], [0.0], "positive"),
        ([0.5], [-1.0], "positive"),
        ([float("nan")], [1.0], "finite"),
        ([0.5], [float("inf")], "finite"),
    ],
)
def test_bad_normalisation_is_refused(mean, std, message):
    with pytest.raises(InputError, match=message):
        build("small", CIFAR, 10, mean, std)


# ----------------------------------------------------------------------------------------- bounds


@pytest.mark.parametrize("name", ["digits-cnn", "digits-cnn-bn", "2x100-bn", "resnet"])
def test_networks_trace_into_operators(name):
    shape = (1, 9, 7)  # odd sides: both branches of a residual block must still agree
    net = build(name, shape, 10, [0.1], [0.3]).eval()
    x = torch.rand(3, *shape)
    torch.testing.assert_close(trace(net, shape).run(x)[0], net(x))


# ------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("dm-smal", "dm-small"),
        ("DM-large", "dm-large"),
        ("cnn7bn", "cnn7-bn"),
        ("convmed-big", "convmedbig"),
    ],
)
def test_an_unknown_name_gets_the_nearest_one(typed, meant):
    for ask in (lambda: build(typed, MNIST, 10), lambda: describe(typed)):
        with pytest.raises(InputError, match=f"unknown model '{typed}'; the nearest is '{meant}'"):
            ask()


def test_an_input_too_small_names_the_layer():
    with pytest.raises(InputError, match=r"layer 3, Conv\(64,3,1,0\), would get only 2x2 pixels"):
        build("dm-medium", DIGITS, 10)
    with pytest.raises(InputError, match=r"layer 5, Residual\(64,halve\), would get only 1x1 pixels"):
        build("resnet", (1, 2, 2), 10)


@pytest.mark.parametrize("name", ["small", "resnet", "cnn7-bn"])
def test_flat_inputs_to_a_convolutional_network_are_refused(name):
    with pytest.raises(InputError, match=rf"'{name}' is convolutional.*\(784,\).*2x100"):
        build(name, (784,), 10)


@pytest.mark.parametrize("shape", [(), (0,), (1, 0, 28)])
def test_empty_inputs_are_refused(shape):
    with pytest.raises(InputError, match="at least one number"):
        build("2x100", shape, 10)


def test_one_class_is_refused():
    with pytest.raises(InputError, match="two classes, got 1"):
        build("2x100", MNIST, 1)


# ------------------------------------------------------------------------------------ description


def test_describe_gives_one_line():
    assert describe("dm-small") == "Gowal et al. small: Conv(16,4,2,0) Conv(32,4,1,0) FC100"
    assert describe("dm-small-pad1").endswith("Conv(16,4,2,1) Conv(32,4,1,1) FC100")
    assert describe("cnn5-bn").endswith("FC512 (BatchNorm before each ReLU)")
    assert not any("\n" in describe(name) for name in names())


def test_names_keep_the_order_of_the_table_and_leave_out_variants():
    assert names()[:3] == ["digits-cnn", "2x100", "small"]
    assert not any(name.endswith("-bn") for name in names())

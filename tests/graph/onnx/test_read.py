"""Networks from ONNX files, as PyTorch and others write them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from tightrope.bounds import Interval, Linear, Problem
from tightrope.errors import InputError, UnsupportedOperatorError
from tightrope.graph import recast, trace
from tightrope.graph.onnx import read_onnx, write_onnx
from tightrope.graph.onnx.rules import RULES
from tightrope.region import Box
from tightrope.spec import Spec

from .conftest import Shape, array, node, save


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


C3, FC = [1, 3, 6, 6], [1, 5]
NETS: dict[str, tuple[Shape, list[onnx.NodeProto], dict[str, np.ndarray]]] = {
    "gemm": (
        ["batch", 5],
        [
            node("Gemm", "x w b", "h", transB=1, alpha=0.5, beta=2.0),
            node("LeakyRelu", "h", "r", alpha=0.2),
            node("Gemm", "r v", "y"),
        ],
        {"w": array(4, 5), "b": array(4), "v": array(4, 3)},
    ),
    "tf2onnx: MatMul and Add, batch of one": (
        FC,
        [
            node("MatMul", "x w", "h"),
            node("Add", "h b", "a"),
            node("Relu", "a", "r"),
            node("MatMul", "r v", "m"),
            node("Add", "c m", "y"),
        ],
        {"w": array(5, 4), "b": array(1, 4), "v": array(4, 3), "c": array(3)},
    ),
    "without a batch": ([5], [node("MatMul", "x w", "h"), node("Sigmoid", "h", "y")], {"w": array(5, 4)}),
    "a column, with the constants on the left, as in mnist-fc": (
        [1, 5, 1],
        [
            node("MatMul", "w x", "h"),
            node("Add", "h b", "a"),
            node("Relu", "a", "r"),
            node("MatMul", "v r", "m"),
            node("Flatten", "m", "y"),
        ],
        {"w": array(4, 5), "b": array(4, 1), "v": array(3, 4)},
    ),
    "acasxu: Sub, Flatten, and a constant node": (
        [1, 1, 1, 5],
        [
            node("Sub", "x mean", "s"),
            node("Flatten", "s", "f", axis=-3),
            helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(array(5, 3))),
            node("Transpose", "w", "wt", perm=[1, 0]),
            node("Gemm", "f wt", "y", transB=1),
        ],
        {"mean": array(1, 1, 1, 5)},
    ),
    "PyTorch of old: the shape of a batch is computed": (
        ["n", 3, 2, 2],
        [
            node("Shape", "x", "s"),
            node("Gather", "s zero", "g", axis=0),
            node("Unsqueeze", "g axis", "u"),
            node("Concat", "u rest", "t", axis=0),
            node("Reshape", "x t", "f"),
            node("MatMul", "f w", "y"),
        ],
        {"zero": np.array(0), "axis": ints(0), "rest": ints(-1), "w": array(12, 3)},
    ),
    "convolution with every attribute, BatchNorm": (
        ["n", 4, 7, 8],
        [
            node("Conv", "x w b", "c", strides=[2, 1], pads=[1, 0, 1, 0], dilations=[1, 2], group=2),
            node("BatchNormalization", "c s t m v", "n", epsilon=0.1),
            node("Tanh", "n", "a"),
            node("Flatten", "a", "f"),
            node("ReduceMean", "a", "r", axes=[2, 3], keepdims=0),
            node("Concat", "f r", "y", axis=1),
        ],
        {"w": array(6, 2, 3, 2), "b": array(6), "s": array(6), "t": array(6), "m": array(6)}
        | {"v": abs(array(6))},
    ),
    "convolution padded on one side": (
        C3,
        [
            node("Conv", "x w", "c", pads=[0, 1, 1, 2]),
            node("Conv", "c v", "d", auto_pad="SAME_UPPER", strides=[2, 2]),
            node("Conv", "d v", "e", auto_pad="SAME_LOWER", strides=[2, 2]),
            node("Conv", "e u", "f", auto_pad="VALID"),
            node("Flatten", "f", "y"),
        ],
        {"w": array(2, 3, 2, 3), "v": array(2, 2, 2, 2), "u": array(3, 2, 1, 1)},
    ),
    "pooling": (
        C3,
        [
            node("MaxPool", "x", "m", kernel_shape=[2, 2], pads=[1, 1, 1, 1]),
            node("AveragePool", "m", "a", kernel_shape=[3, 2], pads=[1, 0, 1, 0], strides=[1, 2]),
            node("AveragePool", "a", "b", kernel_shape=[2, 2], pads=[0, 1, 1, 0], count_include_pad=1),
            node("AveragePool", "b", "c", kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1),
            node("GlobalAveragePool", "c", "g"),
            node("Squeeze", "g axes", "y"),
        ],
        {"axes": ints(2, 3)},
    ),
    "padding, casts, residual sums and reshapes": (
        C3,
        [
            node("Pad", "x pads one", "p"),
            node("Identity", "p", "i"),
            node("Cast", "i", "c", to=TensorProto.FLOAT),
            node("Dropout", "c", "d"),
            node("Mul", "d scale", "m"),
            node("Div", "m scale", "q"),
            node("Neg", "q", "n"),
            node("Sub", "scale n", "s"),
            node("Sub", "s d", "r"),
            node("Add", "r n", "a"),
            node("Unsqueeze", "a zero", "u"),
            node("Reshape", "u minus", "y"),
        ],
        {"pads": ints(0, 0, 1, 0, 0, 0, 0, 2), "one": np.array(1, "float32"), "scale": array(1, 3, 1, 1)}
        | {"zero": ints(0), "minus": ints(0, -1)},
    ),
    "tensorflow's layout of grey images": (
        [1, 4, 4, 1],
        [
            node("Transpose", "x", "t", perm=[0, 3, 1, 2]),
            node("Conv", "t w", "c"),
            node("Reshape", "c to", "y"),
        ],
        {"w": array(2, 1, 2, 2), "to": ints(1, 18)},
    ),
    "limits, other orders, slices and sums": (
        C3,
        [
            node("Conv", "x w", "c"),
            node("Clip", "c low high", "l"),
            node("Transpose", "l", "t", perm=[0, 2, 3, 1]),
            node("Slice", "t from to axes steps", "s"),
            node("ReduceSum", "s last", "r", keepdims=0),
            node("ReduceMean", "r", "m", axes=[1]),
            node("Clip", "m low", "h"),
            node("Flatten", "h", "y"),
        ],
        {"w": array(4, 3, 2, 2), "low": np.array(-0.1, "float32"), "high": np.array(0.2, "float32")}
        | {"from": ints(1, 0), "to": ints(2**31, -1), "axes": ints(1, -1), "steps": ints(2, 1)}
        | {"last": ints(-1)},
    ),
    "parts": (
        C3,
        [
            node("Split", "x sizes", "a b", axis=1),
            node("Split", "b", "c d", axis=-1),
            node("Add", "c d", "e"),
            node("Flatten", "a", "f"),
            node("Flatten", "e", "g"),
            node("Concat", "f g", "y", axis=1),
        ],
        {"sizes": ints(1, 2)},
    ),
    "one dimension": (
        [1, 2, 6],
        [
            node("Conv", "x w", "c"),
            node("MaxPool", "c", "m", kernel_shape=[2], strides=[2]),
            node("Flatten", "m", "y"),
        ],
        {"w": array(3, 2, 3)},
    ),
}


@pytest.mark.parametrize("name", NETS)
def test_a_network_is_read_and_computes_what_onnxruntime_does(name, tmp_path):
    shape, nodes, constants = NETS[name]
    network = read_onnx(save(tmp_path / "net.onnx", nodes, constants, shape))  # compares them itself
    lead = len(shape) > 1 and not (isinstance(shape[0], int) and shape[0] > 1)
    assert network.input_shape == tuple(shape[1:] if lead else shape)
    graph = trace(network, network.input_shape)
    x = torch.rand(3, *network.input_shape)
    logits = graph.run(x)[0]
    box = Problem(graph, x, Box(0.01), Spec.logits(3, graph.classes, x))
    for engine in (Interval(), Linear("adaptive", "interval")):
        bounds = engine(box)
        assert (bounds.lower <= logits + 1e-5).all()
        assert (logits - 1e-5 <= bounds.upper).all()


def test_a_network_read_goes_on_in_another_precision(tmp_path):
    shape, nodes, constants = NETS["convolution with every attribute, BatchNorm"]
    network = read_onnx(save(tmp_path / "net.onnx", nodes, constants, shape))
    exact = recast(trace(network, network.input_shape), torch.float64)
    x = torch.rand(2, *network.input_shape)
    assert torch.allclose(exact.run(x.double())[0].float(), network(x), atol=1e-5)


def test_a_network_in_float64_is_read_as_such(tmp_path):
    nodes, weight = [node("MatMul", "x w", "y")], array(5, 3, dtype="float64")
    network = read_onnx(save(tmp_path / "net.onnx", nodes, {"w": weight}, FC, TensorProto.DOUBLE))
    (read,) = network.parameters()
    assert torch.equal(read, torch.from_numpy(weight).T)  # bit for bit, and in float64
    x = torch.rand(2, 5, dtype=torch.float64)
    # A layer and a product may add up in another order, as processors differ.
    torch.testing.assert_close(network(x), x @ torch.from_numpy(weight), rtol=1e-14, atol=1e-15)


def test_weights_of_more_digits_than_the_input_keep_them(tmp_path):
    nodes = [
        node("Cast", "x", "wide", to=TensorProto.DOUBLE),
        node("MatMul", "wide w", "h"),
        node("Cast", "h", "y", to=TensorProto.FLOAT),
    ]
    weight = array(5, 3, dtype="float64")
    network = read_onnx(save(tmp_path / "net.onnx", nodes, {"w": weight}, FC))
    assert torch.equal(next(network.parameters()), torch.from_numpy(weight).T)


def test_a_factor_of_weights_loses_no_digit(tmp_path):
    tenth = float(np.float32(0.1))
    constants = {"w": array(5, 3), "b": array(3)}
    nodes = [node("Gemm", "x w b", "y", alpha=tenth, beta=2.0)]
    network = read_onnx(save(tmp_path / "net.onnx", nodes, constants, FC))
    weight, bias = network.parameters()
    assert torch.equal(weight, tenth * torch.from_numpy(constants["w"]).double().T)
    assert torch.equal(bias, 2 * torch.from_numpy(constants["b"]).double())


def test_what_float32_holds_exactly_is_read_as_float32(tmp_path):
    shape, nodes, constants = NETS["gemm"]
    network = read_onnx(save(tmp_path / "net.onnx", nodes, constants, shape))
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}


def test_every_operator_that_cannot_be_read_is_reported_with_its_node(tmp_path):
    nodes = [
        node("Erf", "x", "a"),
        node("Mul", "x x", "square"),
        node("Transpose", "x", "turned", perm=[2, 1, 0]),
        node("Relu", "turned", "b"),
        node("Gelu", "b", "c"),
        node("Softmax", "c", "d"),
    ]
    path = save(tmp_path / "net.onnx", nodes, {}, [1, 3, 4], opset=20)
    with pytest.raises(UnsupportedOperatorError) as error:
        read_onnx(path)
    for place in (
        "the a (Erf): not supported",
        "the square (Mul): of two values it is not affine",
        "the turned (Transpose): it moves the batch dimension",
        "the c (Gelu): not supported",
        "the d (Softmax): not supported; Softmax does not change which class wins",
    ):
        assert place in str(error.value)
    assert "Relu" not in str(error.value)


REFUSED: dict[str, tuple[list[onnx.NodeProto], dict[str, np.ndarray], str]] = {
    "values broadcast": (
        [node("GlobalAveragePool", "x", "g"), node("Add", "x g", "y")],
        {},
        "broadcasts one value",
    ),
    "a value grows": ([node("Add", "x c", "y")], {"c": array(1, 3, 6, 6)[:, :, None]}, "broadcasts a value"),
    "channels in place of a batch": (
        [node("Squeeze", "x a", "s"), node("BatchNormalization", "s c c c c", "y")],
        {"a": ints(0), "c": abs(array(6))},
        "lost the batch",
    ),
    "an average over channels": (
        [node("Squeeze", "x a", "s"), node("GlobalAveragePool", "s", "y")],
        {"a": ints(0)},
        "lost the batch",
    ),
    "a number for each row": (
        [node("Reshape", "x r", "s"), node("Gemm", "s w c", "y")],
        {"r": ints(12, 9), "w": array(9, 12), "c": array(12, 1)},
        "one number per output",
    ),
    "trained on, as it was said before": (
        [node("BatchNormalization", "x c c c c", "y m v")],
        {"c": abs(array(3))},
        "training mode",
    ),
    "batches joined": ([node("Concat", "x x", "y", axis=0)], {}, "joins along the batch"),
    "constants joined": ([node("Concat", "x c", "y", axis=1)], {"c": array(1, 1, 6, 6)}, "joins constants"),
    "a batch padded": ([node("Pad", "x p", "y")], {"p": ints(1, 0, 0, 0, 0, 0, 0, 0)}, "pads the batch"),
    "a mirror": ([node("Pad", "x p", "y", mode="reflect")], {"p": ints(*[0] * 8)}, "finite constant"),
    "divided by": ([node("Div", "c x", "y")], {"c": array(1)}, "divided by a value is not affine"),
    "rounded": ([node("Cast", "x", "y", to=TensorProto.FLOAT16)], {}, "it rounds"),
    "trained on": (
        [node("BatchNormalization", "x c c c c", "y", training_mode=1)],
        {"c": array(3)},
        "training mode",
    ),
    "a batch added up": ([node("ReduceSum", "x a", "y")], {"a": ints(0, 1)}, "the whole batch"),
    "backwards": (
        [node("Slice", "x f t a s", "y")],
        {"f": ints(-1), "t": ints(0), "a": ints(1), "s": ints(-1)},
        "only forward slices",
    ),
    "cut along the batch": ([node("Split", "x", "y z")], {}, "the whole batch"),
    "cut into too many": (
        [node("Split", "x s", "y z", axis=1)],
        {"s": ints(1, 1, 1)},
        "3 sizes for 2 outputs",
    ),
    "random": ([node("RandomNormal", "", "r", shape=[1]), node("Add", "x r", "y")], {}, "it is random"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_read_wrongly_is_refused(name, tmp_path):
    nodes, constants, message = REFUSED[name]
    nodes[0].input[:] = [i for i in nodes[0].input if i]
    with pytest.raises(UnsupportedOperatorError, match=message):
        read_onnx(save(tmp_path / "net.onnx", nodes, constants, C3))


def test_files_that_are_no_networks_of_one_input_are_refused(tmp_path):
    with pytest.raises(InputError, match="is missing"):
        read_onnx(tmp_path / "net.onnx")
    (tmp_path / "net.onnx").write_bytes(b"not a network")
    with pytest.raises(InputError, match="not a valid ONNX file"):
        read_onnx(tmp_path / "net.onnx")
    relu = [node("Relu", "x", "y")]
    with pytest.raises(InputError, match="float32 or float64"):
        read_onnx(save(tmp_path / "net.onnx", relu, {}, FC, TensorProto.FLOAT16))
    with pytest.raises(InputError, match="no fixed shape"):
        read_onnx(save(tmp_path / "net.onnx", relu, {}, ["n", "width"]))
    constant = [node("Relu", "c", "y")]
    with pytest.raises(InputError, match="does not depend on the input"):
        read_onnx(save(tmp_path / "net.onnx", constant, {"c": array(1, 3)}, FC))


def test_a_reader_that_computes_something_else_is_found_out(tmp_path, monkeypatch):
    wrong: Callable[[Any], nn.Module] = lambda call: nn.LeakyReLU(0.3)  # noqa: E731
    monkeypatch.setitem(RULES, "LeakyRelu", wrong)
    path = save(tmp_path / "net.onnx", [node("LeakyRelu", "x", "y", alpha=0.2)], {}, FC)
    with pytest.raises(InputError, match=r"onnxruntime do not agree: the largest difference .* is 0\.\d+"):
        read_onnx(path)


@pytest.mark.parametrize("shape", [(1, 3, 6, 6), (1, 1, 3, 1, 1)])
def test_a_constant_may_give_a_value_dimensions_of_size_one(shape, tmp_path):
    nodes = [node("Squeeze", "x a", "s"), node("Add", "s c", "g"), node("Flatten", "g", "y", axis=2)]
    network = read_onnx(save(tmp_path / "net.onnx", nodes, {"a": ints(0), "c": array(*shape)}, C3))
    assert trace(network, (3, 6, 6)).classes == 108


@pytest.mark.parametrize("bias", [0.0, -17.0, -30.0])
def test_sigmoids_near_0_are_no_disagreement(bias, tmp_path):
    net = nn.Sequential(nn.Linear(20, 30), nn.Sigmoid(), nn.Linear(30, 5), nn.Sigmoid())
    net[0].bias.data -= 20
    net[2].bias.data += bias
    write_onnx(net.eval(), (20,), tmp_path / "net.onnx")
    assert read_onnx(tmp_path / "net.onnx")(torch.rand(1, 20)).shape == (1, 5)


def test_numbers_beyond_float32_allow_no_difference(tmp_path, monkeypatch):
    nodes = [node("LeakyRelu", "x", "h", alpha=0.2), node("Mul", "h c", "y")]
    path, large = tmp_path / "net.onnx", {"c": np.float64([1e39])}
    read_onnx(save(path, nodes, large, FC, TensorProto.DOUBLE))
    wrong: Callable[[Any], nn.Module] = lambda call: nn.LeakyReLU(0.3)  # noqa: E731
    monkeypatch.setitem(RULES, "LeakyRelu", wrong)
    with pytest.raises(InputError, match="onnxruntime do not agree"):
        read_onnx(path)


def test_a_class_with_a_large_number_hides_no_other_one(tmp_path, monkeypatch):
    wrong: Callable[[Any], nn.Module] = lambda call: nn.LeakyReLU(0.3)  # noqa: E731
    monkeypatch.setitem(RULES, "LeakyRelu", wrong)
    nodes = [node("LeakyRelu", "x", "h", alpha=0.2), node("Add", "h c", "y")]
    offsets = np.zeros((1, FC[1]), "float32")
    offsets[0, 0] = -1e6
    with pytest.raises(InputError, match="onnxruntime do not agree"):
        read_onnx(save(tmp_path / "net.onnx", nodes, {"c": offsets}, FC))
    nodes = [nodes[0], node("Mul", "h c", "y")]
    with pytest.raises(InputError, match="onnxruntime do not agree"):
        read_onnx(save(tmp_path / "net.onnx", nodes, {"c": np.float32([1e-6])}, FC))


def test_files_of_old_operators_and_of_sparse_constants_are_refused(tmp_path):
    path = save(tmp_path / "net.onnx", [node("Relu", "x", "y")], {}, FC, opset=6)
    with pytest.raises(InputError, match=r"has opset 6; tightrope reads .* from opset 7 on"):
        read_onnx(path)
    model = onnx.load(path)
    model.opset_import[0].version = 17
    values = numpy_helper.from_array(np.float32([1.0]), "c")
    places = numpy_helper.from_array(np.int64([0]), "places")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, places, [4]))
    onnx.save(model, path)
    with pytest.raises(InputError, match="has sparse constants"):
        read_onnx(path)


def test_without_onnxruntime_one_is_told_that_nothing_was_compared(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.warns(UserWarning, match="not compared with onnxruntime"):
        read_onnx(save(tmp_path / "net.onnx", [node("Relu", "x", "y")], {}, FC))


def test_without_the_package_the_error_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(InputError, match=r"pip install 'tightrope\[onnx\]'"):
        read_onnx(tmp_path / "net.onnx")

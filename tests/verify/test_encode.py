import itertools

import numpy as np
import pytest
import torch
from torch import nn

from tightrope.bounds import Linear, Problem
from tightrope.errors import InputError
from tightrope.graph import trace
from tightrope.graph.ops import Affine
from tightrope.region import Box, L1Ball, L2Ball
from tightrope.spec import Spec
from tightrope.verify.encode import encode, layers_of

from .referee import KINDS, case

OPERATORS = {
    "linear": (nn.Linear(6, 4), (6,)),
    "linear on the last axis": (nn.Sequential(nn.Linear(6, 4), nn.Flatten()), (3, 6)),
    "conv": (nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)), (2, 6, 5)),
    "conv in groups": (nn.Conv2d(4, 6, 2, groups=2), (4, 3, 3)),
    "conv that copies what it pads with": (nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect"), (1, 4, 4)),
    "conv of the same size": (nn.Conv2d(1, 2, (1, 3), padding="same"), (1, 4, 4)),
    "conv 1d": (nn.Conv1d(2, 3, 2, padding=1), (2, 5)),
    "batch norm": (nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)), (3, 2, 2)),
    "average pool": (nn.AvgPool2d(2), (2, 4, 4)),
    "pad": (nn.ConstantPad2d(1, 0.7), (1, 2, 2)),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_the_matrices_are_the_operators(name):
    torch.manual_seed(0)
    module, shape = OPERATORS[name]
    module = nn.Sequential(module, nn.Flatten()).double().eval().requires_grad_(False)
    for buffer in module.buffers():
        if buffer.is_floating_point():
            nn.init.uniform_(buffer, 0.5, 2)
    graph = trace(module, shape)
    x = torch.randn(5, *shape, dtype=torch.float64)
    values = [x]
    layers = layers_of(graph)
    for i, node in enumerate(graph.nodes[1:], start=1):
        inputs = [values[j] for j in node.inputs]
        values.append(node.op.apply(*inputs))
        if isinstance(node.op, Affine):
            parts = zip(layers[i], inputs, strict=True)
            by_matrix = sum(form.matrix @ z.flatten(1).numpy().T + form.offset[:, None] for form, z in parts)
            np.testing.assert_allclose(by_matrix.T, values[i].flatten(1).numpy(), atol=1e-13)


def encoded(seed, norm=Box, slope="adaptive"):
    given = case(seed, norm)
    spec = Spec.margins(given.y, 3, given.x)
    boxes = Problem(given.graph, given.x, given.region, spec).bounds(Linear(slope)).boxes
    return given, encode(given.graph, layers_of(given.graph), given.x, given.region, boxes)


def variables(given, encoding, point, start):
    """What the variables are at an input, given those that the input itself is made of."""
    _, entering = given.graph.entering(point)
    neurons = encoding.neurons
    nodes = zip(neurons.node.tolist(), neurons.place.tolist(), strict=True)
    z = np.array([float(entering[i].flatten()[place]) for i, place in nodes])
    parts = [np.maximum(z, 0) / neurons.upper, np.minimum(z, 0) / neurons.lower, z > 0]
    return np.concatenate([start, *parts])


@pytest.mark.parametrize("seed", range(2 * len(KINDS)))
@pytest.mark.parametrize("norm", [Box, L1Ball])
def test_whatever_the_network_does_in_the_region_the_constraints_allow(seed, norm):
    given, encoding = encoded(seed, norm)
    count = len(encoding.neurons)
    program = encoding.switched(np.arange(count))
    generator = torch.Generator().manual_seed(seed)
    lower, upper = given.region.corners(given.x)
    corners = [
        torch.where(torch.tensor(coin).view_as(given.x), lower, upper)
        for coin in itertools.product((False, True), repeat=given.x.numel())
    ]
    points = [given.region.sample(given.x, generator) for _ in range(20)]
    for point in points + (corners if norm is Box else []):
        step = (point - given.x).flatten().numpy()
        if norm is Box:
            half = ((upper - lower) / 2).flatten().numpy()
            start = (point - (lower + upper) / 2).flatten().numpy() / half
        else:
            reach = [(side - given.x).flatten().numpy() for side in (upper, lower)]
            ways = np.concatenate([np.maximum(step, 0), np.minimum(step, 0)])
            start = np.divide(ways, np.concatenate(reach), out=0 * ways, where=ways != 0)
        v = variables(given, program, point, start)
        rows = program.matrix @ v
        assert (rows >= program.least - 1e-9).all()
        assert (rows <= program.most + 1e-9).all()
        assert (v >= program.lower - 1e-12).all()
        assert (v <= program.upper + 1e-12).all()
        logits = program.output.matrix @ v + program.output.offset
        np.testing.assert_allclose(logits, given.graph.run(point)[0][0].numpy(), atol=1e-9)
        np.testing.assert_allclose(program.point(v), point.flatten().numpy(), atol=1e-12)


def test_only_unstable_neurons_have_variables():
    given, encoding = encoded(0)
    spec = Spec.margins(given.y, 3, given.x)
    boxes = Problem(given.graph, given.x, given.region, spec).bounds(Linear()).boxes
    unstable = sum(int(((low < 0) & (up > 0)).sum()) for low, up in boxes.values())
    assert 0 < unstable == len(encoding.neurons) < sum(low.numel() for low, _ in boxes.values())
    assert encoding.matrix.shape == (2 * unstable, 4 + 2 * unstable)


def test_a_neuron_that_hardly_changes_its_sign_gets_a_box_that_the_solver_can_tell_from_none():
    graph = trace(nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 2)).double().eval(), (1,))
    x = torch.full((1, 1), 0.5, dtype=torch.float64)
    for size in (1.0, 1e-9):
        box = torch.tensor([[-1e-13 * size]]).double(), torch.tensor([[size]]).double()
        with torch.no_grad():
            encoding = encode(graph, layers_of(graph), x, Box(0.1), {2: box})
        neurons = encoding.neurons
        np.testing.assert_allclose([neurons.lower.item(), neurons.upper.item()], [-1e-6 * size, size])
        # Its constraint is in units of its box: what a tolerance is to one neuron it is to all.
        row = encoding.matrix.toarray()[0, [neurons.positive.item(), neurons.negative.item()]]
        np.testing.assert_allclose(row, [1, -1e-6])


def test_a_region_that_is_not_linear_is_refused():
    given, _ = encoded(0)
    with pytest.raises(
        InputError, match=r"l_inf and l_1 balls, this region is an l_2 ball.*verifier cascade"
    ):
        encode(given.graph, layers_of(given.graph), given.x, L2Ball(0.1), {})


def test_every_activation_that_has_no_encoding_is_named():
    net = nn.Sequential(
        nn.Conv2d(1, 2, 2), nn.Tanh(), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(2, 2)
    )
    with pytest.raises(InputError, match=r"this network has Tanh \(1\), MaxPool \(2\): use the verifier"):
        layers_of(trace(net.eval(), (1, 3, 3)))

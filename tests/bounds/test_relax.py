"""Relaxations: two lines that hold the activation between them over a box."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tightrope.bounds import Problem
from tightrope.bounds.linear import crown, crown_ibp, fast_lin
from tightrope.bounds.relax import Slopes, relax, seen_from_middle
from tightrope.errors import InputError
from tightrope.graph import trace
from tightrope.graph.ops import Activation, LeakyReLU, MaxPool, ReLU, Sigmoid, Tanh
from tightrope.region import Box
from tightrope.spec import Spec

ACTIVATIONS = [ReLU(), LeakyReLU(0.1), LeakyReLU(0.0), LeakyReLU(1.0), Sigmoid(), Tanh()]
SLOPES = ["parallel", "adaptive", "zero", "one"]
ends = st.floats(-6, 6, allow_subnormal=False)


def below(lines, z):
    offset = 0 if lines.lower_offset is None else lines.lower_offset
    return lines.lower_slope * z + offset


@pytest.mark.parametrize("op", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("slope", SLOPES)
@given(a=ends, b=ends)
def test_the_activation_lies_between_its_lines(op, slope, a, b):
    lower, upper = (torch.tensor([[end]], dtype=torch.float64) for end in sorted((a, b)))
    lines = relax(op, lower, upper, slope)
    z = lower + torch.linspace(0, 1, 101, dtype=torch.float64) * (upper - lower)
    value = op.apply(z)
    assert (below(lines, z) <= value + 1e-9).all()
    assert (lines.upper_slope * z + lines.upper_offset >= value - 1e-9).all()


@pytest.mark.parametrize("op", [ReLU(), LeakyReLU(0.1)], ids=str)
@pytest.mark.parametrize("slope", SLOPES)
def test_a_stable_neuron_is_relaxed_exactly(op, slope):
    lower, upper = torch.tensor([[0.5, -2.0, 0.0, -1.0]]), torch.tensor([[2.0, -0.5, 1.0, 0.0]])
    lines = relax(op, lower, upper, slope)
    for z in (lower, upper, (lower + upper) / 2):
        torch.testing.assert_close(below(lines, z), op.apply(z))
        torch.testing.assert_close(lines.upper_slope * z + lines.upper_offset, op.apply(z))


def test_the_lines_of_an_unstable_relu_are_those_of_the_papers():
    lower, upper = torch.tensor([[-1.0, -3.0]]), torch.tensor([[3.0, 1.0]])
    for slope, below in (("parallel", [0.75, 0.25]), ("adaptive", [1, 0]), ("zero", [0, 0]), ("one", [1, 1])):
        lines = relax(ReLU(), lower, upper, slope)
        assert lines.lower_slope.tolist() == [below]
        assert lines.lower_offset is None
        assert lines.upper_slope.tolist() == [[0.75, 0.25]]
        assert lines.upper_offset.tolist() == [[0.75, 0.75]]


@pytest.mark.parametrize("op", ACTIVATIONS, ids=str)
def test_gradients_are_finite_on_boxes_without_width(op):
    ends = torch.tensor([[0.0, 1.0, -1.0]], requires_grad=True)
    lines = relax(op, ends, ends + 0.0, "adaptive")
    sum(part.sum() for part in vars(lines).values() if part is not None).backward()
    assert torch.isfinite(ends.grad).all()


def test_gradients_of_the_lines_are_those_of_their_definition():
    generator = torch.Generator().manual_seed(0)
    lower, upper = torch.randn(2, 3, 7, generator=generator, dtype=torch.float64).sort(0).values
    assert ((lower < 0) & (upper > 0)).any()
    for op, slope in itertools.product((ReLU(), LeakyReLU(0.1)), ("parallel", "adaptive")):

        def parts(lower, upper, op=op, slope=slope):
            return tuple(part for part in vars(relax(op, lower, upper, slope)).values() if part is not None)

        def middle(lower, upper, op=op, slope=slope):
            return tuple(vars(seen_from_middle(op, lower, upper, slope)).values())

        for function in (parts, middle):
            assert torch.autograd.gradcheck(function, (lower.requires_grad_(), upper.requires_grad_()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_box_whose_width_is_too_large_a_number_is_bounded_too(dtype):
    end = torch.full((1, 1), 0.9 * torch.finfo(dtype).max, dtype=dtype)
    for slope in ("parallel", "adaptive"):
        lines = relax(ReLU(), -end, end, slope)
        torch.testing.assert_close(lines.upper_slope, torch.full_like(end, 0.5))
        torch.testing.assert_close(lines.upper_offset, 0.5 * end)


@given(a=ends, b=ends, slope=st.sampled_from(SLOPES) | st.floats(0, 1))
def test_seen_from_the_middle_of_its_box_a_line_is_what_it_is_from_any_point(a, b, slope):
    lower, upper = (torch.tensor([[end]], dtype=torch.float64) for end in sorted((a, b)))
    slope = torch.full_like(lower, slope) if isinstance(slope, float) else slope
    for op in (ReLU(), LeakyReLU(0.1), LeakyReLU(1.0)):
        value, seen = relax(op, lower, upper, slope).seen_from((lower + upper) / 2)
        middle = seen_from_middle(op, lower, upper, slope)
        torch.testing.assert_close(value, (op.apply(lower) + op.apply(upper)) / 2)
        for one, other in zip(vars(seen).values(), vars(middle).values(), strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("op", [ReLU(), LeakyReLU(0.1)], ids=str)
def test_from_the_middle_of_a_box_without_end_nothing_is_bounded(op):
    for lower, upper in ((-math.inf, 1.0), (-1.0, math.inf), (math.nan, 1.0), (-1.0, math.nan)):
        seen = seen_from_middle(op, torch.full((1, 2), lower), torch.full((1, 2), upper), "adaptive")
        assert not seen.pull(-torch.ones(1, 1, 2))[1].isfinite().any()


@pytest.mark.parametrize("op", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("slope", SLOPES)
def test_a_box_that_is_not_a_number_bounds_nothing(op, slope):
    for lower, upper in ((math.nan, 1.0), (-1.0, math.nan), (math.nan, math.nan)):
        box = (torch.full((1, 1, 2), end) for end in (lower, upper))
        value, seen = relax(op, *box, slope).seen_from(torch.ones(1, 1, 2))
        assert not (value.sum() + seen.pull(-torch.ones(1, 1, *value.shape[1:]))[1]).isfinite().any()


def test_positive_rows_meet_the_lower_line_and_negative_rows_the_upper():
    lines = relax(ReLU(), torch.tensor([[-1.0]]), torch.tensor([[1.0]]), "zero")
    value, seen = lines.seen_from(torch.zeros(1, 1))
    rows, offset = seen.pull(torch.tensor([[[2.0], [-2.0]]]))
    assert value.tolist() == [[0.5]]
    assert rows.tolist() == [[[0.0], [-1.0]]]
    assert offset.tolist() == [[-1.0, 0.0]]


def test_a_maximum_lies_above_its_likely_winner_and_below_the_largest_upper_bound():
    pool = MaxPool(torch.nn.MaxPool1d(2))
    lower, upper = torch.tensor([[[0.0, 0.5, -1.0, -2.0]]]), torch.tensor([[[3.0, 1.0, 0.0, 2.0]]])
    value, seen = relax(pool, lower, upper, "adaptive").seen_from(torch.tensor([[[0.0, 0.25, 0.5, 1.0]]]))
    rows, offset = seen.pull(torch.tensor([[[[2.0, -1.0]]]]))
    assert value.tolist() == [[[3.0, 2.0]]]
    assert rows.tolist() == [[[[0.0, 2.0, 0.0, 0.0]]]]
    assert offset.tolist() == [[2 * (0.25 - 3.0)]]


def test_an_activation_without_a_relaxation_is_named():
    class Square(Activation):
        def apply(self, *inputs):
            return inputs[0].square()

    with pytest.raises(InputError, match="Square"):
        relax(Square(), torch.zeros(1, 2), torch.ones(1, 2), "adaptive")


@given(a=ends, b=ends, slope=st.floats(-0.5, 1.5))
def test_any_slope_that_is_given_yields_a_bound(a, b, slope):
    lower, upper = (torch.tensor([[end]], dtype=torch.float64) for end in sorted((a, b)))
    z = lower + torch.linspace(0, 1, 101, dtype=torch.float64) * (upper - lower)
    for op in (ReLU(), LeakyReLU(0.1)):
        lines = relax(op, lower, upper, torch.full_like(lower, slope))
        assert (below(lines, z) <= op.apply(z) + 1e-9).all()


def test_a_given_slope_is_the_slope_of_unstable_neurons_alone():
    lower, upper = torch.tensor([[-1.0, 0.5, -2.0]]), torch.tensor([[1.0, 1.0, -1.0]])
    lines = relax(ReLU(), lower, upper, torch.tensor([[0.3, 0.3, 0.3]]))
    torch.testing.assert_close(lines.lower_slope, torch.tensor([[0.3, 1.0, 0.0]]))


@pytest.mark.parametrize("op", [*ACTIVATIONS, MaxPool(torch.nn.MaxPool1d(2))], ids=str)
def test_seen_from_a_point_a_bound_is_the_same(op):
    generator = torch.Generator().manual_seed(0)
    ends = torch.randn(2, 3, 2, 4, generator=generator, dtype=torch.float64).sort(0).values
    relaxation, z = relax(op, *ends, "adaptive"), ends.mean(0)
    rows = torch.randn(3, 5, *op.apply(z).shape[1:], generator=generator, dtype=torch.float64)
    bounds = []
    for point in (torch.zeros_like(z), z, ends[1]):
        value, seen = relaxation.seen_from(point)
        pulled, offset = seen.pull(rows)
        counted = (pulled * (z - point).unsqueeze(1)).flatten(2).sum(2)
        bounds.append((rows * value.unsqueeze(1)).flatten(2).sum(2) + counted + offset)
    for bound in bounds[1:]:
        torch.testing.assert_close(bound, bounds[0])
    assert (bounds[0] <= (rows * op.apply(z).unsqueeze(1)).flatten(2).sum(2) + 1e-12).all()


def test_the_gradient_of_a_pull_is_that_of_its_definition():
    generator = torch.Generator().manual_seed(0)
    rows, *parts = (
        torch.randn(2, *shape, 2, 3, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((4,), (), (), ())
    )

    def pull(rows, low, high, gap):
        return Slopes(low, high, gap).pull(rows)

    assert torch.autograd.gradcheck(pull, (rows, *parts))
    positive, negative = rows.clamp(min=0), rows.clamp(max=0)
    low, high, gap = (part.unsqueeze(1) for part in parts)
    pulled, offset = pull(rows, *parts)
    torch.testing.assert_close(pulled, positive * low + negative * high)
    torch.testing.assert_close(offset, -(positive * gap).flatten(2).sum(2))


@pytest.mark.parametrize("engine", [crown(), crown_ibp(), fast_lin()], ids=["crown", "crown-ibp", "fast-lin"])
def test_a_second_derivative_is_refused_rather_than_wrong(engine):
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).double()
    x = torch.rand(2, 3, dtype=torch.float64).requires_grad_()
    lower = engine(Problem(trace(net.eval(), (3,)), x, Box(0.3), Spec.logits(2, 2, x))).lower
    with pytest.raises(InputError, match="only once"):
        torch.autograd.grad(lower.sum(), x, create_graph=True)

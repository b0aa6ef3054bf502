"""Properties in VNN-LIB files."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from tightrope.errors import InputError
from tightrope.verify.vnnlib import Query, read_vnnlib, write_robustness

DECLARED = "\n".join(f"(declare-const {name} Real)" for name in ("X_0", "X_1", "Y_0", "Y_1", "Y_2"))
BOX = "(assert (>= X_0 -1)) (assert (<= X_0 0.5)) (assert (>= X_1 0)) (assert (<= X_1 0))"


@pytest.fixture
def read(tmp_path):
    def reading(text: str, inputs: int = 2, outputs: int = 3) -> tuple[Query, ...]:
        path = tmp_path / "p.vnnlib"
        path.write_text(text)
        return read_vnnlib(path, inputs, outputs)

    return reading


def cases(query: Query) -> list[tuple[list[list[float]], list[float]]]:
    return [(case.rows.tolist(), case.limits.tolist()) for case in query.cases]


def test_a_box_and_a_conjunction(read):
    (query,) = read(f"; a comment\n{DECLARED}\n{BOX}\n(assert (<= Y_0 Y_1)) (assert (>= Y_0 3.5))")
    assert query.lower.tolist() == [-1, 0]
    assert query.upper.tolist() == [0.5, 0]
    assert cases(query) == [([[1, -1, 0], [-1, 0, 0]], [0, -3.5])]


def test_a_disjunction_of_outputs_and_linear_sums(read):
    (query,) = read(
        f"{DECLARED} {BOX} (assert (or (and (>= Y_1 Y_0)) (<= (+ Y_0 (* 2 Y_1) (- Y_2) 1) (- (* Y_0 0.5) 4))"
        "(= Y_2 1)))"
    )
    assert cases(query) == [
        ([[1, -1, 0]], [0]),
        ([[0.5, 2, -1]], [-5]),
        ([[0, 0, 1], [0, 0, -1]], [1, -1]),
    ]


def test_boxes_in_a_disjunction_keep_to_their_outputs(read):
    left = "(and (<= X_0 0.1) (>= X_0 0) (<= Y_0 1))"
    right = "(and (<= X_0 0.5) (>= X_0 0.25) (or (<= Y_1 2) (<= Y_2 3)))"
    first, second = read(f"{DECLARED} (assert (<= X_1 1)) (assert (>= X_1 0)) (assert (or {left} {right}))")
    assert (first.lower.tolist(), first.upper.tolist()) == ([0, 0], [0.1, 1])
    assert cases(first) == [([[1, 0, 0]], [1])]
    assert (second.lower.tolist(), second.upper.tolist()) == ([0.25, 0], [0.5, 1])
    assert cases(second) == [([[0, 1, 0]], [2]), ([[0, 0, 1]], [3])]


def test_the_tightest_bound_of_several_counts_and_an_empty_box_has_no_input(read):
    (query,) = read(f"{DECLARED} {BOX} (assert (<= (* 2 X_0) 0.5)) (assert (<= Y_0 1))")
    assert query.upper.tolist() == [0.25, 0]
    assert read(f"{DECLARED} {BOX} (assert (>= X_0 0.6)) (assert (<= Y_0 1))") == ()


def test_bounds_are_rounded_outwards(read):
    text = "0.1000000000000000000000000000001"  # above the float nearest to it
    assert Fraction(0.1) > Fraction("0.1")
    (query,) = read(
        f"{DECLARED} (assert (>= X_0 0.1)) (assert (<= X_0 {text}))"
        "(assert (>= X_1 -0.1)) (assert (<= X_1 -0.1))"
        "(assert (<= Y_0 1))"
    )
    for i, (low, high) in enumerate((("0.1", text), ("-0.1", "-0.1"))):
        assert Fraction(float(query.lower[i])) <= Fraction(low)
        assert Fraction(float(query.upper[i])) >= Fraction(high)
        assert query.upper[i] - query.lower[i] <= 2 * math.ulp(0.1)


def test_an_input_alone_may_be_a_counter_example(read):
    (query,) = read(f"{DECLARED} {BOX}")
    assert query.cases[0].holds(torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("(vnnlib-version <2.0>)", "VNN-LIB 2"),
        (f"{DECLARED} {BOX} (assert (< Y_0 1))", r"\(< Y_0 1\) is no inequality"),
        (f"{DECLARED} {BOX} (assert (<= Y_0 (* Y_1 Y_2)))", r"\(\* Y_1 Y_2\) is not linear"),
        (f"{DECLARED} {BOX} (assert (<= Y_0 X_0))", "inputs may only have bounds"),
        (f"{DECLARED} {BOX} (assert (<= (+ X_0 X_1) 1))", "X_0, X_1: inputs may only"),
        (f"{DECLARED} {BOX} (assert (<= 1 2))", "no variable"),
        (f"{DECLARED} (assert (<= X_0 1))", "X_0 has no lower bound"),
        (f"{DECLARED} {BOX} (assert (<= Y_3 1))", "'Y_3' is neither a number nor a declared variable"),
        (f"{DECLARED} {BOX} (assert (<= Y_0 nan))", "'nan' is neither"),
        (f"{DECLARED} {BOX} (assert (<= Y_0 1e999999999))", "'1e999999999' is neither"),
        (f"{DECLARED} {BOX} (assert (<= Y_0 1e400))", "beyond float64"),
        ("(" * 3000, "more than 100 deep"),
        (f"{DECLARED} {BOX} (assert)", r"\(assert\) is neither a declaration"),
        (f"{DECLARED} {BOX} (assert ())", r"\(\) is no inequality"),
        (f"{DECLARED} {BOX} (assert (<= Y_0 ()))", r"\(\) is not linear"),
        (f"{DECLARED} {BOX} nonsense", "nonsense is neither"),
        (f"{DECLARED} {BOX} (check-sat)", "neither a declaration"),
        (f"{DECLARED} {BOX})", "closed that was not opened"),
        (f"({DECLARED}", "not closed"),
        ("(declare-const X_0 Real) (declare-const Y_0 Real)", "with 1 inputs .* 1 outputs .* has 2 and 3"),
        (f"{DECLARED} {BOX}" + "(assert (or (<= Y_0 1) (<= Y_0 2)))" * 17, "more than 100,000 cases"),
    ],
)
def test_what_cannot_be_understood_is_refused(read, text, said):
    with pytest.raises(InputError, match=said):
        read(text)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*nothing"):
        read_vnnlib(tmp_path / "nothing.vnnlib", 1, 1)


def test_what_is_written_is_read_again(tmp_path):
    lower = torch.tensor([[0.0, 1e-9], [0.1, -3.0]], dtype=torch.float64)
    upper = lower + 0.3
    write_robustness(tmp_path / "p.vnnlib", lower, upper, 1, 3, "a comment")
    (query,) = read_vnnlib(tmp_path / "p.vnnlib", 4, 3)
    assert (query.lower <= lower.flatten()).all()
    assert (query.upper >= upper.flatten()).all()
    torch.testing.assert_close(query.lower, lower.flatten(), rtol=1e-15, atol=0)
    torch.testing.assert_close(query.upper, upper.flatten(), rtol=1e-15, atol=0)
    assert cases(query) == [([[-1, 1, 0]], [0]), ([[0, 1, -1]], [0])]
    assert "1e-09" not in (tmp_path / "p.vnnlib").read_text()  # VNN-LIB has no exponents

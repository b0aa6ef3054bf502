"""Properties in VNN-LIB files."""

from __future__ import annotations

import contextlib
import itertools
import math
import tempfile
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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
        ([[0.25, 1, -0.5]], [-2.5]),
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


def test_what_version_2_says_the_same_way(read):
    (query,) = read(
        """(vnnlib-version <2.0>)
        (declare-network f
          (declare-input X float32 [1, 2, 2])
          (declare-output Y float32 [1,3]))
        (assert (and (<= X[0,0,0] 0.1) (>= X[0,0,0] -0.1) (<= X[0, 0, 1] 0.2) (>= X[0,0,1] 0.2)))
        (assert (and (<= X[0,1,0] 3) (>= X[0,1,0] 2) (<= X[0,1,1] 5) (>= X[0,1,1] 4)))
        (assert (or (< Y[0,0] Y[0,1]) (and (>= Y[0,0] 0.5) (== Y[0,2] 2.0))))""",
        4,
    )
    assert [query.lower[i] for i in (2, 3)] == [2, 4]
    assert [query.upper[i] for i in (2, 3)] == [3, 5]
    assert cases(query) == [([[1, -1, 0]], [0]), ([[-1, 0, 0], [0, 0, 1], [0, 0, -1]], [-0.5, 2, -2])]
    assert [case.strict.tolist() for case in query.cases] == [[True], [False] * 3]


def test_a_strict_inequality_does_not_hold_where_both_sides_are_equal(read):
    for sign, holds in (("<", False), ("<=", True)):
        (query,) = read(f"{DECLARED} {BOX} (assert ({sign} Y_0 Y_1))")
        assert query.cases[0].holds(torch.ones(3, dtype=torch.float64)) == holds


@pytest.mark.parametrize(("number", "sign", "holds"), [("0.1", "<=", False), ("0.1", ">=", True)])
def test_outputs_are_compared_with_a_limit_that_float64_does_not_have(read, number, sign, holds):
    (query,) = read(f"{DECLARED} {BOX} (assert ({sign} Y_0 {number}))")
    y = torch.tensor([float(number), 0.0, 0.0], dtype=torch.float64)
    assert Fraction(y[0].item()) > Fraction(number)
    assert query.cases[0].holds(y) == holds
    (query,) = read(f"{DECLARED} {BOX} (assert (>= (* {number} Y_0) 1))")
    assert not query.cases[0].holds(torch.tensor([10 - 1e-14, 0.0, 0.0], dtype=torch.float64))
    assert not query.cases[0].holds(torch.tensor([math.nan, 0.0, 0.0], dtype=torch.float64))


def test_bounds_are_rounded_outwards(read):
    text = "0.10000000000000001"  # above the float nearest to 0.1, which is above 0.1
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

    assert Fraction(float(query.inside[0][0])) >= Fraction("0.1")
    assert Fraction(float(query.inside[1][0])) <= Fraction(text)
    assert (
        query.inside[0][1] == query.inside[1][1] == -0.1
    )  # no number of float64 is, but this is the nearest


def test_a_row_is_scaled_by_a_power_of_two(read):
    (query,) = read(f"{DECLARED} {BOX} (assert (<= (+ (* 1e-7 Y_0) (* 3e-8 Y_1)) -2e-7))")
    ((row, limit),) = zip(query.cases[0].rows, query.cases[0].limits, strict=True)
    scale = 2.0**23
    assert row.tolist() == [1e-7 * scale, 3e-8 * scale, 0]
    assert limit == -2e-7 * scale


@pytest.mark.parametrize("atom", ["(<= 1 2)", "(<= (* 0 Y_0) 1)", "(>= Y_0 Y_0)", "(= 1 1.0)"])
def test_what_is_always_true_changes_nothing(read, atom):
    ((plain,), (with_it,)) = (
        read(f"{DECLARED} {BOX} (assert (<= Y_0 1)) {more}") for more in ("", f"(assert {atom})")
    )
    assert cases(plain) == cases(with_it)


@pytest.mark.parametrize("atom", ["(<= 2 1)", "(< Y_0 Y_0)", "(= 1 2)", "(> (* 0 Y_1) 0)"])
def test_what_is_never_true_has_no_counter_example(read, atom):
    assert read(f"{DECLARED} {BOX} (assert {atom})") == ()
    (query,) = read(f"{DECLARED} {BOX} (assert (or {atom} (<= Y_0 1)))")
    assert cases(query) == [([[1, 0, 0]], [1])]


def test_factors_that_float64_does_not_have_are_not_taken_for_zero(read):
    for factor, limit in (("1e-400", "-1e-400"), ("1e300", "-1e300")):
        (query,) = read(f"{DECLARED} {BOX} (assert (<= (* {factor} Y_0) {limit}))")
        one = torch.ones(3, dtype=torch.float64)
        assert query.cases[0].holds(-one)
        assert not query.cases[0].holds(one)
        assert not query.cases[0].holds(0 * one)


def test_an_input_alone_may_be_a_counter_example(read):
    (query,) = read(f"{DECLARED} {BOX}")
    assert query.cases[0].holds(torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("(vnnlib-version <2.0>)", "with 0 inputs"),
        ("(declare-network f (declare-input X float32 [2]))", "only a network of one input and one output"),
        (
            "(declare-network f (declare-input X float32 [99999, 99999]) (declare-output Y float32 [1]))",
            "more than 10,000,000 entries",
        ),
        (f"{DECLARED} {BOX} (assert (!= Y_0 1))", r"\(!= Y_0 1\) is no inequality"),
        (f"{DECLARED} {BOX} (assert (< X_0 0.3))", "bound of X_0 is strict"),
        (f"{DECLARED} {BOX} (assert (<= Y_0 (* Y_1 Y_2)))", r"\(\* Y_1 Y_2\) is not linear"),
        (f"{DECLARED} {BOX} (assert (<= Y_0 X_0))", "inputs may only have bounds"),
        (f"{DECLARED} {BOX} (assert (<= (+ X_0 X_1) 1))", "X_0, X_1: inputs may only"),
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


WORDS = [
    "(",
    ")",
    "(",
    ")",
    "assert",
    "declare-const",
    "declare-network",
    "declare-input",
    "and",
    "or",
    "<=",
    ">=",
]
WORDS += ["<", "=", "+", "-", "*", "X_0", "Y_0", "Y[0]", "[1]", "Real", "1", "-0.5", ";", "\n", "[", "]"]


@settings(max_examples=150)
@given(st.lists(st.sampled_from(WORDS), max_size=30), st.booleans())
def test_no_text_at_all_leads_to_anything_but_a_property_or_a_refusal(words, whole):
    start = (
        "(declare-const X_0 Real) (declare-const Y_0 Real) (assert (<= X_0 1)) (assert (>= X_0 0)) (assert "
    )
    text = " ".join(words)
    with tempfile.NamedTemporaryFile("w", suffix=".vnnlib") as file, contextlib.suppress(InputError):
        file.write(f"{start} (assert {text})" if whole else text)
        file.flush()
        assert isinstance(read_vnnlib(Path(file.name), 1, 1), tuple)


GRID = [-1.0, -0.5, 0.0, 0.5, 1.0]
OPERATORS = {"<=": float.__le__, ">=": float.__ge__, "<": float.__lt__, ">": float.__gt__, "=": float.__eq__}
sides = st.sampled_from(["Y_0", "Y_1", "(+ Y_0 (* 0.5 Y_1))", "(- Y_1 Y_0)", "0.5", "(- 0.5)"])
atoms = st.one_of(
    st.tuples(st.sampled_from(["<=", ">=", "="]), st.just("X_0"), st.sampled_from(["0.5", "-0.5", "0"])),
    st.tuples(st.sampled_from(sorted(OPERATORS)), st.sampled_from(["Y_0", "Y_1"]), sides),
).filter(lambda atom: atom[1] != atom[2])
formulas = st.recursive(
    atoms, lambda part: st.tuples(st.sampled_from(["and", "or"]), st.lists(part, max_size=3)), max_leaves=8
)


def written(formula) -> str:
    head, *rest = formula
    return f"({head} {' '.join(map(written, rest[0]) if head in ('and', 'or') else rest)})"


def value(term: str, at: dict[str, float]) -> float:
    known = {"(+ Y_0 (* 0.5 Y_1))": at["Y_0"] + 0.5 * at["Y_1"], "(- Y_1 Y_0)": at["Y_1"] - at["Y_0"]}
    known |= {**at, "(- 0.5)": -0.5}
    return known[term] if term in known else float(term)


def true(formula, at: dict[str, float]) -> bool:
    head, *rest = formula
    if head in ("and", "or"):
        return (all if head == "and" else any)(true(part, at) for part in rest[0])
    return OPERATORS[head](value(rest[0], at), value(rest[1], at))


@settings(max_examples=75)
@given(formulas)
def test_boxes_and_cases_say_what_the_formula_says(formula):
    declared = "(declare-const X_0 Real) (declare-const Y_0 Real) (declare-const Y_1 Real)"
    with tempfile.NamedTemporaryFile("w", suffix=".vnnlib") as file:
        file.write(f"{declared} (assert (<= X_0 1)) (assert (>= X_0 -1)) (assert {written(formula)})")
        file.flush()
        queries = read_vnnlib(Path(file.name), 1, 2)
    for x, y0, y1 in itertools.product(GRID, repeat=3):
        y = torch.tensor([y0, y1], dtype=torch.float64)
        said = any(q.lower[0] <= x <= q.upper[0] and any(c.holds(y) for c in q.cases) for q in queries)
        assert said == true(formula, {"X_0": x, "Y_0": y0, "Y_1": y1})

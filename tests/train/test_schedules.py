"""Schedules against methods.md, section 1, in absolute steps."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from tightrope.train import Course, Ramp, Steps
from tightrope.train.schedules import Number, at, first_drop, last, parse_number

SHARES = st.floats(0, 1)
VALUES = st.floats(-10, 10)


def smooth_by_steps(s, s0, s1, start, end, c=0.25, b=4):
    """methods.md, section 1.1, word for word."""
    m = s0 + int(c * (s1 - s0))
    t = (m - s0) ** (b - 1)
    alpha = (end - start) / ((s1 - m) * b * t + (m - s0) * t)
    if s <= s0:
        return start
    if s < m:
        return start + alpha * (s - s0) ** b
    middle = start + alpha * (m - s0) ** b
    return middle + (end - middle) * (s - m) / (s1 - m) if s < s1 else end


@given(st.integers(0, 300), st.integers(1, 100), st.integers(1, 300), st.floats(0, 1), st.floats(0, 1))
def test_the_smooth_ramp_is_deepminds_in_absolute_steps(s0, quarter, rest, start, end):
    s1 = s0 + 4 * quarter
    total = s1 + rest
    ramp = Ramp(shape="smooth", start=start, end=end, begin=s0 / total, finish=s1 / total)
    for s in {0, s0, s0 + 1, s0 + quarter - 1, s0 + quarter, s0 + quarter + 1, s1 - 1, s1, total}:
        assert ramp(s / total) == pytest.approx(smooth_by_steps(s, s0, s1, start, end), abs=1e-9)


def test_the_smooth_ramp_is_continuous_where_its_parts_join_in_value_and_slope():
    ramp = Ramp(shape="smooth", start=0.0, end=0.3, begin=0.2, finish=0.6)
    joint, h = 0.3, 1e-6
    assert ramp(joint - 1e-12) == pytest.approx(ramp(joint + 1e-12), abs=1e-10)
    before, after = (ramp(joint) - ramp(joint - h)) / h, (ramp(joint + h) - ramp(joint)) / h
    assert before == pytest.approx(after, rel=1e-3)
    assert (ramp(0.2 + h) - ramp(0.2)) / h == pytest.approx(0, abs=1e-9)  # it begins flat
    assert ramp(0.6 - h) == pytest.approx(0.3, abs=1e-5)


def test_the_linear_ramp():
    ramp = Ramp(shape="linear", start=1.0, end=0.5, begin=0.2, finish=0.6)
    assert [ramp(p) for p in (0.0, 0.2, 0.3, 0.4, 0.6, 1.0)] == pytest.approx([1, 1, 0.875, 0.75, 0.5, 0.5])


@given(st.sampled_from(["linear", "smooth"]), VALUES, VALUES, SHARES, SHARES, st.lists(SHARES, min_size=2))
def test_a_ramp_moves_one_way_between_its_ends(shape, start, end, a, b, moments):
    ramp = Ramp(shape=shape, start=start, end=end, begin=min(a, b), finish=max(a, b))
    values = [ramp(moment) for moment in sorted(moments)]
    sign = math.copysign(1, end - start)
    assert all(sign * (after - before) >= -1e-12 for before, after in itertools.pairwise(values))
    assert all(min(start, end) - 1e-12 <= value <= max(start, end) + 1e-12 for value in values)
    assert ramp(ramp.finish) == ramp(1.0) == end
    if ramp.begin < ramp.finish:
        assert ramp(0.0) == ramp(ramp.begin) == start


def test_a_ramp_of_no_length_is_a_jump():
    jump = Ramp(start=0.0, end=1.0, begin=0.5, finish=0.5)
    assert (jump(0.499), jump(0.5)) == (0.0, 1.0)


def test_steps_multiply_at_their_moments():
    steps = Steps(start=1.0, factor=0.1, at=("25/100", "42/100"))
    assert [steps(p) for p in (0.0, 0.2499, 0.25, 0.4199, 0.42, 1.0)] == pytest.approx(
        [1, 1, 0.1, 0.1, 0.01, 0.01]
    )
    assert Steps(start=0.3, at=())(1.0) == 0.3


@given(st.integers(1, 20), st.integers(1, 10), st.integers(0, 99))
def test_more_epochs_keep_the_shape(factor, batches, epoch):
    ramp = Ramp(shape="smooth", start=0.0, end=0.4, begin="3/100", finish="20/100")
    short, long = 100 * batches, 100 * factor * batches
    assert ramp(epoch * batches / short) == pytest.approx(ramp(epoch * factor * batches / long), abs=1e-12)


@given(st.sampled_from(["linear", "smooth"]), VALUES, VALUES, SHARES)
def test_between_keeps_the_course(shape, start, end, moment):
    course = Course(shape=shape, begin=0.1, finish=0.9)
    expected = start + (end - start) * course.between(0.0, 1.0)(moment)
    assert course.between(start, end)(moment) == pytest.approx(expected, abs=1e-9)


def test_a_number_is_a_schedule_that_stands_still():
    assert at(0.3, 0.1) == last(0.3) == 0.3
    assert last(Ramp(end=0.2)) == 0.2
    assert at(Steps(start=1.0, factor=0.5, at=(0.5,)), 0.7) == 0.5


def test_a_ramp_tells_its_course_and_a_course_makes_ramps():
    ramp = Ramp(shape="smooth", start=1.0, end=2.0, begin=0.1, finish=0.2)
    assert ramp.course() == Course(shape="smooth", begin=0.1, finish=0.2)
    assert ramp.course().between(1.0, 2.0) == ramp


def test_a_course_has_no_values_of_its_own():
    with pytest.raises(ValueError, match="end"):
        Course(begin=0.1, finish=0.2, end=0.5)


@pytest.mark.parametrize(
    ("number", "moment"),
    [
        (0.1, 1.0),
        (Steps(start=1.0, at=(0.25, 0.5)), 0.25),
        (Steps(start=1.0, at=()), 1.0),
        (Steps(start=1.0, factor=2.0, at=(0.25,)), 1.0),
        (Ramp(start=1.0, end=0.0, begin=0.3, finish=0.9), 0.3),
        (Ramp(start=0.0, end=1.0, begin=0.3, finish=0.9), 1.0),
    ],
)
def test_the_first_drop_of_a_schedule(number, moment):
    assert first_drop(number) == moment


# ------------------------------------------------------------------------------------ what is read


@pytest.mark.parametrize(
    ("text", "number"),
    [("8/255", 8 / 255), (" 20 / 100 ", 0.2), ("0.3", 0.3), ("1e-3", 1e-3), ("2", 2.0), (0.5, 0.5), (1, 1.0)],
)
def test_fractions_are_numbers(text, number):
    assert parse_number(text) == number
    assert TypeAdapter(Number).validate_python(text) == number


NONSENSE = [
    "",
    "much",
    "1/0",
    "8/255/3",
    "nan",
    "inf",
    "-inf",
    "1e400",
    True,
    False,
    math.nan,
    math.inf,
    None,
]


@pytest.mark.parametrize("value", NONSENSE, ids=repr)
def test_what_is_no_finite_number_is_refused(value):
    with pytest.raises(ValidationError):
        TypeAdapter(Number).validate_python(value)


@pytest.mark.parametrize(
    ("table", "schedule"),
    [
        ({"shape": "smooth", "end": 1, "begin": "1/70"}, Ramp(shape="smooth", end=1.0, begin=1 / 70)),
        ({"shape": "linear", "end": "8/255"}, Ramp(end=8 / 255)),
        ({"shape": "step", "start": 1, "at": ["1/2"]}, Steps(start=1.0, at=(0.5,))),
        ({"start": 1, "at": ["1/2"]}, Steps(start=1.0, at=(0.5,))),
    ],
)
def test_a_table_is_a_schedule(table, schedule):
    assert TypeAdapter(Number).validate_python(table) == schedule


STEPS = {"start": 1.0, "at": (0.5,)}
REFUSED = [
    (Ramp, {"begin": -0.1}, "begin.*greater than or equal to 0"),
    (Ramp, {"finish": "101/100"}, "finish.*less than or equal to 1"),
    (Ramp, {"begin": math.nan}, "begin"),
    (Ramp, {"finish": math.nan}, "finish"),
    (Ramp, {"begin": True}, "expected a number, got True"),
    (Ramp, {"end": 1.0, "begin": 0.5, "finish": 0.4}, r"cannot finish \(0.4\) before it begins \(0.5\)"),
    (Ramp, {"start": math.nan}, "finite"),
    (Ramp, {"end": math.inf}, "finite"),
    (Ramp, {"shape": "cubic"}, "linear.*smooth"),
    (Ramp, {"begn": 0.1}, "begn"),
    (Ramp, {"begin": 0.1}, "end"),
    (Steps, {**STEPS, "at": (0.5, 0.4)}, "must rise"),
    (Steps, {**STEPS, "at": (0.5, 0.5)}, "must rise"),
    (Steps, {**STEPS, "at": (math.nan,)}, "at.0"),
    (Steps, {**STEPS, "at": (1.5,)}, "at.0"),
    (Steps, {**STEPS, "at": 0.5}, "at"),
    (Steps, {**STEPS, "start": True}, "expected a number, got True"),
    (Steps, {**STEPS, "factor": 0.0}, "greater than 0"),
    (Steps, {**STEPS, "factor": math.nan}, "factor"),
    (Steps, {**STEPS, "fctor": 0.1}, "fctor"),
    (Steps, {"start": 1.0}, "at"),
]


@pytest.mark.parametrize(("schedule", "options", "message"), REFUSED, ids=lambda v: str(v))
def test_what_a_schedule_refuses(schedule, options, message):
    with pytest.raises(ValidationError, match=f"(?s){message}"):
        schedule(**options)

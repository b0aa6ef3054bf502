"""Numbers that change during a run.

Time is the share of the run that is done, from 0 to 1, so that a longer or shorter run keeps the
shape of its schedules: "epochs 3 to 20 of 100" is `begin = 3/100`, `finish = 20/100`.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator


def parse_number(value: Any) -> Any:
    """Turn `"8/255"` into a float; everything else passes through, to be judged by the validator."""
    if isinstance(value, str):
        try:
            return float(Fraction(value.replace(" ", "")))
        except (ValueError, ArithmeticError):
            raise ValueError(f"expected a number such as 0.3 or 8/255, got {value!r}") from None
    if isinstance(value, bool):
        raise ValueError(f"expected a number, got {value}")
    return value


def parse_whole(value: Any) -> Any:
    """Turn `"256"` into a number, as `parse_number` does."""
    if isinstance(value, str) and not value.strip().lstrip("+-").isdigit():
        raise ValueError(f"expected a whole number such as 256, got {value!r}")
    return parse_number(value)


Real = Annotated[float, BeforeValidator(parse_number), Field(allow_inf_nan=False)]
Share = Annotated[float, BeforeValidator(parse_number), Field(ge=0, le=1)]
Decay = Annotated[float, BeforeValidator(parse_number), Field(ge=0, lt=1)]
Positive = Annotated[Real, Field(gt=0)]
NotNegative = Annotated[Real, Field(ge=0)]
Whole = Annotated[int, BeforeValidator(parse_whole)]


class _Options(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Timed(_Options):
    shape: Literal["linear", "smooth"] = "linear"
    begin: Share = 0.03
    finish: Share = 0.2

    @model_validator(mode="after")
    def _ordered(self) -> _Timed:
        if self.finish < self.begin:
            raise ValueError(f"a ramp cannot finish ({self.finish}) before it begins ({self.begin})")
        return self


class Ramp(_Timed):
    """From `start` to `end` between two moments of the run, constant before and after.

    Args:
        shape: "linear", or "smooth": a quartic start that joins a straight line after a quarter of
            the way (methods.md, section 1.1; DeepMind, auto_LiRPA).
        start: value at the beginning of the run.
        end: value at the end.
        begin: share of the run at which the value begins to move.
        finish: share of the run at which it has arrived.
    """

    start: Real = 0.0
    end: Real

    def __call__(self, progress: float) -> float:
        """The value when this share of the run is done."""
        if progress >= self.finish:
            return self.end
        if progress <= self.begin:
            return self.start
        done = (progress - self.begin) / (self.finish - self.begin)
        return self.start + (self.end - self.start) * (done if self.shape == "linear" else _smooth(done))

    def course(self) -> Course:
        """When the value moves, without the values."""
        return Course(shape=self.shape, begin=self.begin, finish=self.finish)


class Course(_Timed):
    """When a ramp moves, and in which shape; from where to where, a method says.

    Args:
        shape: as in `Ramp`.
        begin: share of the run at which values begin to move.
        finish: share of the run at which they have arrived.
    """

    def between(self, start: float, end: float) -> Ramp:
        """The ramp of this course between two values, which the caller checks."""
        return Ramp.model_construct(**self.model_dump(), start=start, end=end)


class Steps(_Options):
    """`start`, multiplied by `factor` at each of the moments `at`.

    Args:
        shape: "step".
        start: value at the beginning of the run.
        factor: what the value is multiplied by.
        at: shares of the run, rising.
    """

    shape: Literal["step"] = "step"
    start: Real
    factor: Annotated[Real, Field(gt=0)] = 0.1
    at: tuple[Share, ...]

    @model_validator(mode="after")
    def _rising(self) -> Steps:
        if list(self.at) != sorted(set(self.at)):
            raise ValueError(f"the moments of a step schedule must rise, got {list(self.at)}")
        return self

    def __call__(self, progress: float) -> float:
        """The value when this share of the run is done."""
        return self.start * float(self.factor ** sum(progress >= moment for moment in self.at))


def completed(said: Any, usual: Any) -> Any:
    """A table that says a part of a schedule, with the rest of the usual one; anything else as it is.

    A table that names its shape is a schedule of its own.

    Raises:
        ValueError: if a ramp is to stand for a number and does not say from where to where it goes.
    """
    if isinstance(said, Mapping) and isinstance(usual, int | float) and _form(said) == "<ramp>":
        missing = [key for key in ("start", "end") if key not in said]
        if missing:
            raise ValueError(f"a ramp in place of the number {usual:g} needs {' and '.join(missing)}")
    if not isinstance(said, Mapping) or not isinstance(usual, Ramp | Course | Steps):
        return said
    whole = usual.model_dump()
    another = {*Ramp.model_fields, *Steps.model_fields} - whole.keys()
    # A key of no schedule is a part misspelt: with the rest, that is all there is to complain of.
    return said if "shape" in said or said.keys() & another else whole | dict(said)


def _form(value: Any) -> str:
    """Which form a number is given in, so that an error speaks of that form alone."""
    if isinstance(value, Mapping):
        return "<steps>" if value.get("shape") == "step" or "at" in value else "<ramp>"
    return "<steps>" if isinstance(value, Steps) else "<ramp>" if isinstance(value, Ramp) else "<number>"


Fixed = Annotated[Real, Tag("<number>")]
Ramped = Annotated[Ramp, Tag("<ramp>")]
Stepped = Annotated[Steps, Tag("<steps>")]
Number = Annotated[Fixed | Ramped | Stepped, Discriminator(_form)]
NumberOrRamp = Annotated[Fixed | Ramped, Discriminator(_form)]


def at(number: float | Ramp | Steps, progress: float) -> float:
    """The value of a number or schedule when this share of the run is done."""
    return number(progress) if isinstance(number, Ramp | Steps) else number


def last(number: float | Ramp | Steps) -> float:
    """The value at the end of the run."""
    return at(number, 1.0)


def first_drop(number: float | Ramp | Steps) -> float:
    """Share of the run at which a schedule first falls; 1 if it never does."""
    if isinstance(number, Steps) and number.factor < 1:
        return min(number.at, default=1.0)
    return number.begin if isinstance(number, Ramp) and number.end < number.start else 1.0


def settles(number: float | Ramp | Steps) -> float:
    """Share of the run after which a schedule does not move any more; 0 if it never does."""
    if isinstance(number, Steps):
        return max(number.at, default=0.0)
    return number.finish if isinstance(number, Ramp) and number.start != number.end else 0.0


def _smooth(done: float) -> float:
    middle, exponent = 0.25, 4
    scale = 1 / (middle ** (exponent - 1) * ((1 - middle) * exponent + middle))
    if done < middle:
        return float(scale * done**exponent)
    joint = scale * middle**exponent
    return float(joint + (1 - joint) * (done - middle) / (1 - middle))

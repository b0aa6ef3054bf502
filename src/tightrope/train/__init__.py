"""Certified training: methods, schedules, the step, and the loop."""

from tightrope.train import modifiers as _modifiers  # noqa: F401 (registers them)
from tightrope.train.loop import Interrupted, Training, train
from tightrope.train.methods import METHODS, MODIFIERS, Method, Modifier
from tightrope.train.objective import Loss
from tightrope.train.schedules import Course, Ramp, Steps

__all__ = [
    "METHODS",
    "MODIFIERS",
    "Course",
    "Interrupted",
    "Loss",
    "Method",
    "Modifier",
    "Ramp",
    "Steps",
    "Training",
    "train",
]

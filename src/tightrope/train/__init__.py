"""Certified training: methods, schedules, the step, and the loop."""

from tightrope.train.loop import Interrupted, Training, train
from tightrope.train.methods import METHODS, Loss, Method
from tightrope.train.schedules import Course, Ramp, Steps

__all__ = ["METHODS", "Course", "Interrupted", "Loss", "Method", "Ramp", "Steps", "Training", "train"]

"""tightrope: train neural networks that are provably robust, and prove it, input by input.

import tightrope as tr

run = tr.fit(model, train_set, tr.methods.ibp(eps=0.3), epochs=100, out="runs/a")
result = tr.certify(model, test_set, tr.Box(eps=0.3))
"""

from tightrope import engines, methods
from tightrope.api import Run, bounds, certify, fit, latent_robustness, margins, radius
from tightrope.errors import DivergedError, InputError, SoundnessViolation, TightropeError
from tightrope.rechecking import recheck
from tightrope.region import Box, L1Ball, L2Ball
from tightrope.train import Course, Method, Ramp, Steps
from tightrope.train.modifiers import (
    auto_eps,
    l1,
    reweight,
    reweight_attack,
    reweight_gairat,
    shi_reg,
    tightness_d,
    tightness_r,
)

__all__ = [
    "Box",
    "Course",
    "DivergedError",
    "InputError",
    "L1Ball",
    "L2Ball",
    "Method",
    "Ramp",
    "Run",
    "SoundnessViolation",
    "Steps",
    "TightropeError",
    "auto_eps",
    "bounds",
    "certify",
    "engines",
    "fit",
    "l1",
    "latent_robustness",
    "margins",
    "methods",
    "radius",
    "recheck",
    "reweight",
    "reweight_attack",
    "reweight_gairat",
    "shi_reg",
    "tightness_d",
    "tightness_r",
]

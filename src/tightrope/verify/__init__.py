"""Certification: verdicts on examples, and certified radii, one by one."""

from tightrope.verify.bab import BranchAndBound
from tightrope.verify.latent import LATENT_ATTACK, LatentRobustness, latent_robustness
from tightrope.verify.pipeline import Certification, Judge, certify
from tightrope.verify.property import CounterExample, Decision, decide
from tightrope.verify.radius import Radii, Radius, certified_radii, read_radii
from tightrope.verify.records import read_verdicts
from tightrope.verify.stages import CERTIFICATION_ATTACK, BoundStage, Finding, Stage
from tightrope.verify.verdict import Status, Verdict, Witness, summarise
from tightrope.verify.verifiers import VERIFIERS
from tightrope.verify.vnnlib import read_vnnlib, write_robustness

__all__ = [
    "CERTIFICATION_ATTACK",
    "LATENT_ATTACK",
    "VERIFIERS",
    "BoundStage",
    "BranchAndBound",
    "Certification",
    "CounterExample",
    "Decision",
    "Finding",
    "Judge",
    "LatentRobustness",
    "Radii",
    "Radius",
    "Stage",
    "Status",
    "Verdict",
    "Witness",
    "certified_radii",
    "certify",
    "decide",
    "latent_robustness",
    "read_radii",
    "read_verdicts",
    "read_vnnlib",
    "summarise",
    "write_robustness",
]

"""Certification: verdicts on examples, and certified radii, one by one."""

from tightrope.verify.bab import BranchAndBound
from tightrope.verify.pipeline import Certification, Judge, certify
from tightrope.verify.radius import Radii, Radius, certified_radii, read_radii
from tightrope.verify.records import read_verdicts
from tightrope.verify.stages import CERTIFICATION_ATTACK, BoundStage, Finding, Stage
from tightrope.verify.verdict import Status, Verdict, Witness, summarise
from tightrope.verify.verifiers import VERIFIERS

__all__ = [
    "CERTIFICATION_ATTACK",
    "VERIFIERS",
    "BoundStage",
    "BranchAndBound",
    "Certification",
    "Finding",
    "Judge",
    "Radii",
    "Radius",
    "Stage",
    "Status",
    "Verdict",
    "Witness",
    "certified_radii",
    "certify",
    "read_radii",
    "read_verdicts",
    "summarise",
]

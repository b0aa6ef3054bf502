"""Certification: verdicts on examples, one by one."""

from tightrope.verify.pipeline import Certification, Judge, certify
from tightrope.verify.records import read_verdicts
from tightrope.verify.stages import CERTIFICATION_ATTACK, VERIFIERS, BoundStage
from tightrope.verify.verdict import Status, Verdict, Witness, summarise

__all__ = [
    "CERTIFICATION_ATTACK",
    "VERIFIERS",
    "BoundStage",
    "Certification",
    "Judge",
    "Status",
    "Verdict",
    "Witness",
    "certify",
    "read_verdicts",
    "summarise",
]

"""Certification: verdicts on examples, one by one."""

from tightrope.verify.pipeline import Certification, Judge, certify, read_verdicts
from tightrope.verify.stages import CERTIFICATION_ATTACK, VERIFIERS, BoundStage
from tightrope.verify.verdict import Status, Verdict, summarise

__all__ = [
    "CERTIFICATION_ATTACK",
    "VERIFIERS",
    "BoundStage",
    "Certification",
    "Judge",
    "Status",
    "Verdict",
    "certify",
    "read_verdicts",
    "summarise",
]

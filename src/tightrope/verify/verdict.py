"""What is known about one example, and what that makes in sum."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from jaxtyping import Float64
from torch import Tensor

Status = Literal["robust", "falsified", "undecided", "misclassified"]


@dataclass(frozen=True, eq=False)
class Witness:
    """A point of the region that the network does not classify as the label.

    Args:
        point: the point, bit for bit.
        predicted: the class it is taken for.
    """

    point: Float64[Tensor, "*shape"]
    predicted: int


@dataclass(frozen=True)
class Certificate:
    """Where the certificate of a verdict is.

    Args:
        file: in the folder of certificates.
        sha256: of that file.
        proof: the rule by which the checker repeats the proof; None if there is none to repeat.
    """

    file: str
    sha256: str
    proof: str | None


@dataclass(frozen=True)
class Verdict:
    """The verdict on one example.

    Args:
        index: number of the example in its data set.
        label: its class.
        predicted: what the network says to the unperturbed input; a tie counts against the label.
        status: "robust" (proved), "falsified" (the witness changes the answer), "undecided", or
            "misclassified" (wrong without any perturbation).
        stage: which stage decided, or was the last to try.
        margin: that stage's smallest margin over the wrong classes: a lower bound where a verifier
            spoke, the margin at a point where "clean" or "attack" did. Positive is safe.
        seconds: time spent on this example, its share of each batch.
        witness: where the answer changes, if the example is falsified.
        certificate: where its certificate is, if one was asked for.
    """

    index: int
    label: int
    predicted: int
    status: Status
    stage: str
    margin: float
    seconds: float
    witness: Witness | None = None
    certificate: Certificate | None = None


def summarise(verdicts: Iterable[Verdict], attacked: bool = True) -> dict[str, Any]:
    """Counts and accuracies (shares of all examples) over verdicts.

    Args:
        verdicts: one per example.
        attacked: whether an attack was run; if not, the attacked accuracy is None, not the clean one.
    """
    statuses = [verdict.status for verdict in verdicts]
    count = len(statuses)
    clean = count - statuses.count("misclassified")
    robust, falsified = statuses.count("robust"), statuses.count("falsified")
    return {
        "examples": count,
        "clean_correct": clean,
        "robust": robust,
        "falsified": falsified,
        "undecided": statuses.count("undecided"),
        "certified_accuracy": robust / count if count else 0.0,
        "clean_accuracy": clean / count if count else 0.0,
        "attacked_accuracy": ((clean - falsified) / count if count else 0.0) if attacked else None,
    }

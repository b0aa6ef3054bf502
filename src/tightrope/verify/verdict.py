"""What is known about one example, and what that makes in sum."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from torch import Tensor, from_numpy

Status = Literal["robust", "falsified", "undecided", "misclassified"]


@dataclass(frozen=True)
class Verdict:
    """The verdict on one example.

    Args:
        index: number of the example in its data set.
        label: its class.
        predicted: what the network says to the unperturbed input.
        status: "robust" (proved), "falsified" (the witness changes the answer), "undecided", or
            "misclassified" (wrong without any perturbation).
        stage: which stage decided, or was the last to try.
        margin: that stage's smallest margin over the wrong classes: a lower bound where a verifier
            spoke, the margin at a point where "clean" or "attack" did. Positive is safe.
        seconds: time spent on this example, its share of each batch.
        witness: a point of the region that is not classified as the label, float64.
    """

    index: int
    label: int
    predicted: int
    status: Status
    stage: str
    margin: float
    seconds: float
    witness: Tensor | None = None

    def to_record(self) -> dict[str, Any]:
        """The verdict as JSON values; a witness bit for bit."""
        witness = None
        if self.witness is not None:
            values = self.witness.numpy().astype("<f8")
            witness = {"shape": list(values.shape), "float64": base64.b64encode(values.tobytes()).decode()}
        return {**vars(self), "witness": witness}

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Verdict:
        """The verdict that `to_record` made this of."""
        witness = record["witness"]
        if witness is not None:
            values = np.frombuffer(base64.b64decode(witness["float64"]), "<f8").astype("f8")
            witness = from_numpy(values.reshape(witness["shape"]))
        return cls(**{**record, "witness": witness})


def summarise(verdicts: Iterable[Verdict], attacked: bool = True) -> dict[str, Any]:
    """Counts and accuracies over verdicts.

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

"""Pictures of successful attacks: the original, what was added, and the result."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib.image
import numpy as np
import torch
from numpy.typing import NDArray

from tightrope.data import DataSet
from tightrope.data import load as load_data
from tightrope.errors import TightropeError
from tightrope.report.read import Certificate
from tightrope.verify import Verdict, Witness

MOST = 8
_NO_METADATA: dict[str, Any] = {"Software": None}
_ROUNDING = 1e-6  # originals are float32, witnesses float64

Load = Callable[[str], "DataSet"]


@dataclass(frozen=True)
class Example:
    """Three pictures as PNG data URIs, and what to write below them."""

    index: int
    label: str
    predicted: str
    original: str
    perturbation: str
    perturbed: str
    largest: float
    scale: str


def examples(certificates: Sequence[Certificate], load: Load) -> tuple[list[Example], str]:
    """Draw the first successful attacks.

    Args:
        certificates: the certify files of one run.
        load: gives a data set by its name.

    Returns:
        At most 8 examples, and a sentence on why there are none although attacks succeeded ("" otherwise).
    """
    found: dict[int, tuple[Certificate, Verdict, Witness]] = {}
    for certificate in certificates:
        for verdict in certificate.verdicts:
            if verdict.witness is not None:
                found.setdefault(verdict.index, (certificate, verdict, verdict.witness))
    drawn: list[Example] = []
    for certificate, verdict, witness in list(found.values())[:MOST]:
        try:
            data = load(certificate.data)
        except (TightropeError, OSError) as error:
            return [], f"The data set “{certificate.data}” is not at hand, so they are not drawn ({error})."
        example = _example(certificate, verdict, witness, data)
        if isinstance(example, str):
            return [], example
        drawn.append(example)
    return drawn, ""


def _example(certificate: Certificate, verdict: Verdict, witness: Witness, data: DataSet) -> Example | str:
    index, identity = verdict.index, certificate.identity
    stranger = (
        f"The data set “{certificate.data}” at hand is not the one that was certified ({{}}), "
        "so they are not drawn."
    )
    if index >= len(data.test):
        return stranger.format(f"it has no test example {index}")
    if int(data.test.y[index]) != verdict.label:
        return stranger.format(f"test example {index} has another label")
    original = data.test.images(torch.tensor([index]))[0].double().cpu().numpy()
    perturbed = witness.point.numpy()
    if original.shape != perturbed.shape:
        return stranger.format(f"example {index} has shape {original.shape}, its witness {perturbed.shape}")
    if original.ndim != 3 or original.shape[0] not in (1, 3):
        return f"Inputs of shape {original.shape} are not images, so they are not drawn."
    change = perturbed - original
    size = np.linalg.norm(np.maximum(abs(change) - _ROUNDING, 0).ravel(), float(identity["norm"]))
    if size > identity["eps"] * (1 + _ROUNDING):
        return stranger.format(f"the witness of example {index} is {size:.4g} away, more than eps")
    largest = float(abs(change).max())
    return Example(
        index=index,
        label=_class(data.class_names, verdict.label),
        predicted=_class(data.class_names, witness.predicted),
        original=_png(original),
        perturbation=_png(0.5 + change / (2 * largest or 1.0), signed=True),
        perturbed=_png(perturbed),
        largest=largest,
        scale="red is brighter, blue is darker" if len(original) == 1 else "mid-grey is no change",
    )


def _class(names: Sequence[str], number: int) -> str:
    name = names[number] if 0 <= number < len(names) else str(number)
    return name if name == str(number) else f"{number} ({name})"


def _png(image: NDArray[np.float64], signed: bool = False) -> str:
    """A (C, H, W) image in [0, 1] as a data URI; `signed` draws one channel in blue (0) to red (1)."""
    stream = io.BytesIO()
    pixels = np.clip(image, 0.0, 1.0)
    if len(image) == 1:
        matplotlib.image.imsave(
            stream,
            pixels[0],
            cmap="RdBu_r" if signed else "gray",
            vmin=0.0,
            vmax=1.0,
            format="png",
            metadata=_NO_METADATA,
        )
    else:
        matplotlib.image.imsave(stream, pixels.transpose(1, 2, 0), format="png", metadata=_NO_METADATA)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def loader() -> Load:
    """A function that loads each data set once, and downloads nothing."""
    loaded: dict[str, DataSet] = {}

    def get(name: str) -> DataSet:
        if name not in loaded:
            loaded[name] = load_data(name, download=False)
        return loaded[name]

    return get

"""Networks to ONNX files."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tightrope.errors import InputError
from tightrope.extras import require
from tightrope.files import write_atomically
from tightrope.graph.onnx.read import TRIES, agree, read


def write_onnx(module: nn.Module, input_shape: Sequence[int], path: Path) -> None:
    """Write a network in float32 to an ONNX file, whose batch may have any size.

    It is read back first, and what was read compared with the network and with onnxruntime.

    Args:
        module: a network that `trace` takes; it is exported in evaluation mode, whatever mode it is in.
        input_shape: shape of one input, without the batch dimension.
        path: the file.

    Raises:
        InputError: if the network cannot be exported, what is read back computes something else, the file
            cannot be written, or the packages that it takes are not installed.
    """
    purpose = "writing an ONNX file"
    require("onnx", "onnx", purpose)
    require("onnxscript", "onnx", purpose)
    network = copy.deepcopy(module).to("cpu", torch.float32).eval().requires_grad_(False)
    x = torch.rand(TRIES, *input_shape, generator=torch.Generator().manual_seed(0))
    model = _export(network, x[:2])
    agree(read(model, str(path)), network, x, f"{path}: what was exported and the network")
    write_atomically(path, model.SerializeToString())


def _export(network: nn.Module, x: Tensor) -> Any:
    """The network as an `onnx.ModelProto`."""
    batch = torch.export.Dim("batch")
    try:
        with warnings.catch_warnings(), _quiet("torch.onnx._internal.exporter._registration"):
            warnings.simplefilter("ignore")  # the exporter's own, on itself
            program = torch.onnx.export(
                network,
                (x,),
                dynamo=True,
                verbose=False,
                input_names=["x"],
                output_names=["logits"],
                dynamic_shapes=({0: batch},),
            )
    except Exception as error:
        reason = " ".join(str(error).split())[:400]
        raise InputError(f"PyTorch cannot export the network to ONNX: {reason}") from error
    assert program is not None
    model = program.model_proto
    # The exporter notes every line of Python that it came by, with its path on this machine.
    for part in (model.graph, *model.graph.node, *model.graph.input, *model.graph.output):
        part.ClearField("metadata_props")
    model.graph.ClearField("value_info")
    return model


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Without a logger's warnings: the exporter's, on packages that the network does not use."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)

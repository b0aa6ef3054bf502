"""`export`: a network as ONNX, and what is to be proved of it as VNN-LIB."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click
import torch

from tightrope.api import warn_of_wide
from tightrope.cli.options import FILE, FOLDER, data_option, first_option, json_option, number, weights_option
from tightrope.data import Split, load
from tightrope.errors import InputError
from tightrope.files import to_json
from tightrope.graph import trace
from tightrope.graph.onnx import write_onnx
from tightrope.region import REGIONS, Region
from tightrope.targets import load_target
from tightrope.verify import write_robustness


@click.command("export")
@click.argument("target")
@weights_option
@click.option("--onnx", "out", type=FILE, required=True, help="ONNX file to write.")
@click.option(
    "--vnnlib",
    "folder",
    type=FOLDER,
    help="Folder for properties (VNN-LIB 1.0), one per test example: its class is robust within eps.",
)
@data_option
@click.option(
    "--eps", type=number, help="l_inf radius in pixel units, from 0.  [default: the run's test eps]"
)
@first_option
@json_option
def export_command(
    target: str,
    weights: Path | None,
    out: Path,
    folder: Path | None,
    data: str | None,
    eps: float | None,
    first: int | None,
    as_json: bool,
) -> None:
    """Write TARGET's network to an ONNX file, and what is to be proved of it to VNN-LIB files.

    TARGET is a run folder, a results folder, an .onnx file, or package.module:factory with --weights. The
    ONNX file is read back and compared with the network, and with onnxruntime, before it is kept.
    """
    loaded = load_target(target, weights)
    if folder is not None and eps is None and loaded.norm != "inf":
        raise InputError(f"{target}'s eps is one in l_{loaded.norm}, and properties are boxes: give --eps")
    data, eps = data or loaded.data, loaded.eps if eps is None else eps
    if data is None and (loaded.input_shape is None or folder is not None):
        raise InputError(f"{target} does not say on what data: give --data")
    if folder is None and click.get_current_context().params["eps"] is not None:
        raise InputError("--eps says what is to be proved of the network: give --vnnlib FOLDER for it too")
    if eps is None and folder is not None:
        raise InputError(f"{target} does not say at which eps: give --eps")
    # The data, where they are needed at all, before anything is written.
    examples = None if data is None or (loaded.input_shape and folder is None) else load(data).test
    shape = loaded.input_shape or (None if examples is None else examples.shape)
    assert shape is not None
    paths, write_properties = list[Path](), None
    if folder is not None and examples is not None and eps is not None:
        paths = _unmixed(folder, eps, min(first or len(examples), len(examples)))
        # Made here: a radius or data that will not do are refused before anything is written.
        region, model = REGIONS["inf"](eps), loaded.taking(examples.shape)
        write_properties = partial(_write_properties, paths, model, examples, region)
    write_onnx(loaded.model, shape, out)
    click.echo(f"network: {out}", err=as_json)
    if write_properties is not None:
        write_properties()
        click.echo(f"properties: {len(paths)} in {folder}", err=as_json)
    if as_json:
        click.echo(to_json({"onnx": str(out), "properties": len(paths)}))


def _unmixed(folder: Path, eps: float, count: int) -> list[Path]:
    """A file for each example's property.

    Raises:
        InputError: if the folder holds others, which would pass for this network's.
    """
    paths = [folder / f"{i:05d}-eps-{eps:.4g}.vnnlib" for i in range(count)]
    others = sorted({*folder.glob("*.vnnlib")} - {*paths})
    if others:
        raise InputError(f"{folder} holds other properties ({others[0].name}, ...): choose another folder")
    return paths


def _write_properties(paths: list[Path], model: torch.nn.Module, examples: Split, region: Region) -> None:
    """One VNN-LIB file per example."""
    eps, classes = float(region.eps), trace(model, examples.shape).classes
    warn_of_wide(eps)
    for i, path in enumerate(paths):
        lower, upper = region.corners(examples.images(torch.tensor([i])).double())
        label = int(examples.y[i])
        about = f"test example {i}, class {label}, l_inf eps {eps!r}; a tie is a counter-example"
        write_robustness(path, lower[0], upper[0], label, classes, about)

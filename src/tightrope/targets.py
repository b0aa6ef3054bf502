"""Networks to certify or attack: a run or results folder, an ONNX file, or a factory with its weights."""

from __future__ import annotations

import importlib
import math
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn

from tightrope.errors import InputError
from tightrope.files import load_tensors, read_json
from tightrope.graph.onnx import read_onnx
from tightrope.models import build
from tightrope.recipes import parse_recipe, read_recipe


class ModelFacts(BaseModel):
    """What `model.json` says: how to rebuild a network, without its weights.

    Args:
        format: of this file.
        name: of the network, or `package.module:factory`; None if it was trained from Python.
        input_shape: shape of one input.
        classes: number of logits.
        mean: of the normalisation that the network begins with, if any.
        std: likewise.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["tightrope-model/1"] = "tightrope-model/1"
    name: str | None
    input_shape: tuple[int, ...]
    classes: int
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Target:
    """A network and what is known about it.

    Args:
        model: the network, in evaluation mode.
        data: name of the data set it was trained on, if known.
        eps: radius it was meant to be certified at, if known.
        norm: in which it is measured.
        folder: where verdicts on it are written, if it is a run folder.
        input_shape: shape of one input, if known.
    """

    model: nn.Module
    data: str | None
    eps: float | None
    folder: Path | None
    input_shape: tuple[int, ...] | None = None
    norm: str = "inf"

    def taking(self, shape: tuple[int, ...]) -> nn.Module:
        """The network for inputs of this shape, which may differ from its own in dimensions of size 1.

        A network that takes vectors takes images too, their entries in order.

        Raises:
            InputError: if it takes other inputs.
        """
        wanted = self.input_shape
        if wanted is None or wanted == shape:
            return self.model
        without_ones, given = (tuple(n for n in sizes if n != 1) for sizes in (wanted, shape))
        vector = len(without_ones) <= 1 and math.prod(wanted) == math.prod(shape)
        if without_ones != given and not vector:
            raise InputError(f"the network takes inputs of shape {wanted}, but those of the data are {shape}")
        return nn.Sequential(nn.Flatten(), nn.Unflatten(1, wanted), self.model).eval()


def load_target(target: str, weights: Path | None = None) -> Target:
    """Load a network.

    Args:
        target: a run or results folder, an `.onnx` file, or `package.module:factory`.
        weights: safetensors file with the factory's weights; the others have their own.

    Raises:
        InputError: if there is no such target, its files are missing, corrupt or of another network, or
            weights are given for one that has its own.
    """
    folder = Path(target)
    if weights is not None and (folder.is_dir() or folder.suffix == ".onnx"):
        raise InputError(
            f"{target} has weights of its own: leave out --weights {weights}, or give what makes the network "
            "as package.module:factory"
        )
    if folder.is_dir():
        return _from_folder(folder)
    if folder.suffix == ".onnx":
        network = read_onnx(folder)
        return Target(network, None, None, None, network.input_shape)
    if ":" in target:
        if weights is None:
            raise InputError(f"{target} is a factory: say where its weights are (--weights FILE.safetensors)")
        model = make_model(target)
        load_weights(model, weights)
        return Target(model.eval(), None, None, None)
    seen = "is a file" if folder.exists() else "does not exist"
    raise InputError(
        f"{target} {seen}: give a run folder, an .onnx file, or package.module:factory with --weights"
    )


def make_model(factory: str) -> nn.Module:
    """The network that `package.module:factory` makes.

    Raises:
        InputError: if it cannot be imported, fails, or makes no network.
    """
    module_name, _, name = factory.partition(":")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        model = getattr(importlib.import_module(module_name), name)()
    except (Exception, SystemExit) as error:  # whatever a user's code raises
        raise InputError(
            f"{factory} cannot be made ({type(error).__name__}: {error}): it must name a function without "
            "arguments that returns a network, in a module that Python finds from here"
        ) from error
    finally:
        with suppress(ValueError):  # the module may have changed the path
            sys.path.remove(here)
    if not isinstance(model, nn.Module):
        raise InputError(f"{factory} returned a {type(model).__name__}: it must return a torch.nn.Module")
    return model


def load_weights(model: nn.Module, path: Path) -> None:
    """Load weights into a network, all or nothing.

    Raises:
        InputError: if the file is missing or corrupt, or belongs to another network.
    """
    tensors, _ = load_tensors(path)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:400]
        raise InputError(f"{path} holds the weights of another network: {reason}") from None
    if not all(bool(torch.isfinite(t).all()) for t in tensors.values() if t.is_floating_point()):
        raise InputError(f"{path} holds NaN or Inf; nothing can be certified about such a network")
    own = model.state_dict()
    rounded = [name for name, t in tensors.items() if not torch.equal(own[name].cpu().to(t.dtype), t)]
    if rounded:
        raise InputError(
            f"{path} has weights that the network rounds ({rounded[0]} is {tensors[rounded[0]].dtype} there "
            f"and {own[rounded[0]].dtype} in the network), so that it would be another one: make the network "
            "in the precision of the file, for example by `.double()` in its factory"
        )


def _from_folder(folder: Path) -> Target:
    if not (folder / "model.json").exists():
        raise InputError(f"{folder} is no run folder (it has no model.json)")
    facts = _read_facts(folder / "model.json")
    if facts.name is None:
        raise InputError(
            f"{folder} was trained from Python, so its network cannot be rebuilt from its name: give what "
            f"makes it, as package.module:factory --weights {folder / 'model.safetensors'}"
        )
    model = (
        make_model(facts.name)
        if ":" in facts.name
        else build(facts.name, facts.input_shape, facts.classes, facts.mean, facts.std)
    )
    if not (folder / "model.safetensors").exists():
        raise InputError(
            f"{folder} holds no weights yet: finish the run with `tightrope train --resume --out {folder}`"
        )
    load_weights(model, folder / "model.safetensors")
    data, eps, norm = None, None, "inf"
    if (path := folder / "recipe.toml").exists():
        recipe = parse_recipe(read_recipe(path), str(path))
        norm = recipe.norm
        data, eps = recipe.data, recipe.with_test_eps(recipe.build_method()).test_eps
    is_run = (folder / "checkpoint").is_dir() or folder.resolve().parent.name == "stages"
    return Target(model.eval(), data, eps, folder if is_run else None, facts.input_shape, norm)


def _read_facts(path: Path) -> ModelFacts:
    facts = read_json(path)
    try:
        return ModelFacts.model_validate(facts)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, p['loc']))}: {p['msg']}" for p in error.errors())
        raise InputError(f"{path} cannot be used ({problems}); restore it") from None

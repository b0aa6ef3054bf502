"""Networks to certify or attack: a run folder, a results folder, or a factory with its weights."""

from __future__ import annotations

import importlib
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tightrope.errors import InputError
from tightrope.files import load_tensors, read_json
from tightrope.models import build

MODEL_FORMAT = "tightrope-model/1"


@dataclass(frozen=True)
class Target:
    """A network and what is known about it.

    Args:
        model: the network, in evaluation mode.
        data: name of the data set it was trained on, if known.
        eps: radius it was meant to be certified at, if known.
        folder: where verdicts on it are written, if it is a run folder.
    """

    model: nn.Module
    data: str | None
    eps: float | None
    folder: Path | None


def load_target(target: str, weights: Path | None = None) -> Target:
    """Load a network.

    Args:
        target: a run or results folder, or `package.module:factory`.
        weights: safetensors file with the factory's weights.

    Raises:
        InputError: if there is no such target, its files are missing, corrupt or of another network.
    """
    folder = Path(target)
    if folder.is_dir():
        return _from_folder(folder)
    if ":" in target:
        if weights is None:
            raise InputError(f"{target} is a factory: say where its weights are (--weights FILE.safetensors)")
        model = make_model(target)
        load_weights(model, weights)
        return Target(model.eval(), None, None, None)
    raise InputError(f"there is no {target}: give a run folder, or package.module:factory with --weights")


def make_model(factory: str) -> nn.Module:
    """The network that `package.module:factory` makes.

    Raises:
        InputError: if it cannot be imported, or makes no network.
    """
    module_name, _, name = factory.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        model = getattr(importlib.import_module(module_name), name)()
    except (ImportError, AttributeError) as error:
        raise InputError(f"{factory} cannot be imported: {error}") from error
    finally:
        sys.path.pop(0)
    if not isinstance(model, nn.Module):
        raise InputError(f"{factory} made a {type(model).__name__}, not a torch.nn.Module")
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


def _from_folder(folder: Path) -> Target:
    if not (folder / "model.json").exists():
        raise InputError(f"{folder} is no run folder (it has no model.json)")
    facts = read_json(folder / "model.json")
    if facts.get("format") != MODEL_FORMAT:
        raise InputError(f"{folder}/model.json has format {facts.get('format')!r}, expected {MODEL_FORMAT!r}")
    name = facts["name"]
    if name is None:
        raise InputError(
            f"{folder} was trained from Python, so its network cannot be rebuilt from a name: certify it as "
            f"package.module:factory --weights {folder / 'model.safetensors'}"
        )
    model = (
        make_model(name)
        if ":" in name
        else build(name, facts["input_shape"], facts["classes"], facts["mean"], facts["std"])
    )
    if not (folder / "model.safetensors").exists():
        raise InputError(
            f"{folder} holds no weights yet: finish the run with `tightrope train --resume --out {folder}`"
        )
    load_weights(model, folder / "model.safetensors")
    recipe: dict[str, Any] = {}
    if (folder / "recipe.toml").exists():
        recipe = tomllib.loads((folder / "recipe.toml").read_text())
    is_run = (folder / "checkpoint").is_dir()
    return Target(model.eval(), recipe.get("data"), recipe.get("test_eps"), folder if is_run else None)

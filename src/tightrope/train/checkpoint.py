"""Checkpoints: everything a resumed run needs, in one safetensors file with a JSON header.

Randomness needs no state here: every draw is a function of the seed and of the step or epoch that
it belongs to (see `derive_seed`), and so are the order of the data and every schedule.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tightrope.errors import FileError
from tightrope.files import load_tensors, save_tensors
from tightrope.identity import check_identity
from tightrope.train.batch import State

FORMAT = "tightrope-checkpoint/1"


@dataclass
class Progressed:
    """How far a run has come.

    Args:
        step: optimiser steps done.
        seconds: time spent training, over all resumed parts.
        sums: over the present epoch, by metric: sum over examples, and their number.
    """

    step: int
    seconds: float
    sums: dict[str, list[float]]

    def add(self, losses: Mapping[str, float], examples: int) -> None:
        """Count one step over this many examples, with what it measured."""
        self.step += 1
        for name, value in losses.items():
            total, count = self.sums.get(name, (0.0, 0.0))
            self.sums[name] = [total + value * examples, count + examples]

    def means(self) -> dict[str, float]:
        """Each metric's mean over the examples of the epoch for which it was measured."""
        return {name: total / count for name, (total, count) in self.sums.items()}


def derive_seed(seed: int, purpose: str, number: int) -> int:
    """A seed for one purpose at one step or epoch; unrelated for different arguments."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@contextmanager
def forked_rng(device: torch.device) -> Iterator[None]:
    """What is drawn inside moves neither torch's generator of the CPU nor that of this device outside."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


def save_checkpoint(
    path: Path,
    module: nn.Module,
    optimiser: torch.optim.Optimizer,
    method_state: State,
    done: Progressed,
    identity: Mapping[str, Any],
) -> None:
    """Write a checkpoint atomically: the file holds the last state or this one, never a mixture.

    `method_state` is what the method remembers, and the averaged network where there is one.
    """
    tensors = {f"model.{name}": tensor for name, tensor in module.state_dict().items()}
    tensors |= {f"method.{name}": tensor for name, tensor in method_state.items()}
    numbers: dict[str, float] = {}
    for i, state in optimiser.state_dict()["state"].items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"optimiser.{i}.{key}"] = value
            elif value is not None:
                numbers[f"{i}.{key}"] = value
    header = {"format": FORMAT, "identity": dict(identity), "progress": vars(done), "optimiser": numbers}
    save_tensors(path, tensors, header)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read, to be put back part by part.

    Args:
        tensors: what the file holds, by name.
        header: the rest of it.
    """

    tensors: Mapping[str, Tensor]
    header: Mapping[str, Any]

    def progress(self) -> Progressed:
        """How far the run had come."""
        return Progressed(**self.header["progress"])

    def restore(self, module: nn.Module, method_state: State) -> None:
        """Bring a network and its method's state to where the checkpoint left them."""
        for name, tensor in method_state.items():
            tensor.copy_(self.tensors[f"method.{name}"])
        mine = {k.removeprefix("model."): t for k, t in self.tensors.items() if k.startswith("model.")}
        module.load_state_dict(mine)

    def restore_optimiser(self, optimiser: torch.optim.Optimizer) -> None:
        """Bring an optimiser of the same parameters to where the checkpoint left it."""
        state: dict[int, dict[str, Any]] = {}
        parameters = [p for group in optimiser.param_groups for p in group["params"]]
        for name, tensor in self.tensors.items():
            if name.startswith("optimiser."):
                _, i, key = name.split(".", 2)
                parameter = parameters[int(i)]
                if tensor.shape == parameter.shape:  # laid out alike, or sums may round in another way
                    tensor = torch.empty_like(parameter).copy_(tensor)
                state.setdefault(int(i), {})[key] = tensor
        for name, number in self.header["optimiser"].items():
            i, key = name.split(".", 1)
            state.setdefault(int(i), {})[key] = number
        optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})


def read_checkpoint(path: Path, identity: Mapping[str, Any]) -> Checkpoint:
    """The checkpoint in a file.

    Raises:
        IdentityError: if it was made with other settings, data or network.
        FileError: if the file is missing or corrupt.
    """
    tensors, header = load_tensors(path)
    if header.get("format") != FORMAT:
        raise FileError(f"{path} has format {header.get('format')!r}; this version reads {FORMAT!r}")
    check_identity(header["identity"], identity, str(path))
    return Checkpoint(tensors, header)

"""One optimiser step: the only place that touches `.grad`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tightrope.errors import DivergedError
from tightrope.train.batch import Batch
from tightrope.train.methods import Method
from tightrope.train.schedules import at


@dataclass(frozen=True)
class StepResult:
    """What one step saw.

    Args:
        losses: mean value of each term that was computed, by name.
        gradient_norm: l_2 norm of the whole gradient before clipping.
    """

    losses: dict[str, float]
    gradient_norm: float


def train_step(method: Method, batch: Batch, optimiser: torch.optim.Optimizer, clip: float) -> StepResult:
    """Sum the method's weighted losses, differentiate, clip, and step.

    Raises:
        DivergedError: if a loss or the gradient is NaN or infinite; the network is as it was.
    """
    buffers = list(batch.graph.module.buffers())
    before = [buffer.clone() for buffer in buffers]
    try:
        losses, norm = _differentiate(method, batch, optimiser)
    except DivergedError:
        for buffer, value in zip(buffers, before, strict=True):  # the running statistics of BatchNorm
            buffer.copy_(value)
        raise
    if clip:
        torch.nn.utils.clip_grads_with_norm_(_parameters(optimiser), clip, norm)
    optimiser.step()
    return StepResult(losses, float(norm))


def _differentiate(
    method: Method, batch: Batch, optimiser: torch.optim.Optimizer
) -> tuple[dict[str, float], Tensor]:
    """Leave the gradient of the weighted losses in `.grad`.

    Returns:
        The losses by name, and the gradient's l_2 norm.
    """
    weights = {loss.name: at(loss.weight, batch.progress) for loss in method.losses}
    active = [loss for loss in method.losses if weights[loss.name] != 0]
    values = torch.stack([loss.term(batch).mean() for loss in active])
    losses = dict(zip((loss.name for loss in active), values.tolist(), strict=True))
    for name, value in losses.items():
        if not math.isfinite(value):
            raise DivergedError(f"the loss `{name}` is {value}")

    optimiser.zero_grad(set_to_none=True)
    values.dot(values.new_tensor([weights[loss.name] for loss in active])).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in _parameters(optimiser) if p.grad is not None])
    if not math.isfinite(float(norm)):
        raise DivergedError(f"the gradient of {' + '.join(losses)} is {float(norm)}")
    return losses, norm


def _parameters(optimiser: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimiser.param_groups for parameter in group["params"]]

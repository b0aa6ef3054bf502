"""One optimiser step: the only place that clips gradients and moves weights."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tightrope.errors import DivergedError
from tightrope.train.batch import Batch
from tightrope.train.combine import SumOfParts
from tightrope.train.methods import Method
from tightrope.train.objective import Gradient, Loss
from tightrope.train.schedules import at


@dataclass(frozen=True)
class StepResult:
    """What one step saw.

    Args:
        losses: mean value of each term that was computed, by name.
        notes: what else the method says of this step, by name.
        gradient_norm: l_2 norm of the whole gradient before clipping.
    """

    losses: dict[str, float]
    notes: dict[str, float]
    gradient_norm: float


def train_step(
    method: Method, batch: Batch, optimiser: torch.optim.Optimizer, clip: float, part: int | None = None
) -> StepResult:
    """Differentiate the method's losses, combine, clip, and step.

    Args:
        method: whose losses, and which radii are to learn from the bounds that the step rests on.
        batch: the examples.
        optimiser: of the network's parameters.
        clip: largest l_2 norm of the gradient; 0 clips nothing.
        part: how many examples at most are gone through at once; their gradients add up. All if not said.

    Raises:
        DivergedError: if a loss or the gradient is NaN or infinite; the network is as it was.
    """
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    kept = [*batch.graph.module.buffers(), *batch.state.values()]
    before = [tensor.clone() for tensor in kept]
    weights = {loss.name: at(loss.weight, batch.progress) for loss in method.losses}
    active = {loss.name: (loss, weights[loss.name]) for loss in method.losses if weights[loss.name] != 0}
    try:
        with _steady_weights(batch.graph.module):
            if part is None or part >= len(batch.y):
                gradient = method.combiner(active, batch, parameters)
                _learn(method, active, batch)
            else:
                gradient = _in_parts(method, active, batch, parameters, part)
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if not math.isfinite(float(norm)):
            raise DivergedError(f"the gradient of {' + '.join(active)} is {float(norm)}")
    except DivergedError:
        for tensor, value in zip(kept, before, strict=True):  # BatchNorm's statistics, the method's state
            tensor.copy_(value)
        raise
    if clip:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip, norm)
    optimiser.step()
    notes = gradient.notes | {
        f"effective share of {name}": float(weights.mean().square() / weights.square().mean())
        for name, weights in batch.weighed.items()
    }
    if method.radii is not None:
        notes = notes | {"mean radius": float(torch.as_tensor(batch.region.eps).mean())}
    return StepResult(gradient.losses, notes, float(norm))


@contextmanager
def _steady_weights(module: nn.Module) -> Iterator[None]:
    """Weights that are computed from others change once now, and not at each use, as spectral norm's do.

    A network's value and its bounds would otherwise be those of different networks.
    """
    parts = list[nn.Module]()
    owners = (owner for _, owner in module.named_modules() if parametrize.is_parametrized(owner))
    for owner in owners:
        for name, chain in owner.parametrizations.items():
            with torch.no_grad():
                getattr(owner, name)
            parts += [part for part in chain.modules() if part.training]
    for part in parts:
        part.training = False
    try:
        yield
    finally:
        for part in parts:
            part.training = True


def _in_parts(
    method: Method,
    active: Mapping[str, tuple[Loss, float]],
    batch: Batch,
    parameters: Sequence[Tensor],
    largest: int,
) -> Gradient:
    """The gradient of a batch of which only a part is held in memory at a time."""
    total, weighed = SumOfParts(active, parameters), defaultdict(list)
    for part in batch.parts(largest):
        total.add(part)
        _learn(method, active, part)
        for name, weights in part.weighed.items():
            weighed[name].append(weights)
    batch.weighed = {name: torch.cat(weights) for name, weights in weighed.items()}
    return total.gradient()


def _learn(method: Method, active: Mapping[str, tuple[Loss, float]], batch: Batch) -> None:
    """Let the radii learn from the bounds that the gradient rests on."""
    if method.radii is not None:
        for loss, _ in active.values():
            if loss.margins is not None:
                method.radii.learn(batch, loss.margins)

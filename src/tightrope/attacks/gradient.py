"""Gradient attacks: projected gradient ascent inside a region. FGSM is one step of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from tightrope.errors import InputError
from tightrope.given import positive, whole
from tightrope.region import Region

Loss = Literal["cross-entropy", "margin", "divergence"]


@runtime_checkable
class Network(Protocol):
    """What can be attacked: a `Graph`, or a latent region, which takes noise for inputs."""

    def run(self, x: Float[Tensor, "batch *shape"]) -> tuple[Float[Tensor, "batch classes"], Any]:
        """The logits, and what an attack does not look at."""
        ...


@dataclass(frozen=True)
class Pgd:
    """Projected gradient ascent (Madry et al. 2018) from a random start.

    Args:
        steps: gradient steps per restart.
        step: length of the first step, as a share of eps.
        decay: what the length is multiplied by after every step.
        restarts: random starts; the best point of all is kept.
        loss: what is increased: the cross-entropy; the margin `max_t f_t - f_y`, whose gradient
            does not vanish on confident networks; or the divergence `KL(p(x) || p(x'))` from the clean answer
            (TRADES), which does not look at the label.
        keep_best: count every point met (one more forward pass) instead of the last one of a restart.

    Raises:
        InputError: if steps or restarts are not positive, the step length is not, the decay is not in (0, 1],
            or the loss is unknown.
    """

    steps: int
    step: float
    restarts: int = 1
    loss: Loss = "cross-entropy"
    keep_best: bool = True
    decay: float = 1.0

    def __post_init__(self) -> None:
        plain = {
            "steps": whole(self.steps, "the number of an attack's steps", 1),
            "restarts": whole(self.restarts, "the number of an attack's restarts", 1),
            "step": positive(self.step, "the length of an attack's first step"),
        }
        for name, value in plain.items():
            object.__setattr__(self, name, value)
        if self.loss not in get_args(Loss):
            raise InputError(f"an attack's loss is one of {', '.join(get_args(Loss))}, got {self.loss!r}")
        if not 0 < self.decay <= 1:
            raise InputError(f"an attack's decay lies in (0, 1], got {self.decay}")

    @torch.no_grad()
    def __call__(
        self,
        network: Network,
        x: Float[Tensor, "batch *shape"],
        y: Int[Tensor, "batch"],
        region: Region,
        generator: torch.Generator | None = None,
        start: Float[Tensor, "batch *shape"] | None = None,
    ) -> Float[Tensor, "batch *shape"]:
        """A point of the region around each example at which the loss is high. No gradient flows through it.

        Args:
            network: at fixed statistics (`Graph.frozen`, or what `Graph.run` returns).
            x: inputs.
            y: labels.
            region: where the points may lie.
            generator: source of the random starts.
            start: where the first restart begins, points of the region; random ones if None.
        """
        y = network.run(x)[0].softmax(1) if self.loss == "divergence" else y
        best, best_loss = x.clone(), x.new_full((len(x),), -torch.inf)
        for restart in range(self.restarts):
            point = region.sample(x, generator) if restart or start is None else start
            for k in range(self.steps):
                loss, gradient, _ = self._gradient(network, point, y)
                if self.keep_best:
                    best, best_loss = _better(best, best_loss, point, loss)
                point = self._next(x, point, gradient, region, k)
            if not self.keep_best and self.restarts == 1:
                return point
            best, best_loss = _better(best, best_loss, point, self._loss(network.run(point)[0], y))
        return best

    @torch.no_grad()
    def steps_needed(
        self,
        network: Network,
        x: Float[Tensor, "batch *shape"],
        y: Int[Tensor, "batch"],
        region: Region,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "batch"]:
        """How many steps of one restart leave each example correctly classified: `steps` if all do."""
        point = region.sample(x, generator)
        needed, standing = x.new_zeros(len(x)), torch.ones_like(y, dtype=torch.bool)
        for k in range(self.steps):
            _, gradient, logits = self._gradient(network, point, y)
            standing &= logits.argmax(1) == y
            needed += standing
            point = self._next(x, point, gradient, region, k)
        return needed

    def _next(self, x: Tensor, point: Tensor, gradient: Tensor, region: Region, k: int) -> Tensor:
        length = self.step * self.decay**k
        return region.project(x, point + length * region.steepest(x, gradient))

    def _gradient(self, network: Network, point: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The loss of each example at a point, its gradient, and the logits."""
        with torch.enable_grad():
            point = point.detach().requires_grad_()
            logits = network.run(point)[0]
            loss = self._loss(logits, y)
            (gradient,) = torch.autograd.grad(loss.sum(), point)
        return loss.detach(), gradient, logits.detach()

    def _loss(self, logits: Tensor, y: Tensor) -> Tensor:
        if self.loss != "margin":  # for the divergence, y is the clean answer
            return F.cross_entropy(logits, y, reduction="none")
        right = logits.gather(1, y.unsqueeze(1)).squeeze(1)
        return logits.scatter(1, y.unsqueeze(1), -torch.inf).amax(1) - right


def fgsm(step: float = 1.25) -> Pgd:
    """One step from a random start (Wong et al. 2020, "Fast is better than free", step 1.25 eps)."""
    return Pgd(steps=1, step=step, keep_best=False)


def _better(best: Tensor, best_loss: Tensor, point: Tensor, loss: Tensor) -> tuple[Tensor, Tensor]:
    better = loss > best_loss
    shape = (-1, *[1] * (point.ndim - 1))
    return torch.where(better.view(shape), point, best), torch.where(better, loss, best_loss)

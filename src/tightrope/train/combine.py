"""Combiners: how several losses become one gradient."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tightrope.attacks import Pgd
from tightrope.errors import DivergedError
from tightrope.graph import Graph
from tightrope.train.batch import Batch, State
from tightrope.train.objective import Gradient, Loss
from tightrope.train.schedules import Number, at


def _read(names: Sequence[str], values: Tensor) -> dict[str, float]:
    losses = dict(zip(names, values.tolist(), strict=True))
    for name, value in losses.items():
        if not math.isfinite(value):
            raise DivergedError(f"the loss `{name}` is {value}")
    return losses


@dataclass(frozen=True)
class Total:
    """The gradient of the weighted sum."""

    def begin(self, graph: Graph) -> State:  # noqa: ARG002
        """See `Combiner`."""
        return {}

    def __call__(
        self, losses: Mapping[str, tuple[Loss, float]], batch: Batch, parameters: Sequence[Tensor]
    ) -> Gradient:
        """See `Combiner`."""
        values = torch.stack([loss.value(batch) for loss, _ in losses.values()])
        read = _read([*losses], values)
        for parameter in parameters:
            parameter.grad = None
        values.dot(values.new_tensor([weight for _, weight in losses.values()])).backward()
        return Gradient(read, {})


class SumOfParts:
    """The gradient that `Total` has for a batch, from parts of the batch one after another.

    A loss over the batch is `sum_i w_i l_i / sum_i w_i`: the parts add up to its numerator, and its
    denominator is known after the last one. So each loss with weights of its own is summed for itself.
    """

    def __init__(self, losses: Mapping[str, tuple[Loss, float]], parameters: Sequence[Tensor]) -> None:
        self._losses, self._parameters = losses, parameters
        self._values = dict.fromkeys(losses, 0.0)
        # By the name of a loss with weights of its own, and None for all the others together:
        self._numerators: dict[str | None, list[Tensor | None]] = {}
        self._denominators: dict[str | None, float] = {}

    def add(self, part: Batch) -> None:
        """Count one more part.

        Raises:
            DivergedError: if a loss is NaN or infinite.
        """
        values = {name: loss.value(part) for name, (loss, _) in self._losses.items()}
        read = _read([*values], torch.stack([*values.values()]))
        masses: dict[str | None, float] = {name: float(w.sum()) for name, w in part.weighed.items()}
        masses[None] = len(part.y)
        numerators: dict[str | None, Tensor] = {}
        for name, (_, weight) in self._losses.items():
            group = name if name in part.weighed else None
            self._values[name] += masses[group] * read[name]
            numerators[group] = numerators.get(group, 0) + weight * masses[group] * values[name]
        for group, mass in masses.items():
            self._denominators[group] = self._denominators.get(group, 0.0) + mass
        groups = [group for group, numerator in numerators.items() if numerator.requires_grad]
        for group in groups:
            more = group is not groups[-1]
            found = torch.autograd.grad(
                numerators[group], self._parameters, retain_graph=more, allow_unused=True
            )
            before = self._numerators.get(group, [None] * len(found))
            self._numerators[group] = [_add(old, new) for old, new in zip(before, found, strict=True)]

    def gradient(self) -> Gradient:
        """Set the `.grad` of the parameters to that of the whole batch."""
        for parameter in self._parameters:
            parameter.grad = None
        for group, gradients in self._numerators.items():
            for parameter, gradient in zip(self._parameters, gradients, strict=True):
                if gradient is not None:
                    parameter.grad = _add(parameter.grad, gradient / self._denominators[group])
        losses = {
            name: value / self._denominators[name if name in self._denominators else None]
            for name, value in self._values.items()
        }
        return Gradient(losses, {})


def _add(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    return second if first is None else first if second is None else first + second


@dataclass(frozen=True)
class Bisector:
    """AdvIBP's weights of an adversarial and a robust loss, from moments of their past gradients.

    `m1, m2` are moving averages of the two gradients and `v1, v2` of their lengths, of the steps before
    this one, so that the weights do not depend on this step's batch. Where the gradients agree, the step
    goes along their angular bisector; where they do not, one loss has priority and its gradient is projected
    so that it leaves the other alone: the adversarial loss while its attack is strong (FOSC at most the
    threshold), else the robust one, with the square of its loss as a regulariser. What other losses there
    are, a modifier's regularisers, are added with their own weights.
    Source: advibp.txt, algorithm 1; seeds.md, section 3.

    Args:
        attack: that of the adversarial loss.
        threshold: FOSC up to which the adversarial loss has priority: `c_t`.
        beta1: decay of the averages of the gradients.
        beta2: decay of the averages of their lengths.
    """

    attack: Pgd
    threshold: Number
    beta1: float = 0.9
    beta2: float = 0.999

    pair = ("adversarial", "robust")

    def begin(self, graph: Graph) -> State:
        """See `Combiner`."""
        first, *others = [p for p in graph.module.parameters() if p.requires_grad]
        size = first.numel() + sum(p.numel() for p in others)
        return {
            "moments.gradients": first.new_zeros(2, size).detach(),
            "moments.lengths": first.new_zeros(2, dtype=torch.float64).detach(),
            "moments.steps": torch.zeros((), dtype=torch.int64),
        }

    def __call__(
        self, losses: Mapping[str, tuple[Loss, float]], batch: Batch, parameters: Sequence[Tensor]
    ) -> Gradient:
        """See `Combiner`. While only one of the two losses counts, it is as with `Total`."""
        if not set(self.pair) <= set(losses):
            return Total()(losses, batch, parameters)
        state, pair = batch.state, [losses[name][0] for name in self.pair]
        added = {name: loss for name, loss in losses.items() if name not in self.pair}
        averages, lengths, product = self._moments(state)
        disagree = product is not None and product <= 0
        inputs = list(parameters)
        if disagree:  # the attack's strength is wanted, and its gradient comes with those of the parameters
            inputs.append(batch.attacked(self.attack).requires_grad_())
        adversarial = pair[0].value(batch)
        robust = pair[1].value(batch)
        others = [loss.value(batch) for loss, _ in added.values()]
        read = _read([*self.pair, *added], torch.stack([adversarial, robust, *others]))
        # Losses may share a pass (at eps 0 the two are the natural one): the last gradient frees the graph.
        parts = _gradient(adversarial, inputs, keep=True)
        first = _flat(parts[: len(parameters)])
        third = torch.zeros_like(first)
        if added:
            rest = torch.stack(others).dot(robust.new_tensor([weight for _, weight in added.values()]))
            if rest.requires_grad:  # at eps 0 a regulariser may have nothing to say
                third = _flat(_gradient(rest, parameters, keep=True))
        second = _flat(_gradient(robust, parameters, keep=False))

        notes: dict[str, float] = {}
        if product is None:  # the first step has no past
            weights = (1.0, 1.0)
        else:
            norms = float(averages[0].norm()) * float(averages[1].norm())
            notes["cosine"] = product / norms if norms else 0.0
            strong = False
            if disagree:
                notes["fosc"] = fosc(batch, self.attack, parts[-1] * len(batch.y))
                strong = notes["fosc"] <= at(self.threshold, batch.progress)
            notes |= {
                "agree": float(not disagree),
                "adversarial first": float(disagree and strong),
                "robust first": float(disagree and not strong),
            }
            weights = self.weights(averages, lengths, product, strong, read["robust"])
        notes |= {"adversarial weight": weights[0], "robust weight": weights[1]}
        self._learn(state, first, second)
        final = weights[0] * first + weights[1] * second + third
        pieces = final.split([p.numel() for p in parameters])
        for parameter, piece in zip(parameters, pieces, strict=True):
            parameter.grad = piece.view_as(parameter)
        return Gradient(read, notes)

    def weights(
        self, averages: Tensor, lengths: Sequence[float], product: float, strong: bool, robust: float
    ) -> tuple[float, float]:
        """What the two gradients are multiplied by: `kappa_adv`, and `kappa_IBP + 2 kappa_reg L_IBP`.

        Args:
            averages: `m1, m2`, bias-corrected, `(2, parameters)`.
            lengths: `v1, v2`, bias-corrected.
            product: `<m1, m2>`.
            strong: whether the attack is strong enough for the adversarial loss to have priority.
            robust: `L_IBP`, whose square is the regulariser.
        """
        v1, v2 = (max(length, 1e-12) for length in lengths)
        if product > 0:
            bisector = averages[0] / v1 + averages[1] / v2
            gamma = 0.5 * float((averages.sum(0) @ bisector) / (bisector @ bisector))
            return gamma / v1, gamma / v2
        if strong:
            return 1.0, -product / v2**2
        return -product / v1**2, 1.0 + 2 * 0.5 * robust

    def _moments(self, state: State) -> tuple[Tensor, list[float], float | None]:
        """`m1, m2`, `v1, v2`, and `<m1, m2>`, bias-corrected; no product before the first step."""
        steps = int(state["moments.steps"])
        averages, lengths = state["moments.gradients"], state["moments.lengths"]
        if steps == 0:
            return averages, lengths.tolist(), None
        averages = averages / (1 - self.beta1**steps)
        return averages, (lengths / (1 - self.beta2**steps)).tolist(), float(averages[0] @ averages[1])

    def _learn(self, state: State, first: Tensor, second: Tensor) -> None:
        averages, lengths = state["moments.gradients"], state["moments.lengths"]
        averages[0].lerp_(first, 1 - self.beta1)
        averages[1].lerp_(second, 1 - self.beta1)
        lengths.lerp_(torch.stack([first.norm(), second.norm()]).to(lengths), 1 - self.beta2)
        state["moments.steps"] += 1


def _gradient(value: Tensor, inputs: Sequence[Tensor], *, keep: bool) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value, inputs, retain_graph=keep, allow_unused=True, materialize_grads=True)


def _flat(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.flatten() for part in parts])


def fosc(batch: Batch, attack: Pgd, gradient: Float[Tensor, "batch *shape"]) -> float:
    """First-order stationary condition of the attacked inputs, on average: 0 where no step helps.

    `c(x') = max <x'' - x', grad>` over the region, `grad` that of the example's own loss at x'. Source: Wang
    et al. 2019; advibp.txt, eq. 6.
    """
    point, rows = batch.attacked(attack).detach(), gradient.unsqueeze(1)
    reach = -batch.region.minimise(batch.x, -rows).squeeze(1)
    return float((reach - (point * gradient).flatten(1).sum(1)).mean())

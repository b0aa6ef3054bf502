"""What a latent attack and the bounds in front of it cost, in plain training steps.

    python benchmarks/latent.py [--batch 100] [--rounds 5]

ConvMed on MNIST-shaped noise, after some steps of adversarial training, so that its neurons are about as open
as in a run. A plain step is a forward and a backward pass and an optimiser's step: three forward passes'
worth. The target for an attack of 8 iterations is 8 of them plus 20 %.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch.nn import functional as F

from tightrope.attacks import Pgd
from tightrope.bounds import Estimator, Latent, Linear, Problem, Projected
from tightrope.bounds.latent import NOISE, boxes_upto
from tightrope.graph import trace
from tightrope.models import build
from tightrope.region import Box
from tightrope.spec import Spec
from tightrope.train.stages import Layerwise, frozen_upto

EPS, STEPS = 0.1, 8


def seconds(function: Callable[[], object], rounds: int) -> float:
    """The best of several rounds, after one that warms up."""
    times = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return min(times[1:])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.manual_seed(0)
    network = build("convmed", (1, 28, 28), 10).train()
    graph = trace(network, (1, 28, 28))
    prototypes = (torch.rand(10, 1, 28, 28) > 0.8).float()
    optimiser = torch.optim.Adam(network.parameters(), 1e-3)

    def draw() -> tuple[torch.Tensor, torch.Tensor]:
        y = torch.randint(0, 10, (args.batch,))
        return (prototypes[y] + 0.2 * torch.randn(args.batch, 1, 28, 28)).clamp(0, 1), y

    def step(x: torch.Tensor, y: torch.Tensor) -> None:
        optimiser.zero_grad()
        F.cross_entropy(network(x), y).backward()
        optimiser.step()

    fgsm = Pgd(steps=1, step=1.0, keep_best=False)
    for _ in range(60):
        x, y = draw()
        step(fgsm(graph, x, y, Box(EPS)), y)
    x, y = draw()
    plain = seconds(lambda: step(x, y), 4 * args.rounds)
    print(f"plain step of {args.batch}: {1000 * plain:.1f} ms")
    attack = Pgd(STEPS, 0.25, keep_best=False)
    estimators: dict[str, Estimator] = {
        "10 projections": Projected(10),
        "50 projections": Projected(50),
        "exact": Linear("parallel", "linear", sides="none"),
    }
    for stage in Layerwise().of(graph):
        with frozen_upto(graph, stage.cut) as live, torch.no_grad():
            problem = Problem(live, x, Box(EPS), Spec.margins(y, 10, x))
            boxes = boxes_upto(problem, stage.cut, estimators["10 projections"])
            latent = Latent.over(live, x, Box(EPS), stage.cut, boxes)
            spent = seconds(lambda: attack(latent, latent.still, y, NOISE), args.rounds)  # noqa: B023
            words = [f"attack of {STEPS} {spent / plain:.1f} (target {1.2 * STEPS:.1f})"]
            for name, estimator in estimators.items():
                spent = seconds(lambda: boxes_upto(problem, stage.cut, estimator), 1)  # noqa: B023
                words.append(f"bounds, {name} {spent / plain:.1f}")
        print(f"stage {stage.number + 1}, in plain steps: {', '.join(words)}")


if __name__ == "__main__":
    main()

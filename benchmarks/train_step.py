"""Cost of a training step: plain cross-entropy, hand-written IBP, and tightrope's IBP, side by side.

    python benchmarks/train_step.py [--threads 2] [--rounds 40]

One process, the three variants in turn, median after a warm-up; prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tightrope.graph import trace
from tightrope.models import build
from tightrope.region import Box
from tightrope.train import METHODS
from tightrope.train.batch import Batch
from tightrope.train.step import train_step

EPS, KAPPA, BATCH = 0.3, 0.5, 100


def network(name: str) -> tuple[nn.Sequential, torch.optim.Optimizer]:
    torch.manual_seed(0)
    net = build(name, (1, 28, 28), 10).train()
    return net, torch.optim.Adam(net.parameters(), 1e-3, foreach=True)


def plain_step(net: nn.Sequential, optimiser: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    optimiser.zero_grad(set_to_none=True)
    F.cross_entropy(net(x), y).backward()
    optimiser.step()


def hand_step(net: nn.Sequential, optimiser: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    """The least that the same objective needs: clean pass, centre/radius pass, merged last layer."""
    optimiser.zero_grad(set_to_none=True)
    logits = net(x)
    low, high = (x - EPS).clamp(0, 1), (x + EPS).clamp(0, 1)
    c, r = (low + high) / 2, (high - low) / 2
    for layer in list(net)[:-1]:
        if isinstance(layer, nn.Conv2d):
            c, r = layer(c), F.conv2d(r, layer.weight.abs(), None, layer.stride, layer.padding)
        elif isinstance(layer, nn.Linear):
            c, r = layer(c), F.linear(r, layer.weight.abs())
        elif isinstance(layer, nn.ReLU):
            low, high = F.relu(c - r), F.relu(c + r)
            c, r = (low + high) / 2, (high - low) / 2
        else:
            c, r = layer(c), layer(r)
    last = net[-1]
    assert isinstance(last, nn.Linear)
    rows = last.weight[y].unsqueeze(1) - last.weight
    offset = last.bias[y].unsqueeze(1) - last.bias
    lower = (rows @ c.unsqueeze(-1) - rows.abs() @ r.unsqueeze(-1)).squeeze(-1) + offset
    (KAPPA * F.cross_entropy(logits, y) + (1 - KAPPA) * F.cross_entropy(-lower, y)).backward()
    optimiser.step()


def our_step(name: str, x: Tensor, y: Tensor) -> Callable[[], object]:
    net, optimiser = network(name)
    graph, method, generator = (
        trace(net, (1, 28, 28)),
        METHODS["ibp"](eps=EPS, kappa=KAPPA),
        torch.Generator(),
    )

    def step() -> None:
        batch = Batch(graph, x, y, Box(EPS), 1.0, generator)
        train_step(method, batch, optimiser, clip=0.0)

    return step


def measure(name: str, rounds: int, warmup: int = 5) -> dict[str, float]:
    x, y = torch.rand(BATCH, 1, 28, 28), torch.randint(0, 10, (BATCH,))
    plain, hand = network(name), network(name)
    steps: dict[str, Callable[[], object]] = {
        "plain": lambda: plain_step(*plain, x, y),
        "hand-written": lambda: hand_step(*hand, x, y),
        "tightrope": our_step(name, x, y),
    }
    seconds: dict[str, list[float]] = {variant: [] for variant in steps}
    for i in range(warmup + rounds):
        for variant, step in steps.items():
            began = time.perf_counter()
            step()
            if i >= warmup:
                seconds[variant].append(time.perf_counter() - began)
    medians = {variant: statistics.median(times) for variant, times in seconds.items()}
    return {f"{variant} ms": round(1e3 * value, 3) for variant, value in medians.items()} | {
        "tightrope / hand-written": round(medians["tightrope"] / medians["hand-written"], 3),
        "hand-written / plain": round(medians["hand-written"] / medians["plain"], 3),
        "tightrope / plain": round(medians["tightrope"] / medians["plain"], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=40)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    results = {name: measure(name, arguments.rounds) for name in ("dm-small", "dm-medium")}
    setting = {
        "batch": BATCH,
        "threads": arguments.threads,
        "torch": torch.__version__,
        "machine": platform.platform(),
    }
    print(json.dumps({**setting, "ibp": results}, indent=2))


if __name__ == "__main__":
    main()

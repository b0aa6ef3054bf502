"""Cost of a training step: plain cross-entropy, hand-written IBP, and tightrope's methods, side by side.

    python benchmarks/train_step.py [--threads 2] [--rounds 40]

One process, the variants in turn, median after a warm-up; prints one JSON object. Memory is kept between
steps as in a training run, for every variant; tightrope's have their weights laid out as there.
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
from tightrope.memory import channels_innermost, keep_freed
from tightrope.models import build
from tightrope.train import METHODS, Method
from tightrope.train.batch import Batch
from tightrope.train.modifiers import auto_eps, reweight
from tightrope.train.stages import WHOLE
from tightrope.train.step import train_step

EPS, KAPPA, BATCH = 0.3, 0.5, 100
IN_THE_RAMP = 0.2  # where CROWN-IBP mixes both kinds of bounds


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


def our_step(name: str, x: Tensor, y: Tensor, method: Method, progress: float = 1.0) -> Callable[[], object]:
    net, optimiser = network(name)
    graph, generator, index = trace(net, (1, 28, 28)), torch.Generator(), torch.arange(len(x))
    state = method.begin(graph, len(x))

    def step() -> None:
        region = method.region(WHOLE, progress, index, state)
        batch = Batch(graph, x, y, region, progress, generator, index, state)
        with channels_innermost(net):
            train_step(method, batch, optimiser, clip=0.0)

    return step


def measure(name: str, rounds: int, warmup: int = 5) -> dict[str, float]:
    x, y = torch.rand(BATCH, 1, 28, 28), torch.randint(0, 10, (BATCH,))
    plain, hand = network(name), network(name)
    steps: dict[str, Callable[[], object]] = {
        "plain": lambda: plain_step(*plain, x, y),
        "hand-written": lambda: hand_step(*hand, x, y),
        "ibp": our_step(name, x, y, METHODS["ibp"](eps=EPS, kappa=KAPPA)),
        "ibp, reweight, auto-eps": our_step(name, x, y, METHODS["ibp"](eps=EPS) | reweight() | auto_eps()),
        "advibp": our_step(name, x, y, METHODS["advibp"](eps=EPS)),
        **{
            title: our_step(name, x, y, METHODS["crown-ibp"](eps=EPS, fusion=fusion), IN_THE_RAMP)
            for title, fusion in {"crown-ibp": False, "crown-ibp, fused": True}.items()
        },
    }
    seconds: dict[str, list[float]] = {variant: [] for variant in steps}
    for i in range(warmup + rounds):
        for variant, step in steps.items():
            began = time.perf_counter()
            step()
            if i >= warmup:
                seconds[variant].append(time.perf_counter() - began)
    medians = {variant: statistics.median(times) for variant, times in seconds.items()}
    ratios = {f"{variant} / plain": medians[variant] / medians["plain"] for variant in steps}
    ratios["ibp / hand-written"] = medians["ibp"] / medians["hand-written"]
    ratios |= {f"{v} / ibp": medians[v] / medians["ibp"] for v in ("ibp, reweight, auto-eps", "advibp")}
    figures = {f"{variant} ms": 1e3 * value for variant, value in medians.items()} | ratios
    return {name: round(figure, 3) for name, figure in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=40)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    keep_freed()
    results = {name: measure(name, arguments.rounds) for name in ("dm-small", "dm-medium")}
    setting = {
        "batch": BATCH,
        "threads": arguments.threads,
        "torch": torch.__version__,
        "machine": platform.platform(),
    }
    print(json.dumps({**setting, "steps": results}, indent=2))


if __name__ == "__main__":
    main()

"""Cost of linear bounds in forward passes per image: crown, fast-lin and crown-ibp.

    python benchmarks/bounds.py [--threads 2] [--images 10] [--rounds 5]

One process, which keeps its memory as `tightrope certify` does; forward passes and engines in turn, median
after a warm-up; prints one JSON object. A forward pass is a hundredth of one of a batch of 100. Freshly
initialised networks of MNIST's shape, random images, eps 0.1, the margins of every class, both sides.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable

import torch

from tightrope.bounds import Problem
from tightrope.bounds.linear import crown, crown_ibp, fast_lin
from tightrope.graph import trace
from tightrope.memory import keep_freed
from tightrope.models import build
from tightrope.region import Box
from tightrope.spec import Spec

EPS, BATCH = 0.1, 100
ENGINES = {"crown": crown(), "fast-lin": fast_lin(), "crown-ibp": crown_ibp()}


def measure(name: str, images: int, rounds: int) -> dict[str, float]:
    torch.manual_seed(0)
    net = build(name, (1, 28, 28), 10).eval()
    graph, x = trace(net, (1, 28, 28)), torch.rand(BATCH, 1, 28, 28)
    spec = Spec.margins(torch.arange(images) % 10, 10, x)

    def bounds(engine: str) -> Callable[[], object]:
        return lambda: Problem(graph, x[:images], Box(EPS), spec).bounds(ENGINES[engine])

    variants: dict[str, Callable[[], object]] = {"forward": lambda: net(x)}
    variants |= {engine: bounds(engine) for engine in ENGINES}
    seconds: dict[str, list[float]] = {variant: [] for variant in variants}
    for i in range(1 + rounds):
        for variant, run in variants.items():
            for _ in range(10 if variant == "forward" else 1):
                began = time.perf_counter()
                run()
                if i:
                    seconds[variant].append(time.perf_counter() - began)
    medians = {variant: statistics.median(times) for variant, times in seconds.items()}
    forward = medians.pop("forward")
    per_image = {engine: round(value / images / (forward / BATCH), 1) for engine, value in medians.items()}
    return {"forward ms": round(1e3 * forward, 3)} | per_image


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--images", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed()
    with torch.no_grad():
        results = {n: measure(n, arguments.images, arguments.rounds) for n in ("dm-small", "dm-medium")}
    setting = {
        "threads": arguments.threads,
        "images": arguments.images,
        "eps": EPS,
        "torch": torch.__version__,
        "machine": platform.platform(),
    }
    print(json.dumps({**setting, "forward passes per image": results}, indent=2))


if __name__ == "__main__":
    main()

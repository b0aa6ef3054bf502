"""What `crown` and `alpha-crown` cost per image, beside the operations that they cannot do without.

    python benchmarks/verify.py [--target results/mnist-dm-small-ibp-0.3] [--images 100] [--rounds 3]

The first images of MNIST that the network classifies correctly, in float64, by the stages that `tightrope
certify` runs (lower side of nine margins, early exit). Each stage runs in a process of its own, so that peak
memory is its own; a process's memory before the first bound is left out. Prints one JSON object; needs
TIGHTROPE_DATA.

Floors, in forward passes per image, are counts of multiplications. A forward pass is a hundredth of one of a
batch of 100, in float64. A row that is pulled back costs, in each layer, the coefficients that may differ
from 0 there times what the layer needs for one of its outputs. CROWN: two rows for each neuron that intervals
leave open (none before the first activation, where they are exact), and nine for the margins. alpha-CROWN:
that, and two passes (one back, one for its gradient) for each step of each row that is still open. Time is
that of the processor, on one thread, so that other work on the machine disturbs it less.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import resource
import statistics
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from tightrope.bounds import Interval, Optimised, Problem, crown
from tightrope.data import load
from tightrope.graph import Graph, recast, trace
from tightrope.graph.ops import Affine
from tightrope.memory import keep_freed
from tightrope.region import Box
from tightrope.spec import Spec
from tightrope.targets import load_target
from tightrope.verify import VERIFIERS
from tightrope.verify.stages import answer, slack

STEPS = 20


def prepare(target: str, images: int) -> tuple[Graph, torch.Tensor, torch.Tensor, Box]:
    found, data = load_target(target), load("mnist")
    assert found.eps is not None
    graph = recast(trace(found.model, data.train.shape), torch.float64)
    index = torch.arange(2 * images)
    x, y = data.test.images(index).double(), data.test.y[index]
    right = (answer(graph, x, y).margin > 0).nonzero().flatten()[:images]
    return graph, x[right], y[right], Box(found.eps)


def measure(name: str, target: str, images: int, rounds: int) -> dict[str, float]:
    """Seconds and peak memory of a stage, or of a forward pass."""
    torch.set_num_threads(1)
    keep_freed()
    graph, x, y, region = prepare(target, images)
    stage = None if name == "forward" else VERIFIERS[name][0]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds, proved = [], 0
    for _ in range(1 + rounds):
        problem = Problem(graph, x, region, Spec.margins(y, graph.classes, x))  # nothing is known of it
        began = time.process_time()
        if stage is None:
            graph.run(x)
        else:
            proved = int(stage(problem, y).proved.sum())
        seconds.append(time.process_time() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {
        "ms per image": 1e3 * statistics.median(seconds[1:]) / len(x),
        "proved": proved,
        "MB": peak / 1024,
    }


def cost_of_row(graph: Graph, node: int, costs: list[float]) -> float:
    """Multiplications that pull a neuron in the middle of a layer back to the input; the graph is a chain."""
    shape = graph.nodes[node].shape
    rows = torch.zeros(1, 1, shape.numel(), dtype=torch.float64)
    rows[..., shape.numel() // 2 + shape[-1] // 2 * (len(shape) > 1)] = 1
    rows, total = rows.view(1, 1, *shape), 0.0
    while node > 0:
        total += int((rows != 0).sum()) * costs[node]
        op, (source,) = graph.nodes[node].op, graph.nodes[node].inputs
        if isinstance(op, Affine):
            (rows,) = op.transpose(rows, [graph.nodes[source].shape])
        node = source
    return total


@torch.no_grad()
def floors(target: str, images: int) -> dict[str, float]:
    """Forward passes per image."""
    graph, x, y, region = prepare(target, images)
    problem = Problem(graph, x, region, Spec.margins(y, graph.classes, x))
    boxes, interval = problem.bounds(crown()).boxes, problem.bounds(Interval())
    costs, value = [0.0], {0: x[:1]}  # multiplications for one entry of each node
    for i, node in enumerate(graph.nodes[1:], start=1):
        assert node.op is not None
        with FlopCounterMode(display=False) as counter:
            value[i] = node.op.apply(*[value[j] for j in node.inputs])
        costs.append(counter.get_total_flops() / node.shape.numel())
    forward = sum(cost * node.shape.numel() for cost, node in zip(costs, graph.nodes, strict=True))
    passes = float(graph.classes - 1)
    for i in list(boxes)[1:]:
        lower, upper = interval.boxes[i]  # CROWN looks at what intervals leave open
        rows = 2 * ((lower < 0) & (upper > 0)).sum().item() / len(x)
        passes += rows * cost_of_row(graph, graph.nodes[i].inputs[0], costs) / forward
    enough = float(slack(problem, interval).max())
    open_ = [
        int((Optimised(sides="lower", iterations=n, enough=enough)(problem).lower <= enough).sum()) - len(x)
        for n in range(STEPS)
    ]  # the label's own row is 0, and is not bounded
    return {"crown": passes, "alpha-crown": passes + 2 * sum(open_) / len(x)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", default="results/mnist-dm-small-ibp-0.3")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    results = {}
    for name in ("forward", "crown", "alpha-crown"):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            results[name] = pool.apply(measure, (name, given.target, given.images, given.rounds))
    forward = results.pop("forward")["ms per image"]
    for name, floor in floors(given.target, given.images).items():
        results[name] |= {"forward passes": results[name]["ms per image"] / forward, "floor": floor}
    rounded = {name: {k: round(v, 2) for k, v in found.items()} for name, found in results.items()}
    setting = {"torch": torch.__version__, "machine": platform.platform(), "forward ms": round(forward, 4)}
    print(json.dumps({**vars(given), **setting, **rounded}, indent=2))


if __name__ == "__main__":
    main()

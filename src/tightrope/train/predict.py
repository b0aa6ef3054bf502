"""How long a run will take, before it begins."""

from __future__ import annotations

import copy
import itertools
import time

import torch

from tightrope.graph import Graph, trace
from tightrope.memory import channels_innermost
from tightrope.train.average import recompute_statistics
from tightrope.train.batch import Batch
from tightrope.train.evaluate import HeldOut, evaluate
from tightrope.train.loop import Training
from tightrope.train.methods import Method
from tightrope.train.schedules import Ramp
from tightrope.train.stages import frozen_upto
from tightrope.train.step import train_step

ROUNDS = 3  # timed steps, after one that warms up


def predict_seconds(
    graph: Graph, method: Method, training: Training, examples: int, held_out: HeldOut, test_eps: float
) -> float:
    """Seconds that a run will take here, from a few steps of each part of its schedule on a copy.

    Args:
        graph: the network.
        method: what it is trained for.
        training: how.
        examples: number of training examples.
        held_out: examples to time the steps on, and of each epoch's metrics.
        test_eps: radius of the metrics.
    """
    copied = trace(copy.deepcopy(graph.module), graph.input_shape)
    copied.module.train()
    count = min(training.batch, len(held_out.y))
    x, y = held_out.x[:count], held_out.y[:count]
    state, numbers, eps = method.begin(copied, count), torch.arange(count), method.eps
    begin, finish = (eps.begin, eps.finish) if isinstance(eps, Ramp) else (0.0, 0.0)
    if method.layerwise is not None:
        finish = method.layerwise.mix
    parts = [part for part in ((0.0, begin), (begin, finish), (finish, 1.0)) if part[0] < part[1]]
    per_example = 0.0
    for stage, (start, stop) in itertools.product(method.stages(copied), parts):
        with channels_innermost(copied.module), frozen_upto(copied, stage.cut) as live:
            trained = [p for p in copied.module.parameters() if p.requires_grad]
            optimiser = torch.optim.Adam(trained, 1e-9)
            progress, times = (start + stop) / 2, []
            for _ in range(ROUNDS + 1):
                began = time.perf_counter()
                region = method.region(stage, progress, numbers, state)
                generator = torch.Generator(x.device)
                batch = Batch(live, x, y, region, progress, generator, numbers, state, stage)
                train_step(method, batch, optimiser, 0.0, training.part)
                times.append(time.perf_counter() - began)
        per_example += (stage.end - stage.begin) * (stop - start) * min(times[1:]) / count
    began = time.perf_counter()
    evaluate(copied, held_out, method.ball(test_eps), method.engine)
    measured = time.perf_counter() - began
    if training.average is not None or training.bn_statistics == "recompute":
        began = time.perf_counter()
        recompute_statistics(copied, [x])
        averaged = 0.0 if training.average is None else 1 - training.average.begin
        times_an_epoch = averaged + (training.bn_statistics == "recompute")
        per_example += times_an_epoch * (time.perf_counter() - began) / count
    return training.epochs * (examples * per_example + measured)

"""Branch and bound against enumeration: the verdicts on small random ReLU networks, all of which must agree.

    python benchmarks/referee.py [--cases 500] [--start 0]

Each case is a network (dense, convolutional or residual), an input and an eps from tests/verify/referee.py,
in turn in l_inf and l_1. Every second search goes without gradient steps, so that it has to split down to
single patterns. Prints one JSON object; exits with 1 if a verdict differs from the exact minimum's sign.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.verify.referee import ask, case, smallest_margin

from tightrope.region import Box, L1Ball
from tightrope.verify.bab import BranchAndBound

SEARCHES = (BranchAndBound(), BranchAndBound(iterations=0, candidates=1))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--start", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    counts, wrong = {"robust": 0, "falsified": 0, "undecided": 0}, []
    seconds = {"referee": 0.0, "search": 0.0}
    for seed in range(arguments.start, arguments.start + arguments.cases):
        asked = case(seed, L1Ball if seed % 4 > 1 else Box)
        began = time.perf_counter()
        exact = smallest_margin(asked)
        seconds["referee"] += time.perf_counter() - began
        began = time.perf_counter()
        found = ask(SEARCHES[seed % 2], asked.graph, asked.x, asked.y, asked.region)
        seconds["search"] += time.perf_counter() - began
        assert found.point is not None
        refuted = not bool(found.point.isnan().any())
        verdict = "robust" if found.proved[0] else "falsified" if refuted else "undecided"
        counts[verdict] += 1
        too_high = verdict == "robust" and float(found.margin) > exact + 1e-9
        if verdict != ("robust" if exact > 0 else "falsified") or too_high:
            wrong.append({"seed": seed, "exact": exact, "verdict": verdict, "bound": float(found.margin)})
    setting = {"torch": torch.__version__, "machine": platform.platform()}
    rounded = {name: round(value, 1) for name, value in seconds.items()}
    print(json.dumps({**setting, **counts, "wrong": wrong, "seconds": rounded}, indent=2))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()

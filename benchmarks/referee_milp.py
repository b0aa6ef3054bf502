"""The verifier milp against an LP for every activation pattern, on random small networks.

    python benchmarks/referee_milp.py [--cases 500] [--first 0]

Prints one JSON object: how many margins were compared, how far the optima lay apart, how far CROWN lies below
the triangles and these below the optimum, and how many verdicts were robust, falsified and open. Any
contradiction ends the run with its seed. The referee is that of the tests (tests/verify/referee.py).
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections import Counter
from pathlib import Path

import highspy
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.verify.referee import case, exact_minima

from tightrope.bounds import Linear, Problem
from tightrope.region import Box, L1Ball
from tightrope.spec import Spec
from tightrope.verify.encode import encode, layers_of
from tightrope.verify.milp import Milp, minimise
from tightrope.verify.stages import answer

WIDEST = 0.6  # radius; larger than in the tests, so that more neurons are unstable


def judge(seed: int) -> tuple[str, int, list[tuple[float, float, float, float]]]:
    """The verdict, the number of unstable neurons, and for each wrong class CROWN, LP, MILP and the truth."""
    given = case(seed, L1Ball if seed % 4 == 3 else Box, WIDEST)
    problem = Problem(given.graph, given.x, given.region, Spec.margins(given.y, 3, given.x))
    bounds, rows = problem.bounds(Linear()), problem.spec.rows[0]
    triangles = encode(given.graph, layers_of(given.graph), given.x, given.region, bounds.boxes)
    program = triangles.switched(np.arange(len(triangles.neurons)))
    exact = exact_minima(given.graph, given.x, given.region, rows)
    wrong = [t for t in range(3) if t != given.y]
    found = []
    for t in wrong:
        row = rows[t].numpy()
        lines, true = bounds.lower[0, t].item(), float(exact[t])
        found.append((lines, minimise(triangles, row).lower, minimise(program, row).lower, true))
    proved, _, point, *_ = Milp()(problem, given.y)
    smallest = min(exact[t] for t in wrong)
    verdict = "robust" if proved else "open"
    if point is not None and bool(point.isfinite().all()):
        replayed = answer(given.graph, given.region.project(given.x, point), given.y)
        assert replayed.margin <= 0, f"seed {seed}: the witness is none"
        assert not proved, f"seed {seed}: robust, with a witness"
        verdict = "falsified"
    assert verdict != "robust" or smallest > 0, f"seed {seed}: robust, but the minimum is {smallest}"
    assert verdict != "falsified" or smallest <= 1e-6, (
        f"seed {seed}: falsified, but the minimum is {smallest}"
    )
    for lines, relaxed, whole, true in found:
        assert lines <= relaxed + 1e-7, f"seed {seed}: CROWN {lines} is above the triangles {relaxed}"
        assert relaxed <= whole + 1e-7, f"seed {seed}: the triangles {relaxed} are above the program {whole}"
        assert whole <= true + 1e-6, f"seed {seed}: the proven bound {whole} is above the minimum {true}"
        close = abs(whole - true) <= 1e-6 + 1e-4 * abs(true)
        assert close, f"seed {seed}: the program says {whole}, the patterns {true}"
    return verdict, len(triangles.neurons), found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--first", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    verdicts, counts, rows = [], [], []
    with torch.no_grad():
        for seed in range(arguments.first, arguments.first + arguments.cases):
            verdict, count, found = judge(seed)
            verdicts.append(verdict)
            counts.append(count)
            rows += found
            if sys.stderr.isatty():
                print(f"\r{len(verdicts)} cases", end="", file=sys.stderr)
    lines, relaxed, whole, true = np.array(rows).T
    result = {
        "margins": len(rows),
        "verdicts": Counter(verdicts),
        "unstable neurons": {"mean": round(float(np.mean(counts)), 2), "most": max(counts)},
        "largest distance of an optimum": float(np.abs(whole - true).max()),
        "triangles above CROWN": int((relaxed > lines + 1e-6).sum()),
        "optima above the triangles": int((whole > relaxed + 1e-6).sum()),
        "seconds": round(time.perf_counter() - began, 1),
        "highs": highspy.Highs().version(),
        "machine": platform.platform(),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

"""How many random tamperings of certificates are rejected: PYTHONPATH=src python benchmarks/recheck.py.

Files of certificates of small networks (dense, convolutional, residual; l_inf, l_1, l_2), each change drawn
at random: half leave the hashes as they are, half state the right ones again (tests/verify/tampering.py).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.verify.tampering import PLAIN, SEALED, Files, NothingToChange, examples, is_rejected, store

from tightrope import checker
from tightrope.region import Box, L1Ball, L2Ball
from tightrope.verify import pipeline


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--files", type=int, default=15)
    options = parser.parse_args()
    pipeline.CHUNK = 3  # so that there are several files of certificates
    quiet = contextlib.redirect_stderr(io.StringIO())
    with tempfile.TemporaryDirectory() as folder, quiet:
        originals = [Path(folder) / f"{seed}.jsonl" for seed in range(options.files)]
        accepted = stored = bare = 0
        for seed, path in enumerate(originals):
            store(*examples(seed, 6, (Box, L1Ball, Box, L2Ball, Box)[seed // 5 % 5]), path)
            report = checker.recheck(path)
            accepted, stored = accepted + report["accepted"], stored + report["examples"]
            bare += report["without_certificate"]
        tried, missed = Counter[str](), list[str]()
        number = 0
        while sum(tried.values()) < options.count:
            number += 1
            random = np.random.default_rng(number)
            change = (PLAIN, SEALED)[number % 2]
            chosen = change[random.integers(len(change))]
            files = Files.read(originals[random.integers(len(originals))])
            try:
                chosen(files, random)
            except NothingToChange:
                continue
            path = Path(folder) / "tampered.jsonl"
            files.write(path, sealed=chosen in SEALED)
            tried[chosen.__name__] += 1
            if not is_rejected(path):
                missed.append(f"{chosen.__name__}, seed {number}")
    print(f"untouched: {accepted} of {stored} verdicts accepted, {bare} have no certificate")
    for name, count in sorted(tried.items()):
        print(f"{count:5} {name}")
    print(f"{sum(tried.values())} tamperings, {len(missed)} not rejected", *missed, sep="\n")


if __name__ == "__main__":
    main()

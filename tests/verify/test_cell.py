"""The linear programs at the end of branch and bound, on cells known by hand."""

from __future__ import annotations

import pytest
import torch

from tightrope.region import Box, L1Ball, L2Ball
from tightrope.verify.cell import Halves, Program

CENTRE = torch.tensor([[0.5, 0.5]], dtype=torch.float64)
BOX = Box(0.5)  # all of [0, 1]^2


def halves(*functions: tuple[float, float, float]) -> Halves:
    """`a x0 + b x1 + c` for each (a, b, c), counted from the centre."""
    numbers = torch.tensor(functions, dtype=torch.float64)
    return Halves(numbers[:, :2], numbers[:, :2] @ CENTRE[0] + numbers[:, 2])


def solve(functions, region=BOX):
    return Program(halves(*functions), CENTRE, region).solve()


def test_a_cell_without_a_witness_is_proved():
    assert solve([(1, 0, -0.5), (1, 0, -0.7)]).proof == pytest.approx(0.1)  # x0 > 0.5 where x0 >= 0.7


def test_an_empty_cell_is_proved():
    assert solve([(1, 0, -5), (1, 0, -0.7), (-1, 0, 0.2)]).proof > 0.1  # x0 >= 0.7 and x0 <= 0.2


def test_what_cancels_in_a_proof_counts_in_its_size():
    nearest = solve([(1e6, 0, 1 - 0.5e6), (1e6, 0, -1 - 0.5e6)])
    assert nearest.proof == pytest.approx(1.0)
    assert nearest.size > 1e5


def test_a_witness_is_found():
    nearest = solve([(1, 0, -0.5), (1, 0, -0.3), (0, 1, -0.9)])
    assert nearest.proof < 0
    assert 0.3 <= nearest.point[0, 0] <= 0.5
    assert nearest.point[0, 1] >= 0.9


@pytest.mark.parametrize(("region", "exact"), [(L2Ball(0.3), 0.7 - 0.3 / 2**0.5), (L1Ball(0.3), 0.7 - 0.15)])
def test_a_ball_is_enclosed_closer_with_every_cut(region, exact):
    """The least s with (x0 + x1) / 2 + 0.2 <= s and (x0 - x1) / 2 >= -s."""
    program = Program(halves((0.5, 0.5, 0.2), (0.5, -0.5, 0.0)), CENTRE, region)
    proofs = []
    for _ in range(30):
        nearest = program.solve()
        proofs.append(nearest.proof)
        if not program.cut(nearest.point):
            break
    assert max(proofs) <= exact + 1e-9
    assert max(proofs) > 0.45


def test_a_proof_is_never_above_what_sampling_finds():
    generator = torch.Generator().manual_seed(0)
    for region in (BOX, L2Ball(0.4), L1Ball(0.6), L2Ball(0.9), L1Ball(1.5)):
        points = torch.cat([region.sample(CENTRE, generator) for _ in range(500)])
        for _ in range(4):
            numbers = torch.randn(4, 3, generator=generator, dtype=torch.float64)
            program = Program(Halves(numbers[:, :2], numbers[:, 2]), CENTRE, region)
            values = (points - CENTRE) @ numbers[:, :2].T + numbers[:, 2]
            sampled = torch.maximum(values[:, 0], -values[:, 1:].amin(1)).min()
            for _ in range(12):
                nearest = program.solve()
                assert nearest.proof <= sampled + 1e-9
                if not program.cut(nearest.point):
                    break
            assert nearest.proof >= sampled - 0.2  # and not far below

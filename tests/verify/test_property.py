"""Properties of boxes and linear inequalities, decided by any verifier."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from tightrope.errors import InputError, SoundnessViolation
from tightrope.region import Box
from tightrope.verify import VERIFIERS, BoundStage, certify, decide
from tightrope.verify.vnnlib import Case, Query, read_vnnlib, write_robustness

from .conftest import labelled, random_net
from .test_stages import Says


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def case(*inequalities: tuple[list[float], float], strict: bool = False) -> Case:
    """Counter-examples where every row's product with the outputs is at most its limit."""
    rows = torch.tensor([row for row, _ in inequalities], dtype=torch.float64).view(-1, 2)
    return Case(rows, vector(*(limit for _, limit in inequalities)), torch.full((len(rows),), strict))


def identity() -> nn.Module:
    """Outputs are the inputs, behind a hinge that moves nothing."""
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    with torch.no_grad():
        for layer, shift in ((net[0], 8.0), (net[2], -8.0)):
            layer.weight.copy_(torch.eye(2))
            layer.bias.fill_(shift)
    return net


BOX = (vector(-1, 0), vector(3, 0.5))  # neither centred nor square


@pytest.mark.parametrize("verifier", [name for name, stages in VERIFIERS.items() if stages])
@pytest.mark.parametrize(
    ("cases", "result"),
    [
        ((case(([1, 0], -1.1)),), "unsat"),
        ((case(([1, 0], -0.9)),), "sat"),
        ((case(([1, 0], -1.1)), case(([0, -1], -0.6))), "unsat"),
        ((case(([1, 0], -1.1)), case(([0, -1], -0.4))), "sat"),
        ((case(([1, 0], 0), ([0, -1], -0.6)),), "unsat"),  # of a conjunction, one row is enough
        ((case(([1, 0], 0), ([0, -1], -0.4)),), "sat"),
        ((case(([1, 0], 0), ([0, -1], -0.6)), case(([1, 0], -1.1))), "unsat"),
        ((case(),), "sat"),  # every output is one of a counter-example
        ((case(([1, 0], 0), ([-1, 0], -0.01)),), "unknown"),  # excluded, but by neither row alone
        ((case(([1, 0], 0), ([-1, 0], -0.01)), case(([1, 0], -1.1))), "unknown"),
    ],
)
def test_what_can_be_known_by_hand(verifier, cases, result):
    asked = [Query(*BOX, cases)]
    found = decide(identity(), (2,), asked, verifier=verifier)
    if result == "unknown" and verifier in ("complete", "cascade", "milp"):  # these search
        result = "unsat"
    assert found.result == result or (result == "unknown" and found.result == "unsat")
    if found.counterexample is not None:
        x, y = found.counterexample.x, found.counterexample.y
        assert ((BOX[0] <= x) & (x <= BOX[1])).all()
        assert any((one.rows @ y <= one.limits).all() for one in cases)
        torch.testing.assert_close(x, y)


def test_every_box_must_be_proved_and_one_counter_example_will_do():
    right, wrong = case(([1, 0], -1.1)), case(([1, 0], -0.9))
    assert decide(identity(), (2,), [Query(*BOX, (right,)), Query(*BOX, (wrong,))]).result == "sat"
    unknown = Query(*BOX, (case(([1, 0], 0), ([-1, 0], -0.01)),))
    found = decide(identity(), (2,), [unknown, Query(*BOX, (right,))], verifier="ibp")
    assert (found.result, found.undecided) == ("unknown", 1)
    assert decide(identity(), (2,), []).result == "unsat"


def test_where_only_equality_is_left_a_strict_property_is_not_refuted():
    zero = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    with torch.no_grad():
        for parameter in zero.parameters():
            parameter.zero_()
    for strict, result in ((False, "sat"), (True, "unknown")):
        assert decide(zero, (2,), [Query(*BOX, (case(([1, 0], 0), strict=strict),))]).result == result


def test_a_tie_in_the_middle_of_the_box_hides_no_counter_example_to_a_strict_property():
    middle = (vector(-1, 0), vector(1, 0))
    below = Query(*middle, (case(([1, 0], 0), strict=True),))
    found = decide(identity(), (2,), [below])
    assert found.result == "sat"
    assert found.counterexample.y[0] < 0
    assert decide(identity(), (2,), [below], attack=None).result == "unknown"


def test_an_input_that_float64_does_not_have_is_the_number_nearest_to_it(tmp_path):
    path = tmp_path / "p.vnnlib"
    declared = "".join(f"(declare-const {name} Real)" for name in ("X_0", "X_1", "Y_0", "Y_1"))
    bounds = "(assert (and (>= X_0 0) (<= X_0 1) (>= X_1 0.1) (<= X_1 0.1)))"
    path.write_text(f"{declared} {bounds} (assert (<= (+ Y_0 Y_1) 0.5))")
    found = decide(identity(), (2,), read_vnnlib(path, 2, 2))
    assert found.result == "sat"
    assert found.counterexample.x[1] == 0.1


def test_numbers_beyond_float32_are_attacked_in_float64():
    net = nn.Linear(2, 2, bias=False)
    nn.init.eye_(net.weight)
    for limit, result in ((-2e39, "unsat"), (-1e38, "sat")):
        query = Query(vector(-1e39, 0), vector(1e39, 0), (case(([1, 0], limit)),))
        assert decide(net, (2,), [query]).result == result


def random_query(seed: int) -> Query:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    lower = draw(2)
    upper = lower + draw(2).abs() * (torch.rand(2, generator=generator) < 0.8)
    sizes = [1 + seed % 2, 1, 2 + seed % 2][: 1 + seed % 3]
    cases = (Case(draw(n, 3), draw(n) - 1.0, torch.zeros(n, dtype=torch.bool)) for n in sizes)
    return Query(lower, upper, tuple(cases))


@pytest.mark.parametrize("layer", [nn.ReLU, nn.Tanh])
def test_a_fine_grid_never_contradicts_an_answer(layer):
    results = []
    for seed in range(24):
        net = random_net(seed, inputs=2, layer=layer).module.double()
        query = random_query(seed)
        found = decide(net, (2,), [query])
        results.append(found.result)
        steps = torch.linspace(0, 1, 41, dtype=torch.float64)
        grid = query.lower + torch.cartesian_prod(steps, steps) * (query.upper - query.lower)
        y = net(grid)
        hits = any((y @ one.rows.T <= one.limits).all(1).any() for one in query.cases)
        assert not (found.result == "unsat" and hits)
        assert not (found.result == "unknown" and hits)  # the attack is that good here
        if found.counterexample is not None:
            x = found.counterexample.x
            assert ((query.lower <= x) & (x <= query.upper)).all()
            assert any(one.holds(net(x.unsqueeze(0))[0]) for one in query.cases)
    assert results.count("unsat") >= 6
    assert results.count("sat") >= 6


def test_robustness_as_a_property_gets_the_verdict_that_certify_gives(tmp_path):
    graph = random_net(3)
    examples = labelled(graph, 20)
    region = Box(0.1)
    verdicts = certify(graph, examples, region, verifier="crown", attack=None)
    for x, y, index in examples.batches(torch.arange(20).split(1)):
        lower, upper = region.corners(x.double())
        write_robustness(tmp_path / "p.vnnlib", lower[0], upper[0], int(y), 3, "")
        queries = read_vnnlib(tmp_path / "p.vnnlib", 4, 3)
        found = decide(graph.module, (4,), queries, verifier="crown", attack=None)
        expected = {"robust": "unsat", "undecided": "unknown"}[verdicts.verdicts[int(index)].status]
        assert found.result == expected
    assert {"robust", "undecided"} == {verdict.status for verdict in verdicts}


def test_images_are_numbered_row_by_row():
    net = nn.Sequential(nn.Conv2d(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[[[1.0, 0], [0, 0]]], [[[0, 0], [0, 1.0]]]]))
        net[0].bias.zero_()
        net[3].weight.copy_(torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 1.0]]))
        net[3].bias.zero_()
    corner = vector(0, 0.1, 0.2, 0.3, 0.4, 0.5)  # of 2x3: outputs are the entries 0 and 5
    for limit, result in ((0.6, "unsat"), (0.4, "sat")):
        query = Query(corner, corner + 0.05, (case(([0, -1], -limit)),))
        assert decide(net, (1, 2, 3), [query]).result == result


def test_a_network_and_its_mode_are_left_as_they_are():
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    decide(net, (2,), [Query(*BOX, (case(([1, 0], 0)),))])
    assert net.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_a_proof_that_a_counter_example_refutes_stops_everything(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    liar = replace(BoundStage("liar", Says(1.0)), cheap=True)
    monkeypatch.setitem(VERIFIERS, "liar", (liar,))
    query = Query(*BOX, (case(([1, 0], 0)),))
    off = nn.Sequential(identity(), nn.Linear(2, 2))
    with torch.no_grad():
        off[1].weight.copy_(torch.eye(2))
        off[1].bias.copy_(torch.tensor([-0.5, 0.0]))  # so that the middle is none
    with pytest.raises(SoundnessViolation):
        decide(off, (2,), [query], verifier="liar")


def test_a_time_limit_must_be_positive():
    with pytest.raises(InputError, match="time limit in seconds must be a positive"):
        decide(identity(), (2,), [], time_limit=0.0)

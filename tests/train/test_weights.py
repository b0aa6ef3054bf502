"""Weights and radii of single examples, against the definitions of decision_boundary.txt and its peers."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

import tightrope as tr
from tightrope.attacks import Pgd
from tightrope.bounds import Interval
from tightrope.train import Loss, terms
from tightrope.train.loop import Interrupted
from tightrope.train.stages import WHOLE
from tightrope.train.step import train_step
from tightrope.train.weights import AutoEps, by_attack, by_steps, confidence, near_the_boundary

IBP = terms.bounded(Interval())


def probabilities(logits, y):
    p = logits.softmax(1)
    right = p[torch.arange(len(y)), y]
    others = p.clone()
    others[torch.arange(len(y)), y] = -1
    return right - others.amax(1)


def test_confidence_is_the_margin_of_the_worst_cases_probabilities(network, batch):
    b = batch(network(), eps=0.05)
    lower = b.problem.bounds(Interval()).lower
    torch.testing.assert_close(confidence(b, IBP), probabilities(-lower, b.y))
    certified = torch.where(torch.arange(3) == b.y.unsqueeze(1), torch.inf, lower).amin(1) > 0
    assert torch.equal(confidence(b, IBP) > 0, certified)
    assert not confidence(b, IBP).requires_grad


def test_near_the_boundary_is_the_papers_formula(network, batch):
    b = batch(network(), eps=0.05)
    found = near_the_boundary(5.0, 0.1)(b, IBP)
    torch.testing.assert_close(found, torch.exp(-5 * confidence(b, IBP).abs()) + 0.1)
    assert ((found > 0.1) & (found <= 1.1)).all()


def test_by_attack_is_the_formula_of_zeng(network, batch):
    attack = Pgd(steps=3, step=0.5, keep_best=False)
    b = batch(network(), eps=0.05)
    found = by_attack(2.0, attack)(b, IBP)
    expected = torch.exp(-2 * probabilities(b.graph.run(b.attacked(attack))[0], b.y))
    torch.testing.assert_close(found, expected.detach())


def test_by_steps_is_the_formula_of_gairat(network, batch):
    module, attack = network(), Pgd(steps=4, step=0.5, keep_best=False)
    b = batch(module, eps=0.3)
    needed = attack.steps_needed(b.graph.frozen(), b.x, b.y, b.region, torch.Generator().manual_seed(0))
    assert ((needed >= 0) & (needed <= 4) & (needed == needed.round())).all()
    found = by_steps(-1.0, attack)(batch(module, eps=0.3), IBP)
    torch.testing.assert_close(found, (1 + torch.tanh(-1 + 5 * (1 - 2 * needed / 4))) / 2)


def test_an_attack_needs_no_steps_where_the_network_errs_and_all_where_it_cannot(network, batch):
    attack = Pgd(steps=4, step=0.5, keep_best=False)
    b = batch(network(), eps=0.0)
    right = b.logits.argmax(1) == b.y
    needed = attack.steps_needed(b.graph.frozen(), b.x, b.y, b.region)
    assert torch.equal(needed, torch.where(right, 4.0, 0.0))


def test_a_weighted_loss_is_the_weighted_mean_over_the_batch(network, batch):
    weigh = near_the_boundary(5.0, 0.1)
    b = batch(network(), eps=0.05)
    each, weights = terms.worst_case(IBP)(b), weigh(b, IBP)
    found = Loss("robust", 1.0, terms.worst_case(IBP), IBP, weigh).value(b)
    torch.testing.assert_close(found, (weights * each).sum() / weights.sum())
    assert not torch.isclose(found, each.mean())


def test_no_gradient_flows_through_the_weights(network, batch):
    module = network()
    b = batch(module, eps=0.05)
    weights = near_the_boundary(5.0, 0.1)(b, IBP)
    expected = torch.autograd.grad(
        (weights * terms.worst_case(IBP)(b)).sum() / weights.sum(), list(module.parameters())
    )
    loss = Loss("robust", 1.0, terms.worst_case(IBP), IBP, near_the_boundary(5.0, 0.1))
    found = torch.autograd.grad(loss.value(batch(module, eps=0.05)), list(module.parameters()))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


# ------------------------------------------------------------------------------------------- radii


def test_radii_are_eps_less_the_offset_and_never_negative():
    radii = AutoEps(0.15)
    state = radii.begin(4)
    assert state["eps.offsets"].tolist() == [0, 0, 0, 0]
    state["eps.offsets"][:] = torch.tensor([0.0, 0.1, 0.15, 0.05])
    found = radii(0.1, torch.tensor([3, 1, 2]), state)
    torch.testing.assert_close(found, torch.tensor([0.05, 0.0, 0.0]))


def test_an_offset_is_the_lost_margins_share_and_nothing_where_it_is_won(network, batch):
    radii = AutoEps(0.15)
    state = radii.begin(30)
    index = torch.arange(12).flip(0) + 7
    b = batch(network(), eps=torch.full((12,), 0.05), index=index, state=state)
    radii.learn(b, IBP)
    margins = confidence(b, IBP)
    torch.testing.assert_close(state["eps.offsets"][index], 0.15 * (-margins).clamp(min=0))
    rest = torch.ones(30, dtype=torch.bool)
    rest[index] = False
    assert (state["eps.offsets"][rest] == 0).all()


def test_offsets_have_their_own_precision():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert AutoEps(0.1).begin(3)["eps.offsets"].dtype == torch.float32
    finally:
        torch.set_default_dtype(before)


def test_examples_count_by_whether_intervals_certify_them_where_the_loss_mixes_bounds_with_an_attack(
    batch, network
):
    b = batch(network(), eps=0.05)
    for method in (tr.methods.cc_ibp(eps=0.05), tr.methods.mtl_ibp(eps=0.05), tr.methods.exp_ibp(eps=0.05)):
        (margins,) = [loss.margins for loss in method.losses if loss.certified]
        torch.testing.assert_close(margins(b), IBP(b))


def test_an_offset_is_the_same_whether_the_rest_of_the_batch_has_a_radius_or_not(network, batch):
    radii, module = AutoEps(0.15), network()
    alone, beside = radii.begin(12), radii.begin(12)
    for state, eps in ((alone, torch.zeros(12)), (beside, torch.tensor([0.0] * 11 + [0.1]))):
        state["eps.offsets"][:] = 0.12
        radii.learn(batch(module, eps=eps, index=torch.arange(12), state=state), IBP)
    torch.testing.assert_close(alone["eps.offsets"][:11], beside["eps.offsets"][:11])
    right = module(batch(module).x).argmax(1) == batch(module).y
    assert ((alone["eps.offsets"] == 0) == right).all()


def test_offsets_are_learned_from_the_bounds_of_before_the_step(network, batch):
    module, index = network(), torch.arange(12)
    method = tr.methods.ibp(eps=0.05) | tr.auto_eps(max_offset=0.02)
    state = method.begin(batch(module).graph, 12)
    region = method.region(WHOLE, 1.0, index, state)
    margins = confidence(batch(module, eps=region.eps), IBP)
    b = batch(module, eps=region.eps, index=index, state=state)
    result = train_step(method, b, torch.optim.SGD(module.parameters(), 10.0), 0.0)
    torch.testing.assert_close(state["eps.offsets"], 0.02 * (-margins).clamp(min=0))
    assert result.notes == {"mean radius": pytest.approx(0.05)}


MODIFIED = {
    "reweight": lambda m: m | tr.reweight(),
    "auto-eps": lambda m: m | tr.auto_eps(max_offset=0.03),
    "both": lambda m: m | tr.reweight() | tr.auto_eps(max_offset=0.03),
    "attack": lambda m: m | tr.reweight_attack(steps=2),
    "gairat": lambda m: m | tr.reweight_gairat(steps=2),
}
METHODS = {
    "ibp": lambda: tr.methods.ibp(eps=0.05, ramp=tr.Course(begin=0, finish=0.5)),
    "shi-ibp": lambda: tr.methods.shi_ibp(eps=0.05),
    "crown-ibp": lambda: tr.methods.crown_ibp(eps=0.05),
    "crown-ibp, fused": lambda: tr.methods.crown_ibp(eps=0.05, fusion=True),
    "wong-kolter": lambda: tr.methods.wong_kolter(eps=0.05, projections=0),
    "advibp": lambda: tr.methods.advibp(eps=0.05, clean=0.1, ramp=tr.Course(begin=0.2, finish=0.5)),
    "advcrown-ibp": lambda: tr.methods.advcrown_ibp(
        eps=0.05, clean=0.1, ramp=tr.Course(begin=0.2, finish=0.5)
    ),
}


@pytest.mark.parametrize("modifier", ["both", "attack", "gairat"])
@pytest.mark.parametrize("name", METHODS)
def test_every_certified_method_trains_with_them(name, modifier, network, images, tmp_path):
    method = MODIFIED[modifier](METHODS[name]())
    out = tmp_path / "run"
    # The last batch is partial.
    tr.fit(network(), images(50), method, out=out, epochs=2, batch=8, held_out=10, lr=0.01)
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == 2
    assert ("mean radius" in records[-1].get("notes", {})) == (modifier == "both")


@pytest.mark.parametrize("name", ["ibp", "advibp"])
def test_a_resumed_run_is_the_uninterrupted_one(name, network, images, tmp_path, monkeypatch):
    def run(out, **more):
        method = MODIFIED["both"](METHODS[name]())
        return tr.fit(network(), images(50), method, out=out, epochs=4, batch=8, held_out=10, lr=0.01, **more)

    whole = run(tmp_path / "whole")
    steps = iter(range(100))

    def interrupted(*args):
        if next(steps) == 13:
            raise Interrupted
        return train_step(*args)

    with monkeypatch.context() as patched:
        patched.setattr("tightrope.train.loop.train_step", interrupted)
        patched.setattr("tightrope.train.loop.Training.checkpoint_seconds", 0.0, raising=False)
        with pytest.raises(Interrupted):
            run(tmp_path / "parts", checkpoint_seconds=1e-9)
    again = run(tmp_path / "parts", resume=True)
    for one, other in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)
    lines = [
        [
            {k: v for k, v in json.loads(line).items() if k != "seconds"}
            for line in (tmp_path / part / "metrics.jsonl").read_text().splitlines()
        ]
        for part in ("whole", "parts")
    ]
    assert lines[0] == lines[1]


def test_offsets_follow_their_examples_through_two_shuffled_epochs(network, images, tmp_path, monkeypatch):
    """Each visit is trained at eps less what the example's own last visit left behind."""
    visits: dict[int, list[tuple[float, float]]] = {}

    def watched(method, batch, *rest):
        result = train_step(method, batch, *rest)
        margins = confidence(batch, IBP)
        offsets = 0.03 * (-margins).clamp(min=0)
        for number, radius, offset in zip(
            batch.index.tolist(), batch.region.eps.tolist(), offsets.tolist(), strict=True
        ):
            visits.setdefault(number, []).append((radius, offset))
        return result

    monkeypatch.setattr("tightrope.train.loop.train_step", watched)
    method = tr.methods.ibp(
        eps=tr.Ramp(start=0.05, end=0.05), kappa=tr.Ramp(start=0.5, end=0.5)
    ) | tr.auto_eps(max_offset=0.03)
    tr.fit(network(), images(50), method, out=tmp_path / "run", epochs=3, batch=8, held_out=10, lr=0.01)
    assert len(visits) == 40
    assert any(offset > 0 for seen in visits.values() for _, offset in seen)
    for seen in visits.values():
        assert len(seen) == 3
        assert seen[0][0] == pytest.approx(0.05)
        for (_, offset), (radius, _) in itertools.pairwise(seen):
            assert radius == pytest.approx(max(0.0, 0.05 - offset), abs=1e-7)


def test_a_step_says_how_many_examples_count(network, batch):
    module, index = network(), torch.arange(12)
    method = tr.methods.ibp(eps=0.05) | tr.reweight()
    result = train_step(method, batch(module, index=index), torch.optim.SGD(module.parameters(), 0.0), 0.0)
    weights = near_the_boundary(5.0, 0.1)(batch(module), IBP)
    share = weights.sum().square() / (12 * weights.square().sum())
    assert result.notes == {"effective share of robust": pytest.approx(share.item(), rel=1e-5)}

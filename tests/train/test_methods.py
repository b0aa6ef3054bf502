"""The contract of every training method: one row per method, and all tests for each row.

To add a method: one row in `ROWS`.
"""

import json
import tomllib
from collections import Counter
from dataclasses import replace

import pytest
import tomli_w
import torch

from tightrope.attacks import Pgd
from tightrope.bounds import HybridZonotope, Intersect, Interval, Linear
from tightrope.errors import InputError, RecipeError
from tightrope.graph import trace
from tightrope.recipes import build_method
from tightrope.region import L1Ball, L2Ball
from tightrope.train import METHODS, Course, Ramp, Steps, methods, terms
from tightrope.train.methods import LatentAttack, Penalty
from tightrope.train.schedules import at, last
from tightrope.train.stages import WHOLE, Layerwise
from tightrope.train.step import train_step

NO_PENALTY = Penalty(l1=0, stability=0)
# name, options, whether it needs a network with BatchNorm
ROWS = [
    ("standard", {}, False),
    ("fgsm", {"eps": 0.05}, False),
    ("pgd", {"eps": 0.05, "steps": 3}, False),
    ("trades", {"eps": 0.05, "steps": 3}, False),
    ("mart", {"eps": 0.05, "steps": 3}, False),
    ("relu-stability", {"eps": 0.05, "weight": 0.0, "l1": 0.0, "steps": 3}, False),
    ("ibp", {"eps": 0.05}, False),
    ("shi-ibp", {"eps": 0.05}, True),
    ("crown-ibp", {"eps": 0.05}, False),
    ("wong-kolter", {"eps": 0.05, "projections": 4}, False),
    ("diffai", {"eps": 0.05, "domain": "switch"}, False),
    ("advibp", {"eps": 0.05}, False),
    ("advcrown-ibp", {"eps": 0.05}, False),
    ("colt", {"eps": 0.05, "penalty": NO_PENALTY}, False),
    ("mat", {"eps": 0.05, "penalty": NO_PENALTY}, False),
    ("maar", {"eps": 0.05, "penalty": NO_PENALTY}, False),
    ("sabr", {"eps": 0.05, "steps": 3}, False),
    ("cc-ibp", {"eps": 0.05}, False),
    ("mtl-ibp", {"eps": 0.05}, False),
    ("exp-ibp", {"eps": 0.05}, False),
    ("taps", {"eps": 0.05, "steps": 3}, False),
    ("staps", {"eps": 0.05, "steps": 3}, False),
]
WITHOUT_BOUNDS = ("fgsm", "pgd", "trades", "mart")  # attacked inputs have BatchNorm statistics of their own
NETWORKS = {"plain": {}, "BatchNorm": {"norm": True}}
EVERY = pytest.mark.parametrize(("name", "options", "norm"), ROWS, ids=[row[0] for row in ROWS])
ON_EACH_NETWORK = pytest.mark.parametrize("kind", list(NETWORKS))

# Another value for each option: what the metrics and checkpoints must tell apart.
OTHER_OPTIONS = [
    ("fgsm", {"eps": 0.1, "step": 1.0}),
    ("pgd", {"eps": Ramp(end=0.1, begin=0.1, finish=0.5), "steps": 2, "step": 0.7}),
    ("ibp", {"eps": 0.1, "kappa": 0.0, "ramp": Course(shape="smooth", begin=0.1, finish=0.3)}),
    ("ibp", {"eps": Steps(start=0.1, at=(0.5,)), "kappa": Ramp(start=0.9, end=0.4)}),
    ("shi-ibp", {"eps": 0.1, "regularise": 0.2, "ramp": Course(begin=0.1, finish=0.9)}),
    ("crown-ibp", {"eps": 0.1, "kappa": 0.1, "beta": 0.3, "fusion": True}),
    ("wong-kolter", {"eps": 0.1, "projections": 0, "ramp": Course(begin=0.1, finish=0.4)}),
    ("diffai", {"eps": 0.1, "domain": "deepz", "sample": False, "kappa": 0.2, "ramp": Course(begin=0.1)}),
    ("diffai", {"eps": Ramp(end=0.1, begin=0.1, finish=0.3), "kappa": Ramp(start=0.9, end=0.4)}),
    ("crown-ibp", {"eps": Ramp(end=0.1, begin=0.1, finish=0.3), "beta": Ramp(start=0.9, end=0.4)}),
    ("advibp", {"eps": 0.1, "threshold": 0.2, "beta1": 0.5, "beta2": 0.9, "combiner": "total"}),
    ("advcrown-ibp", {"eps": 0.1, "threshold": Ramp(start=1, end=0), "clean": 0.02, "fusion": True}),
    ("trades", {"eps": 0.1, "beta": 2.0, "steps": 2, "step": 0.5}),
    ("mart", {"eps": 0.1, "lam": 2.0, "steps": 2, "step": 0.5}),
    ("relu-stability", {"eps": 0.1, "weight": 1e-3, "l1": 1e-4, "steps": 2, "step": 0.5}),
    ("sabr", {"eps": 0.1, "share": 0.1, "steps": 2, "step": 0.5, "ramp": Course(begin=0.1, finish=0.4)}),
    ("cc-ibp", {"eps": Ramp(end=0.1, begin=0.1, finish=0.3), "alpha": 0.5, "steps": 3, "step": 0.4}),
    ("mtl-ibp", {"eps": 0.1, "alpha": 0.5, "steps": 3, "step": 0.4}),
    ("exp-ibp", {"eps": 0.1, "alpha": 0.5, "steps": 3, "step": 0.4}),
    ("taps", {"eps": 0.1, "split": 2, "weight": 2.0, "steps": 3, "step": 0.4}),
    ("staps", {"eps": Ramp(end=0.1, begin=0.1, finish=0.3), "share": 0.3, "split": 2, "weight": 2.0}),
    ("colt", {"eps": 0.1, "natural": 0.5, "attack": LatentAttack(steps=2, step=0.5, projections=0)}),
    ("mat", {"eps": 0.1, "stages": Layerwise(widen=1, eps_factor=1.2, mix=0.1, lengths=(1, 2))}),
    ("maar", {"eps": 0.1, "lam": 2.0, "weight": "hard", "penalty": Penalty(l1=0, stability=0.1)}),
]


def build(name, options):
    return METHODS[name](**options)


CERTIFIED = [row[0] for row in ROWS if any(loss.certified for loss in build(*row[:2]).losses)]


def gradient(method, batch):
    """The gradient of the mean of all losses that do not vanish."""
    values = [(at(loss.weight, batch.progress), loss.value(batch)) for loss in method.losses]
    values = [(weight, value) for weight, value in values if value.item() != 0]
    total = sum(weight * value for weight, value in values) / sum(weight for weight, _ in values)
    return torch.autograd.grad(total, list(batch.graph.module.parameters()))


def objective(method, batch):
    weights = [(at(loss.weight, batch.progress), loss) for loss in method.losses]
    with torch.no_grad():
        return sum(w * loss.term(batch).mean().item() for w, loss in weights if w)


def test_the_table_has_every_method():
    assert [row[0] for row in ROWS] == list(METHODS)


@EVERY
@ON_EACH_NETWORK
@pytest.mark.parametrize("progress", [0.0, 0.1, 1.0], ids=["warm-up", "ramp", "end"])
def test_three_steps_lower_the_loss(network, batch, name, options, norm, kind, progress):
    method, module = build(name, options), network(**NETWORKS[kind])
    eps = at(method.eps, progress)
    optimiser = torch.optim.SGD(module.parameters(), 0.02)
    before = objective(method, batch(module, eps, progress))
    state = method.begin(trace(module, (1, 6, 6)), 12)
    for _ in range(3):
        train_step(method, batch(module, eps, progress, state=state), optimiser, clip=0.0)
    assert objective(method, batch(module, eps, progress)) < before


@EVERY
@pytest.mark.parametrize("ball", [L2Ball, L1Ball])
def test_over_balls_it_lowers_the_loss_too_or_is_refused(network, batch, name, options, norm, ball):
    method, module = build(name, options), network(norm=norm)
    if name in ("colt", "mat", "maar") or (name == "wong-kolter" and ball is L1Ball):
        with pytest.raises(InputError, match=rf"{name}.* l_inf.* l_{ball.norm}"):
            method.over(ball.norm)
        return
    method = method.over(ball.norm)
    region = method.region(WHOLE, 1.0, torch.arange(12), {})
    assert (type(region), region.eps) == (ball, at(method.eps, 1.0))
    optimiser = torch.optim.SGD(module.parameters(), 0.02)
    before = objective(method, batch(module, region.eps, kind=ball))
    state = method.begin(trace(module, (1, 6, 6)), 12)
    for _ in range(3):
        train_step(method, batch(module, region.eps, state=state, kind=ball), optimiser, clip=0.0)
    assert objective(method, batch(module, region.eps, kind=ball)) < before


@EVERY
@ON_EACH_NETWORK
def test_with_eps_zero_every_method_is_natural_training(network, batch, name, options, norm, kind):
    module = network(**NETWORKS[kind])
    found = gradient(build(name, options), batch(module, eps=0.0, progress=1.0))
    expected = gradient(methods.standard(), batch(module, eps=0.0, progress=1.0))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


@EVERY
@ON_EACH_NETWORK
@pytest.mark.parametrize("progress", [0.1, 1.0])
def test_one_radius_for_all_is_a_radius_for_each(network, batch, name, options, norm, kind, progress):
    method = build(name, options)
    for eps in (0.03, 0.0):
        one = batch(network(**NETWORKS[kind]), eps, progress)
        each = batch(network(**NETWORKS[kind]), torch.full((len(one.y),), eps), progress)
        for loss in method.losses:
            torch.testing.assert_close(loss.term(each), loss.term(one), atol=1e-6, rtol=1e-5)


@EVERY
@pytest.mark.parametrize("progress", [0.0, 0.02, 0.1, 0.5, 1.0])
def test_a_term_is_computed_once_if_it_has_weight_and_never_otherwise(
    network, batch, name, options, norm, progress
):
    method, calls = build(name, options), Counter()

    def counting(loss):
        def term(b):
            calls[loss.name] += 1
            return loss.term(b)

        return replace(loss, term=term)

    counted = replace(method, losses=tuple(map(counting, method.losses)))
    module = network(norm=norm)
    optimiser = torch.optim.SGD(module.parameters(), 0.01)
    state = method.begin(trace(module, (1, 6, 6)), 12)
    result = train_step(
        counted, batch(module, at(method.eps, progress), progress, state=state), optimiser, 0.0
    )
    weighty = {loss.name: 1 for loss in method.losses if at(loss.weight, progress) != 0}
    assert calls == weighty
    assert set(result.losses) == set(weighty)


@EVERY
def test_the_terms_have_names_of_their_own(name, options, norm):
    names = [loss.name for loss in build(name, options).losses]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(("name", "options"), [*(row[:2] for row in ROWS), *OTHER_OPTIONS])
def test_options_say_all_there_is_to_say(name, options):
    """Through TOML (a recipe) and JSON (a checkpoint) and back to the same method."""
    method = build(name, options)
    assert method.name == name
    for read in (tomllib.loads(tomli_w.dumps(method.options)), json.loads(json.dumps(method.options))):
        again = build_method({"name": name, **read})
        assert again.options == method.options
        assert (again.name, again.eps, again.initialise) == (method.name, method.eps, method.initialise)
        assert [replace(loss, term=terms.natural, margins=None, join=None) for loss in again.losses] == [
            replace(loss, term=terms.natural, margins=None, join=None) for loss in method.losses
        ]


@EVERY
def test_every_method_begins_without_a_region_or_with_its_own(name, options, norm):
    """A schedule begins at eps 0; a method without one trains at its eps throughout."""
    method = build(name, options)
    assert at(method.eps, 0.0) in (0.0, options.get("eps"))
    assert last(method.eps) == options.get("eps", 0.0)


# ------------------------------------------------------------------------- what a method promises


@pytest.mark.parametrize("name", CERTIFIED)
@pytest.mark.parametrize("eps", [0.0, -0.1, Ramp(end=0.0), Steps(start=0.0, at=())])
def test_a_certified_method_needs_a_radius(name, eps):
    with pytest.raises(InputError, match=f"{name} needs a training eps above 0"):
        METHODS[name](eps=eps)


@pytest.mark.parametrize("name", ["fgsm", "pgd", "ibp", "shi-ibp"])
@pytest.mark.parametrize(
    ("eps", "said"),
    [
        (float("nan"), " cannot be used: eps: .* finite number"),
        (float("inf"), " cannot be used: eps: .* finite number"),
        (Ramp(start=-0.1, end=0.1), ": eps must be finite and not negative"),
    ],
    ids=str,
)
def test_a_radius_is_finite_and_not_negative_from_the_first_step_on(name, eps, said):
    with pytest.raises(InputError, match=name + said):
        METHODS[name](eps=eps)


@pytest.mark.parametrize(("kappa", "ends"), [(1.0, "0"), (1.5, "-0.5"), (Ramp(start=0.5, end=1.0), "0")])
def test_a_certified_method_that_ends_without_its_robust_term_is_refused(kappa, ends):
    with pytest.raises(
        InputError, match=f"ibp is a certified method, .* robust term ends with weight {ends}:"
    ):
        methods.ibp(eps=0.1, kappa=kappa)


def test_a_network_trained_on_crown_ibp_to_the_end_is_measured_by_it():
    assert METHODS["crown-ibp"](eps=0.1).engine == Interval()
    engine = METHODS["crown-ibp"](eps=0.1, beta=0.5).engine
    assert engine == Intersect(Linear("adaptive", "interval", sides="lower"), Interval())


@pytest.mark.parametrize("name", ["advibp", "advcrown-ibp"])
def test_moving_averages_forget(name):
    with pytest.raises(InputError, match=r"beta2: .*less than 1"):
        METHODS[name](eps=0.1, beta2=1.0)


@pytest.mark.parametrize(
    ("name", "option"),
    [("sabr", "share"), ("staps", "share"), ("cc-ibp", "alpha"), ("mtl-ibp", "alpha"), ("exp-ibp", "alpha")],
)
def test_a_mixture_without_any_bounds_is_refused(name, option):
    with pytest.raises(InputError, match=rf"{name} cannot be used:\s+{option}: .*greater than 0"):
        METHODS[name](eps=0.1, **{option: 0.0})


@pytest.mark.parametrize(
    "make", [lambda: methods.ibp(0.1, kappa=-0.5), lambda: methods.shi_ibp(0.1, regularise=-1.0)]
)
def test_a_negative_weight_is_refused(make):
    with pytest.raises(InputError, match=r"the weight of its .* term must be finite and not negative"):
        make()


@pytest.mark.parametrize("options", [{"steps": 0}, {"steps": -1}, {"step": 0.0}, {"step": -0.3}])
def test_an_attack_without_steps_is_refused(options):
    with pytest.raises(RecipeError, match=r"must be a (whole|positive) number"):
        build_method({"name": "pgd", "eps": 0.1, **options})


def test_ibp_moves_kappa_as_eps_moves(network, batch):
    """methods.md, section 2: kappa_t = (eps - eps_t (1 - kappa)) / eps."""
    method = methods.ibp(eps=0.2, kappa=0.4, ramp=Course(shape="smooth", begin=0.1, finish=0.5))
    natural, robust = method.losses
    for progress in (0.0, 0.1, 0.2, 0.3, 0.45, 0.5, 1.0):
        share = at(method.eps, progress) / 0.2
        assert at(natural.weight, progress) == pytest.approx(1 - share * (1 - 0.4))
        assert at(natural.weight, progress) + at(robust.weight, progress) == pytest.approx(1)


def test_ibp_is_kappa_natural_and_the_rest_robust(network, batch):
    b = batch(network(), eps=0.05)
    natural, robust = (loss.term(b).mean().item() for loss in methods.ibp(eps=0.05).losses)
    assert objective(methods.ibp(eps=0.05, kappa=0.3), b) == pytest.approx(0.3 * natural + 0.7 * robust)
    assert robust > natural


def test_the_default_ramps_are_the_papers():
    ibp, shi = methods.ibp(eps=0.4), methods.shi_ibp(eps=0.4)
    assert ibp.eps == Ramp(shape="linear", start=0.0, end=0.4, begin=3 / 100, finish=20 / 100)
    assert shi.eps == Ramp(shape="smooth", start=0.0, end=0.4, begin=1 / 70, finish=21 / 70)


def test_shi_s_regularisers_fade_as_eps_rises_and_cost_nothing_after_the_ramp():
    """methods.md, section 4: lambda (1 - eps_t / eps)."""
    method = methods.shi_ibp(eps=0.3, regularise=0.5)
    robust, *regularisers = method.losses
    assert robust.weight == 1.0
    for progress in (0.0, 1 / 70, 0.05, 0.1, 0.2, 0.29, 21 / 70, 0.5, 1.0):
        for loss in regularisers:
            expected = 0.5 * (1 - at(method.eps, progress) / 0.3)
            assert at(loss.weight, progress) == pytest.approx(expected, abs=1e-12)
    assert [at(loss.weight, 21 / 70) for loss in regularisers] == [0.0, 0.0]


def test_a_misspelt_option_is_named_with_the_right_one():
    with pytest.raises(InputError, match=r"eps is missing\n .*unknown key epsilon .did you mean 'eps'"):
        METHODS["ibp"](epsilon=0.1)
    with pytest.raises(TypeError, match="multiple values"):
        METHODS["ibp"](0.1, eps=0.2)


@EVERY
def test_only_passes_over_inputs_update_statistics(network, batch, name, options, norm):
    """Neither bounds nor the search of an attack may, nor may they leave the network in another mode.

    Beside bounds, which are about the network at the clean batch's statistics, attacked inputs may not.
    """
    module = network(norm=True)
    method = build(name, options)
    b = batch(module, eps=0.05)
    for loss in method.losses:
        loss.term(b)
    assert module.training
    clean = 0 if name in ("fgsm", "pgd") else 1  # they never look at clean inputs
    assert module[1].num_batches_tracked.item() == clean + (name in WITHOUT_BOUNDS)
    if name not in WITHOUT_BOUNDS:
        same = network(norm=True)
        same(b.x)
        torch.testing.assert_close(module[1].running_mean, same[1].running_mean)


@pytest.mark.parametrize("name", ["taps", "staps"])
class TestConnected:
    def test_until_the_end_of_the_ramp_it_is_ibp(self, network, batch, name):
        method = METHODS[name](eps=0.1, ramp=Course(begin=0.1, finish=0.4))
        robust, connected = method.losses
        for progress, weights in ((0.0, (1, 0)), (0.39, (1, 0)), (0.4, (0, 1)), (1.0, (0, 1))):
            assert (at(robust.weight, progress), at(connected.weight, progress)) == weights
        module = network()
        ibp = terms.worst_case(terms.bounded(Interval()))
        assert torch.equal(robust.term(batch(module)), ibp(batch(module)))

    def test_a_network_that_cannot_be_split_there_is_refused_before_the_run(self, network, name):
        graph = trace(network(), (1, 6, 6))
        METHODS[name](eps=0.1, split=1).begin(graph, 12)
        with pytest.raises(InputError, match="this network has 2: set split to 1 at most"):
            METHODS[name](eps=0.1, split=2).begin(graph, 12)

    def test_a_split_leaves_something_behind_it(self, name):
        with pytest.raises(RecipeError, match="split"):
            build_method({"name": name, "eps": 0.1, "split": 0})


def test_staps_over_the_whole_region_is_taps(network, batch):
    """Up to the random start of the attack."""
    options = {"eps": 0.1, "steps": 20}
    module = network()
    taps, staps = (
        METHODS[name](**options, **more).losses[1].term(batch(module, count=60)).mean()
        for name, more in (("taps", {}), ("staps", {"share": 1.0}))
    )
    assert taps.item() == pytest.approx(staps.item(), rel=1e-2)


def test_between_an_attack_and_a_bound_the_losses_rise(network, batch):
    module = network()
    attack = Pgd(steps=20, step=0.25, loss="margin", keep_best=False)
    margins = [
        terms.between(attack, 0.0),
        terms.connected(attack, 1, terms.small(attack, 0.5)),
        terms.connected(attack, 1),
        terms.bounded(Interval()),
    ]
    losses = [terms.worst_case(m)(batch(module, eps=0.1, count=60)).mean().item() for m in margins]
    assert losses == sorted(losses)


class TestDiffai:
    def test_with_boxes_over_the_whole_region_it_is_ibp(self, network, batch):
        ramp = Course(begin=0.1, finish=0.5)
        ours = methods.diffai(eps=0.1, sample=False, kappa=0.3, ramp=ramp)
        theirs = methods.ibp(eps=0.1, kappa=0.3, ramp=ramp)
        for progress in (0.0, 0.3, 1.0):
            found, expected = (
                objective(m, batch(network(), at(m.eps, progress), progress)) for m in (ours, theirs)
            )
            assert found == expected

    def test_its_box_grows_into_the_whole_region_over_the_ramp(self, network, batch):
        method = methods.diffai(eps=0.1, domain="switch", ramp=Course(begin=0.2, finish=0.6))
        module, engine = network(), HybridZonotope("adaptive")
        whole = terms.worst_case(terms.bounded(engine))
        for progress in (0.21, 0.4, 0.6, 1.0):
            b = batch(module, eps=0.1, progress=progress)
            loss, largest = method.losses[1].term(b).mean(), whole(b).mean()
            assert (loss < largest) if progress < 0.6 else torch.allclose(loss, largest)
        assert method.engine == engine

    def test_its_default_schedule_is_the_code_s(self):
        """methods.md, section 11: Lin(0, 1, 150, 10), and a weight Lin(0, 0.5, 150, 10)."""
        method = methods.diffai(eps=0.1)
        assert method.eps == Ramp(end=0.1, begin=10 / 420, finish=160 / 420)
        natural, robust = method.losses
        assert (last(natural.weight), last(robust.weight)) == (0.5, 0.5)

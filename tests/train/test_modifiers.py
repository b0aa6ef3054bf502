"""What can be added to methods, and to which."""

from __future__ import annotations

import pytest

import tightrope as tr
from tightrope.errors import InputError, RecipeError
from tightrope.recipes import build_method, parse_recipe
from tightrope.train import METHODS, MODIFIERS
from tightrope.train.schedules import at

# name, other options than the defaults
ROWS = [
    ("tightness-r", {"gamma": 0.1}),
    ("tightness-d", {"lam": 0.2}),
    ("reweight", {"gamma": 3.0, "alpha": 0.2}),
    ("reweight-attack", {"alpha": 2.0, "steps": 3, "step": 0.5}),
    ("reweight-gairat", {"lam": 0.0, "steps": 3, "step": 0.5}),
    ("auto-eps", {"max_offset": 0.03}),
    ("l1", {"weight": 0.1}),
    ("shi-reg", {"lam": 0.2}),
]
TIGHTNESS = ["tightness-r", "tightness-d"]
WEIGHTS = ["reweight", "reweight-attack", "reweight-gairat"]
SINGLE = [*WEIGHTS, "auto-eps"]
OWN = [row for row in ROWS if row[0] in SINGLE]
EVERY = pytest.mark.parametrize(("name", "options"), ROWS, ids=[row[0] for row in ROWS])
RELAXED = ["crown-ibp", "wong-kolter"]
CERTIFIED = [
    "ibp",
    "shi-ibp",
    *RELAXED,
    "advibp",
    "advcrown-ibp",
    "sabr",
    "cc-ibp",
    "mtl-ibp",
    "exp-ibp",
    "diffai",
]
CONNECTED = ["taps", "staps"]


def test_the_table_has_every_modifier():
    assert [name for name, _ in ROWS] == list(MODIFIERS)


@pytest.mark.parametrize(("name", "options"), ROWS[:2])
@pytest.mark.parametrize("method", RELAXED)
def test_it_adds_its_loss_and_its_options(name, options, method):
    plain = METHODS[method](eps=0.1)
    modified = plain | MODIFIERS[name](**options)
    assert [loss.name for loss in modified.losses] == [*(loss.name for loss in plain.losses), name]
    assert modified.modifiers == {name: options}
    assert modified.options == plain.options
    assert plain.modifiers == {}


@pytest.mark.parametrize("name", ["ibp", "shi-ibp", "advcrown-ibp", "wong-kolter", "staps"])
def test_a_method_looks_like_the_call_that_makes_it(name):
    method = METHODS[name](eps=tr.Ramp(end=0.1, begin=0.1) if name == "ibp" else 0.1) | tr.l1(weight=2e-5)
    again = eval(repr(method), vars(tr.methods) | vars(tr))
    assert (again.name, again.options, again.modifiers) == (method.name, method.options, method.modifiers)


@pytest.mark.parametrize("name", TIGHTNESS)
def test_it_comes_in_with_the_ramp_of_wong_kolter(name):
    loss = (tr.methods.wong_kolter(eps=0.1) | MODIFIERS[name]()).losses[-1]
    full = at(loss.weight, 1.0)
    assert [at(loss.weight, moment) for moment in (0.0, 0.125, 0.25)] == [0.0, full / 2, full]


@pytest.mark.parametrize("name", TIGHTNESS)
def test_it_fades_out_with_beta_in_crown_ibp(name):
    loss = (tr.methods.crown_ibp(eps=0.1) | MODIFIERS[name]()).losses[-1]
    begin, finish = 10 / 200, 60 / 200
    assert at(loss.weight, begin) == at(loss.weight, 0.0) > 0
    assert at(loss.weight, (begin + finish) / 2) == pytest.approx(at(loss.weight, 0.0) / 2)
    assert at(loss.weight, finish) == at(loss.weight, 1.0) == 0


@pytest.mark.parametrize("name", TIGHTNESS)
@pytest.mark.parametrize("method", ["ibp", "shi-ibp", "pgd", *CONNECTED])
def test_a_method_without_a_linear_relaxation_is_refused(name, method):
    with pytest.raises(InputError, match=f"{method} has none: add it to crown-ibp or wong-kolter"):
        METHODS[method](eps=0.1) | MODIFIERS[name]()


def test_a_modifier_can_be_added_once():
    method = tr.methods.crown_ibp(eps=0.1) | tr.tightness_r()
    with pytest.raises(InputError, match="already has the modifier tightness-r"):
        method | tr.tightness_r()


@EVERY
def test_a_recipe_says_the_same(name, options):
    content = {"data": "digits", "model": "2x100", "method": {"name": "wong-kolter", "eps": 0.1}}
    recipe = parse_recipe(content | {"modifiers": {name: options}}, "here")
    assert recipe.modifiers == {name: options}
    method = recipe.build_method()
    assert method.modifiers == {name: options}
    again = build_method(recipe.method, recipe.modifiers)
    assert (again.options, again.modifiers) == (method.options, method.modifiers)


@pytest.mark.parametrize(
    ("modifiers", "said"),
    [
        ({"tightness": {}}, "unknown modifier 'tightness' .did you mean 'tightness-."),
        ({"tightness-r": {"gama": 1}}, "unknown key gama .did you mean 'gamma'"),
        ({"tightness-r": {"gamma": -1}}, "greater than 0"),
    ],
)
def test_a_recipe_with_a_mistake_says_which(modifiers, said):
    with pytest.raises(RecipeError, match=said):
        parse_recipe({"method": {"name": "crown-ibp", "eps": 0.1}, "modifiers": modifiers}, "here")


def test_a_recipe_whose_modifier_does_not_apply_is_refused():
    with pytest.raises(RecipeError, match="ibp has none"):
        parse_recipe({"method": {"name": "ibp", "eps": 0.1}, "modifiers": {"tightness-r": {}}}, "here")


@pytest.mark.parametrize(("name", "options"), OWN)
@pytest.mark.parametrize("method", [*CERTIFIED, *CONNECTED])
def test_single_examples_have_their_say_in_every_certified_method(name, options, method):
    plain = METHODS[method](eps=0.1)
    modified = plain | MODIFIERS[name](**options)
    assert modified.modifiers == {name: options}
    assert [loss.name for loss in modified.losses] == [loss.name for loss in plain.losses]
    weighed = [loss.name for loss in modified.losses if loss.weigh is not None]
    certified = ["robust", "connected"] if method in CONNECTED else ["robust"]
    assert weighed == (certified if name in WEIGHTS else [])
    assert (modified.radii is not None) == (name == "auto-eps")


@pytest.mark.parametrize("name", SINGLE)
@pytest.mark.parametrize("method", ["fgsm", "pgd"])
def test_without_certified_margins_there_is_nothing_to_look_at(name, method):
    with pytest.raises(
        InputError, match=f"{name} is for methods with a certified term, and {method} has none"
    ):
        METHODS[method](eps=0.1) | MODIFIERS[name]()


@pytest.mark.parametrize("name", WEIGHTS[1:])
def test_an_example_has_one_weight(name):
    with pytest.raises(InputError, match="have weights already"):
        tr.methods.ibp(eps=0.1) | tr.reweight() | MODIFIERS[name]()


@pytest.mark.parametrize("method", ["pgd", "ibp", *CONNECTED, "maar", "relu-stability"])
def test_l1_goes_with_every_method_that_has_none(method):
    if method in ("maar", "relu-stability"):
        with pytest.raises(InputError, match="l1 term of its own"):
            METHODS[method](eps=0.1) | tr.l1()
    else:
        loss = (METHODS[method](eps=0.1) | tr.l1(weight=0.01)).losses[-1]
        assert (loss.name, loss.weight) == ("l1", 0.01)


def test_shi_reg_is_what_shi_ibp_has():
    theirs = tr.methods.shi_ibp(eps=0.1).losses[1:]
    for method in ("sabr", *CONNECTED):
        ours = (METHODS[method](eps=0.1) | tr.shi_reg()).losses[-2:]
        assert [(loss.name, loss.weight) for loss in ours] == [(loss.name, loss.weight) for loss in theirs]
    with pytest.raises(InputError, match="already"):
        tr.methods.shi_ibp(eps=0.1) | tr.shi_reg()
    with pytest.raises(InputError, match="the eps of pgd does not"):
        tr.methods.pgd(eps=0.1) | tr.shi_reg()

"""Recipes: what is read, what it becomes, and what an error says."""

import datetime
import math
import re
from importlib.resources import files
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tightrope.errors import InputError, RecipeError
from tightrope.recipes import (
    DEFAULT_DATA,
    DEFAULT_TRAINING,
    Augmentation,
    Normalisation,
    Recipe,
    build_method,
    override,
    parse_recipe,
    read_recipe,
)
from tightrope.train import METHODS, Course, Ramp, Steps, Training
from tightrope.train.options import options_of

ROOT = Path(__file__).parent.parent
SHIPPED = [*sorted((ROOT / "recipes").rglob("*.toml")), Path(str(files("tightrope") / "quickstart.toml"))]
BASE = {"data": "digits", "model": "digits-cnn", "method": {"name": "ibp", "eps": 0.1}}


def parse(**changes):
    return parse_recipe(BASE | changes, "r.toml")


def parse_method(**options):
    return parse(method=BASE["method"] | options)


def refusal(make):
    with pytest.raises(RecipeError) as refused:
        make()
    message = str(refused.value)
    assert not re.search(r"function-|tagged-union|\[type=|Value error|<", message), "pydantic shows through"
    return message


def written(recipe, folder):
    """The recipe after a way through a file."""
    (folder / "recipe.toml").write_text(recipe.to_toml())
    return parse_recipe(read_recipe(folder / "recipe.toml"), "recipe.toml")


# ---------------------------------------------------------------------------------- what is shipped


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_recipe_can_be_read_and_written(path, tmp_path):
    recipe = parse_recipe(read_recipe(path), str(path))
    method = recipe.build_method()
    assert method.name == recipe.method["name"]
    assert written(recipe, tmp_path) == recipe
    complete = recipe.with_test_eps(method)
    assert written(complete, tmp_path) == complete


def test_there_is_a_default_for_every_method():
    assert set(DEFAULT_TRAINING) == set(METHODS)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("data", [*DEFAULT_DATA, "mnist", "my/images.npz"])
def test_a_recipe_of_defaults_can_be_read_and_written(name, data, tmp_path):
    method = {"name": name} if name == "standard" else {"name": name, "eps": "8/255"}
    recipe = parse(data=data, method=method)
    assert written(recipe, tmp_path) == recipe
    assert recipe.build_method().options == {k: v for k, v in recipe.method.items() if k != "name"}


SHARES = st.floats(0, 1)
SCHEDULES = st.builds(
    lambda shape, start, end, moments: Ramp(
        shape=shape, start=start, end=end, begin=min(moments), finish=max(moments)
    ),
    st.sampled_from(["linear", "smooth"]), st.floats(0, 1), st.floats(0.01, 1), st.tuples(SHARES, SHARES),
) | st.builds(
    lambda start, factor, at: Steps(start=start, factor=factor, at=tuple(sorted(at))),
    st.floats(0.01, 1), st.floats(0.1, 2), st.sets(SHARES, max_size=3),
)  # fmt: skip


@given(
    SCHEDULES,
    SCHEDULES.filter(lambda lr: lr(0.0) > 0),
    st.integers(0, 2**32 - 1),
    st.floats(0, 9),
)
def test_any_recipe_means_the_same_after_a_way_through_a_file(tmp_path_factory, eps, lr, seed, clip):
    training = {"lr": lr.model_dump(), "clip": clip}
    recipe = parse(method={"name": "ibp", "eps": eps.model_dump()}, training=training, seed=seed)
    assert recipe.build_method().eps == eps
    assert recipe.training.lr == lr
    assert written(recipe, tmp_path_factory.mktemp("recipe")) == recipe


# ---------------------------------------------------------------------------------------- defaults


def test_the_defaults_of_a_method_are_its_papers():
    assert parse().training == Training(
        epochs=100, batch=100, lr=Steps(start=1e-3, factor=0.1, at=(0.25, 0.42))
    )
    shi = parse(method={"name": "shi-ibp", "eps": 0.1}).training
    assert (shi.epochs, shi.batch, shi.clip, shi.optimiser) == (70, 256, 10.0, "adam")
    assert shi.lr == Steps(start=5e-4, factor=0.2, at=(50 / 70, 60 / 70))


def test_what_a_recipe_says_replaces_that_default_alone():
    training = parse(method={"name": "shi-ibp", "eps": 0.1}, training={"epochs": 7}).training
    assert (training.epochs, training.batch, training.clip) == (7, 256, 10.0)


def test_a_part_of_a_schedule_keeps_the_rest_of_the_methods_own():
    faster = parse(training={"lr": {"start": 5e-3}}).training.lr
    assert faster == Steps(start=5e-3, factor=0.1, at=(0.25, 0.42))
    ramp = parse(method={"name": "crown-ibp", "eps": 0.1, "ramp": {"finish": 0.5}}).method["ramp"]
    usual = parse(method={"name": "crown-ibp", "eps": 0.1}).method["ramp"]
    assert ramp == usual | {"finish": 0.5}


def test_a_ramp_in_place_of_a_number_says_where_it_begins():
    with pytest.raises(RecipeError, match=r"kappa: a ramp in place of the number 0\.5 needs start"):
        parse(method={"name": "ibp", "eps": 0.1, "kappa": {"end": 0.2}})


def test_a_schedule_that_names_its_shape_is_one_of_its_own():
    ramp = parse(training={"lr": {"shape": "linear", "start": 1e-3, "end": 0.0}}).training.lr
    assert ramp == Ramp(start=1e-3, end=0.0)


def test_a_network_of_ones_own_normalises_for_itself():
    assert parse(data="cifar10", model="mine:net").normalise is None
    with pytest.raises(RecipeError, match=r"normalise is for tightrope's networks, not for mine:net"):
        parse(model="mine:net", normalise={"mean": [0.5], "std": [0.25]})


def test_data_have_defaults_too():
    cifar = parse(data="cifar10")
    assert cifar.augment == Augmentation(flip=True, pad=2, mode="edge")
    assert cifar.normalise == Normalisation(mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010))
    assert parse(data="cifar10", augment={"pad": 4}).augment == Augmentation(pad=4)
    assert parse().held_out == 140
    assert parse(held_out=10).held_out == 10
    mnist = parse(data="mnist")
    assert (mnist.held_out, mnist.augment, mnist.normalise) == (1000, Augmentation(), None)


def test_the_options_of_a_method_are_spelled_out():
    assert parse().method == {
        "name": "ibp",
        "eps": 0.1,
        "kappa": 0.5,
        "ramp": Course(begin=0.03, finish=0.2).model_dump(),
    }


def test_a_norm_may_be_a_number_and_holds_for_the_method(tmp_path):
    assert parse().norm == parse().build_method().norm == "inf"
    assert parse(norm=2).build_method().norm == parse(norm="2").norm == "2"
    assert "norm: Input should be 'inf', '2' or '1'" in refusal(lambda: parse(norm=3))
    assert written(parse(norm=1), tmp_path).norm == "1"


def test_the_test_eps_is_the_radius_at_the_end_of_training_if_not_said():
    recipe = parse_method(eps={"shape": "linear", "end": "8/255"})
    assert recipe.test_eps is None
    assert recipe.with_test_eps(recipe.build_method()).test_eps == 8 / 255
    said = parse(test_eps=0.05)
    assert said.with_test_eps(said.build_method()) is said


def test_fractions_may_stand_for_numbers_everywhere():
    recipe = parse(
        test_eps="8/255",
        method={"name": "ibp", "eps": "1/10", "ramp": {"begin": "3/100", "finish": "20/100"}},
        training={"lr": {"shape": "step", "start": "1/1000", "at": ["1/2"]}, "weight_decay": "1/4"},
    )
    assert recipe.test_eps == 8 / 255
    assert recipe.build_method().eps == Ramp(end=0.1, begin=0.03, finish=0.2)
    assert recipe.training.lr == Steps(start=1e-3, at=(0.5,))
    assert recipe.training.weight_decay == 0.25
    assert parse(method={"name": "pgd", "eps": 0.1, "step": "1/4"}).method["step"] == 0.25


# -------------------------------------------------------------------------------------- unknown keys


@pytest.mark.parametrize(
    ("changes", "unknown", "meant"),
    [
        ({"sed": 1}, "sed", "seed"),
        ({"epochs": 3}, "epochs", "training.epochs"),
        ({"eps": 0.3}, "eps", "method.eps"),
        ({"flip": True}, "flip", "augment.flip"),
        ({"training": {"epoch": 3}}, "training.epoch", "training.epochs"),
        ({"training": {"seed": 3}}, "training.seed", "seed"),
        (
            {"training": {"lr": {"shape": "step", "start": 1, "at": [], "fctor": 1}}},
            "training.lr.fctor",
            "factor",
        ),
        ({"training": {"lr": {"shape": "linear", "begn": 1}}}, "training.lr.begn", "begin"),
        ({"augment": {"flp": True}}, "augment.flp", "augment.flip"),
        ({"normalise": {"mean": [0], "std": [1], "men": 1}}, "normalise.men", "normalise.mean"),
        ({"method": {"name": "ibp", "eps": 0.1, "kapa": 0.5}}, "kapa", "kappa"),
        ({"method": {"name": "ibp", "eps": {"shape": "smooth", "strt": 0.5}}}, "eps.strt", "start"),
        ({"method": {"name": "ibp", "eps": 0.1, "ramp": {"finnish": 0.5}}}, "ramp.finnish", "finish"),
        ({"method": {"name": "pgd", "eps": 0.1, "stps": 0.5}}, "stps", "steps"),
    ],
)
def test_an_unknown_key_at_any_level_is_an_error_with_the_nearest_valid_one(changes, unknown, meant):
    assert f"unknown key {unknown} (did you mean '{meant}'?)" in refusal(lambda: parse(**changes))


def test_a_key_that_is_like_no_other_is_an_error_without_a_guess():
    message = refusal(lambda: parse(zzzzzz=1))
    assert message == "r.toml cannot be used: unknown key zzzzzz"


def test_all_errors_are_named_at_once():
    message = refusal(lambda: parse(sed=1, training={"epochs": 0, "bach": 2}, held_out="many"))
    for part in ("unknown key sed", "training.epochs: ", "unknown key training.bach", "held_out: "):
        assert part in message


@pytest.mark.parametrize(
    ("name", "rest"), [("ipb", " (did you mean 'ibp'?)"), ("zzz", ""), (["ibp"], ""), (3, "")]
)
def test_an_unknown_method_is_an_error_that_lists_them(name, rest):
    message = refusal(lambda: parse(method={"name": name}))
    assert message.startswith(f"r.toml: unknown method {name!r}{rest}")
    assert message.endswith("; there are " + ", ".join(METHODS))


def test_a_method_needs_a_name_and_a_recipe_a_method():
    assert "method.name is missing" in refusal(lambda: parse(method={"eps": 0.1}))
    assert "method is missing" in refusal(lambda: parse_recipe({"data": "digits"}, "r.toml"))


# --------------------------------------------------------------------------------------- wrong values


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"seed": -1}, "seed: "),
        ({"seed": 2**32}, "seed: "),
        ({"seed": 1.5}, "seed: "),
        ({"seed": True}, "seed: expected a number, got True"),
        ({"data": 5}, "data: "),
        ({"model": ["small"]}, "model: "),
        ({"test_eps": -0.1}, "test_eps: "),
        ({"test_eps": math.nan}, "test_eps: "),
        ({"test_eps": "wide"}, "test_eps: expected a number such as 0.3 or 8/255, got 'wide'"),
        ({"held_out": 0}, "held_out: "),
        ({"training": "long"}, "training: "),
        ({"training": {"epochs": 0}}, "training.epochs: "),
        ({"training": {"epochs": 1.5}}, "training.epochs: "),
        ({"training": {"epochs": True}}, "training.epochs: expected a number, got True"),
        ({"training": {"batch": 0}}, "training.batch: "),
        ({"training": {"optimiser": "lbfgs"}}, "training.optimiser: "),
        ({"training": {"lr": 0}}, "training: the learning rate must begin above 0"),
        ({"training": {"lr": "fast"}}, "training.lr: expected a number such as 0.3 or 8/255, got 'fast'"),
        ({"training": {"lr": True}}, "training.lr: expected a number, got True"),
        ({"training": {"lr": [1]}}, "training.lr: "),
        ({"training": {"lr": math.inf}}, "training.lr: "),
        ({"training": {"lr": {"shape": "cubic"}}}, "training.lr.shape: "),
        ({"training": {"lr": {"shape": "step", "at": []}}}, "training.lr.start is missing"),
        ({"training": {"lr": {"shape": "step", "start": 1, "at": [0.5, 0.2]}}}, "must rise"),
        ({"training": {"clip": -1}}, "training.clip: "),
        ({"training": {"clip": math.nan}}, "training.clip: "),
        ({"training": {"weight_decay": -1}}, "training.weight_decay: "),
        ({"training": {"checkpoint_seconds": 0}}, "training.checkpoint_seconds: "),
        ({"augment": {"pad": -1}}, "augment.pad: "),
        ({"augment": {"pad": True}}, "augment.pad: expected a number, got True"),
        ({"augment": {"mode": "reflect"}}, "augment.mode: "),
        ({"normalise": {"mean": [0.5]}}, "normalise.std is missing"),
        ({"normalise": {"mean": 0.5, "std": [1]}}, "normalise.mean: "),
        ({"method": "ibp"}, "method: "),
        ({"method": {"name": "ibp"}}, "eps is missing"),
        ({"method": {"name": "ibp", "eps": "big"}}, "eps: expected a number such as 0.3 or 8/255, got 'big'"),
        ({"method": {"name": "ibp", "eps": True}}, "eps: expected a number, got True"),
        ({"method": {"name": "ibp", "eps": math.nan}}, "eps: "),
        ({"method": {"name": "ibp", "eps": datetime.date(2026, 1, 1)}}, "eps: "),
        ({"method": {"name": "ibp", "eps": 0}}, "ibp needs a training eps above 0"),
        ({"method": {"name": "ibp", "eps": 0.1, "kappa": 1}}, "ends with weight 0"),
        ({"method": {"name": "ibp", "eps": 0.1, "kappa": -1}}, "must be finite and not negative"),
        (
            {"method": {"name": "ibp", "eps": 0.1, "ramp": {"begin": 0.5, "finish": 0.1}}},
            "cannot finish (0.1) before",
        ),
        ({"method": {"name": "ibp", "eps": 0.1, "ramp": 3}}, "ramp: "),
        ({"method": {"name": "pgd", "eps": 0.1, "steps": 1.5}}, "steps: "),
        ({"method": {"name": "pgd", "eps": 0.1, "steps": True}}, "steps: expected a number, got True"),
        ({"method": {"name": "pgd", "eps": 0.1, "steps": 0}}, "must be a whole number from 1 up"),
        ({"method": {"name": "pgd", "eps": 0.1, "step": math.inf}}, "step: "),
        ({"method": {"name": "standard", "eps": 0.1}}, "unknown key eps"),
    ],
    ids=str,
)
def test_a_wrong_value_is_an_error_with_its_place(changes, place):
    assert place in refusal(lambda: parse(**changes))


def test_an_error_says_which_file_and_what_was_seen():
    message = refusal(lambda: parse_recipe(BASE | {"held_out": -5}, "mine.toml"))
    assert message.startswith("mine.toml cannot be used: held_out: ")
    assert "-5" in message
    assert issubclass(RecipeError, InputError)


@pytest.mark.parametrize(
    "changes",
    [
        {"method": {"name": "ipb"}},
        {"method": {"name": "ibp", "eps": 0.1, "kapa": 0.5}},
        {"modifiers": {"l2": {}}},
        {"modifiers": {"l1": {"wieght": 1.0}}},
    ],
    ids=str,
)
def test_an_error_about_a_method_says_which_file_too(changes):
    assert refusal(lambda: parse(**changes)).startswith("r.toml: ")


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"training": {"lr": {"strat": 0.1}}}, "training.lr.strat (did you mean 'start'?)"),
        ({"method": BASE["method"] | {"ramp": {"finsh": 0.5}}}, "ramp.finsh (did you mean 'finish'?)"),
    ],
)
def test_of_a_schedule_s_misspelt_part_nothing_else_is_said(changes, place):
    assert refusal(lambda: parse(**changes)).endswith(f"cannot be used: unknown key {place}")


def test_the_content_that_is_parsed_is_left_alone():
    content = {"data": "cifar10", "method": {"name": "ibp", "eps": "8/255"}, "training": {"epochs": 3}}
    parse_recipe(content, "r.toml")
    assert content == {
        "data": "cifar10",
        "method": {"name": "ibp", "eps": "8/255"},
        "training": {"epochs": 3},
    }


def test_recipes_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        parse().seed = 3  # type: ignore[misc]


# ------------------------------------------------------------------------------------- files, --set


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"there is no recipe .*r\.toml"),
        (b"data = digits", r"r\.toml is not valid TOML"),
        (b"seed = 1\nseed = 2", r"r\.toml is not valid TOML"),
        (b"data = '\xff'", r"r\.toml is not valid TOML"),
        (..., r"r\.toml cannot be read"),
    ],
    ids=["missing", "no TOML", "twice", "no text", "a folder"],
)
def test_what_is_no_recipe_file_is_an_error_that_names_it(tmp_path, content, message):
    path = tmp_path / "r.toml"
    if content is ...:
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(RecipeError, match=message):
        read_recipe(path)


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("seed=3", {"seed": 3}),
        ("training.batch=256", {"training": {"epochs": 5, "batch": 256}}),
        ("training.epochs = 7", {"training": {"epochs": 7}}),
        ("method.eps=8/255", {"method": {"eps": "8/255"}}),
        ("training.lr=1e-3", {"training": {"epochs": 5, "lr": 1e-3}}),
        ("model=dm-small", {"model": "dm-small"}),
        ('model="dm-small"', {"model": "dm-small"}),
        ("model=a=b", {"model": "a=b"}),
        ("augment.flip=true", {"augment": {"flip": True}}),
        ("normalise.mean=[0.1, 0.2]", {"normalise": {"mean": [0.1, 0.2]}}),
        ("method.ramp.begin=3/100", {"method": {"ramp": {"begin": "3/100"}}}),
        (
            'training.lr={ shape = "step", start = 1e-3, at = ["1/2"] }',
            {"training": {"epochs": 5, "lr": {"shape": "step", "start": 1e-3, "at": ["1/2"]}}},
        ),
        ("data=", {"data": ""}),
    ],
)
def test_assignments_set_dotted_keys_to_toml_values_or_plain_words(assignment, expected):
    content = {"training": {"epochs": 5}}
    override(content, [assignment])
    assert content == {"training": {"epochs": 5}} | expected


def test_later_assignments_win():
    content: dict[str, object] = {}
    override(content, ["seed=1", "seed=2", "method.name=ibp", "method.eps=0.1"])
    assert content == {"seed": 2, "method": {"name": "ibp", "eps": 0.1}}


@pytest.mark.parametrize("assignment", ["seed", "=3", " =3", ""])
def test_an_assignment_needs_a_key_and_an_equals_sign(assignment):
    with pytest.raises(RecipeError, match=rf"expected key=value, for example .*, got '{assignment}'"):
        override({}, [assignment])


def test_an_assignment_cannot_lead_through_a_value():
    with pytest.raises(RecipeError, match=r"training\.lr\.start cannot be set: lr is a value, not a table"):
        override({"training": {"lr": 1e-3}}, ["training.lr.start=1"])


def test_a_misspelt_assignment_is_found_when_the_recipe_is_parsed():
    content = {**BASE}
    override(content, ["training.bach=3"])
    assert "unknown key training.bach (did you mean 'training.batch'?)" in refusal(
        lambda: parse_recipe(content, "r")
    )


# ------------------------------------------------------------------------------------------ methods


@pytest.mark.parametrize("name", METHODS)
def test_the_options_of_a_method_are_its_parameters(name):
    fields = options_of(METHODS[name]).model_fields
    assert set(fields) == set(
        build_method({"name": name, **({"eps": 0.1} if "eps" in fields else {})}).options
    )


def test_a_schedule_may_stand_for_any_number_that_may_change():
    method = build_method(
        {"name": "fgsm", "eps": {"shape": "smooth", "end": "8/255", "begin": 0, "finish": "1/2"}}
    )
    assert method.eps == Ramp(shape="smooth", end=8 / 255, begin=0.0, finish=0.5)
    ibp = build_method(
        {"name": "ibp", "eps": 0.1, "kappa": {"start": 0.9, "end": 0.3, "begin": 0.1, "finish": 0.2}}
    )
    assert ibp.losses[0].weight == Ramp(start=0.9, end=0.3, begin=0.1, finish=0.2)


def test_a_recipe_of_python_s_own_is_the_same_recipe():
    assert (
        Recipe(**BASE, held_out=140, training=DEFAULT_TRAINING["ibp"]).build_method().options
        == parse().build_method().options
    )

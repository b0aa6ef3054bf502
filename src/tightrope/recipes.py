"""Recipes: a training run as a TOML file, strictly checked.

A recipe says everything that a run depends on. Numbers may be written as fractions ("8/255",
"20/100"), and any number that may change during a run may be a schedule (a table with a `shape`).
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import tomli_w
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from tightrope.errors import InputError, RecipeError
from tightrope.train import METHODS, MODIFIERS, Method, Steps, Training
from tightrope.train.options import SCHEDULE_KEYS, check_options, explain, nearest, options_of
from tightrope.train.schedules import Real, Whole, completed, last

R = TypeVar("R")


class Augmentation(BaseModel):
    """Random changes of training images: see `tightrope.data.Augment`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    flip: bool = False
    pad: Whole = Field(default=0, ge=0)
    mode: Literal["edge", "zeros"] = "edge"


class Normalisation(BaseModel):
    """The network's first operator: `(x - mean) / std`, per channel."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mean: tuple[float, ...]
    std: tuple[float, ...]


class Recipe(BaseModel):
    """A training run.

    Args:
        data: name of a data set, or the path of an `.npz` file.
        model: name of a network, or `package.module:factory`.
        seed: one seed, one result on one machine.
        test_eps: radius at which the network is meant to be certified; the training eps if not said.
        norm: in which both are measured: "inf", "2" or "1".
        held_out: training examples set aside for the metrics, balanced over the classes.
        method: `name` and the method's own options.
        modifiers: what is added to the method: for each modifier's name a table of its options.
        training: epochs, batch, optimiser, learning rate.
        augment: random changes of training images.
        normalise: the first operator of a network that is named; one's own network has its own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: str | None = None
    model: str | None = None
    seed: Annotated[Whole, Field(ge=0, lt=2**32)] = 0
    test_eps: Annotated[Real, Field(ge=0)] | None = None
    norm: Annotated[Literal["inf", "2", "1"], BeforeValidator(str)] = "inf"
    held_out: Whole = Field(default=1000, ge=1)
    method: dict[str, Any]
    modifiers: dict[str, dict[str, Any]] = {}
    training: Training = Training()
    augment: Augmentation = Augmentation()
    normalise: Normalisation | None = None

    def build_method(self) -> Method:
        """The method with the recipe's options and modifiers.

        Raises:
            RecipeError: if a method, a modifier or an option is unknown, or a value makes no sense.
        """
        return build_method(self.method, self.modifiers, self.norm)

    def with_test_eps(self, method: Method) -> Self:
        """The recipe with its test eps spelled out."""
        return self if self.test_eps is not None else self.model_copy(update={"test_eps": last(method.eps)})

    def to_toml(self) -> str:
        """The recipe as a file that `read_recipe` reads back to the same recipe."""
        content = self.model_dump(exclude_none=True, mode="json")
        return tomli_w.dumps({key: value for key, value in content.items() if value != {}})


# Where a recipe does not say: what the field's papers use (methods.md, sections 1-4), but for the layer-wise
# methods, whose 900 epochs and more become 90 (docs/methods/colt.md).
_ADVERSARIAL = Training(epochs=30, lr=Steps(start=1e-3, factor=0.1, at=(0.6, 0.85)))
_MIXED = Training(epochs=70, batch=256, lr=Steps(start=5e-4, factor=0.2, at=(50 / 70, 60 / 70)), clip=10.0)
_LAYERWISE = Training(
    epochs=90, batch=100, lr=Steps(start=1e-3, factor=0.5, at=tuple(i / 30 for i in range(10, 30, 3)))
)
_JOINT = Training(epochs=100, batch=100, lr=Steps(start=5e-4, factor=0.2, at=(0.8, 0.92)))
DEFAULT_TRAINING: dict[str, Training] = {
    "standard": _ADVERSARIAL,
    "fgsm": _ADVERSARIAL,
    "pgd": _ADVERSARIAL,
    "ibp": Training(epochs=100, batch=100, lr=Steps(start=1e-3, factor=0.1, at=(0.25, 0.42))),
    "crown-ibp": Training(epochs=200, batch=256, lr=Steps(start=5e-4, factor=0.1, at=(130 / 200, 190 / 200))),
    "diffai": Training(
        epochs=420, batch=50, lr=Steps(start=1e-3, factor=0.1, at=(200 / 420, 250 / 420, 300 / 420))
    ),
    "advibp": _JOINT,
    "advcrown-ibp": _JOINT,
    "trades": _ADVERSARIAL,
    "mart": _ADVERSARIAL,
    "relu-stability": _ADVERSARIAL,
    **dict.fromkeys(("sabr", "cc-ibp", "mtl-ibp", "exp-ibp", "taps", "staps"), _MIXED),
    "colt": _LAYERWISE,
    "mat": _LAYERWISE,
    "maar": _LAYERWISE,
    "wong-kolter": Training(
        epochs=80, batch=50, lr=Steps(start=1e-3, factor=0.5, at=tuple(i / 80 for i in range(20, 80, 10)))
    ),
    "shi-ibp": Training(
        epochs=70, batch=256, lr=Steps(start=5e-4, factor=0.2, at=(50 / 70, 60 / 70)), clip=10.0
    ),
}
_CIFAR10 = {
    "augment": {"flip": True, "pad": 2, "mode": "edge"},
    "normalise": {"mean": [0.4914, 0.4822, 0.4465], "std": [0.2023, 0.1994, 0.2010]},
}
DEFAULT_DATA: dict[str, dict[str, Any]] = {"cifar10": _CIFAR10, "digits": {"held_out": 140}}


def parse_recipe(content: Mapping[str, Any], source: str) -> Recipe:
    """A recipe from nested tables, with the defaults of its method and data spelled out.

    Args:
        content: what a TOML file holds.
        source: how errors call it.

    Raises:
        RecipeError: naming every unknown key, with the nearest valid one, and every bad value; what is wrong
            with the options of the method and its modifiers, once the rest is right.
    """
    # What `tightrope tune` would vary is no part of a run: without it the recipe is whole.
    content = {key: value for key, value in content.items() if key != "tune"}
    method = content.get("method")
    name = method.get("name") if isinstance(method, Mapping) else None
    if (
        isinstance(name, str)
        and name in DEFAULT_TRAINING
        and isinstance(content.get("training", {}), Mapping)
    ):
        content["training"] = usual_training(name, content.get("training", {}))
    for key, value in DEFAULT_DATA.get(str(content.get("data")), {}).items():
        if key != "normalise" or not _is_ones_own(content.get("model")):
            content.setdefault(key, value)
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        raise RecipeError(explain(error, source, _places())) from None
    if recipe.normalise and _is_ones_own(recipe.model):
        raise RecipeError(
            f"{source}: normalise is for tightrope's networks, not for {recipe.model}: leave it out, and "
            "normalise in the network itself"
        )
    try:
        method = recipe.build_method()
    except RecipeError as error:
        raise RecipeError(f"{source}: {error}") from None
    return recipe.model_copy(update=described(method))


def usual_training(method: str, said: Mapping[str, Any]) -> dict[str, Any]:
    """What is said of `training`, with what is usual for a method where it is silent."""
    usual, said = DEFAULT_TRAINING.get(method, Training()), dict(said)
    if "lr" in said:
        said["lr"] = completed(said["lr"], usual.lr)
    return usual.model_dump() | said


def _is_ones_own(model: Any) -> bool:
    """Whether a network is the user's own: `package.module:factory`."""
    return isinstance(model, str) and ":" in model


def described(method: Method) -> dict[str, Any]:
    """A method as a recipe says it: the tables `method` and `modifiers`."""
    return {"method": {"name": method.name, **method.options}, "modifiers": dict(method.modifiers)}


def read_recipe(path: Path) -> dict[str, Any]:
    """The content of a recipe file, not yet checked.

    Raises:
        RecipeError: if the file is missing or not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"there is no recipe {path}") from None
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not valid TOML: {error}") from None


def override(content: dict[str, Any], assignments: Iterable[str]) -> None:
    """Apply `key=value` assignments; keys are dotted, values are TOML or plain words.

    Raises:
        RecipeError: if an assignment has no `=`, or a key leads through something that is no table.
    """
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key.strip():
            raise RecipeError(f"expected key=value, for example training.batch=256, got {assignment!r}")
        try:
            value: Any = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        assign(content, key.strip(), value)


def assign(content: dict[str, Any], key: str, value: Any) -> None:
    """Set one value in nested tables, by its dotted key.

    Raises:
        RecipeError: if the key leads through something that is no table.
    """
    *parents, leaf = key.split(".")
    _table(content, parents, key)[leaf] = value


def add_modifier(content: dict[str, Any], name: str) -> None:
    """Add a modifier to a recipe, which keeps the options that it has for it.

    Raises:
        RecipeError: if `modifiers` is no table.
    """
    _table(content, ["modifiers"], f"modifiers.{name}").setdefault(name, {})


def _table(content: dict[str, Any], path: Iterable[str], key: str) -> dict[str, Any]:
    """The table at the end of a path, made where there is none, for a key that is to be set in it."""
    table = content
    for part in path:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise RecipeError(f"{key} cannot be set: {part} is a value, not a table; set {part} itself")
    return table


def build_method(
    options: Mapping[str, Any],
    modifiers: Mapping[str, Mapping[str, Any]] | None = None,
    norm: str = "inf",
) -> Method:
    """A method from its name and options, and what is added to it, for balls of a norm.

    Raises:
        RecipeError: if a method, a modifier or an option is unknown, or a value makes no sense.
    """
    if options.get("name") is None:
        raise RecipeError(f"method.name is missing; there are {', '.join(METHODS)}")
    own = {key: value for key, value in options.items() if key != "name"}
    method = _make("method", options["name"], own, METHODS)
    try:
        for name, table in (modifiers or {}).items():
            method = method | _make("modifier", name, table, MODIFIERS)
        return method.over(norm)
    except InputError as error:
        raise RecipeError(str(error)) from error


def _make(kind: str, name: Any, options: Mapping[str, Any], registry: Mapping[str, Callable[..., R]]) -> R:
    """A method or modifier, its options checked."""
    if not isinstance(name, str) or name not in registry:
        meant = nearest(str(name), {known: known for known in registry})
        raise RecipeError(f"unknown {kind} {name!r}{meant}; there are {', '.join(registry)}")
    try:
        return registry[name](**check_options(registry[name], options, f"{kind} {name}"))
    except InputError as error:
        raise RecipeError(str(error)) from error


def _places() -> dict[str, str]:
    """Where each key of a recipe belongs: its full name by its last part."""
    tables: list[tuple[str, type[BaseModel]]] = [
        *((f"modifiers.{name}.", options_of(modifier)) for name, modifier in MODIFIERS.items()),
        *(("method.", options_of(method)) for method in METHODS.values()),
        ("normalise.", Normalisation),
        ("augment.", Augmentation),
        ("training.", Training),
        ("", Recipe),
    ]
    places = {key: key for key in (*SCHEDULE_KEYS, "tune")}
    return places | {key: f"{table}{key}" for table, model in tables for key in model.model_fields}

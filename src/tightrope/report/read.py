"""Read the files of a run folder; a broken one is an error that names the file and the line."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NotRequired

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict  # pydantic refuses typing.TypedDict before Python 3.12

from tightrope.errors import InputError
from tightrope.files import check_line, read_json, read_lines
from tightrope.report.text import number_text
from tightrope.train.schedules import Number, Real
from tightrope.verify import Radii, Verdict, read_radii, read_verdicts, summarise

_extensible = with_config(ConfigDict(extra="allow", strict=True))


@_extensible
class HeldOut(TypedDict):
    """Accuracies (in [0, 1]) on held-out training examples after one epoch."""

    clean: float
    certified: NotRequired[float | None]
    verified_error: NotRequired[float]  # share of the right answers that a latent attack turns
    examples: NotRequired[int]
    eps: NotRequired[float]


@_extensible
class Layer(TypedDict):
    """Shares of neurons (in [0, 1]) and mean bound width of one activation after one epoch."""

    name: str
    dead: float
    unstable: float
    width: float


@_extensible
class Epoch(TypedDict):
    """One line of metrics.jsonl."""

    epoch: int
    stage: NotRequired[int]  # of a run that trains layer by layer, from 1
    seconds: NotRequired[float]  # of training since the first epoch
    eps: NotRequired[float | None]
    lr: NotRequired[float | None]
    losses: NotRequired[dict[str, float]]
    weights: NotRequired[dict[str, float]]
    notes: NotRequired[dict[str, float]]  # what else a method or a modifier says of the epoch
    held_out: NotRequired[HeldOut | None]
    layers: NotRequired[list[Layer]]


class Method(TypedDict):
    """What a recipe says about its method; `eps` is missing where nothing is perturbed."""

    name: str
    eps: NotRequired[Number]


@with_config(ConfigDict(extra="allow"))
class Recipe(TypedDict):
    """What a page shows of recipe.toml; `data` and `model` are missing where Python passed them in."""

    data: NotRequired[str]
    model: NotRequired[str]
    seed: NotRequired[int]
    test_eps: NotRequired[Real]
    norm: NotRequired[str]
    method: Method


_EPOCH, _RECIPE = TypeAdapter(Epoch), TypeAdapter(Recipe)


def read_metrics(path: Path) -> list[Epoch]:
    """Read metrics.jsonl: one record per epoch, in file order.

    A last line that was cut off while it was written is ignored.

    Raises:
        InputError: the file cannot be read, or another line is broken; the message names file and line.
    """
    return [check_line(_EPOCH, line, path, number) for number, line in enumerate(read_lines(path), start=1)]


@dataclass(frozen=True)
class Certificate:
    """One certify file."""

    path: Path
    header: dict[str, Any]
    verdicts: list[Verdict]

    @property
    def data(self) -> str:
        """What the data set is called."""
        return self.header.get("data") or "unnamed data"

    @property
    def identity(self) -> dict[str, Any]:
        """What the verdicts rest on: eps, norm, verifier, attack ..."""
        found: dict[str, Any] = self.header["identity"]
        return found

    @property
    def attacked(self) -> bool:
        """Whether an attack was run."""
        return self.identity["attack"] is not None

    @property
    def counts(self) -> dict[str, Any]:
        """The verdicts, counted."""
        return summarise(self.verdicts, self.attacked)

    @property
    def unfinished(self) -> str:
        """What is missing in the file of a certification that was stopped; "" if nothing is."""
        done, asked = len(self.verdicts), self.header.get("examples", 0)
        if done >= asked:
            return ""
        return (
            f"{self.path.name} is unfinished: it holds {done} of {asked} examples. Those that need a search "
            "come last, so its shares are not those of all examples: go on with `tightrope certify --resume`."
        )


@dataclass(frozen=True)
class RadiusFile:
    """One radius file."""

    path: Path
    radii: Radii

    @property
    def data(self) -> str:
        """What the data set is called."""
        return self.radii.header.get("data") or "unnamed data"

    @property
    def identity(self) -> dict[str, Any]:
        """What the radii rest on: norm, verifier, largest radius looked at, tolerance ..."""
        found: dict[str, Any] = self.radii.header["identity"]
        return found


@_extensible
class LatentFile(TypedDict):
    """A latent-*.json file: how many examples withstand a latent attack."""

    format: Literal["tightrope-latent/1"]
    node: str
    eps: float
    examples: int
    clean_correct: int
    withstood: int


_LATENT = TypeAdapter(LatentFile)


@dataclass(frozen=True)
class Run:
    """Everything that a run or results folder says; `missing` holds a sentence for each absent piece.

    `stages` holds the networks that a run which trained layer by layer left after its stages.
    """

    path: Path
    recipe: Recipe | None
    recipe_text: str
    environment: dict[str, Any]
    result: dict[str, Any]
    epochs: list[Epoch]
    certificates: list[Certificate]
    radii: list[RadiusFile]
    latent: list[LatentFile]
    stages: list[Run]
    missing: list[str]


def read_run(folder: Path) -> Run:
    """Read a run or results folder.

    Raises:
        InputError: the folder does not exist, holds nothing to report, or one of its files is broken.
    """
    if not folder.is_dir():
        raise InputError(f"no run folder at {folder}; give the folder that `tightrope train --out` made")
    files = {
        name: folder / name for name in ("recipe.toml", "environment.json", "metrics.jsonl", "result.json")
    }
    certify, radius = (sorted(folder.glob(f"{kind}-*.jsonl")) for kind in ("certify", "radius"))
    if not certify and not radius and not any(path.is_file() for path in files.values()):
        raise InputError(
            f"{folder} is not a run folder: it holds none of {', '.join(files)}, certify-*.jsonl, "
            "radius-*.jsonl; "
            "give the folder that `tightrope train --out` made"
        )
    recipe, recipe_text = _read_recipe(files["recipe.toml"]) if files["recipe.toml"].is_file() else (None, "")
    environment, result = (
        read_json(files[name]) if files[name].is_file() else {}
        for name in ("environment.json", "result.json")
    )
    epochs = read_metrics(files["metrics.jsonl"]) if files["metrics.jsonl"].is_file() else []
    certificates = [Certificate(path, *read_verdicts(path)) for path in certify]
    radii = [RadiusFile(path, read_radii(path)) for path in radius]

    latent = [_read_latent(path) for path in sorted(folder.glob("latent-*.json"))]
    parts = [part for part in folder.glob("stages/*") if part.is_dir()]
    stages = [read_run(part) for part in sorted(parts, key=lambda part: part.name.zfill(9))]

    missing = []
    if recipe is None:
        missing.append("recipe.toml is missing, so what was trained, and how, is known only in part.")
    if not environment and not result:
        missing.append("environment.json is missing, so commit, machine and date are not known.")
    if not epochs and not files["metrics.jsonl"].is_file():
        missing.append("metrics.jsonl is missing, so there are no training curves.")
    elif not epochs:
        missing.append("metrics.jsonl holds no finished epoch yet, so there are no training curves.")
    if (folder / "checkpoint").is_dir() and not (folder / "model.safetensors").is_file():
        missing.append(
            f"Training is unfinished ({number_text(len(epochs), 'epoch')} so far): go on with "
            f"`tightrope train --resume --out {folder}`."
        )
    elif not certificates:
        missing.append(
            "There is no certify-*.jsonl file, so nothing has been proved yet: run `tightrope certify` on it."
        )
    missing += [
        f"{certificate.path.name} holds no verdict yet, so it is left out."
        for certificate in certificates
        if not certificate.verdicts
    ]
    missing += [one.unfinished for one in certificates if one.verdicts and one.unfinished]
    missing += [f"{one.path.name} holds no radius yet, so it is left out." for one in radii if not one.radii]
    finished = [certificate for certificate in certificates if certificate.verdicts]
    searched = [one for one in radii if one.radii]
    return Run(
        folder, recipe, recipe_text, environment, result, epochs, finished, searched, latent, stages, missing
    )


def _read_latent(path: Path) -> LatentFile:
    try:
        return _LATENT.validate_python(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(
            f"{path}: {where}: {first['msg']}; write it again: tightrope attack --latent"
        ) from None


def _read_recipe(path: Path) -> tuple[Recipe, str]:
    try:
        text = path.read_text(encoding="utf-8")
        return _RECIPE.validate_python(tomllib.loads(text)), text
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(f"{path}: {where}: {first['msg']}; restore the file") from None
    except ValueError as error:  # TOMLDecodeError, UnicodeDecodeError
        raise InputError(f"{path} is not TOML ({error}); restore the file") from None

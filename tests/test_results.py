"""Committed results: whoever runs the command of a claim gets the claim."""

from __future__ import annotations

import functools
import os
import runpy
import tomllib
from pathlib import Path
from typing import Any

import pytest

import tightrope as tr
from tightrope import data
from tightrope.errors import DataError
from tightrope.files import read_json
from tightrope.recipes import parse_recipe, read_recipe
from tightrope.targets import load_target

ROOT = Path(__file__).parent.parent
RESULTS = sorted(file.parent for file in ROOT.glob("results/*/result.json"))
# One result of each verifier is certified on all its images, the others on the first thousand.
WHOLE = {"ibp": "mnist-dm-small-ibp-0.3", "fast-lin": "mnist-2x100-wong-kolter-tight-0.1"}
load = functools.cache(data.load)


@pytest.fixture(params=RESULTS, ids=lambda folder: folder.name)
def folder(request):
    return request.param


def test_a_result_was_made_by_the_recipe_of_its_name(folder):
    name, _, rest = folder.name.partition("-")
    recipe = ROOT / "recipes" / name / f"{rest}.toml"
    assert parse_recipe(read_recipe(recipe), str(recipe)).model_copy(update={"seed": 0}) == parse_recipe(
        tomllib.loads((folder / "recipe.toml").read_text()), folder.name
    ).model_copy(update={"seed": 0})


def test_a_result_says_how_it_was_made(folder):
    result = read_json(folder / "result.json")
    assert result["format"] == "tightrope-result/1"
    assert result["name"] == folder.name
    for key in ("train", "certify", "commit", "machine", "dates", "epochs", "seconds", "seeds"):
        assert result[key], key
    assert "+" not in result["commit"], "made by a changed checkout"


def test_the_pages_of_results_are_up_to_date():
    make = runpy.run_path(str(ROOT / "results" / "make.py"))
    assert (ROOT / "docs" / "results.md").read_text() == make["page"]()
    assert (ROOT / "docs" / "comparison.md").read_text() == make["sweep_page"]()


def test_certifying_a_result_gives_its_claim_again(folder):
    if not (folder / "model.safetensors").exists():
        pytest.skip("its weights are not kept: train it anew to certify it")
    target = load_target(str(folder))
    try:
        test = load(target.data, download=False).test
    except DataError as error:
        pytest.skip(f"{target.data} is not here (TIGHTROPE_DATA={os.environ.get('TIGHTROPE_DATA')}): {error}")
    ours = read_json(folder / "result.json")["ours"]
    region = tr.Box(target.eps)

    def certified(verifier: str, first: int) -> dict[str, Any]:
        return tr.certify(target.model, test, region, verifier=verifier, attack=None, first=first).summary()

    if folder.name in WHOLE.values():
        summary = certified(ours["verifier"], ours["examples"])
        assert summary["robust"] == ours["robust_of_first_seed"]
    else:
        summary = certified("none", ours["examples"])
        if ours["verifier"] == "cascade":  # takes its time: what it decides at once, of a few images
            few = tr.certify(target.model, test, region, verifier="linear", first=20).summary()
            assert few["robust"] == ours["linear_of_its_first_20"]
        else:
            first = certified(ours["verifier"], 1000)
            assert first["robust"] == ours["robust_of_its_first_1000"]
    assert 100 * (1 - summary["clean_accuracy"]) == pytest.approx(ours["clean_error"]["each"][0], abs=1e-3)


def test_each_verifier_has_a_result_that_is_certified_whole():
    kept = {folder for folder in RESULTS if (folder / "model.safetensors").exists()}
    verifiers = {folder.name: read_json(folder / "result.json")["ours"]["verifier"] for folder in kept}
    assert all(verifiers[name] == verifier for verifier, name in WHOLE.items())
    assert set(verifiers.values()) - {"cascade"} == set(WHOLE)

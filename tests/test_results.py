"""Committed results: whoever runs the command of a claim gets the claim."""

from __future__ import annotations

import os
import runpy
import tomllib
from pathlib import Path

import pytest

import tightrope as tr
from tightrope.data import load
from tightrope.errors import DataError
from tightrope.files import read_json
from tightrope.recipes import parse_recipe, read_recipe
from tightrope.targets import load_target

ROOT = Path(__file__).parent.parent
RESULTS = sorted(file.parent for file in ROOT.glob("results/*/result.json"))


@pytest.fixture(params=RESULTS, ids=lambda folder: folder.name)
def folder(request):
    return request.param


def test_a_result_was_made_by_the_recipe_of_its_name(folder):
    data, _, rest = folder.name.partition("-")
    recipe = ROOT / "recipes" / data / f"{rest}.toml"
    assert parse_recipe(read_recipe(recipe), str(recipe)).model_copy(update={"seed": 0}) == parse_recipe(
        tomllib.loads((folder / "recipe.toml").read_text()), folder.name
    ).model_copy(update={"seed": 0})


def test_a_result_says_how_it_was_made(folder):
    result = read_json(folder / "result.json")
    assert result["format"] == "tightrope-result/1"
    assert result["name"] == folder.name
    for key in ("train", "certify", "commit", "machine", "dates", "epochs", "seconds", "seeds"):
        assert result[key], key
    assert not result["commit"].endswith("+"), "made by a changed checkout"


def test_the_pages_of_results_are_up_to_date():
    make = runpy.run_path(str(ROOT / "results" / "make.py"))
    assert (ROOT / "docs" / "results.md").read_text() == make["page"]()
    assert (ROOT / "docs" / "comparison.md").read_text() == make["sweep_page"]()


def test_certifying_a_result_gives_its_claim_again(folder):
    if not (folder / "model.safetensors").exists():
        pytest.skip("its weights are not kept: train it anew to certify it")
    target = load_target(str(folder))
    try:
        data = load(target.data, download=False)
    except DataError as error:
        pytest.skip(f"{target.data} is not here (TIGHTROPE_DATA={os.environ.get('TIGHTROPE_DATA')}): {error}")
    ours = read_json(folder / "result.json")["ours"]
    region = tr.Box(target.eps)
    if ours["verifier"] == "cascade":  # takes its time: what it decides at once, of a few images
        few = tr.certify(target.model, data.test, region, verifier="linear", first=20).summary()
        assert few["robust"] == ours["linear_of_its_first_20"]
        clean = tr.certify(
            target.model, data.test, region, verifier="none", attack=None, first=ours["examples"]
        )
        summary = clean.summary()
    else:
        result = tr.certify(target.model, data.test, region, verifier=ours["verifier"], attack=None)
        summary = result.summary()
        assert summary["robust"] == ours["robust_of_first_seed"]
    assert 100 * (1 - summary["clean_accuracy"]) == pytest.approx(ours["clean_error"]["each"][0], abs=1e-3)

"""Examples in the documentation run."""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch

import tightrope
from tightrope.data import load
from tightrope.models import build

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src"
MODULES = [
    ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted(SOURCE.rglob("*.py"))
    if ">>>" in path.read_text()
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize("page", ["README.md", "src/tightrope/__init__.py"])
def test_the_tour_of_the_python_interface_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / page).read_text()
    tour = re.search(
        r"```python\n(.*?)```" if page.endswith(".md") else r'\n\n(import .*?)"""', text, re.DOTALL
    )
    digits = load("digits")
    few = torch.arange(60)
    x, y = digits.test.images(few[:4]), digits.test.y[:4]
    names = {"model": build("2x100", digits.train.shape, digits.classes), "x": x, "y": y}
    names |= {"train_set": digits.train.subset(few), "test_set": digits.test.subset(few)}
    monkeypatch.setitem(
        inspect.unwrap(tightrope.certify).__kwdefaults__, "time_limit", 0.05
    )  # it shows how, not how well
    exec(tour[1], names)
    assert isinstance(names["run"], tightrope.Run)
    assert len(list(names["result"])) == names["result"].summary()["examples"] == 60


def test_every_source_that_is_cited_by_a_short_name_is_explained():
    pages = [*SOURCE.rglob("*.py"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "recipes").rglob("*.toml")]
    # Papers, and the sheets of notes that no page of that name explains.
    cited = {
        name for page in pages for name in re.findall(r"\b[a-z_]+\.txt\b|\bseeds\.md\b", page.read_text())
    }
    sources = (ROOT / "docs" / "sources.md").read_text()
    assert len(cited) > 5
    assert all(f"| `{name}` |" in sources for name in cited)


def test_recipes_in_the_repository_can_be_used():
    from tightrope.recipes import parse_recipe, read_recipe

    recipes = [*(ROOT / "recipes").rglob("*.toml"), SOURCE / "tightrope" / "quickstart.toml"]
    assert len(recipes) > 1
    for path in recipes:
        parse_recipe(read_recipe(path), str(path)).build_method()

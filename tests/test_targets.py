"""What can be certified: folders, and factories with their weights."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tightrope.errors import InputError
from tightrope.models import build
from tightrope.targets import ModelFacts, Target, load_target, load_weights, make_model

RECIPE = """
data = "digits"
test_eps = "8/255"
method = { name = "ibp", eps = 0.1 }
"""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A results folder with a network for 2x2 images, in the current folder."""
    monkeypatch.chdir(tmp_path)
    Path("net").mkdir()
    facts = ModelFacts(name="2x100", input_shape=(1, 2, 2), classes=3, mean=(0.5,), std=(0.25,))
    Path("net/model.json").write_text(facts.model_dump_json())
    Path("net/recipe.toml").write_text(RECIPE)
    save_file(build("2x100", (1, 2, 2), 3, [0.5], [0.25]).state_dict(), "net/model.safetensors")
    return Path("net")


@pytest.fixture
def nets(tmp_path, monkeypatch) -> None:
    """A module `homemade` in the current folder."""
    monkeypatch.chdir(tmp_path)
    code = "from torch import nn\ndef net(): return nn.Linear(3, 2)\n"
    Path("homemade.py").write_text(code)
    yield
    sys.modules.pop("homemade", None)


def change(path: Path, **facts: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))


def test_a_folder_knows_its_network_its_data_and_its_radius(folder):
    target = load_target("net")
    assert (target.data, target.eps) == ("digits", 8 / 255)
    assert not target.model.training
    state, stored = target.model.state_dict(), load_file(folder / "model.safetensors")
    assert all(torch.equal(state[name], stored[name]) for name in stored)
    assert target.model(torch.rand(5, 1, 2, 2)).shape == (5, 3)


def test_verdicts_belong_into_run_folders_but_not_into_results(folder):
    assert load_target("net").folder is None
    (folder / "checkpoint").mkdir()
    assert load_target("net").folder == folder


def test_a_recipe_may_leave_the_radius_to_its_method(folder):
    (folder / "recipe.toml").write_text('data = "digits"\nmethod = { name = "ibp", eps = 0.1 }\n')
    assert load_target("net").eps == 0.1


def test_a_folder_without_a_recipe_is_a_network_and_no_more(folder):
    (folder / "recipe.toml").unlink()
    target = load_target("net")
    assert (target.data, target.eps) == (None, None)


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"format": "other/7"}, "format"),
        ({"name": 3}, "name"),
        ({"name": "2x10"}, "2x100"),
        ({"classes": "many"}, "classes"),
        ({"input_shape": None}, "input_shape"),
        ({"mean": "dark"}, "mean"),
        ({"classes": 4}, "another network"),
        ({"input_shape": [1, 3, 3]}, "another network"),
        ({"std": None}, "mean"),
        ({"name": None}, "package.module:factory"),
    ],
)
def test_a_folder_that_contradicts_itself_is_refused(folder, facts, said):
    change(folder / "model.json", **facts)
    with pytest.raises(InputError, match=said):
        load_target("net")


@pytest.mark.parametrize("text", ["", "[]", '{"format": ', '{"format": "tightrope-model/1"}'])
def test_a_damaged_description_is_refused_by_name(folder, text):
    (folder / "model.json").write_text(text)
    with pytest.raises(InputError, match=r"net/model\.json"):
        load_target("net")


@pytest.mark.parametrize(
    "text", ["data =", "data = 3", RECIPE + "eps = 0.3", RECIPE.replace("8/255", "8/0"), 'data = "digits"']
)
def test_a_damaged_recipe_is_refused_by_name(folder, text):
    (folder / "recipe.toml").write_text(text)
    with pytest.raises(InputError, match=r"net/recipe\.toml"):
        load_target("net")


def test_a_run_without_weights_is_to_be_finished(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="tightrope train --resume --out net"):
        load_target("net")


def test_weights_are_never_unpickled(folder):
    torch.save(build("2x100", (1, 2, 2), 3).state_dict(), folder / "model.safetensors")
    with pytest.raises(InputError, match="not a safetensors file"):
        load_target("net")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_weights_must_be_finite(folder, bad):
    tensors = load_file(folder / "model.safetensors")
    tensors["2.weight"][0, 0] = bad
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match="NaN or Inf"):
        load_target("net")


def test_weights_must_be_what_the_network_holds(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file({name: t.double() for name, t in tensors.items()}, folder / "model.safetensors")
    load_target("net")  # the same numbers
    tensors = {name: t.double() / 3 for name, t in tensors.items()}
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"weights that the network rounds \(.* is torch.float64 there and"):
        load_target("net")


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("nothere", "nothere does not exist"),
        ("net/model.json", "is a file"),
        (".", "no run folder"),
        ("homemade:net", "--weights"),
    ],
)
def test_what_is_no_target_is_refused(folder, target, said):
    with pytest.raises(InputError, match=said):
        load_target(target)


@pytest.mark.parametrize("target", ["net", "net.onnx"])
def test_what_has_weights_of_its_own_takes_no_others(folder, target):
    with pytest.raises(
        InputError, match=f"{target} has weights of its own: leave out --weights w.safetensors"
    ):
        load_target(target, Path("w.safetensors"))


def test_a_factory_is_found_from_the_current_folder(nets):
    save_file(torch.nn.Linear(3, 2).state_dict(), "weights.safetensors")
    target = load_target("homemade:net", Path("weights.safetensors"))
    assert target.model(torch.rand(4, 3)).shape == (4, 2)
    assert (target.data, target.eps, target.folder) == (None, None, None)
    assert str(Path.cwd()) not in sys.path


def test_a_folder_may_name_a_factory(folder, nets):
    change(folder / "model.json", name="homemade:net", mean=None, std=None)
    save_file(torch.nn.Linear(3, 2).state_dict(), folder / "model.safetensors")
    assert isinstance(load_target("net").model, torch.nn.Linear)


def test_weights_of_another_network_name_what_does_not_fit(nets):
    save_file(torch.nn.Linear(3, 4).state_dict(), "weights.safetensors")
    with pytest.raises(InputError, match=r"another network.*size mismatch for weight"):
        load_weights(make_model("homemade:net"), Path("weights.safetensors"))


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("def net(): return 3", "returned a int"),
        ("net = 3", "not callable"),
        ("def net(width): return width", "without arguments"),
        ("def net(): raise OSError('no such luck')", "no such luck"),
        ("def other(): pass", "no attribute 'net'"),
        ("def net(:", "SyntaxError"),
        ("import nosuchmodule", "No module named 'nosuchmodule'"),
    ],
)
def test_a_factory_that_makes_no_network_is_refused(nets, code, said):
    Path("homemade.py").write_text(code)
    shutil.rmtree("__pycache__", ignore_errors=True)
    with pytest.raises(InputError, match=said):
        make_model("homemade:net")


@pytest.mark.parametrize(
    ("own", "given"), [((1, 2, 2), (2, 2)), ((4,), (1, 2, 2)), ((4, 1), (2, 2, 1)), ((2, 2, 1), (1, 2, 2))]
)
def test_a_network_takes_inputs_that_only_differ_in_ones_and_vectors_take_images(own, given):
    target = Target(nn.Flatten(), None, None, None, own)
    x = torch.rand(3, *given)
    assert torch.equal(target.taking(given)(x), x.flatten(1))


def test_a_network_does_not_take_images_whose_channels_lie_elsewhere():
    target = Target(nn.Flatten(), None, None, None, (2, 2, 3))
    with pytest.raises(InputError, match=r"\(2, 2, 3\), but those of the data are \(3, 2, 2\)"):
        target.taking((3, 2, 2))

"""Checkpoints: all of the state or an error, never a part of it."""

import errno
import json
import os
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tightrope import files
from tightrope.errors import FileError, IdentityError, InputError, TightropeError
from tightrope.files import load_tensors, save_tensors
from tightrope.train import methods
from tightrope.train.checkpoint import Progressed, derive_seed, read_checkpoint, save_checkpoint
from tightrope.train.step import train_step

IDENTITY = {"method.eps": 0.1, "data identity": "abc", "training.lr.at": [0.25, 0.42]}
OPTIMISERS = {
    "adam": lambda p: torch.optim.Adam(p, 0.01, foreach=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1, foreach=True),
    "sgd": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, foreach=True),
    "plain": lambda p: torch.optim.SGD(p, 0.01),
}


def load(path, module, optimiser, state, identity):
    found = read_checkpoint(path, identity)
    found.restore(module, state)
    found.restore_optimiser(optimiser)
    return found.progress()


def progressed():
    return Progressed(7, 12.3, {"natural": [0.1 + 0.2, 64.0], "gradient_norm": [1 / 3, 64.0]})


@pytest.fixture
def trained(network, batch):
    """Builds a network and its optimiser, after some steps."""

    def train(optimiser="adam", steps=3, seed=0):
        module = network(norm=True, seed=seed)
        chosen = OPTIMISERS[optimiser](list(module.parameters()))
        for _ in range(steps):
            train_step(methods.standard(), batch(module), chosen, 0.0)
        return module, chosen

    return train


@pytest.fixture
def saved(tmp_path, trained):
    """A checkpoint, and what is in it."""
    module, optimiser = trained()
    save_checkpoint(tmp_path / "last.safetensors", module, optimiser, {}, progressed(), IDENTITY)
    return tmp_path / "last.safetensors", module, optimiser


@pytest.mark.parametrize("name", OPTIMISERS)
def test_what_is_loaded_goes_on_bit_by_bit_as_what_was_saved(tmp_path, trained, batch, name):
    module, optimiser = trained(name)
    path = tmp_path / "checkpoint" / "last.safetensors"
    save_checkpoint(path, module, optimiser, {}, progressed(), IDENTITY)
    other, its_optimiser = trained(name, steps=1, seed=1)
    assert load(path, other, its_optimiser, {}, IDENTITY) == progressed()
    for one, its in ((module, optimiser), (other, its_optimiser)):
        for _ in range(3):
            train_step(methods.standard(), batch(one), its, 0.0)
    expected = module.state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in other.state_dict().items())


def test_an_optimiser_that_has_done_nothing_yet_can_be_saved(tmp_path, trained):
    module, optimiser = trained(steps=0)
    save_checkpoint(tmp_path / "c", module, optimiser, {}, Progressed(0, 0.0, {}), {})
    other, its_optimiser = trained(steps=0, seed=1)
    assert load(tmp_path / "c", other, its_optimiser, {}, {}) == Progressed(0, 0.0, {})
    assert its_optimiser.state_dict()["state"] == {}


def test_each_difference_is_named_and_nothing_is_loaded(saved, trained):
    path, *_ = saved
    module, optimiser = trained(seed=1)
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    wanted = IDENTITY | {"method.eps": 0.2, "training.batch": 100}
    with pytest.raises(IdentityError) as refused:
        load(path, module, optimiser, {}, wanted)
    message = str(refused.value)
    assert str(path) in message
    assert "method.eps: 0.1 there, 0.2 now" in message
    assert "training.batch: none there, 100 now" in message
    assert "data identity" not in message
    assert all(torch.equal(tensor, before[key]) for key, tensor in module.state_dict().items())


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.9999])
def test_a_truncated_checkpoint_is_refused(saved, share):
    path, module, optimiser = saved
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(InputError, match=r"last\.safetensors.* is corrupt"):
        load(path, module, optimiser, {}, IDENTITY)


@pytest.mark.parametrize("content", [b"\0" * 100, b"not a checkpoint", pickle.dumps({"a": 1})])
def test_what_is_no_checkpoint_is_refused_and_never_unpickled(saved, content, monkeypatch):
    path, module, optimiser = saved
    path.write_bytes(content)
    monkeypatch.setattr(pickle, "loads", pytest.fail)
    with pytest.raises(InputError, match="is corrupt or not a safetensors file"):
        load(path, module, optimiser, {}, IDENTITY)


def test_a_missing_checkpoint_is_an_input_error(tmp_path, saved):
    _, module, optimiser = saved
    with pytest.raises(InputError, match="elsewhere is missing"):
        load(tmp_path / "elsewhere", module, optimiser, {}, IDENTITY)


@pytest.mark.parametrize("header", [{}, {"format": "tightrope-checkpoint/2"}])
def test_another_format_is_refused(saved, header):
    path, module, optimiser = saved
    save_tensors(path, module.state_dict(), header)
    with pytest.raises(FileError, match="this version reads 'tightrope-checkpoint/1'"):
        load(path, module, optimiser, {}, IDENTITY)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_on_a_full_disk_the_last_checkpoint_stays(saved, trained, monkeypatch, code):
    path, *_ = saved
    before = path.read_bytes()

    def full(_descriptor):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(TightropeError, match=r"no space left to write .*what was there before is kept"):
        save_checkpoint(path, *trained(steps=1), {}, Progressed(9, 0.0, {}), IDENTITY)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_the_header_says_what_the_file_is(saved):
    path, module, _ = saved
    tensors, header = load_tensors(path)
    assert header["format"] == "tightrope-checkpoint/1"
    assert header["identity"] == json.loads(json.dumps(IDENTITY))
    assert header["progress"]["step"] == 7
    assert {name.removeprefix("model.") for name in tensors if name.startswith("model.")} == set(
        module.state_dict()
    )


# ------------------------------------------------------------------------------ seeds and progress


def test_means_are_over_the_examples_for_which_a_metric_was_measured():
    done = Progressed(0, 0.0, {})
    done.add({"natural": 1.0}, 10)
    done.add({"natural": 3.0, "robust": 5.0}, 30)
    assert done.means() == {"natural": 2.5, "robust": 5.0}
    assert done.step == 2


ARGUMENTS = st.tuples(
    st.integers(0, 2**32 - 1), st.sampled_from(["step", "order", "read"]), st.integers(0, 10**7)
)


@given(ARGUMENTS, ARGUMENTS)
def test_seeds_are_a_function_of_their_arguments_and_unrelated(one, other):
    assert 0 <= derive_seed(*one) < 2**63
    assert (derive_seed(*one) == derive_seed(*other)) == (one == other)


def test_seeds_stay_the_same_everywhere():
    """A change here changes every published run."""
    assert derive_seed(0, "step", 0) == 4_433_896_974_232_160_741
    assert derive_seed(1, "order", 7) == 5_568_122_274_206_039_363

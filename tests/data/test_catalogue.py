import pytest
import torch

from tightrope.data import load, names
from tightrope.errors import DataError


def test_names_are_the_documented_ones():
    assert names() == ["digits", "mnist", "cifar10"]


@pytest.mark.parametrize(
    ("wrong", "meant"), [("minst", "mnist"), ("cifar-10", "cifar10"), ("digit", "digits")]
)
def test_an_unknown_name_gets_the_nearest_one(wrong, meant):
    with pytest.raises(DataError, match=f"no data set '{wrong}': did you mean '{meant}'"):
        load(wrong)


def test_a_name_like_no_other_gets_the_list():
    with pytest.raises(DataError, match=r"Choose digits, mnist, cifar10, or the path of an \.npz file"):
        load("imagenet")


def test_digits_need_no_files_and_are_split_the_same_way_every_time():
    data = load("digits")
    assert (len(data.train), len(data.test), data.train.shape, data.classes) == (1437, 360, (1, 8, 8), 10)
    assert (data.train.x.min(), data.train.x.max()) == (0, 1)
    assert torch.equal(data.train.x * 16, (data.train.x * 16).round())
    assert data.test.y.bincount().min() >= 35
    assert data.test.identity() == load("digits").test.identity()
    assert data.test.identity()[:16] == "1b4dfc2209bdeb87"

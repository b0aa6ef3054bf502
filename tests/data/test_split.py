import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tightrope.data import hold_out
from tightrope.errors import InputError

Y = torch.arange(1000) % 10


@given(st.lists(st.sampled_from([0, 1, 2, 7]), min_size=2, max_size=40), st.data(), st.integers(0, 2**32 - 1))
def test_every_example_is_on_one_side_and_every_class_gives_its_share(labels, data, seed):
    y = torch.tensor(labels)
    count = data.draw(st.integers(0, len(y) - 1))
    train, held_out = hold_out(y, count, seed)
    assert len(held_out) == count
    assert sorted([*train.tolist(), *held_out.tolist()]) == list(range(len(y)))
    assert train.tolist() == sorted(train.tolist())
    assert held_out.tolist() == sorted(held_out.tolist())
    for label in set(labels):
        assert abs((y[held_out] == label).sum() - count * labels.count(label) / len(y)) < 1


def test_equal_classes_give_equal_parts():
    _, held_out = hold_out(Y, 200, seed=0)
    assert Y[held_out].bincount().tolist() == [20] * 10
    assert held_out.dtype == torch.int64


def test_the_seed_decides_and_stays_the_same_everywhere():
    assert torch.equal(hold_out(Y, 100, 3)[1], hold_out(Y, 100, 3)[1])
    assert not torch.equal(hold_out(Y, 100, 3)[1], hold_out(Y, 100, 4)[1])
    assert hold_out(Y, 100, 0)[1][:6].tolist() == [1, 14, 27, 31, 45, 55]


@pytest.mark.parametrize("count", [-1, 1000, 2000])
def test_a_count_that_leaves_nothing_is_refused(count):
    with pytest.raises(InputError, match=f"cannot hold out {count} of 1000"):
        hold_out(Y, count, 0)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_out_of_range_is_refused(seed):
    with pytest.raises(InputError, match="seed"):
        hold_out(Y, 10, seed)

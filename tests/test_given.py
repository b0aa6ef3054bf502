"""Numbers that a caller gives from Python."""

import json
import math

import numpy as np
import pytest
import torch

from tightrope.errors import InputError
from tightrope.given import positive, whole


@pytest.mark.parametrize("value", [5, np.int64(5), np.uint8(5), torch.tensor(5)])
def test_whole_numbers_of_any_kind_become_plain_ones(value):
    assert json.dumps(whole(value, "the seed")) == "5"


@pytest.mark.parametrize("value", [-1, 9, 2.0, 1.5, "3", None, True, math.nan, torch.rand(2)])
def test_what_is_no_whole_number_in_the_range_is_refused(value):
    with pytest.raises(InputError, match="the seed must be a whole number from 0 to 8, got"):
        whole(value, "the seed", 0, 8)


def test_without_a_largest_one_the_smallest_is_named():
    with pytest.raises(InputError, match="the number of jobs must be a whole number from 1 up, got 0"):
        whole(0, "the number of jobs", 1)


@pytest.mark.parametrize("value", [2, 2.0, np.float32(2), np.float64(2), np.int16(2)])
def test_positive_numbers_of_any_kind_become_plain_ones(value):
    assert json.dumps(positive(value, "the time limit")) == "2.0"


@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, None, True, "60"])
def test_what_is_no_finite_positive_number_is_refused(value):
    with pytest.raises(InputError, match=f"the time limit must be a positive number, got {value!r}"):
        positive(value, "the time limit")

"""Verifiers by name, and what each of them is given."""

import math

import pytest

from tightrope.errors import InputError
from tightrope.verify.verifiers import check_time_limit, find_verifier


@pytest.mark.parametrize("limit", [0.0, -1.0, math.nan, None, True, "60"])
def test_a_time_limit_must_be_a_positive_number(limit):
    with pytest.raises(InputError, match=f"time limit must be a positive number of seconds, got {limit!r}"):
        check_time_limit(limit)


def test_a_misspelt_verifier_is_refused_with_the_nearest_one():
    with pytest.raises(InputError, match="did you mean 'cascade'"):
        find_verifier("cascad")

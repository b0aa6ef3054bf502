"""Verifiers by name, and what each of them is given."""

import pytest

from tightrope.errors import InputError
from tightrope.verify.verifiers import find_verifier


def test_a_misspelt_verifier_is_refused_with_the_nearest_one():
    with pytest.raises(InputError, match="did you mean 'cascade'"):
        find_verifier("cascad")

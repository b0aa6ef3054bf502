"""Cached and resumed work is used only where everything agrees."""

import pytest

from tightrope.errors import IdentityError, InputError
from tightrope.identity import check_identity

FOUND = {"eps": 0.3, "data": "abc", "lr.at": [0.25, 0.42], "clip": None}


def test_the_same_in_another_order_is_the_same():
    check_identity(FOUND, dict(reversed(FOUND.items())), "here")
    check_identity({}, {}, "here")


def test_every_difference_is_named_with_both_values_and_nothing_else():
    wanted = {"eps": 0.4, "data": "abc", "lr.at": [0.25, 0.5], "clip": None, "norm": "inf"}
    with pytest.raises(IdentityError) as refused:
        check_identity(FOUND, wanted, "runs/a/checkpoint")
    assert str(refused.value).split("\n") == [
        "runs/a/checkpoint was made with other settings:",
        "  eps: 0.3 there, 0.4 now",
        "  lr.at: [0.25, 0.42] there, [0.25, 0.5] now",
        "  norm: none there, 'inf' now",
        "Resume with the same settings, or start afresh in another place.",
    ]


def test_what_is_missing_now_is_a_difference_too():
    with pytest.raises(IdentityError, match="data: 'abc' there, none now"):
        check_identity(FOUND, {key: value for key, value in FOUND.items() if key != "data"}, "here")


def test_of_a_hash_the_beginning_is_shown():
    with pytest.raises(IdentityError, match="the hash aaaaaaaa there, one with the hash bbbbbbbb now"):
        check_identity({"weights": 64 * "a"}, {"weights": 64 * "b"}, "here")


def test_a_wrong_identity_is_a_user_s_error():
    assert issubclass(IdentityError, InputError)
    assert IdentityError.exit_code == 2

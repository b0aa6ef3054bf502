"""The same work in several processes."""

from __future__ import annotations

import os

import pytest
import torch

from tightrope.errors import InputError, TightropeError
from tightrope.memory import free_bytes
from tightrope.parallel import each


def test_results_are_those_of_one_process_in_any_order():
    shift = 3

    def work(number: int) -> tuple[int, int, int]:
        return number + shift, os.getpid(), torch.get_num_threads()

    batches = [(i,) for i in range(5)]
    alone, shared = list(each(work, batches, 1)), list(each(work, batches, 2))
    assert {pid for _, pid, _ in alone} == {os.getpid()}
    assert os.getpid() not in {pid for _, pid, _ in shared}
    assert {threads for *_, threads in shared} == {1}
    assert sorted(found for found, *_ in shared) == [found for found, *_ in alone] == [3, 4, 5, 6, 7]


def test_every_process_takes_its_share_of_the_memory():
    (shared,) = each(lambda: free_bytes(torch.device("cpu")), [()], 2)
    assert shared < 0.75 * free_bytes(torch.device("cpu"))


def test_an_error_in_a_process_arrives_as_it_is():
    def work() -> None:
        raise InputError("no such thing")

    with pytest.raises(InputError, match="no such thing"):
        list(each(work, [()], 2))


def test_a_process_that_is_killed_is_reported():
    def work() -> None:
        os.kill(os.getpid(), 9)

    with pytest.raises(TightropeError, match="a worker process was killed"):
        list(each(work, [()], 2))

"""Memory: how much is free, and keeping what was freed."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import torch
from torch import nn

from tightrope.memory import channels_innermost, free_bytes, keep_freed


def test_free_bytes_is_what_the_machine_has_left(monkeypatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=123))
    assert free_bytes(torch.device("cpu")) == 123


def test_the_process_is_told_once(monkeypatch):
    calls = []
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=lambda *args: calls.append(args)))
    keep_freed.cache_clear()
    keep_freed()
    keep_freed()
    assert calls == [(-3, 2**30), (-1, 2**31 - 1)]


def test_a_c_library_that_cannot_be_told_is_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace())
    keep_freed.cache_clear()
    keep_freed()


def test_channels_lie_innermost_for_a_while():
    first, second = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 2, 3)
    network, x = nn.Sequential(first, nn.ReLU(), second), torch.rand(5, 1, 8, 8)
    weights, before = (first.weight, second.weight), [w.clone() for w in network.parameters()]
    strides, y = [w.stride() for w in weights], network(x)
    with channels_innermost(network):
        assert (first.weight, second.weight) == weights
        assert second.weight.is_contiguous(memory_format=torch.channels_last)
        inside = network(x)
        assert not inside.is_contiguous()
        assert inside.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(inside, y)
    assert [w.stride() for w in weights] == strides
    assert network(x).is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))


def test_weights_that_are_computed_or_of_a_class_of_their_own_stay_as_they_are():
    class Standardised(nn.Conv2d):
        def forward(self, x):
            return self._conv_forward(x, self.weight - self.weight.view(4, -1).mean(1).view(4, 1, 1, 1), None)

    network = nn.Sequential(Standardised(2, 4, 3), nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 3, 2)))
    x = torch.rand(2, 2, 5, 5)
    y = network(x)
    with channels_innermost(network):
        assert torch.equal(network(x), y)

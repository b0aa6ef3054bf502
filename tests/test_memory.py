"""Memory: how much is free, and keeping what was freed."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import torch

from tightrope.memory import free_bytes, keep_freed


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

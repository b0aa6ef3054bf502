"""Memory: how much of it is free, and keeping what a step has freed for the next one."""

from __future__ import annotations

import ctypes
from functools import cache

import psutil
import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc


_sharing = 1  # processes that do the same


def share_memory(processes: int) -> None:
    """Tell this process that it is one of so many, which all take their share of what is free."""
    global _sharing
    _sharing = processes


def free_bytes(device: torch.device) -> int:
    """Memory that a computation on a device may still take."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available) // _sharing


@cache
def keep_freed() -> None:
    """Have this process keep the memory that it frees, where its C library can be told so (glibc).

    Else every large tensor of every training step or bound is mapped anew and its pages are filled one
    fault at a time: half of a CROWN-IBP step on DM-medium, a third of `crown` on DM-small. The process then
    shrinks only when it ends.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 2**30)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)

"""What a process should set once, before it computes on CPUs: how it keeps memory and how many threads it has."""

import ctypes
import os
import sys

import torch

# Parameter numbers of glibc's mallopt(3).
_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_MAX = -4
_M_ARENA_MAX = -8


def keep_freed_memory() -> bool:
    """Reuse the memory of freed tensors instead of returning it to the kernel, in huge pages where allowed.

    By default glibc gives each large tensor fresh pages, and the kernel zeroes and maps them 4 KiB at a time,
    which takes longer than many of the operations that fill them. Call this before the first tensor is made:
    torch reads its huge-page switch only once. The process then stays as large as it has ever been.

    Returns:
        Whether anything was set: only glibc on Linux has these switches.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    settings = {
        _M_MMAP_MAX: 0,
        _M_TRIM_THRESHOLD: -1,
        _M_TOP_PAD: 64 << 20,
        # The heaps of other threads are at most 64 MiB, and larger tensors made there would be mapped afresh.
        _M_ARENA_MAX: 1,
    }
    return all(mallopt(name, value) == 1 for name, value in settings.items())


def set_threads(granted_cpus: float) -> int:
    """Let torch use as many threads as whole CPUs are granted, at least 1, and return that number.

    OpenMP threads that outnumber free cores spin against each other and cost far more than they bring.
    """
    threads = max(1, int(min(granted_cpus, os.cpu_count() or 1)))
    torch.set_num_threads(threads)
    return threads

"""Process settings for CPUs; each in a process of its own, since they cannot be taken back."""

import os
import subprocess
import sys

import pytest
import torch

from moe_ray.cpu import set_threads

MEASURE_FAULTS = """
import resource, sys
from moe_ray.cpu import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
import torch
def faults():
    start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(64 << 20, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start
print([faults() for _ in range(4)][-1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc only")
def test_freed_memory_is_reused_without_page_faults():
    faults = {}
    for kind in ("default", "kept"):
        command = [sys.executable, "-c", MEASURE_FAULTS, kind]
        faults[kind] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert faults["default"] > 100
    assert faults["kept"] < 10


@pytest.mark.parametrize(("granted", "threads"), [(0.25, 1), (1.0, 1), (1e9, os.cpu_count())])
def test_threads_are_whole_granted_cpus(granted, threads):
    before = torch.get_num_threads()
    try:
        assert set_threads(granted) == torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)

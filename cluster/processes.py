"""Find and end the processes that belong to a cluster, and no others.

A cluster's first process gets a marker in its environment, which all that it starts inherit. Command lines would
not do: workers rename themselves, and a user's shell or pager may name the cluster's folder too.
"""

import contextlib
import os
import signal
import time
from collections.abc import Iterable

import psutil

MARKER = "MOE_RAY_CLUSTER"


def started_at(pid: int) -> float | None:
    """Start time of a process, None if it has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        if process.status() != psutil.STATUS_ZOMBIE:
            return process.create_time()
    return None


def find_marked(value: str) -> list[psutil.Process]:
    """Living processes whose marker has this value, and their descendants, but never the caller or its parents."""
    marked: set[int] = set()
    children: dict[int, list[int]] = {}
    alive: dict[int, psutil.Process] = {}
    for process in psutil.process_iter(["pid", "ppid", "status", "environ"]):
        info = process.info
        if info["status"] != psutil.STATUS_ZOMBIE:
            alive[info["pid"]] = process
        children.setdefault(info["ppid"], []).append(info["pid"])
        if (info["environ"] or {}).get(MARKER) == value:
            marked.add(info["pid"])
    pending = list(marked)
    while pending:
        new = [pid for pid in children.get(pending.pop(), []) if pid not in marked]
        marked.update(new)
        pending += new
    return [alive[pid] for pid in sorted(marked - _own_line()) if pid in alive]


def end_marked(value: str, head: int | None, grace: float, patience: float) -> list[psutil.Process]:
    """End all processes with this marker: `head` is asked to end them for `grace` seconds, then they are killed.

    Returns:
        Those still alive after another `patience` seconds.
    """
    found = find_marked(value)
    deadline = time.monotonic() + grace
    if head in {process.pid for process in found}:
        _signal([process for process in found if process.pid == head], signal.SIGTERM)
        while found and time.monotonic() < deadline:
            time.sleep(0.2)
            _reap(head)
            found = find_marked(value)
    deadline = time.monotonic() + patience
    while found and time.monotonic() < deadline:
        end_processes(found, 0.5)
        found = find_marked(value)
    return found


def end_processes(processes: Iterable[psutil.Process], patience: float) -> list[psutil.Process]:
    """Kill processes; returns those still alive after `patience` seconds."""
    processes = list(processes)
    _signal(processes, signal.SIGKILL)
    return psutil.wait_procs(processes, timeout=patience)[1]


def _signal(processes: Iterable[psutil.Process], number: int) -> None:
    for process in processes:
        # psutil compares start times first, so a reused process id is not hit.
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def _reap(pid: int | None) -> None:
    """Collect the exit status if the process is our child, so that it does not stay a zombie."""
    if pid is not None:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)


def _own_line() -> set[int]:
    me = psutil.Process()
    return {me.pid, *(parent.pid for parent in me.parents())}

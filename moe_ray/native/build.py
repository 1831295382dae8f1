"""Compile the C++ of this package for the machine it runs on, once, and load it."""

import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from moe_ray.private_folder import private_folder, user_cache

_SOURCE = Path(__file__).with_name("decode.cpp")
_HEADERS = sorted(_SOURCE.parent.glob("*.hpp"))
_FLAGS = ("-std=gnu++17", "-O3", "-march=native", "-fPIC", "-fno-math-errno", "-fopenmp")
_COMPILE_SECONDS = 300

_logger = logging.getLogger(__name__)


class NativeUnavailableError(Exception):
    """There is no compiler, or it cannot compile the source; the message says which."""


@functools.cache
def load() -> ctypes.CDLL:
    """The compiled library; the first call on a machine compiles for some seconds.

    The compiler is that of the variable CXX, else g++ or clang++. What it made stays in a folder that only this
    user can enter, `moe_ray` in the folder of XDG_CACHE_HOME or ~/.cache.

    Raises:
        NativeUnavailableError: there is none to be had.
    """
    compiler = _find_compiler()
    openmp = _find_openmp()
    try:
        folder = private_folder(user_cache())
        target = folder / f"decode-{_identity(compiler, openmp)}.so"
        with (folder / "lock").open("w") as lock:
            # Replicas that start together wait for the one that compiles.
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.exists():
                _logger.info("compiling %s with %s", _SOURCE.name, compiler)
                _compile(compiler, openmp, target)
        return ctypes.CDLL(str(target))
    except (OSError, subprocess.SubprocessError) as error:
        raise NativeUnavailableError(f"{compiler} made no library that loads: {_last_line(error)}") from error


def _find_compiler() -> str:
    named = os.environ.get("CXX")
    names = [named] if named else ["g++", "clang++"]
    for name in names:
        found = shutil.which(name)
        if found:
            return found
    raise NativeUnavailableError(f"there is no C++ compiler: looked for {', '.join(names)}")


def _find_openmp() -> str | None:
    """The OpenMP runtime that torch has loaded: with another one there would be two pools of threads."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return None
    found = re.search(r"(/\S*libgomp\S*\.so\S*)$", maps.read_text(), re.MULTILINE)
    return found.group(1) if found else None


def _identity(compiler: str, openmp: str | None) -> str:
    """Changes with the sources, the compiler, the processor and the OpenMP runtime."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    about = sorted({line for line in lines if line.startswith(("flags", "model", "Features", "CPU part"))})
    stat = Path(compiler).stat()
    sources = [path.read_text() for path in (_SOURCE, *_HEADERS)]
    parts = (sources, compiler, stat.st_size, stat.st_mtime_ns, openmp, _FLAGS, about)
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def _compile(compiler: str, openmp: str | None, target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        code, library = Path(scratch, "decode.o"), Path(scratch, "decode.so")
        _run([compiler, *_FLAGS, "-c", str(_SOURCE), "-o", str(code)])
        _run([compiler, "-shared", str(code), openmp or "-fopenmp", "-o", str(library)])
        library.replace(target)


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=_COMPILE_SECONDS)


def _last_line(error: Exception) -> str:
    said = getattr(error, "stderr", None) or str(error)
    lines = [line for line in said.splitlines() if "error" in line] or said.splitlines()
    return lines[0].strip() if lines else type(error).__name__

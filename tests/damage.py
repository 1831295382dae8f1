"""Damaged files and full disks."""

import os
import subprocess
from pathlib import Path

import pytest

DAMAGES = ("flip", "cut", "empty", "directory", "swap", "foreign")


def spoil(folder: Path, damage: str) -> None:
    """Damage all files of a folder, of which there are at least two."""
    files = sorted(folder.iterdir())
    contents = [path.read_bytes() for path in files]
    for index, (path, content) in enumerate(zip(files, contents, strict=True)):
        if damage == "directory":
            path.unlink()
            path.mkdir()
            continue
        spoiled = {
            "flip": content[:-3] + bytes([content[-3] ^ 1]) + content[-2:],
            "cut": content[: len(content) // 2],
            "empty": b"",
            "swap": contents[index - 1],
            "foreign": b"the picture of somebody else" * 9,
        }
        path.write_bytes(spoiled[damage])


def fill(folder: Path) -> Path:
    """The file that takes all that is left of a disk."""
    path = folder / "filler"
    with path.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        _write_on(file)
    return path


def _write_on(file) -> None:
    while True:
        file.write(bytes(4096))


class Disk:
    """A mounted file system of 16 MB that can be filled up."""

    def __init__(self, mount: Path) -> None:
        subprocess.run(["mount", "-o", "remount,size=16m", str(mount)], check=True)
        self._filler = mount / "filler"
        self._mount = mount

    def fill(self) -> None:
        free = os.statvfs(self._mount)
        with self._filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_frsize - 100_000)

    def free(self) -> None:
        self._filler.unlink(missing_ok=True)

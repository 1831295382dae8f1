"""Storage in a folder of a disk or of a mounted network file system."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from moe_ray.durable import sync
from moe_ray.storage.base import LOCK, TEMPORARY_PREFIX, checked
from moe_ray.storage.retry import Policy
from moe_ray.storage.staged import make_folder, staged, temporary


@dataclass(frozen=True)
class LocalStorage:
    """A `Storage`.

    Attributes:
        local: the folder.
        top: the folder that was opened, of which this is a child; empty folders in it are not kept.
        policy: how errors are dealt with.
    """

    local: Path
    top: Path
    policy: Policy

    @property
    def uri(self) -> str:
        return str(self.local)

    def read(self, name: str) -> bytes:
        path = self._path(name)
        return self.policy.run(path.read_bytes, "read", str(path), may_be_absent=True)

    def write(self, name: str, content: bytes | memoryview) -> None:
        path = self._path(name)

        def write() -> None:
            try:
                make_folder(path.parent)
                with staged(path) as staging, staging.open("wb") as file:
                    file.write(content)
            except FileNotFoundError as error:
                raise OSError(errno.ESTALE, "another process removed the folder meanwhile") from error

        self.policy.run(write, "written", str(path))

    def fetch(self, name: str, target: Path) -> None:
        path = self._path(name)

        def copy() -> None:
            make_folder(target.parent)
            with path.open("rb") as source, staged(target) as staging, staging.open("wb") as file:
                shutil.copyfileobj(source, file, 1 << 20)

        self.policy.run(copy, f"copied to {str(target)!r}", str(path), may_be_absent=True)

    def list(self, folder: str = "") -> list[str]:
        base = self._path(folder) if folder else self.local

        def names() -> list[str]:
            files = [path for path in _walk(base) if path.name != LOCK]
            return sorted(
                path.relative_to(self.local).as_posix()
                for path in files
                if not any(part.startswith(TEMPORARY_PREFIX) for part in path.relative_to(base).parts)
            )

        return self.policy.run(names, "listed", str(base))

    def exists(self, name: str) -> bool:
        path = self._path(name)
        return self.policy.run(path.is_file, "looked up", str(path))

    def delete(self, name: str) -> None:
        path = self._path(name)

        def delete() -> None:
            try:
                _remove(path)
            except FileNotFoundError:
                return
            self._drop_empty_folders(path.parent)

        self.policy.run(delete, "deleted", str(path))

    def child(self, folder: str) -> "LocalStorage":
        return replace(self, local=self._path(folder))

    def clean(self) -> None:
        def clean() -> None:
            for folder, _, files in os.walk(self.local, topdown=False, onerror=_raise_unless_gone):
                for file in files:
                    path = Path(folder, file)
                    if any(part.startswith(TEMPORARY_PREFIX) for part in path.relative_to(self.local).parts):
                        path.unlink(missing_ok=True)
                if Path(folder) != self.top:
                    # One that is not empty stays.
                    with suppress(OSError):
                        os.rmdir(folder)

        self.policy.run(clean, "cleaned", str(self.local))

    def _path(self, name: str) -> Path:
        return self.local / checked(name)

    def _drop_empty_folders(self, folder: Path) -> None:
        while folder != self.top:
            try:
                folder.rmdir()
            except OSError:
                return
            folder = folder.parent


def _remove(path: Path) -> None:
    if not path.is_dir() or path.is_symlink():
        path.unlink()
        return
    doomed = path.rename(temporary(path))
    sync(path.parent)
    shutil.rmtree(doomed, ignore_errors=True)


def _walk(base: Path) -> Iterator[Path]:
    for folder, _, files in os.walk(base, onerror=_raise_unless_gone):
        yield from (Path(folder, file) for file in files)


def _raise_unless_gone(error: OSError) -> None:
    if error.errno not in (errno.ENOENT, errno.ENOTDIR):
        raise error

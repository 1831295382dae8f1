"""Storage in a bucket of an object store."""

import errno
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote

import pyarrow as pa
from pyarrow.fs import FileSelector, FileSystem, FileType

from moe_ray.storage.base import checked
from moe_ray.storage.retry import Policy
from moe_ray.storage.staged import make_folder, staged

# One request each, so that a download is neither slow for their number nor large in memory.
_PART_BYTES = 16 << 20


@dataclass(frozen=True)
class ObjectStorage:
    """A `Storage`.

    What an unfinished upload has sent is never visible; a rule of the bucket can expire it.

    Attributes:
        filesystem: the client; it does not retry for long.
        scheme: s3 or gs.
        prefix: the bucket and, after `/`, the common beginning of all names.
        query: settings of the client as in the URI, without credentials.
        policy: how errors are dealt with.
    """

    filesystem: FileSystem
    scheme: str
    prefix: str
    query: str
    policy: Policy

    @property
    def uri(self) -> str:
        return f"{self.scheme}://{quote(self.prefix)}" + (f"?{self.query}" if self.query else "")

    @property
    def local(self) -> None:
        return None

    def read(self, name: str) -> bytes:
        path = self._path(name)

        def download() -> bytes:
            with self.filesystem.open_input_file(path) as source:
                content = source.read()
                self._check_unchanged(path, source.metadata())
                return content

        return self.policy.run(download, "read", self._shown(path), may_be_absent=True)

    def write(self, name: str, content: bytes | memoryview) -> None:
        path = self._path(name)
        buffer = pa.py_buffer(content)

        def upload() -> None:
            stream = self.filesystem.open_output_stream(path)
            stream.write(buffer)
            stream.close()

        def upload_undisturbed() -> None:
            # A stream that an exception leaves behind publishes what it has, even if that is nothing. In a thread,
            # no signal can raise between these calls.
            with ThreadPoolExecutor(max_workers=1) as thread:
                thread.submit(upload).result()

        self.policy.run(upload_undisturbed, "written", self._shown(path))

    def fetch(self, name: str, target: Path) -> None:
        path = self._path(name)

        def download() -> None:
            with self.filesystem.open_input_file(path) as source:
                make_folder(target.parent)
                with staged(target) as staging:
                    with staging.open("wb") as file:
                        shutil.copyfileobj(source, file, _PART_BYTES)
                    self._check_unchanged(path, source.metadata())

        self.policy.run(download, f"copied to {str(target)!r}", self._shown(path), may_be_absent=True)

    def list(self, folder: str = "") -> list[str]:
        base = self._path(folder) if folder else self.prefix
        selector = FileSelector(base, allow_not_found=True, recursive=True)
        found = self.policy.run(lambda: self.filesystem.get_file_info(selector), "listed", self._shown(base))
        return sorted(info.path.removeprefix(f"{self.prefix}/") for info in found if info.type is FileType.File)

    def exists(self, name: str) -> bool:
        return self._type(name) is FileType.File

    def delete(self, name: str) -> None:
        path = self._path(name)

        def delete() -> None:
            kind = self.filesystem.get_file_info(path).type
            try:
                if kind is FileType.File:
                    self.filesystem.delete_file(path)
                elif kind is FileType.Directory:
                    self.filesystem.delete_dir(path)
            except FileNotFoundError:
                return

        self.policy.run(delete, "deleted", self._shown(path))

    def child(self, folder: str) -> "ObjectStorage":
        return replace(self, prefix=self._path(folder))

    def clean(self) -> None:
        """Nothing: killed writers leave nothing that could be seen."""

    def _path(self, name: str) -> str:
        return f"{self.prefix}/{checked(name)}"

    def _shown(self, path: str) -> str:
        return f"{self.scheme}://{path}"

    def _type(self, name: str) -> FileType:
        path = self._path(name)
        return self.policy.run(lambda: self.filesystem.get_file_info(path), "looked up", self._shown(path)).type

    def _check_unchanged(self, path: str, metadata: dict[str, bytes]) -> None:
        """Several requests read one file; had it been replaced in between, they would have read a mixture."""
        with self.filesystem.open_input_file(path) as now:
            if now.metadata() != metadata:
                raise OSError(errno.ESTALE, "it was replaced while it was read")

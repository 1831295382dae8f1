"""Small files in one folder under a byte budget, the least recently used removed first.

The folder may be shared by replicas and outlives them. A file begins with the XXH3 checksum of its digest and the
rest: one that is damaged, or was cut off by a crash, is no more than a miss. Files of others are left alone. No
error of the disk leaves this module; they are counted.
"""

import os
import secrets
from pathlib import Path

import xxhash

_SUFFIX = ".tier"
_CHECKSUM_BYTES = 16
# After a scan the folder is this full at most, so that not every write needs one.
_FILL = 0.9
# Replicas that share a folder see each other's files in scans only: one each time so much was written.
_SCAN_SHARE = 1 / 16


class DiskTier:
    """Bytes by digest; used by one thread.

    Args:
        folder: made if needed, for its owner only.
        budget_bytes: of all files of tiers in it.

    Attributes:
        num_bytes: of these files, as far as this process knows.
        damaged: files that were removed because of their checksum.
        errors: operations that the disk refused.
    """

    def __init__(self, folder: Path, budget_bytes: int) -> None:
        self._folder = folder
        self._budget = budget_bytes
        self._unscanned = 0
        self.num_bytes = 0
        self.damaged = 0
        self.errors = 0
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError:
            self.errors += 1
        self._make_room(0)

    def __contains__(self, digest: bytes) -> bool:
        return self._path(digest).exists()

    def get(self, digest: bytes) -> bytes | None:
        """What was put; None if it is not there or damaged."""
        path = self._path(digest)
        try:
            content = path.read_bytes()
            checksum, data = content[:_CHECKSUM_BYTES], content[_CHECKSUM_BYTES:]
            if checksum == _checksum(digest, data):
                os.utime(path)
                return data
            self.damaged += 1
            path.unlink()
        except FileNotFoundError:
            pass
        except OSError:
            self.errors += 1
        return None

    def put(self, digest: bytes, data: bytes) -> None:
        """Keep `data` if the disk allows; a reader sees all of it or nothing."""
        size = _CHECKSUM_BYTES + len(data)
        self._unscanned += size
        if self.num_bytes + size > self._budget or self._unscanned > _SCAN_SHARE * self._budget:
            self._make_room(size)
        if self.num_bytes + size > self._budget:
            return
        temporary = self._folder / f".{secrets.token_hex(16)}{_SUFFIX}"
        try:
            with open(temporary, "xb", opener=_open_private) as file:
                file.write(_checksum(digest, data) + data)
            temporary.replace(self._path(digest))
            self.num_bytes += size
        except OSError:
            self.errors += 1
            self._remove(temporary)

    def _make_room(self, size: int) -> None:
        """Look at the folder and remove what was used least recently, until `size` bytes fit."""
        try:
            with os.scandir(self._folder) as entries:
                ours = (entry for entry in entries if entry.name.endswith(_SUFFIX) and entry.is_file())
                stats = [(entry.stat(follow_symlinks=False), entry.path) for entry in ours]
        except OSError:
            self.errors += 1
            return
        self._unscanned = 0
        self.num_bytes = sum(stat.st_size for stat, _ in stats)
        if self.num_bytes + size <= self._budget:
            return
        for stat, path in sorted(stats, key=lambda item: item[0].st_mtime_ns):
            if self.num_bytes + size <= _FILL * self._budget:
                return
            self._remove(Path(path))
            self.num_bytes -= stat.st_size

    def _remove(self, path: Path) -> None:
        try:
            path.unlink(missing_ok=True)
        except OSError:
            self.errors += 1

    def _path(self, digest: bytes) -> Path:
        return self._folder / f"{digest.hex()}{_SUFFIX}"


def _checksum(digest: bytes, data: bytes) -> bytes:
    # With the digest, as a file may have got the name of another.
    return xxhash.xxh3_128_digest(digest + data)


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)

"""Prepared data on disk: memory-mapped token shards and the index that describes them.

A folder holds `tokenizer.json`, `index.json` and, for each split, domain and number, `SPLIT-DOMAIN-NNNNN.bin`
(little-endian uint16, or uint32 when the vocabulary needs it; each document ends with the end-of-text id) and
`SPLIT-DOMAIN-NNNNN.npy` (int64 [documents + 1]: where each document starts, then the number of tokens).
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from moe_ray.errors import DataError

FORMAT = 1
INDEX_NAME = "index.json"
TOKENIZER_NAME = "tokenizer.json"
SPLITS = ("train", "validation")
SHARD_TOKENS = 128 << 20
_SHARD_FILE = re.compile(rf"({'|'.join(SPLITS)})-[^/\0]+-\d{{5}}\.(bin|npy)")


@dataclass(frozen=True)
class Shard:
    """One token file, of one domain and split."""

    file: str
    split: str
    domain: str
    num_tokens: int
    num_documents: int
    text_bytes: int
    sha256: str
    offsets_sha256: str

    @property
    def offsets_file(self) -> str:
        """Name of the file of document offsets."""
        return str(Path(self.file).with_suffix(".npy"))


@dataclass(frozen=True)
class Totals:
    """Sums over shards. `text_bytes` counts UTF-8 without end-of-text: bits per byte = nats / ln 2 / bytes."""

    num_tokens: int
    num_documents: int
    text_bytes: int


@dataclass(frozen=True)
class Index:
    """What a prepared folder holds, and the fingerprint of what it was made from."""

    fingerprint: str
    eos_id: int
    vocab_size: int
    tokenizer_sha256: str
    dtype: str
    domains: tuple[str, ...]
    shards: tuple[Shard, ...]

    def totals(self, split: str, domain: str | None = None) -> Totals:
        """Sums over the shards of a split, or of one domain of it."""
        shards = [s for s in self.shards if s.split == split and domain in (None, s.domain)]
        return Totals(
            sum(shard.num_tokens for shard in shards),
            sum(shard.num_documents for shard in shards),
            sum(shard.text_bytes for shard in shards),
        )

    @property
    def digest(self) -> str:
        """Identity of the tokens and their order, whatever the folder or the time: compare it on resume."""
        return hashlib.sha256("".join(shard.sha256 for shard in self.shards).encode()).hexdigest()


class ShardWriter:
    """Appends the documents of one split and domain, and starts a new shard when one is full.

    Args:
        shard_tokens: a shard that has this many tokens takes no further document.
    """

    def __init__(
        self, folder: Path, split: str, domain: str, dtype: str, eos_id: int, shard_tokens: int = SHARD_TOKENS
    ) -> None:
        self._folder, self._split, self._domain = folder, split, domain
        self._dtype, self._eos_id, self._shard_tokens = dtype, eos_id, shard_tokens
        self._shards: list[Shard] = []
        self._file: BinaryIO | None = None

    def append(self, ids: Sequence[int], text_bytes: int) -> None:
        """Write one document and its end-of-text id."""
        if self._file is not None and self._offsets[-1] >= self._shard_tokens:
            self._finish_shard(self._file)
        if self._file is None:
            self._file = (self._folder / self._name()).open("wb")
            self._hash, self._offsets, self._text_bytes = hashlib.sha256(), [0], 0
        tokens = np.empty(len(ids) + 1, self._dtype)
        tokens[:-1], tokens[-1] = ids, self._eos_id
        self._hash.update(tokens.data)
        self._file.write(tokens.data)
        self._offsets.append(self._offsets[-1] + len(tokens))
        self._text_bytes += text_bytes

    def finish(self) -> list[Shard]:
        """Flush to disk and describe the shards written, none if there was no document."""
        if self._file is not None:
            self._finish_shard(self._file)
        return self._shards

    def close(self) -> None:
        """Give up the open shard, if any."""
        if self._file is not None:
            with suppress(OSError):
                self._file.close()

    def _name(self) -> str:
        return f"{self._split}-{self._domain}-{len(self._shards):05d}.bin"

    def _finish_shard(self, file: BinaryIO) -> None:
        self._file = None
        with file:
            _sync(file)
        offsets_path = (self._folder / self._name()).with_suffix(".npy")
        with offsets_path.open("wb") as offsets_file:
            np.save(offsets_file, np.array(self._offsets, "<i8"), allow_pickle=False)
            _sync(offsets_file)
        shard = Shard(
            file=self._name(),
            split=self._split,
            domain=self._domain,
            num_tokens=self._offsets[-1],
            num_documents=len(self._offsets) - 1,
            text_bytes=self._text_bytes,
            sha256=self._hash.hexdigest(),
            offsets_sha256=file_sha256(offsets_path),
        )
        self._shards.append(shard)


def is_data_file(name: str) -> bool:
    """Whether a prepared folder may hold a file of this name."""
    return name in (INDEX_NAME, TOKENIZER_NAME) or _SHARD_FILE.fullmatch(name) is not None


def token_dtype(vocab_size: int) -> str:
    """Smallest numpy type, little-endian, for ids in [0, vocab_size)."""
    return "<u2" if vocab_size <= 1 << 16 else "<u4"


def write_index(folder: Path, index: Index) -> None:
    """Write the index, the last file of a folder."""
    totals = {split: asdict(index.totals(split)) for split in SPLITS}
    content = {"format": FORMAT, **asdict(index), "splits": totals}
    with (folder / INDEX_NAME).open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=2)
        _sync(file)


def read_index(folder: Path) -> Index:
    """Read the index of a prepared folder.

    Raises:
        DataError: there is none, or it is damaged or of another format.
    """
    path = folder / INDEX_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = content.pop("format")
        if found == FORMAT:
            content.pop("splits")
            shards = tuple(Shard(**shard) for shard in content.pop("shards"))
            _check_names(path, shards)
            domains = tuple(content.pop("domains"))
            return Index(**content, domains=domains, shards=shards)
    except OSError as error:
        raise DataError(
            f"{folder} is no prepared data: {INDEX_NAME} cannot be read ({error.strerror}).",
            "run jobs/prepare.py.",
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DataError(f"{path} is damaged.", "delete the folder and run jobs/prepare.py.") from None
    raise DataError(
        f"{path} has format {found!r}; this version reads {FORMAT}.", "delete the folder and run jobs/prepare.py."
    )


def _check_names(path: Path, shards: Iterable[Shard]) -> None:
    for shard in shards:
        if not _SHARD_FILE.fullmatch(shard.file):
            raise DataError(f"{path} names the file {shard.file!r}, which is no shard.", "use trusted data.")


def check_files(folder: Path, index: Index, *, verify: bool = False) -> None:
    """Raise a DataError that names the first file which is missing, of the wrong size or, if asked, content."""
    itemsize = np.dtype(index.dtype).itemsize
    expected = {TOKENIZER_NAME: (None, index.tokenizer_sha256)}
    for shard in index.shards:
        expected[shard.file] = (shard.num_tokens * itemsize, shard.sha256)
        expected[shard.offsets_file] = (_npy_bytes(shard.num_documents + 1), shard.offsets_sha256)
    for name, (size, sha256) in expected.items():
        path = folder / name
        try:
            found = path.stat().st_size
            if size is not None and found != size:
                raise _damaged(path, f"has {found} bytes, not {size}")
            if verify and file_sha256(path) != sha256:
                raise _damaged(path, "does not have the checksum of its index")
        except OSError as error:
            raise _damaged(path, f"cannot be read ({error.strerror})") from None


def file_sha256(path: Path) -> str:
    """Checksum of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _npy_bytes(length: int) -> int:
    # numpy pads the header of a short int64 array to 128 bytes.
    return 128 + 8 * length


def _damaged(path: Path, what: str) -> DataError:
    return DataError(f"{path} {what}.", "run jobs/prepare.py again; it rebuilds damaged data.")


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())

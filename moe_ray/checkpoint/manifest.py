"""The manifest of a checkpoint: a folder is a checkpoint when, and only when, it holds one.

The first line of the file holds the checksum of all that follows, so that no byte of it can change unnoticed.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import xxhash
from pydantic import BaseModel, ConfigDict, ValidationError

from moe_ray.errors import CheckpointError

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
FORMAT_VERSION = 2
FileKind = Literal["model", "optimizer", "tokenizer", "sidecar"]
_OTHER = "use another checkpoint of the run."


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Part(_Record):
    """A box of a whole tensor.

    Attributes:
        offset: where it begins, by dim.
        size: how far it reaches, by dim.
        whole: shape of the whole tensor.
    """

    offset: tuple[int, ...]
    size: tuple[int, ...]
    whole: tuple[int, ...]


class FileEntry(_Record):
    """One file of a checkpoint.

    Attributes:
        name: file name inside the checkpoint folder.
        kind: what it holds; inference reads all but `optimizer`. `sidecar` files say how chats are written.
        size: bytes.
        checksum: XXH3 of the content, 128 bits, hexadecimal. It finds damage, not malice.
        tensors: what a safetensors file holds, by name.
    """

    name: str
    kind: FileKind
    size: int
    checksum: str
    tensors: Mapping[str, Part] = {}


class Manifest(_Record):
    """What a checkpoint holds and where in the run it was taken.

    Attributes:
        step: optimizer steps done.
        tokens: training tokens seen.
        data_position: training sequences consumed; the next step starts there.
        data_digest: identity of the tokens and their order; another data set would make the position meaningless.
        rng_seed: the generator is seeded anew from this and the step at each step, so this is its whole state.
        world_size: ranks that wrote it; any world can read it.
        ep: expert parallelism of that world.
        metrics: numbers that the run logged last, by which the best checkpoints are chosen.
        config: the resolved settings of the run.
    """

    format_version: Literal[2] = FORMAT_VERSION
    step: int
    tokens: int
    data_position: int
    data_digest: str
    rng_seed: int
    world_size: int
    ep: int
    metrics: Mapping[str, float]
    config: dict[str, Any]
    files: tuple[FileEntry, ...]


def checksum_of(content: bytes | memoryview) -> str:
    """XXH3 of some bytes, 128 bits, hexadecimal."""
    return xxhash.xxh3_128_hexdigest(content)


def checksum_of_file(path: Path) -> str:
    """XXH3 of a file's content, 128 bits, hexadecimal."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def encode_manifest(manifest: Manifest) -> bytes:
    """The file's content."""
    body = manifest.model_dump_json(indent=1).encode().removeprefix(b"{\n")
    return _first_line(checksum_of(body)) + body


def decode_manifest(content: bytes, where: str) -> Manifest:
    """Read the file's content.

    Args:
        where: the file, for the message.

    Raises:
        CheckpointError: it is damaged, or of a format that this version does not know.
    """
    first, newline, body = content.partition(b"\n")
    if first + newline != _first_line(checksum_of(body)):
        raise CheckpointError(f"{where!r} is damaged or of another version.", _OTHER)
    try:
        manifest = Manifest.model_validate_json(b"{" + body)
    except ValidationError as error:
        field = ".".join(str(part) for part in error.errors()[0]["loc"]) or "content"
        raise CheckpointError(f"{where!r} is of another version ({field}).", _OTHER) from None
    for entry in manifest.files:
        if Path(entry.name).name != entry.name or entry.name in ("", ".."):
            raise CheckpointError(
                f"{where!r} names the file {entry.name!r} outside the checkpoint.", "use a trusted checkpoint."
            )
    return manifest


def check_file(path: Path, entry: FileEntry, where: str | None = None) -> None:
    """Compare a file with what the manifest says of it.

    Args:
        where: what it is a copy of, for the message.

    Raises:
        CheckpointError: it is missing, or its size or checksum differ; it is named.
    """
    try:
        if not path.is_file():
            problem = "is missing"
        elif path.stat().st_size != entry.size:
            problem = f"has {path.stat().st_size} bytes instead of {entry.size}"
        elif checksum_of_file(path) != entry.checksum:
            problem = "is damaged: its checksum differs from the manifest"
        else:
            return
    except OSError as error:
        problem = f"cannot be read: {error.strerror}"
    raise CheckpointError(f"checkpoint file {(where or str(path))!r} {problem}.", _OTHER)


def _first_line(checksum: str) -> bytes:
    return b'{ "checksum": "' + checksum.encode() + b'",\n'

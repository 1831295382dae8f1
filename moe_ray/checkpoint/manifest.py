"""The manifest of a checkpoint: a directory is a checkpoint when, and only when, it holds one."""

import hashlib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from moe_ray.errors import CheckpointError

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
FileKind = Literal["model", "optimizer", "tokenizer", "sidecar"]


class FileEntry(BaseModel):
    """One file of a checkpoint.

    Attributes:
        name: file name inside the checkpoint directory.
        kind: what it holds; inference reads `model` and `tokenizer`, `sidecar` files only go along for export.
        size: bytes.
        sha256: hex digest of the content.
        first_expert: global index of the first expert in the file; None for parameters that are not experts.
        num_experts: experts in the file.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    kind: FileKind
    size: int
    sha256: str
    first_expert: int | None = None
    num_experts: int = 0


class Manifest(BaseModel):
    """What a checkpoint holds and where in the run it was taken.

    Attributes:
        step: optimizer steps done.
        tokens: training tokens seen.
        data_position: training sequences consumed; the next step starts there.
        data_digest: identity of the tokens and their order; another data set would make the position meaningless.
        rng_seed: the generator is seeded anew from this and the step at each step, so this is its whole state.
        world_size: ranks that wrote it; any world can read it.
        ep: expert parallelism of that world.
        config: the resolved settings of the run.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1] = FORMAT_VERSION
    step: int
    tokens: int
    data_position: int
    data_digest: str
    rng_seed: int
    world_size: int
    ep: int
    config: dict[str, Any]
    files: tuple[FileEntry, ...]


def describe_file(
    path: Path,
    kind: FileKind,
    first_expert: int | None = None,
    num_experts: int = 0,
) -> FileEntry:
    """Size and checksum of a file that was just written."""
    return FileEntry(
        name=path.name,
        kind=kind,
        size=path.stat().st_size,
        sha256=sha256_of(path),
        first_expert=first_expert,
        num_experts=num_experts,
    )


def sha256_of(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(checkpoint: Path) -> Manifest:
    """The manifest of a checkpoint directory.

    Raises:
        CheckpointError: it is missing or damaged, or of a format that this version does not know.
    """
    path = checkpoint / MANIFEST
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(
            f"{str(checkpoint)!r} is no checkpoint: it has no {MANIFEST}.",
            "give a run folder or one of its checkpoints/step-* folders.",
        ) from None
    except OSError as error:
        raise CheckpointError(f"{str(path)!r} cannot be read: {error.strerror}.", "mend the storage.") from None
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"]) or "content"
        raise CheckpointError(
            f"{str(path)!r} is damaged or of another version ({where}).", "use another checkpoint of the run."
        ) from None
    for entry in manifest.files:
        if Path(entry.name).name != entry.name:
            raise CheckpointError(
                f"{str(path)!r} names the file {entry.name!r} outside the checkpoint.", "use a trusted checkpoint."
            )
    return manifest


def verify(checkpoint: Path, manifest: Manifest, kinds: frozenset[str] | None = None) -> None:
    """Compare the files with the manifest.

    Args:
        kinds: only files of these kinds; default all.

    Raises:
        CheckpointError: a file is missing or its size or checksum differ; it is named.
    """
    for entry in manifest.files:
        if kinds is not None and entry.kind not in kinds:
            continue
        problem = _damage(checkpoint / entry.name, entry)
        if problem is not None:
            raise CheckpointError(
                f"checkpoint file {str(checkpoint / entry.name)!r} {problem}.",
                "use another checkpoint of the run.",
            )


def _damage(path: Path, entry: FileEntry) -> str | None:
    try:
        if not path.is_file():
            return "is missing"
        if path.stat().st_size != entry.size:
            return f"has {path.stat().st_size} bytes instead of {entry.size}"
        if sha256_of(path) != entry.sha256:
            return "is damaged: its checksum differs from the manifest"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None

"""The weights of a model in one file of a node, which all processes that serve them map into memory.

A pack holds the tensors of a model as they are used: in their final types, experts quantized if that is asked
for. safetensors maps a file privately: a page that nobody writes to is the one of the page cache, however many
processes map it, and who writes to one gets a copy of it. A process that replaces its model gives the old mapping
back with the tensors.

The experts of a model that is larger than memory lie in a file of their own beside the pack, which nobody maps.

A pack is known by the names, sizes and times of its source's files. Whoever makes one first removes those whose
source has other files by now or is gone, those that nobody has opened for a week, and what a killed one left.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from moe_ray.models import quantize
from moe_ray.models.transformer import Transformer
from moe_ray.offload.experts import offloaded_experts
from moe_ray.private_folder import private_folder

_SUFFIX, _EXPERTS, _UNFINISHED = ".safetensors", ".experts", ".unfinished"
_UNUSED_SECONDS = 7 * 24 * 3600.0
# Packs of another layout are never opened, only removed.
_FORMAT = 1

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Origin:
    """What a pack is made of.

    Attributes:
        source: folder of the checkpoint, or the Hugging Face folder.
        variant: what became of the weights: their type and the scheme of the experts.
    """

    source: Path
    variant: str


def pack_path(folder: Path, origin: Origin) -> Path:
    """Where the pack is, or will be."""
    name = f"{_digest(origin, files_identity(origin.source))}{_SUFFIX}"
    return Path(os.path.expanduser(folder)) / name


def experts_path(pack: Path) -> Path:
    """Where the offloaded experts are that belong to a pack."""
    return pack.with_suffix(_EXPERTS)


def load_shared(
    target: Path, origin: Origin, skeleton: Transformer, load: Callable[[], Transformer]
) -> Transformer:
    """A model whose weights are mapped from the pack `target`, which is made first if need be.

    Processes that start together wait for the one that makes it. Without space or rights to write the weights are
    in this process's own memory, and the log says so.

    Args:
        target: given by `pack_path`.
        skeleton: the model on the meta device, its tensors of the final types.
        load: the same model with its weights, in memory; it writes offloaded experts to `experts_path`.
    """
    files, folder = files_identity(origin.source), target.parent
    try:
        private_folder(folder)
        if _map(target, skeleton):
            return skeleton
        lock = (folder / "lock").open("w")
    except OSError as error:
        return _unshared(load(), folder, error)
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if _map(target, skeleton):
                return skeleton
            _remove_stale(folder)
        except OSError as error:
            return _unshared(load(), folder, error)
        model = load()
        try:
            _write(target, model, {"source": str(origin.source), "files": files})
            # Else, it is damaged as soon as it is written.
            return skeleton if _map(target, skeleton) else model
        except (OSError, SafetensorError) as error:
            return _unshared(model, folder, error)


def files_identity(folder: Path) -> str:
    """Changes whenever the files of a folder do; differs between folders."""
    files = [(path, path.stat()) for path in sorted(folder.rglob("*")) if path.is_file()]
    return repr([(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in files])


def _unshared(model: Transformer, folder: Path, error: Exception) -> Transformer:
    _logger.warning("weights are not shared with other processes, %s cannot be used: %s", folder, error)
    return model


def _digest(origin: Origin, files: str) -> str:
    code = Path(quantize.__file__).read_text()
    parts = (_FORMAT, str(origin.source), files, origin.variant, code)
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """All that a model holds, with the buffers that a state dict leaves out; tied ones once."""
    return dict(sorted([*model.named_parameters(), *model.named_buffers()]))


def _map(target: Path, skeleton: Transformer) -> bool:
    """Give the skeleton the tensors of a pack; False: there is none, or it is damaged."""
    if not target.exists():
        return False
    if not _has_experts(target, skeleton):
        _logger.warning("making %s anew, its experts are damaged", target)
        return False
    try:
        with safe_open(target, framework="pt") as file:
            checksum = file.metadata()["checksum"]
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, TypeError) as error:
        _logger.warning("making %s anew, it is damaged: %s", target, error)
        return False
    if _shapes(stored) != _shapes(_tensors(skeleton)) or _checksum(stored) != checksum:
        _logger.warning("making %s anew, it is damaged", target)
        return False
    for name, tensor in stored.items():
        module_name, _, attribute = name.rpartition(".")
        module = skeleton.get_submodule(module_name)
        is_parameter = attribute in module._parameters
        setattr(module, attribute, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)
    skeleton.eval()
    # The time of the last use.
    with contextlib.suppress(OSError):
        os.utime(target)
    return True


def _has_experts(target: Path, skeleton: Transformer) -> bool:
    size = sum(experts.record.num_bytes * len(experts.checksum_E) for experts in offloaded_experts(skeleton))
    path = experts_path(target)
    return not size or (path.exists() and path.stat().st_size == size)


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    """XXH3 of names and bytes, a second for 10 GB and more."""
    digest = xxhash.xxh3_128()
    for name in sorted(tensors):
        digest.update(name)
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _write(target: Path, model: Transformer, about: Mapping[str, str]) -> None:
    # Files of safetensors share no memory between tensors.
    tensors = {name: tensor.detach().contiguous() for name, tensor in _tensors(model).items()}
    unfinished = target.with_suffix(_UNFINISHED)
    try:
        save_file(tensors, unfinished, {**about, "checksum": _checksum(tensors)})
        unfinished.chmod(0o600)
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)


def _remove_stale(folder: Path) -> None:
    """Called by the one that holds the lock, so that nobody writes."""
    for path in folder.iterdir():
        if path.suffix == _UNFINISHED or (path.suffix == _SUFFIX and _is_stale(path)):
            _logger.info("removing %s", path)
            path.unlink(missing_ok=True)
    for path in folder.glob(f"*{_EXPERTS}"):
        if not path.with_suffix(_SUFFIX).exists():
            path.unlink(missing_ok=True)


def _is_stale(pack: Path) -> bool:
    if time.time() - pack.stat().st_mtime > _UNUSED_SECONDS:
        return True
    try:
        with safe_open(pack, framework="pt") as file:
            about = file.metadata()
        return about["files"] != files_identity(Path(about["source"]))
    except (SafetensorError, KeyError, TypeError):
        return True

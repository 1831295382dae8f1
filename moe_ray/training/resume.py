"""What a run may change when it goes on, and that only one job at a time trains it."""

import fcntl
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from moe_ray.checkpoint.catalog import checkpoint_path
from moe_ray.checkpoint.manifest import Manifest
from moe_ray.checkpoint.save import TOKENIZER
from moe_ray.config import Config, build_config
from moe_ray.data.shards import Index
from moe_ray.data.tokenizer import load_tokenizer
from moe_ray.errors import CheckpointError, ConfigError
from moe_ray.models.hf.sidecars import read_sidecars

# Changing one of these in mid-run would give a curve that no single run has.
_FIXED_SECTION = "model"
# These act only before the first step.
_START_FIELDS = frozenset({"preset", "init_from", "upcycle_from", "upcycle_noise", "init_std"})
_FIXED_FIELDS = (("data", "sequence_length"), ("train", "seed"), ("train", "global_batch"))


def check_settings(manifest: Manifest, config: Config) -> None:
    """Compare the settings with those of the checkpoint that the run would go on from.

    Raises:
        ConfigError: one that must not change has changed.
    """
    now, then = config.model_dump(mode="json"), build_config(manifest.config).model_dump(mode="json")
    fields = [(_FIXED_SECTION, name) for name in now[_FIXED_SECTION] if name not in _START_FIELDS]
    for section, name in (*fields, *_FIXED_FIELDS):
        before = then[section][name]
        if before != now[section][name]:
            raise ConfigError(
                f"{section}.{name}={now[section][name]!r} differs from the run in {str(config.train.run_dir)!r}, "
                f"which has {before!r}.",
                "keep the value to resume the run, or set another train.name to start a new one.",
            )


def start_sidecars(config: Config, first_step: int) -> dict[str, bytes]:
    """Small files of the folder that the run started from; later its checkpoint's, for the folder may be gone.

    They describe the folder's tokenizer, and are left behind with it.
    """
    if first_step > 0:
        return read_sidecars(checkpoint_path(config.train.run_dir, first_step))
    folder, tokenizer = config.model.init_from or config.model.upcycle_from, config.data.tokenizer
    if folder is None or (tokenizer is not None and _digest(Path(tokenizer)) != _digest(Path(folder) / TOKENIZER)):
        return {}
    return read_sidecars(Path(folder))


def _digest(tokenizer: Path) -> str | None:
    path = tokenizer.expanduser()
    return load_tokenizer(path).digest if path.is_file() else None


def check_data(manifest: Manifest, index: Index) -> None:
    """Compare the tokens with those of the checkpoint; its data position means nothing in others.

    Raises:
        CheckpointError: they differ.
    """
    if manifest.data_digest != index.digest:
        raise CheckpointError(
            "the text, its tokenizer or its split is not what the run was started with.",
            "restore data.sources and the other data settings, or set another train.name to start a new run.",
        )


@contextmanager
def only_writer(run_dir: Path) -> Generator[None]:
    """Hold the run for this process; the lock ends with it, however it ends.

    Raises:
        ConfigError: another process trains this run.
    """
    with (run_dir / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"the run {str(run_dir)!r} is being trained by another job.",
                "wait for it or stop it, or set another train.name.",
            ) from None
        yield

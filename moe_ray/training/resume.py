"""What a run may change when it goes on, and what it takes along from its start."""

from collections.abc import Mapping
from pathlib import Path

from moe_ray.checkpoint.catalog import checkpoint_name, read_step
from moe_ray.checkpoint.manifest import TOKENIZER, Manifest
from moe_ray.config import Config, build_config
from moe_ray.data.shards import Index
from moe_ray.data.tokenizer import load_tokenizer
from moe_ray.errors import CheckpointError, ConfigError
from moe_ray.models.hf.sidecars import read_sidecars
from moe_ray.storage import Storage

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
                f"{section}.{name}={now[section][name]!r} differs from the run in {config.train.run_uri!r}, "
                f"which has {before!r}.",
                "keep the value to resume the run, or set another train.name to start a new one.",
            )


def small_files(config: Config, run: Storage, step: int, tokenizer_file: Path) -> Mapping[str, bytes]:
    """What a checkpoint holds beside tensors, by name: the tokenizer, and small files of the weights' origin.

    The latter describe the tokenizer of the folder that the run started from, and are left behind with it. When
    the run goes on they are those of its checkpoint, for the folder may be gone.

    Args:
        step: of the checkpoint that the run goes on from; 0: none.
        tokenizer_file: that of the training data.
    """
    files = {TOKENIZER: tokenizer_file.read_bytes()}
    if step > 0:
        checkpoint = run.child(checkpoint_name(step))
        names = [entry.name for entry in read_step(run, step).files if entry.kind == "sidecar"]
        return files | {name: checkpoint.read(name) for name in names}
    folder, tokenizer = config.model.init_from or config.model.upcycle_from, config.data.tokenizer
    if folder is None or (tokenizer is not None and _digest(Path(tokenizer)) != _digest(Path(folder) / TOKENIZER)):
        return files
    return files | read_sidecars(Path(folder))


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

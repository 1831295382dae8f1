"""Open a checkpoint or a Hugging Face folder to evaluate, serve or export it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from moe_ray.checkpoint.catalog import resolve_checkpoint
from moe_ray.checkpoint.load import load_model
from moe_ray.checkpoint.manifest import MANIFEST, TOKENIZER, Manifest
from moe_ray.checkpoint.offload import Read, load_offloaded
from moe_ray.checkpoint.packs import Origin, experts_path, load_shared, pack_path
from moe_ray.config import Config, DataConfig, build_config
from moe_ray.data.tokenizer import Tokenizer, load_tokenizer
from moe_ray.errors import ConfigError
from moe_ray.models.hf.config import is_hf_folder, read_quantization, read_tree
from moe_ray.models.hf.load import OpenFolder, load_weights, open_folder, read_model_config, use_stored_dtypes
from moe_ray.models.hf.sidecars import read_sidecars, token_ids
from moe_ray.models.quantize import quantize_experts, scheme_of
from moe_ray.models.router import Router
from moe_ray.models.transformer import Transformer, materialize
from moe_ray.offload.experts import offload_experts, offloaded_experts, open_experts
from moe_ray.offload.resident import check_budget
from moe_ray.section import Dtype, Quantize


@dataclass(frozen=True)
class InferenceModel:
    """A model that is ready to generate.

    Attributes:
        model: in evaluation mode, all experts on one device.
        tokenizer: the one it was trained with.
        config: the settings of its run.
        step: optimizer steps it was trained for; 0 for a Hugging Face folder.
        data_digest: identity of the tokens it was trained on; empty for a Hugging Face folder.
        path: the checkpoint directory or the folder.
        sidecars: the small files around the weights of a Hugging Face folder, by name, or of the one that the run
            started from.
        quantize: scheme of the experts' weights.
    """

    model: Transformer
    tokenizer: Tokenizer
    config: Config
    step: int
    data_digest: str
    path: Path
    sidecars: Mapping[str, bytes]
    quantize: Quantize = "none"

    @property
    def name(self) -> str:
        """Name of the run, which is the model's name in the API."""
        return self.config.train.name


def load_for_inference(
    source: str | Path,
    dtype: Dtype | None = "float32",
    device: torch.device | str = "cpu",
    *,
    quantize: Quantize = "none",
    packs: Path | None = None,
    expert_bytes: int | None = None,
    prefetch: bool = False,
) -> InferenceModel:
    """Load a checkpoint, the newest good one of a run, or a Hugging Face folder.

    Routers stay in float32 whatever `dtype`: rounding them would route differently than training did.

    Args:
        source: folder of a run, of a checkpoint, or with a config.json and safetensors.
        dtype: of all other weights; None: as they are stored.
        device: where they are; meta: nowhere, they have only shapes.
        quantize: weights of the experts in 8 or 4 bits; those that a folder has so already stay as they are.
        packs: on a CPU, folder by which processes share the weights, see `checkpoint.packs`; None: they do not.
        expert_bytes: with `packs`, memory for experts, which are read when they are needed; None: all are there.
        prefetch: whether to read experts ahead.

    Raises:
        CheckpointError: there is none, or it is damaged, or its architecture is not supported.
        ConfigError: the experts cannot be quantized or offloaded as asked, or are quantized in another way.
        StorageError: the file of offloaded experts cannot be opened.
    """
    opened = _open(source)
    path, config, manifest = opened.path, opened.config, opened.manifest
    quantize = _agreed(opened, quantize)
    if torch.device(device).type == "meta":
        model = _skeleton(config, dtype, quantize).eval()
    elif packs is None:
        model = _load(opened, dtype, device, quantize)
    else:
        assert dtype is not None
        assert torch.device(device).type == "cpu"
        model = _load_packed(opened, packs, dtype, quantize, expert_bytes, prefetch)
    sidecars = read_sidecars(path)
    tokenizer = load_tokenizer(path / TOKENIZER, opened.eos_id, _stop_ids(sidecars, config.model.vocab_size))
    step, digest = (manifest.step, manifest.data_digest) if manifest is not None else (0, "")
    return InferenceModel(model, tokenizer, config, step, digest, path, sidecars, quantize)


def resolve_source(source: str | Path) -> tuple[Path, Config]:
    """Folder and settings of what `load_for_inference` would load, verified.

    Raises:
        CheckpointError: as there.
    """
    opened = _open(source)
    return opened.path, opened.config


def stored_scheme(source: str | Path) -> Quantize:
    """How the experts of what `load_for_inference` would load are quantized already; only folders can be.

    Raises:
        CheckpointError: as there.
    """
    return _open(source).quantize


def check_expert_budget(source: str | Path, dtype: Dtype, quantize: Quantize, expert_bytes: int) -> None:
    """Raise a ConfigError if `load_for_inference` would, for this budget of experts."""
    _offloaded_skeleton(_open(source), dtype, quantize, expert_bytes)


@dataclass(frozen=True)
class _Opened:
    """Where a model is and what its settings are; a Hugging Face folder has no manifest."""

    path: Path
    config: Config
    manifest: Manifest | None
    eos_id: int | None = None
    quantize: Quantize = "none"


def _agreed(opened: _Opened, quantize: Quantize) -> Quantize:
    """The scheme that is asked for, or that of a folder which is quantized already."""
    if opened.quantize == "none" or quantize in ("none", opened.quantize):
        return quantize if opened.quantize == "none" else opened.quantize
    raise ConfigError(
        f"serve.quantize={quantize} is not possible, {str(opened.path)!r} has experts in {opened.quantize}.",
        "leave it out, or use the model that the folder was made of.",
    )


def _skeleton(config: Config, dtype: Dtype | None, quantize: Quantize) -> Transformer:
    """The model on the meta device."""
    with torch.device("meta"):
        model = Transformer(config.model)
    if dtype is not None:
        _cast(model, getattr(torch, dtype))
    if quantize != "none":
        quantize_experts(model, quantize)
    return model


def _load(opened: _Opened, dtype: Dtype | None, device: torch.device | str, quantize: Quantize) -> Transformer:
    """The model with its weights, in memory of its own."""
    model = _skeleton(opened.config, dtype, opened.quantize)
    folder = open_folder(opened.path, model) if opened.manifest is None else None
    if dtype is None and folder is not None:
        use_stored_dtypes(folder, model)
    materialize(model, device)
    for moe in model.moe_modules():
        moe.router.init_state("")
    _reader(opened, folder)(model, lambda name: True)
    if quantize != scheme_of(model):
        assert quantize != "none"
        quantize_experts(model, quantize)
    return model.requires_grad_(False).eval()


def _load_packed(
    opened: _Opened, packs: Path, dtype: Dtype, quantize: Quantize, expert_bytes: int | None, prefetch: bool
) -> Transformer:
    """The model with its weights in a pack, and its experts in a file beside it if they have a budget."""
    if expert_bytes is None:
        skeleton = _skeleton(opened.config, dtype, quantize)
        pack = pack_path(packs, origin := Origin(opened.path, f"{dtype} {quantize}"))
        return load_shared(pack, origin, skeleton, lambda: _load(opened, dtype, "cpu", quantize))
    skeleton = _offloaded_skeleton(opened, dtype, quantize, expert_bytes)
    pack = pack_path(packs, origin := Origin(opened.path, f"{dtype} {quantize} offloaded"))
    path = experts_path(pack)

    def load() -> Transformer:
        model = _skeleton(opened.config, dtype, "none")
        folder = open_folder(opened.path, model) if opened.manifest is None else None
        return load_offloaded(model, skeleton, path, quantize, _reader(opened, folder))

    model = load_shared(pack, origin, skeleton, load)
    open_experts(model, path, expert_bytes, prefetch)
    return model


def _offloaded_skeleton(opened: _Opened, dtype: Dtype, quantize: Quantize, expert_bytes: int) -> Transformer:
    if opened.quantize != "none":
        raise ConfigError(
            f"serve.expert_memory_bytes={expert_bytes} needs experts that are not quantized yet, "
            f"and {str(opened.path)!r} has them in {opened.quantize}.",
            "serve the model that the folder was made of, with serve.quantize.",
        )
    skeleton = _skeleton(opened.config, dtype, quantize)
    offload_experts(skeleton)
    check_budget(next(offloaded_experts(skeleton)).record, opened.config.model.num_experts, expert_bytes)
    return skeleton


def _reader(opened: _Opened, folder: OpenFolder | None) -> Read:
    """Copies those tensors of a checkpoint or folder into a model whose names are wanted."""
    if opened.manifest is not None:
        return partial(load_model, opened.path, opened.manifest)
    assert folder is not None
    return partial(load_weights, folder)


def _open(source: str | Path) -> _Opened:
    if "://" in str(source):
        return _open_checkpoint(source)
    folder = Path(source).expanduser().resolve()
    is_checkpoint = (folder / MANIFEST).exists()
    return _open_hf_folder(folder) if is_hf_folder(folder) and not is_checkpoint else _open_checkpoint(source)


def _open_checkpoint(source: str | Path) -> _Opened:
    path, manifest = resolve_checkpoint(source)
    return _Opened(path, build_config(manifest.config), manifest)


def _open_hf_folder(folder: Path) -> _Opened:
    """A folder says nothing of a run: its settings are the defaults, as far as the model allows."""
    model = read_model_config(folder)
    length = min(DataConfig().sequence_length, model.max_sequence_length)
    config = build_config(
        {
            "model": model.model_dump(mode="json"),
            "data": {"sequence_length": length, "tokenizer": str(folder / TOKENIZER)},
            "train": {"name": re.sub(r"[^A-Za-z0-9._-]", "-", folder.name).lstrip("._-")[:100] or "model"},
        }
    )
    # Chat models end a turn with a token of their own, the first if there are several.
    stop_ids = _stop_ids(read_sidecars(folder), model.vocab_size)
    eos_id = stop_ids[0] if stop_ids else None
    return _Opened(folder, config, None, eos_id, read_quantization(read_tree(folder)))


def _stop_ids(sidecars: Mapping[str, bytes], vocab_size: int) -> list[int]:
    """The tokens that end a text by a generation config, none if it names none or one that the model lacks."""
    ids = token_ids(sidecars)["eos_token_id"]
    ids = ids if isinstance(ids, list) else [ids]
    return ids if all(type(token_id) is int and 0 <= token_id < vocab_size for token_id in ids) else []


def _cast(model: Transformer, dtype: torch.dtype) -> None:
    routers = {id(p) for m in model.modules() if isinstance(m, Router) for p in m.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in routers:
            parameter.data = parameter.data.to(dtype)

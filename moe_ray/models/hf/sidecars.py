"""The small files around the weights: how text becomes tokens and how `transformers` generates."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_ray.errors import CheckpointError
from moe_ray.models.hf.config import CONFIG_FILE, read_tree

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
GENERATION_CONFIG = "generation_config.json"
SIDECARS = (
    TOKENIZER_CONFIG,
    GENERATION_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def read_sidecars(folder: Path) -> dict[str, bytes]:
    """Contents of those files of a folder by name; token ids that only config.json has become a generation config.

    Raises:
        CheckpointError: one cannot be read.
    """
    contents = {}
    for name in SIDECARS:
        path = folder / name
        try:
            if path.is_file():
                contents[name] = path.read_bytes()
        except OSError as error:
            raise CheckpointError(
                f"{str(path)!r} cannot be read: {error.strerror}.", "mend the folder's permissions."
            ) from None
    if GENERATION_CONFIG not in contents and (folder / CONFIG_FILE).is_file():
        tree = read_tree(folder)
        ids = {key: tree[key] for key in _TOKEN_IDS if tree.get(key) is not None}
        contents[GENERATION_CONFIG] = _to_json(ids)
    return contents


def complete_sidecars(
    sidecars: Mapping[str, bytes], tokenizer_json: bytes, eos_id: int, max_length: int
) -> dict[str, bytes]:
    """The same files, with those that `transformers` needs made for a tokenizer of ours where they are missing.

    Our texts are delimited by one end-of-text token, which so begins, ends and pads.

    Args:
        tokenizer_json: content of the tokenizer.json.
        eos_id: its end-of-text token.
        max_length: longest context of the model.
    """
    added = {token["id"]: token["content"] for token in json.loads(tokenizer_json).get("added_tokens", [])}
    token = added.get(eos_id)
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        **({f"{role}_token": token for role in ("bos", "eos", "pad")} if token is not None else {}),
    }
    made = {
        TOKENIZER_CONFIG: _to_json(tokenizer_config),
        GENERATION_CONFIG: _to_json(dict.fromkeys(_TOKEN_IDS, eos_id)),
    }
    return made | dict(sidecars)


def token_ids(sidecars: Mapping[str, bytes]) -> dict[str, Any]:
    """The ids of special tokens in a generation config, which config.json repeats."""
    try:
        tree = json.loads(sidecars.get(GENERATION_CONFIG, b"{}"))
    except (ValueError, RecursionError):
        tree = None
    if not isinstance(tree, dict):
        raise CheckpointError(f"{GENERATION_CONFIG} is no JSON object.", "mend or remove the file.")
    return {key: tree.get(key) for key in _TOKEN_IDS}


def _to_json(tree: dict[str, Any]) -> bytes:
    return (json.dumps(tree, indent=2, ensure_ascii=False) + "\n").encode()

"""The held-out text that an analysis reads: sequences, their domains, and which of them belong together.

Shapes: N sequences, S tokens of each.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moe_ray.checkpoint.inference import InferenceModel
from moe_ray.checkpoint.manifest import TOKENIZER
from moe_ray.config import Config
from moe_ray.data.batches import validation_batches
from moe_ray.data.prepare import prepare
from moe_ray.data.reader import TokenData, open_data
from moe_ray.errors import DataError

# A domain with fewer documents is cut into this many parts, or its labels could hardly be permuted.
MIN_UNITS = 8


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Sequences spread evenly over the validation split, in its order.

    Attributes:
        tokens_NS: token ids, int64.
        domains: names.
        domains_N: domain id of each sequence, int64.
        units_N: number of the unit of each sequence, int64: the document in which it begins, or a part of it.
    """

    tokens_NS: np.ndarray
    domains: tuple[str, ...]
    domains_N: np.ndarray
    units_N: np.ndarray


def read_held_out(data: TokenData, max_tokens: int) -> HeldOut:
    """At most `max_tokens` tokens, but at least one sequence."""
    total = data.num_sequences("validation")
    (numbers_N,) = validation_batches(total, max(1, min(total, max_tokens // data.sequence_length)), 1)
    tokens_NS = np.stack([data.sequence("validation", int(n))[:-1] for n in numbers_N]).astype(np.int64)
    domains_N = data.domain_ids("validation", numbers_N)
    units_N = data.document_ids("validation", numbers_N)
    return HeldOut(tokens_NS, data.domains, domains_N, cut_units(domains_N, units_N))


def cut_units(domains_N: np.ndarray, units_N: np.ndarray) -> np.ndarray:
    """Units numbered from 0, those of domains that have fewer than `MIN_UNITS` replaced by even parts."""
    names = np.stack([domains_N, units_N], axis=1)
    for domain in np.unique(domains_N):
        places = np.flatnonzero(domains_N == domain)
        if len(np.unique(units_N[places])) < MIN_UNITS:
            names[places, 1] = np.arange(len(places)) * MIN_UNITS // len(places)
    return np.unique(names, axis=0, return_inverse=True)[1].reshape(-1)


def open_held_out(checkpoint: InferenceModel, data_dir: Path | None) -> TokenData:
    """The data whose validation split the checkpoint was never trained on, made anew if it is gone.

    Args:
        data_dir: other prepared data, cut into the model's tokens; None: that of its run.

    Raises:
        ConfigError: the data do not fit the settings of the run.
        DataError: there are none, or they are other ones than those of the run, or of another tokenizer.
        StorageError: they cannot be written.
    """
    length = checkpoint.config.data.sequence_length
    if data_dir is not None:
        data = open_data(data_dir, length)
        if data.index.tokenizer_sha256 != checkpoint.tokenizer.digest:
            raise DataError(
                f"the data in {str(data_dir)!r} was prepared with another tokenizer.",
                f"prepare it with data.tokenizer={checkpoint.path / TOKENIZER}.",
            )
        return data
    if not checkpoint.data_digest:
        raise DataError(
            f"{checkpoint.path.name!r} has no run whose held-out text it could be.", "give prepared data."
        )
    data = open_data(prepare(_as_prepared(checkpoint.config)), length)
    if data.index.digest != checkpoint.data_digest:
        raise DataError(
            f"the data in {str(data.folder)!r} is not what the run was trained on; its sources have changed.",
            "restore them, or give other prepared data.",
        )
    return data


def _as_prepared(config: Config) -> Config:
    """Settings that never make the data at `data.path` anew."""
    if config.data.path is None:
        return config
    return config.model_copy(update={"data": config.data.model_copy(update={"sources": ()})})

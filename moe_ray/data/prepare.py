"""Config to prepared folder: read, train the tokenizer, split, encode, publish; or reuse what is there."""

import hashlib
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path

from moe_ray.config import Config
from moe_ray.data.build import build
from moe_ray.data.corpus import Source, resolve_sources
from moe_ray.data.publish import exclusive, publish, refuse_foreign, staging, storage_errors
from moe_ray.data.reader import open_data
from moe_ray.data.shards import FORMAT, INDEX_NAME, SPLITS, check_files, is_data_file, read_index
from moe_ray.data.tokenizer import Tokenizer, check_vocab_size, load_tokenizer
from moe_ray.errors import ConfigError, DataError

logger = logging.getLogger(__name__)


def prepare(config: Config, *, progress: bool = False) -> Path:
    """Make the token shards of `config.data`, or find them made, and return their folder.

    The folder appears whole or not at all; processes that prepare the same one at once share the work of the
    first. Data whose sources, tokenizer or settings have changed is replaced only once its successor is
    complete. Prepared data whose sources are gone cannot be checked and is refused, unless `data.sources` is
    empty: then the data at `data.path` is used as it is.

    Args:
        progress: show a progress bar on stderr.

    Raises:
        DataError: a source is missing, unreadable or holds too little text.
        ConfigError: the vocabulary is too small or the tokenizer too big for the model.
        StorageError: the folder cannot be written.
    """
    if not config.data.sources:
        return _prepared_as_is(config)
    inputs = _find_inputs(config)
    folder = _folder(config, inputs.fingerprint)
    with storage_errors(folder):
        reason = _why_not(folder, inputs.fingerprint)
        if reason is None:
            logger.info("reused the prepared data in %s", folder)
            return _checked(folder, config)
        logger.info("preparing %s: %s", folder, reason)
        refuse_foreign(folder, is_data_file)
        with exclusive(folder):
            if _why_not(folder, inputs.fingerprint):
                with staging(folder) as aside:
                    _build(config, inputs, aside, progress)
                    publish(aside, folder, lambda other: not _why_not(other, inputs.fingerprint))
        return _checked(folder, config)


def prepared_dir(config: Config) -> Path:
    """The folder that `prepare` fills: `data.path`, else one under `train.storage` named by the fingerprint.

    Raises:
        DataError: `data.path` is not set and a source is missing, so that there is no fingerprint.
    """
    return _folder(config, "" if config.data.path is not None else _find_inputs(config).fingerprint)


@dataclass(frozen=True)
class _Inputs:
    sources: list[Source]
    tokenizer: Tokenizer | None
    fingerprint: str


def _folder(config: Config, fingerprint: str) -> Path:
    if config.data.path is not None:
        return Path(config.data.path).expanduser().resolve()
    return (_local_root(config.train.storage) / "data" / fingerprint).resolve()


def _local_root(storage: str) -> Path:
    """The folder of all runs, or for runs in an object store one of this machine."""
    if "://" not in storage:
        return Path(storage).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "moe_ray"


def _find_inputs(config: Config) -> _Inputs:
    """Resolve the sources and the tokenizer, and hash all that the shards depend on."""
    tokenizer = _given_tokenizer(config)
    try:
        sources = resolve_sources(config.data.sources)
        stamps = [source.stamp() for source in sources]
    except DataError as error:
        raise _explain_stale(config, error) from None
    identity = {
        "format": FORMAT,
        "sources": stamps,
        "text_field": config.data.text_field,
        "validation_fraction": config.data.validation_fraction,
        "tokenizer": tokenizer.digest if tokenizer else f"trained, {config.model.vocab_size} ids",
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return _Inputs(sources, tokenizer, digest[:16])


def _given_tokenizer(config: Config) -> Tokenizer | None:
    if config.data.tokenizer is None:
        check_vocab_size(config.model.vocab_size)
        return None
    tokenizer = load_tokenizer(config.data.tokenizer)
    _check_fits(f"data.tokenizer={config.data.tokenizer!r}", tokenizer.vocab_size, config)
    return tokenizer


def _check_fits(what: str, vocab_size: int, config: Config) -> None:
    if vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"{what} has {vocab_size} ids, model.vocab_size={config.model.vocab_size} rows.",
            f"set model.vocab_size to at least {vocab_size}.",
        )


def _explain_stale(config: Config, error: DataError) -> DataError:
    if config.data.path is None or not (_folder(config, "") / INDEX_NAME).is_file():
        return error
    return DataError(
        f"{error.problem} So the data prepared in data.path={config.data.path!r} cannot be checked against it.",
        f"{error.fix} Or set data.sources=[] to use the prepared data as it is.",
    )


def _prepared_as_is(config: Config) -> Path:
    if config.data.path is None:
        raise ConfigError(
            "data.sources=[] without data.path names no data.", "give sources, or the path of prepared data."
        )
    folder = _checked(_folder(config, ""), config)
    _check_fits(f"the prepared data in {folder}", read_index(folder).vocab_size, config)
    logger.info("using the prepared data in %s as it is", folder)
    return folder


def _checked(folder: Path, config: Config) -> Path:
    open_data(folder, config.data.sequence_length)
    return folder


def _why_not(folder: Path, fingerprint: str) -> str | None:
    """The reason why the data in `folder` cannot be used, None if it can."""
    if not folder.exists():
        return "it does not exist yet."
    try:
        index = read_index(folder)
        check_files(folder, index)
    except DataError as error:
        return error.problem
    if index.fingerprint != fingerprint:
        return "it was made from other sources or settings."
    return None


def _build(config: Config, inputs: _Inputs, folder: Path, progress: bool) -> None:
    """Fill an empty folder, and be sure that it can be used."""
    build(
        folder,
        inputs.sources,
        config.data.text_field,
        fraction=config.data.validation_fraction,
        tokenizer=inputs.tokenizer or config.model.vocab_size,
        fingerprint=inputs.fingerprint,
        progress=progress,
    )
    data = open_data(folder, config.data.sequence_length)
    for split in SPLITS:
        for domain in data.domains:
            if data.num_sequences(split, domain) == 0:
                logger.warning(
                    "domain %r has too little %s text for one sequence; it has no part there", domain, split
                )
    if _find_inputs(config).fingerprint != inputs.fingerprint:
        raise DataError("data.sources changed while they were read.", "run it again when they are at rest.")

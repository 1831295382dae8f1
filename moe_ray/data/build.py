"""Sources to a filled folder, in two passes: count and sample, then split, encode and write."""

import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from itertools import chain
from pathlib import Path

from tqdm import tqdm

from moe_ray.data.corpus import Document, Source, read_documents
from moe_ray.data.shards import (
    SPLITS,
    TOKENIZER_NAME,
    Index,
    Shard,
    ShardWriter,
    file_sha256,
    token_dtype,
    write_index,
)
from moe_ray.data.split import Census, SplitPlan, plan_split
from moe_ray.data.tokenizer import Tokenizer, train_tokenizer

logger = logging.getLogger(__name__)

# Enough for several thousand merges; more text makes training slower, not the tokenizer better.
_SAMPLE_BYTES = 8 << 20
_BATCH_CHARS = 1 << 20


def build(
    folder: Path,
    sources: Sequence[Source],
    text_field: str,
    *,
    fraction: float,
    tokenizer: Tokenizer | int,
    fingerprint: str,
    progress: bool = False,
) -> None:
    """Fill `folder` with a tokenizer, shards and, last, the index. The same sources give the same bytes.

    Args:
        fraction: share of the documents for validation.
        tokenizer: one to use, or the number of ids of one to train.
        fingerprint: identity of the inputs, for the index.
        progress: show progress bars on stderr.

    Raises:
        DataError: a source is unreadable or holds no text.
        OSError: the folder cannot be written.
    """
    started = time.perf_counter()
    census = Census(_SAMPLE_BYTES)
    with _bar("reading", None, progress) as bar:
        for document in chain.from_iterable(read_documents(source, text_field) for source in sources):
            bar.update(census.add(document))
    plan = plan_split(census, fraction)
    _log_cut_domains(census, plan)
    if isinstance(tokenizer, int):
        tokenizer = train_tokenizer(census.sample(plan), tokenizer)
        logger.info("trained a tokenizer of %d ids", tokenizer.vocab_size)
    tokenizer.save(folder / TOKENIZER_NAME)
    domains, shards = tuple(census.hashes), []
    with _bar("encoding", census.text_bytes, progress) as bar:
        # One domain at a time: a writer holds a file open.
        for domain in domains:
            documents = chain.from_iterable(read_documents(s, text_field) for s in sources if s.domain == domain)
            shards += _encode_domain(folder, domain, _batches(documents, plan), tokenizer, bar)
    index = Index(
        fingerprint=fingerprint,
        eos_id=tokenizer.eos_id,
        vocab_size=tokenizer.vocab_size,
        tokenizer_sha256=file_sha256(folder / TOKENIZER_NAME),
        dtype=token_dtype(tokenizer.vocab_size),
        domains=domains,
        shards=tuple(shards),
    )
    write_index(folder, index)
    num_tokens = sum(shard.num_tokens for shard in shards)
    logger.info(
        "prepared %d bytes as %d tokens in %.1f s", census.text_bytes, num_tokens, time.perf_counter() - started
    )


def _encode_domain(
    folder: Path, domain: str, batches: Iterable[list[tuple[str, str]]], tokenizer: Tokenizer, bar: tqdm
) -> list[Shard]:
    dtype = token_dtype(tokenizer.vocab_size)
    with ExitStack() as stack:
        writers = {
            split: stack.enter_context(closing(ShardWriter(folder, split, domain, dtype, tokenizer.eos_id)))
            for split in SPLITS
        }
        for batch in batches:
            encoded = tokenizer.encode_batch([text for _, text in batch])
            for (split, text), ids in zip(batch, encoded, strict=True):
                size = len(text.encode())
                writers[split].append(ids, size)
                bar.update(size)
        return [shard for writer in writers.values() for shard in writer.finish()]


def _batches(documents: Iterable[Document], plan: SplitPlan) -> Iterator[list[tuple[str, str]]]:
    """Lists of pairs of a split and a text, of about a million characters each."""
    batch, size = [], 0
    for document in documents:
        batch += plan.split(document)
        size += len(document.text)
        if size >= _BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _log_cut_domains(census: Census, plan: SplitPlan) -> None:
    for domain, hashes in census.hashes.items():
        if domain not in plan.last_hashes:
            logger.info(
                "domain %r of %d documents has none to spare: the last %g%% of each text is for validation",
                domain,
                len(hashes),
                100 * plan.fraction,
            )


def _bar(what: str, total: int | None, shown: bool) -> tqdm:
    return tqdm(
        desc=what,
        total=total,
        unit="B",
        unit_scale=True,
        disable=not shown,
        file=sys.stderr,
        mininterval=0.2 if sys.stderr.isatty() else 5.0,
    )

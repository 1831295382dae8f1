"""What an engine has done so far and holds now, as plain numbers."""

from dataclasses import dataclass

from moe_ray.offload.resident import OffloadStats


@dataclass(frozen=True)
class TierStats:
    """Of the tiers below the KV cache; bytes are held now, all else counts from the start.

    Attributes:
        tier_memory_hits, tier_disk_hits, tier_misses: blocks that new prompts asked for, by where they were.
        tier_prefetched, tier_prefetch_hits: blocks that went from disk to memory before they were asked for, and
            those of them that were.
        tier_memory_bytes, tier_disk_bytes: in each tier, compressed.
        tier_dropped: blocks that were not kept because too many waited.
        tier_damaged: files that were removed because of their checksum.
        tier_errors: operations that the disk refused.
    """

    tier_memory_hits: int = 0
    tier_disk_hits: int = 0
    tier_misses: int = 0
    tier_prefetched: int = 0
    tier_prefetch_hits: int = 0
    tier_memory_bytes: int = 0
    tier_disk_bytes: int = 0
    tier_dropped: int = 0
    tier_damaged: int = 0
    tier_errors: int = 0


@dataclass(frozen=True)
class ResponseStats:
    """Of the cache of finished answers; bytes are held now, all else counts from the start.

    Attributes:
        response_cache_hits, response_memory_hits, response_disk_hits, response_misses: texts that the same answer
            may be given for, by where it was.
        response_cache_bytes, response_memory_bytes, response_disk_bytes: in each tier.
        response_dropped: answers that were not kept below the first tier because too many waited.
        response_damaged: files that were removed because of their checksum.
        response_errors: operations that the disk refused.
    """

    response_cache_hits: int = 0
    response_memory_hits: int = 0
    response_disk_hits: int = 0
    response_misses: int = 0
    response_cache_bytes: int = 0
    response_memory_bytes: int = 0
    response_disk_bytes: int = 0
    response_dropped: int = 0
    response_damaged: int = 0
    response_errors: int = 0


@dataclass(frozen=True)
class EngineStats(OffloadStats, ResponseStats, TierStats):
    """A snapshot between two steps; the last seven count from the start of the engine.

    Attributes:
        waiting, running: requests.
        queued_tokens: tokens of theirs that are still to be computed, nearly all of prompts.
        blocks_total: blocks of the KV cache.
        blocks_used: those of running requests.
        blocks_known: those that nobody uses and that hold a prefix that can be shared.
        prompt_tokens: tokens of all prompts that were accepted.
        prefix_tokens, prefix_hit_tokens: of the prompts that ran, all tokens and those found in the cache.
        computed_tokens: tokens that went through the model.
        generated_tokens: tokens that were sampled.
        preemptions: times that a request lost its blocks to another.
        missed_deadlines: requests that ended with one.
    """

    waiting: int = 0
    running: int = 0
    queued_tokens: int = 0
    blocks_total: int = 0
    blocks_used: int = 0
    blocks_known: int = 0
    prompt_tokens: int = 0
    prefix_tokens: int = 0
    prefix_hit_tokens: int = 0
    computed_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    missed_deadlines: int = 0

"""Continuous batching: requests join and leave the running batch between any two tokens.

Shapes: T tokens of a step, D model dim, B sequences that get a token, V vocabulary.
"""

import heapq
import logging
import time
from collections.abc import Callable
from itertools import accumulate

import numpy as np
import torch

from moe_ray.config import ModelConfig
from moe_ray.errors import ConfigError, RequestError
from moe_ray.models.transformer import Transformer
from moe_ray.offload.experts import offloaded_experts
from moe_ray.serving.engine.blocks import BlockPool, root_digest
from moe_ray.serving.engine.cache import (
    BLOCK_TOKENS,
    FREE_SHARE,
    KVCache,
    blocks_of,
    bytes_per_block,
    count_blocks,
)
from moe_ray.serving.engine.generation import Generation
from moe_ray.serving.engine.layout import Layout
from moe_ray.serving.engine.make_runner import RunnerKind, make_runner
from moe_ray.serving.engine.request import Chunk, Request, Tokenizer
from moe_ray.serving.engine.sampler import sample
from moe_ray.serving.engine.scheduler import Scheduler, Span
from moe_ray.serving.engine.stats import EngineStats
from moe_ray.serving.engine.tier_store import Tiering
from moe_ray.serving.engine.tiers import PrefixTiers

# Long enough to use the matrix units, short enough that running texts pause for tens of milliseconds.
PREFILL_TOKENS = 256

# What `step` waits for blocks from the tiers if it has nothing else to do: requests may come or go meanwhile.
_IDLE_SECONDS = 0.01
# Blocks in flight at the end, which bounds the memory for their copies.
_CLOSE_BLOCKS = 64
# Of what tiers keep; another number whenever blocks are stored otherwise, as disks outlive releases.
_FORMAT = 1

_logger = logging.getLogger(__name__)


class Engine:
    """Generates for many requests at once. Not thread-safe: one thread calls all methods but `check`.

    Args:
        model: in eval mode; its dtype is that of the cache.
        max_batch_size: most requests in one forward pass; others wait.
        max_context: most tokens of prompt plus completion.
        prefill_tokens: most prompt tokens of one step.
        kv_cache_bytes: of the KV cache, which is allocated at once; None: see `count_blocks`.
        tiering: of what the KV cache has no room for; None: that is forgotten.
        identity: of the weights; engines of one identity find each other's blocks on disk.
        free_share: of the free memory that a cache of no given size may take.
        runner: see `make_runner`.
        clock: seconds, as the deadlines of requests are given.

    Raises:
        ConfigError: the KV cache holds no text.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        max_batch_size: int,
        max_context: int,
        prefill_tokens: int = PREFILL_TOKENS,
        kv_cache_bytes: int | None = None,
        tiering: Tiering | None = None,
        identity: str = "",
        free_share: float = FREE_SHARE,
        runner: RunnerKind = "auto",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        weight, max_blocks = model.embed.weight, blocks_of(max_context)
        num_blocks = count_blocks(
            model.config,
            weight.dtype,
            weight.device,
            wanted=max_batch_size * max_blocks,
            budget_bytes=kv_cache_bytes,
            free_share=free_share,
        )
        self._tokenizer = tokenizer
        # The model may have more rows than there are tokens; those are never sampled.
        self._vocab_size = min(tokenizer.vocab_size, model.config.vocab_size)
        self._max_context = max_context
        self._pool = BlockPool(num_blocks)
        if self._pool.num_blocks < max_blocks:
            tokens = self._pool.num_blocks * BLOCK_TOKENS
            _logger.warning("the KV cache holds %d tokens, fewer than a context of %d", tokens, max_context)
        self._scheduler = Scheduler(
            self._pool,
            block_tokens=BLOCK_TOKENS,
            max_running=max_batch_size,
            max_blocks=max_blocks,
            prefill_tokens=prefill_tokens,
            root=root_digest(
                f"{_FORMAT} {identity} {weight.dtype} {BLOCK_TOKENS} {model.config.model_dump_json()}"
            ),
        )
        self._cache = KVCache(model.config, num_blocks, BLOCK_TOKENS, weight.dtype, weight.device)
        self._runner = make_runner(model, self._cache, runner)
        self._resident = next((experts.resident for experts in offloaded_experts(model)), None)
        block_bytes = bytes_per_block(model.config, weight.dtype)
        self._tiers = PrefixTiers(block_bytes, weight.dtype.itemsize, tiering) if tiering else None
        self._loading: set[Generation] = set()
        self._generations: dict[str, Generation] = {}
        self._clock = clock
        self._deadlines: list[tuple[float, str]] = []
        self._prompt_tokens = self._computed_tokens = self._generated_tokens = self._missed_deadlines = 0

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        return self._scheduler.has_work or bool(self._loading)

    def stats(self) -> EngineStats:
        """What it has done and holds."""
        scheduler, pool = self._scheduler, self._pool
        return EngineStats(
            **(vars(self._tiers.stats()) if self._tiers else {}),
            **(vars(self._resident.stats()) if self._resident else {}),
            waiting=scheduler.num_waiting + len(self._loading),
            running=len(scheduler.running),
            queued_tokens=scheduler.queued_tokens + sum(g.sequence.num_pending for g in self._loading),
            blocks_total=pool.num_blocks,
            blocks_used=pool.num_blocks - pool.num_free,
            blocks_known=pool.num_unused_known,
            prompt_tokens=self._prompt_tokens,
            prefix_tokens=scheduler.prefix_tokens,
            prefix_hit_tokens=scheduler.prefix_hit_tokens,
            computed_tokens=self._computed_tokens,
            generated_tokens=self._generated_tokens,
            preemptions=scheduler.preemptions,
            missed_deadlines=self._missed_deadlines,
        )

    def check(self, request: Request) -> None:
        """Raise a RequestError if the request cannot be served."""
        request.check(self._vocab_size, self._max_context)
        # The last token that is generated needs no room.
        tokens = len(request.prompt_ids) + request.params.max_tokens - 1
        if blocks_of(tokens) > self._pool.num_blocks:
            raise RequestError(
                f"the prompt has {len(request.prompt_ids)} tokens and max_tokens={request.params.max_tokens}, "
                f"together more than the {self._pool.num_blocks * BLOCK_TOKENS} that the KV cache holds.",
                "shorten the prompt, lower max_tokens, or raise serve.kv_cache_bytes.",
                param="max_tokens",
                code="context_length_exceeded",
            )

    def submit(self, request: Request) -> None:
        """Queue a request; chunks of its text come out of later steps.

        Raises:
            RequestError: it cannot be served.
        """
        self.check(request)
        generation = Generation(request, self._tokenizer)
        self._generations[request.id] = generation
        if not self._look_below(generation):
            self._scheduler.add(generation.sequence)
        self._prompt_tokens += len(request.prompt_ids)
        if request.deadline is not None:
            heapq.heappush(self._deadlines, (request.deadline, request.id))

    def cancel(self, request_id: str) -> None:
        """Drop a request, whose blocks are free at once; unknown ones are ignored."""
        generation = self._generations.pop(request_id, None)
        if generation in self._loading:
            self._loading.remove(generation)
        elif generation is not None:
            self._scheduler.remove(generation.sequence, is_broken=generation.finish_reason == "error")

    def close(self) -> None:
        """Hand all known blocks to the tiers, for the next start. Nothing is called after this."""
        if self._tiers:
            known = self._pool.known()
            for first in range(0, len(known), _CLOSE_BLOCKS):
                self._put(known[first : first + _CLOSE_BLOCKS], wait=True)
            self._tiers.close()

    @torch.inference_mode()
    def step(self) -> list[Chunk]:
        """Run one forward pass; returns the text that became certain, with the last chunk of each that ended."""
        chunks = self._end_late()
        if self._loading:
            self._add_loaded()
        spans = self._scheduler.plan()
        if not spans:
            return chunks
        hidden_TD = self._forward(spans)
        ended = self._scheduler.advance(spans)
        if not ended:
            return chunks
        generations = [self._generations[spans[index].sequence.id] for index in ended]
        last = _last_rows(spans, ended)
        # Picking all rows would copy them.
        hidden_BD = hidden_TD if len(last) == len(hidden_TD) else hidden_TD[last]
        logits_BV = self._runner.logits(hidden_BD)[:, : self._vocab_size]
        choices = sample(logits_BV, [generation.row for generation in generations])
        self._generated_tokens += len(choices)
        for generation, choice in zip(generations, choices, strict=True):
            chunk = generation.append(choice)
            if chunk is not None:
                chunks.append(chunk)
            if generation.finish_reason is not None:
                self.cancel(generation.request.id)
        return chunks

    def _end_late(self) -> list[Chunk]:
        """End the requests whose deadline has passed."""
        chunks = []
        while self._deadlines and self._deadlines[0][0] <= self._clock():
            deadline, request_id = heapq.heappop(self._deadlines)
            generation = self._generations.get(request_id)
            # Another request may have the name of one that ended before its deadline.
            if generation is not None and generation.request.deadline == deadline:
                chunks += generation.expire()
                self.cancel(request_id)
                self._missed_deadlines += 1
        return chunks

    def _look_below(self, generation: Generation) -> bool:
        """Ask the tiers for the prefix of a request; whether there is anything to wait for."""
        if not self._tiers:
            return False
        unknown = self._scheduler.unknown_prefix(generation.sequence)
        if unknown:
            self._loading.add(generation)
            self._tiers.fetch(generation, unknown)
        self._tiers.follow(generation.sequence.digests, self._pool)
        return bool(unknown)

    def _add_loaded(self) -> None:
        """Queue the requests whose prefixes have been looked for; waits a little only if nothing else is to do."""
        assert self._tiers is not None
        for generation, blocks in self._tiers.loaded(0 if self._scheduler.has_work else _IDLE_SECONDS):
            if isinstance(generation, Generation) and generation in self._loading:
                self._loading.remove(generation)
                generation.sequence.loaded = blocks
                self._scheduler.add(generation.sequence)

    def _exchange(self) -> None:
        """Hand evicted blocks to the tiers, then write those that came from them, perhaps to the same memory."""
        evicted, restored = self._pool.evicted, self._scheduler.restored
        if self._tiers and evicted:
            self._put(evicted, wait=False)
        evicted.clear()
        if restored:
            self._cache.write([block for block, _ in restored], np.stack([data for _, data in restored]))
            restored.clear()

    def _put(self, blocks: list[tuple[int, bytes]], *, wait: bool) -> None:
        assert self._tiers is not None
        for (_, digest), data in zip(blocks, self._cache.read([block for block, _ in blocks]), strict=True):
            self._tiers.put(digest, data, wait=wait)

    def _forward(self, spans: list[Span]) -> torch.Tensor:
        tokens: list[int] = []
        for sequence, start, count in spans:
            tokens += sequence.tokens[start : start + count]
        self._computed_tokens += len(tokens)
        self._exchange()
        layout = Layout.of(spans, self._scheduler.tables_RM, BLOCK_TOKENS)
        return self._runner.forward(np.array(tokens, dtype=np.int64), layout)


def check_faithful(config: ModelConfig, allow_unfaithful_routing: bool) -> None:
    """Raise a ConfigError if generating would route otherwise than training did, unless that is asked for."""
    reasons = {
        "expert_choice": "is not causal: experts pick tokens by looking at later ones",
        "forced_balance": "routes by the place of a token among those computed together",
    }
    if config.router in reasons and not allow_unfaithful_routing:
        raise ConfigError(
            f"model.router={config.router} {reasons[config.router]}, so token by token the model routes otherwise "
            "than it was trained to.",
            "set serve.allow_unfaithful_routing=true to generate all the same.",
        )


def _last_rows(spans: list[Span], indices: list[int]) -> list[int]:
    """Row of the last token of each of these spans in the forward pass of all."""
    ends = list(accumulate(span.count for span in spans))
    return [ends[index] - 1 for index in indices]

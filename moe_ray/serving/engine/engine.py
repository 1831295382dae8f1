"""Continuous batching: requests join and leave the running batch between any two tokens.

Shapes: S tokens of a step, D model dim, B sequences that get a token, V vocabulary.
"""

import torch

from moe_ray.config import ModelConfig
from moe_ray.errors import ConfigError
from moe_ray.models.transformer import Transformer
from moe_ray.serving.engine.cache import KVCache, make_layout
from moe_ray.serving.engine.generation import Generation
from moe_ray.serving.engine.request import Chunk, Request, Tokenizer
from moe_ray.serving.engine.sampler import sample
from moe_ray.serving.engine.scheduler import Scheduler, Span

# Long enough to use the matrix units, short enough that running texts pause for tens of milliseconds.
PREFILL_TOKENS = 256


class Engine:
    """Generates for many requests at once. Not thread-safe: one thread calls all methods but `check`.

    Args:
        model: in eval mode; its dtype is that of the cache.
        max_batch_size: most requests in one forward pass; others wait.
        max_context: most tokens of prompt plus completion; `max_batch_size` such caches are allocated at once.
        prefill_tokens: most prompt tokens of one step.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        max_batch_size: int,
        max_context: int,
        prefill_tokens: int = PREFILL_TOKENS,
    ) -> None:
        weight = model.embed.weight
        self._model = model
        self._tokenizer = tokenizer
        self._device = weight.device
        # The model may have more rows than there are tokens; those are never sampled.
        self._vocab_size = min(tokenizer.vocab_size, model.config.vocab_size)
        self._max_context = max_context
        self._windows = frozenset(map(model.config.window, range(model.config.num_layers)))
        self._scheduler = Scheduler(max_batch_size, prefill_tokens)
        self._cache = KVCache(model.config, max_batch_size, max_context, weight.dtype, weight.device)
        self._generations: dict[str, Generation] = {}

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        return self._scheduler.has_work

    def check(self, request: Request) -> None:
        """Raise a RequestError if the request cannot be served."""
        request.check(self._vocab_size, self._max_context)

    def submit(self, request: Request) -> None:
        """Queue a request; chunks of its text come out of later steps.

        Raises:
            RequestError: it cannot be served.
        """
        self.check(request)
        generation = Generation(request, self._tokenizer)
        self._generations[request.id] = generation
        self._scheduler.add(generation.sequence)

    def cancel(self, request_id: str) -> None:
        """Drop a request, whose slot is free from the next step on; unknown ones are ignored."""
        generation = self._generations.pop(request_id, None)
        if generation is not None:
            for move in self._scheduler.remove(generation.sequence):
                self._cache.move(move)

    @torch.inference_mode()
    def step(self) -> list[Chunk]:
        """Run one forward pass; returns the text that became certain, with the last chunk of each that ended."""
        spans = self._scheduler.plan()
        if not spans:
            return []
        hidden_SD = self._forward(spans)
        slots = self._scheduler.advance(spans)
        if not slots:
            return []
        generations = [self._generations[self._scheduler.active[slot].id] for slot in slots]
        logits_BV = self._model.logits(hidden_SD[_last_rows(spans, slots)])[:, : self._vocab_size]
        choices = sample(logits_BV, [generation.row for generation in generations])
        for slot, choice in zip(slots, choices, strict=True):
            if choice.token_id is None:
                # The slot's next sequence would see it: what is masked has weight 0, and 0 * NaN is NaN.
                self._cache.clear(slot)
        chunks = []
        for generation, choice in zip(generations, choices, strict=True):
            chunk = generation.append(choice)
            if chunk is not None:
                chunks.append(chunk)
            if generation.finish_reason is not None:
                self.cancel(generation.request.id)
        return chunks

    def _forward(self, spans: list[Span]) -> torch.Tensor:
        tokens: list[int] = []
        for span in spans:
            tokens += self._scheduler.active[span.slot].tokens[span.start : span.end]
        layout = make_layout(spans, self._windows, self._device)
        tokens_1S = torch.tensor([tokens], device=self._device)
        caches = self._cache.views(layout)
        return self._model(tokens_1S, layout.position_T[None], caches).hidden_BSD[0]


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


def _last_rows(spans: list[Span], slots: list[int]) -> list[int]:
    """Row of the last token of each of `slots` in the forward pass of `spans`, whose slots are 0, 1, …"""
    rows, end = [], 0
    for span in spans:
        end += span.count
        rows.append(end - 1)
    return [rows[slot] for slot in slots]

"""What requests ask to be done to their logits before a token is chosen: biases, penalties, a grammar.

Rows that ask for nothing are copied at most, and not even that if no row of the batch asks for anything.

Shapes: B rows, V vocabulary, b a subset of the rows.
"""

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from moe_ray.serving.engine.grammar import Matcher
from moe_ray.serving.engine.request import SamplingParams


class Adjustments:
    """What the logits of one request are changed by, which depends on its tokens so far.

    Attributes:
        matcher: follows the grammar; None if there is none.
    """

    def __init__(self, params: SamplingParams, prompt_ids: Sequence[int]) -> None:
        self.params = params
        self.matcher: Matcher | None = None if params.grammar is None else params.grammar.matcher()
        self._prompt_ids = prompt_ids
        self._counts_V: Tensor | None = None
        self._seen_V: Tensor | None = None

    @classmethod
    def of(cls, params: SamplingParams, prompt_ids: Sequence[int]) -> Self | None:
        """Those of a request; None if it asks for none."""
        asks = params.logit_bias or params.grammar is not None or _has_penalties(params)
        return cls(params, prompt_ids) if asks else None

    def counts(self, logits_V: Tensor) -> tuple[Tensor, Tensor]:
        """How often each token was generated, float32, and whether it is in the prompt or the text, bool."""
        if self._counts_V is None or self._seen_V is None:
            self._counts_V = torch.zeros_like(logits_V)
            self._seen_V = torch.zeros_like(logits_V, dtype=torch.bool)
            self._seen_V[torch.tensor(self._prompt_ids, dtype=torch.int64, device=logits_V.device)] = True
        return self._counts_V, self._seen_V

    def accept(self, token_id: int) -> bool:
        """Take note of the chosen token; returns False if the grammar cannot go on with it."""
        if self._counts_V is not None and self._seen_V is not None:
            self._counts_V[token_id] += 1
            self._seen_V[token_id] = True
        return self.matcher is None or self.matcher.accept(token_id)


def adjust(logits_BV: Tensor, rows: Sequence[Adjustments | None]) -> Tensor:
    """The logits that tokens are chosen by, float32; `logits_BV` itself if no row asks for a change."""
    asking = [(index, row) for index, row in enumerate(rows) if row is not None]
    if not asking:
        return logits_BV
    logits_BV = logits_BV.clone()
    _penalise(logits_BV, [(index, row) for index, row in asking if _has_penalties(row.params)])
    biases = [(index, *pair) for index, row in asking for pair in row.params.logit_bias]
    if biases:
        index, token, bias = zip(*biases, strict=True)
        place = (torch.tensor(index), torch.tensor(token))
        logits_BV.index_put_(place, torch.tensor(bias, device=logits_BV.device), accumulate=True)
    for index, row in asking:
        if row.matcher is not None:
            allowed_V = row.matcher.allowed().to(logits_BV.device)
            logits_BV[index].masked_fill_(~allowed_V, -torch.inf)
    return logits_BV


def _penalise(logits_BV: Tensor, rows: Sequence[tuple[int, Adjustments]]) -> None:
    if not rows:
        return
    indices = [index for index, _ in rows]
    some_bV = logits_BV[indices]
    counts_bV, seen_bV = map(torch.stack, zip(*(row.counts(logits_BV[0]) for _, row in rows), strict=True))

    def column(numbers: Sequence[float]) -> Tensor:
        return torch.tensor(numbers, device=logits_BV.device)[:, None]

    repetition_b1 = column([row.params.repetition_penalty for _, row in rows])
    repeated_bV = torch.where(some_bV > 0, some_bV / repetition_b1, some_bV * repetition_b1)
    some_bV = torch.where(seen_bV, repeated_bV, some_bV)
    some_bV -= column([row.params.frequency_penalty for _, row in rows]) * counts_bV
    some_bV -= column([row.params.presence_penalty for _, row in rows]) * (counts_bV > 0)
    logits_BV[indices] = some_bV


def _has_penalties(params: SamplingParams) -> bool:
    return bool(params.presence_penalty or params.frequency_penalty) or params.repetition_penalty != 1

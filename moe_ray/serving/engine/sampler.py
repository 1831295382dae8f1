"""Choose the next token of every row of a batch, each with its own parameters.

A row's choice depends on its own logits and state only, never on the other rows: the cumulative
distribution over token ids is inverted at one uniform number a token.

Shapes: B rows, V vocabulary, b a subset of the rows, N most likely tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from moe_ray.serving.engine.adjust import Adjustments, adjust
from moe_ray.serving.engine.request import SamplingParams

_FIRST_CANDIDATES = 256


@dataclass(frozen=True)
class Logprob:
    """Natural-log probability of the chosen token and the (token id, logprob) pairs of the most likely ones."""

    chosen: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Choice:
    """A row's next token, or None if its logits are not finite; `logprob` if it was asked for."""

    token_id: int | None
    logprob: Logprob | None


class Row:
    """What the choices of one request depend on beside its logits.

    Attributes:
        adjustments: what is done to its logits before a choice; None: nothing.
    """

    def __init__(self, params: SamplingParams, prompt_ids: Sequence[int] = ()) -> None:
        self.params = params
        self.adjustments = Adjustments.of(params, prompt_ids)

    @cached_property
    def generator(self) -> torch.Generator:
        """Advances by one number a token if the temperature is above 0; made when it is first needed."""
        generator = torch.Generator()
        if self.params.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.params.seed)
        return generator

    def accept(self, token_id: int) -> bool:
        """Take note of the chosen token; returns False if the grammar cannot go on with it."""
        return self.adjustments is None or self.adjustments.accept(token_id)


def sample(logits_BV: Tensor, rows: Sequence[Row]) -> list[Choice]:
    """One choice a row."""
    logits_BV = logits_BV.float()
    params = [row.params for row in rows]
    token_B, highest_B = _most_likely(logits_BV)
    adjusted_BV = adjust(logits_BV, [row.adjustments for row in rows])
    if adjusted_BV is not logits_BV:
        token_B, _ = _most_likely(adjusted_BV)
    drawn = [index for index, param in enumerate(params) if param.temperature > 0]
    if drawn:
        token_B[drawn] = _draw(adjusted_BV[drawn], [rows[index] for index in drawn])
    logprobs = _logprobs(logits_BV, token_B, params)
    return [
        # NaN and infinity survive a maximum.
        Choice(token if math.isfinite(most) else None, logprob)
        for token, most, logprob in zip(token_B.tolist(), highest_B.tolist(), logprobs, strict=True)
    ]


def _most_likely(logits_BV: Tensor) -> tuple[Tensor, Tensor]:
    """The most likely token of each row, and its logit."""
    if logits_BV.device.type != "cpu":
        highest_B, token_B = logits_BV.max(dim=-1)
        return token_B, highest_B
    # torch's own compares number by number.
    numbers_BV = logits_BV.detach().numpy()
    token_B = numbers_BV.argmax(axis=-1)
    return torch.from_numpy(token_B), torch.from_numpy(numbers_BV[np.arange(len(token_B)), token_B])


def _draw(logits_bV: Tensor, rows: Sequence[Row]) -> Tensor:
    device, params = logits_bV.device, [row.params for row in rows]
    # Bounded below and with the maximum subtracted first, tiny temperatures do not overflow.
    temperatures = [[max(param.temperature, 1e-6)] for param in params]
    shifted_bV = logits_bV - logits_bV.amax(dim=-1, keepdim=True)
    probs_bV = (shifted_bV / torch.tensor(temperatures, device=device)).softmax(dim=-1)
    if any(param.min_p > 0 for param in params):
        min_p_b1 = torch.tensor([[param.min_p] for param in params], device=device)
        probs_bV *= probs_bV >= min_p_b1 * probs_bV.amax(dim=-1, keepdim=True)
    filtered = [row for row, param in enumerate(params) if param.top_k > 0 or param.top_p < 1]
    if filtered:
        some_bV = probs_bV[filtered]
        smallest_b1 = _smallest_kept(some_bV, [params[row] for row in filtered])
        probs_bV[filtered] = some_bV * (some_bV >= smallest_b1)
    cdf_bV = probs_bV.cumsum(dim=-1, dtype=torch.float64)
    total_b1 = cdf_bV[:, -1:]
    uniform = [torch.rand(1, 1, generator=row.generator, dtype=torch.float64) for row in rows]
    # The uniform number is below 1, but its product with the total may round up to it, past every token.
    below_total_b1 = total_b1.nextafter(torch.zeros_like(total_b1))
    target_b1 = torch.minimum(torch.cat(uniform).to(device) * total_b1, below_total_b1)
    index_b = torch.searchsorted(cdf_bV, target_b1, right=True).squeeze(-1)
    return index_b.clamp_(max=probs_bV.shape[-1] - 1)


def _smallest_kept(probs_bV: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """The least probability that `top_k` and then `top_p` of what is left keep, [b, 1]; ties are all kept."""
    device, vocab_size = probs_bV.device, probs_bV.shape[-1]
    top_k_b1 = torch.tensor([[min(param.top_k, vocab_size) or vocab_size] for param in params], device=device)
    top_p_b1 = torch.tensor([[param.top_p] for param in params], dtype=torch.float64, device=device)
    # Sorting the whole vocabulary costs more than the model; a few hundred tokens nearly always hold top_p.
    size = min(vocab_size, max(_FIRST_CANDIDATES, *(min(param.top_k, vocab_size) for param in params)))
    while True:
        top_bN = probs_bV.topk(size, dim=-1).values
        in_top_k_bN = torch.arange(size, device=device) < top_k_b1
        cdf_bN = (top_bN * in_top_k_bN).cumsum(dim=-1, dtype=torch.float64)
        everything_b1 = probs_bV.sum(dim=-1, keepdim=True, dtype=torch.float64)
        total_b1 = torch.where(top_k_b1 < vocab_size, cdf_bN[:, -1:], everything_b1)
        if size == vocab_size or bool((cdf_bN[:, -1:] >= top_p_b1 * total_b1).all()):
            break
        size = min(16 * size, vocab_size)
    # A token stays while those before it have not reached top_p.
    kept_bN = in_top_k_bN & (cdf_bN - top_bN < top_p_b1 * total_b1)
    return top_bN.gather(1, kept_bN.sum(dim=-1, keepdim=True).clamp(min=1) - 1)


def _logprobs(logits_BV: Tensor, token_B: Tensor, params: Sequence[SamplingParams]) -> list[Logprob | None]:
    counts = {row: param.logprobs for row, param in enumerate(params) if param.logprobs is not None}
    result: list[Logprob | None] = [None] * len(params)
    if counts:
        rows = list(counts)
        found = top_logprobs(logits_BV[rows], token_B[rows], list(counts.values()))
        for row, logprob in zip(rows, found, strict=True):
            result[row] = logprob
    return result


def top_logprobs(logits_BV: Tensor, token_B: Tensor, counts: Sequence[int]) -> list[Logprob]:
    """The log-probability of a token of each row and of as many most likely ones as `counts` says."""
    logprob_BV = logits_BV.log_softmax(dim=-1)
    chosen_B = logprob_BV.gather(1, token_B[:, None]).squeeze(1).tolist()
    most = min(max(counts, default=0), logprob_BV.shape[-1])
    top_BN, ids_BN = (top.tolist() for top in logprob_BV.topk(most, dim=-1))
    return [
        Logprob(chosen, tuple(zip(ids[:count], values[:count], strict=True)))
        for chosen, values, ids, count in zip(chosen_B, top_BN, ids_BN, counts, strict=True)
    ]

"""Choose the next token of every row of a batch, each with its own parameters.

A row's choice depends on its own logits and generator only, never on the other rows: the cumulative
distribution over token ids is inverted at one uniform number a token.

Shapes: B rows, V vocabulary, b a subset of the rows, N most likely tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

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


def make_generator(params: SamplingParams) -> torch.Generator:
    """The source of a request's random numbers."""
    generator = torch.Generator()
    if params.seed is None:
        generator.seed()
    else:
        generator.manual_seed(params.seed)
    return generator


def sample(
    logits_BV: Tensor, params: Sequence[SamplingParams], generators: Sequence[torch.Generator]
) -> list[Choice]:
    """One choice a row; `generators[i]` advances by one number if row i has a temperature above 0."""
    logits_BV = logits_BV.float()
    best_B, token_B = logits_BV.max(dim=-1)
    rows = [row for row, param in enumerate(params) if param.temperature > 0]
    if rows:
        token_B[rows] = _draw(logits_BV[rows], [params[row] for row in rows], [generators[row] for row in rows])
    # NaN and infinity survive a maximum.
    finite = best_B.isfinite().tolist()
    logprobs = _logprobs(logits_BV, token_B, params)
    return [
        Choice(token if good else None, logprob)
        for token, good, logprob in zip(token_B.tolist(), finite, logprobs, strict=True)
    ]


def _draw(logits_bV: Tensor, params: Sequence[SamplingParams], generators: Sequence[torch.Generator]) -> Tensor:
    device = logits_bV.device
    # Bounded below and with the maximum subtracted first, tiny temperatures do not overflow.
    temperatures = [[max(param.temperature, 1e-6)] for param in params]
    shifted_bV = logits_bV - logits_bV.amax(dim=-1, keepdim=True)
    probs_bV = (shifted_bV / torch.tensor(temperatures, device=device)).softmax(dim=-1)
    filtered = [row for row, param in enumerate(params) if param.top_k > 0 or param.top_p < 1]
    if filtered:
        some_bV = probs_bV[filtered]
        smallest_b1 = _smallest_kept(some_bV, [params[row] for row in filtered])
        probs_bV[filtered] = some_bV * (some_bV >= smallest_b1)
    cdf_bV = probs_bV.cumsum(dim=-1, dtype=torch.float64)
    total_b1 = cdf_bV[:, -1:]
    uniform = [torch.rand(1, 1, generator=generator, dtype=torch.float64) for generator in generators]
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
    rows = [row for row, param in enumerate(params) if param.logprobs is not None]
    result: list[Logprob | None] = [None] * len(params)
    if not rows:
        return result
    logprob_bV = logits_BV[rows].log_softmax(dim=-1)
    chosen_b = logprob_bV.gather(1, token_B[rows][:, None]).squeeze(1).tolist()
    most = min(max(params[row].logprobs or 0 for row in rows), logprob_bV.shape[-1])
    top_bN, ids_bN = (top.tolist() for top in logprob_bV.topk(most, dim=-1))
    for row, chosen, values, ids in zip(rows, chosen_b, top_bN, ids_bN, strict=True):
        count = params[row].logprobs or 0
        result[row] = Logprob(chosen, tuple(zip(ids[:count], values[:count], strict=True)))
    return result

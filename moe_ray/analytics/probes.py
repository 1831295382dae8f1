"""Which experts serve a pattern: their part in prompts that have it against controls that do not.

Shapes: P pairs, S tokens of a prompt, L MoE layers, E experts, R flips.
"""

import numpy as np
from torch import Tensor

from moe_ray.analytics.analysis import SIGNIFICANT, ExpertEffect, PatternProbe
from moe_ray.analytics.collect import run_pieces
from moe_ray.analytics.counts import choices
from moe_ray.analytics.prompts import Prompts, make_prompts
from moe_ray.data.tokenizer import Tokenizer
from moe_ray.models.transformer import Transformer

# Most experts that are listed for a pattern.
_LISTED = 256
_FLIPS = 999
# Tokens of a prompt, and fewer than which no pattern shows.
_LENGTH = 64
MIN_LENGTH = 16


def probe_patterns(model: Transformer, tokenizer: Tokenizer, pairs: int, seed: int) -> tuple[PatternProbe, ...]:
    """Probe all patterns; equal arguments give equal results.

    Args:
        model: in evaluation mode.
            Its context must have room for `MIN_LENGTH` tokens.
        pairs: prompts of a pattern.
    """
    length = min(_LENGTH, model.config.max_sequence_length)
    return tuple(
        probe_pattern(model, prompts, seed)
        for prompts in make_prompts(tokenizer, model.config.vocab_size, pairs, length, seed)
    )


def probe_pattern(model: Transformer, prompts: Prompts, seed: int) -> PatternProbe:
    """Compare the experts' shares of the measured tokens pair by pair."""
    shares_PLE = _shares(model, prompts.prompts_PS, prompts.measured_PS)
    controls_PLE = _shares(model, prompts.controls_PS, prompts.measured_PS)
    z_LE, p_LE = flip_signs(shares_PLE - controls_PLE, seed)
    share_LE, control_LE = shares_PLE.mean(axis=0), controls_PLE.mean(axis=0)
    strongest_L = np.abs(z_LE).argmax(axis=1)
    is_listed_LE = p_LE <= SIGNIFICANT
    is_listed_LE[np.arange(len(strongest_L)), strongest_L] = True
    listed = sorted(np.argwhere(is_listed_LE).tolist(), key=lambda place: -abs(z_LE[tuple(place)]))[:_LISTED]
    numbers = model.config.moe_layers
    effects = [
        ExpertEffect(
            layer=numbers[i],
            expert=e,
            share=share_LE[i, e],
            control_share=control_LE[i, e],
            effect=share_LE[i, e] - control_LE[i, e],
            z=z_LE[i, e],
            p_value=p_LE[i, e],
        )
        for i, e in listed
    ]
    return PatternProbe(
        pattern=prompts.pattern,
        description=prompts.description,
        pairs=len(prompts.prompts_PS),
        tokens=int(prompts.measured_PS.sum()),
        experts=tuple(sorted(effects, key=lambda effect: -effect.effect)),
    )


def flip_signs(differences_PLE: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Whether differences of pairs have a mean other than 0: z and corrected p-value, each [L, E].

    If prompt and control are exchangeable, so is the sign of each pair's differences. z is their sum over the
    root of the sum of their squares, which no flip changes; its largest size over all experts and layers is what
    each is compared with (max-T).
    """
    scale_LE = np.sqrt((differences_PLE**2).sum(axis=0))
    unit_PLE = differences_PLE / np.where(scale_LE > 1e-6, scale_LE, np.inf)
    signs_RP = np.random.default_rng((seed, 3)).choice((-1.0, 1.0), (_FLIPS, len(differences_PLE)))
    largest_R = np.array([np.abs(np.einsum("p,ple->le", signs_P, unit_PLE)).max() for signs_P in signs_RP])
    z_LE = unit_PLE.sum(axis=0)
    beaten_LE = np.searchsorted(np.sort(largest_R), np.abs(z_LE) - 1e-9, side="left")
    return z_LE, (1 + _FLIPS - beaten_LE) / (1 + _FLIPS)


def _shares(model: Transformer, prompts_PS: np.ndarray, measured_PS: np.ndarray) -> np.ndarray:
    """Mean routing weight of each expert over the measured tokens of each prompt, float64 [P, L, E]."""
    parts = []
    for piece, routings in run_pieces(model, prompts_PS):
        weights_BS = measured_PS[piece] / measured_PS[piece].sum(axis=1, keepdims=True)
        parts.append(np.stack([_mean(choices(routing).mass_TE, weights_BS) for routing in routings], axis=1))
    return np.concatenate(parts)


def _mean(mass_TE: Tensor, weights_BS: np.ndarray) -> np.ndarray:
    mass_BSE = mass_TE.double().cpu().numpy().reshape(*weights_BS.shape, -1)
    return np.einsum("bse,bs->be", mass_BSE, weights_BS)

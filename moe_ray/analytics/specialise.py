"""From counts by label to what the experts specialise in.

Shapes: L MoE layers, E experts, M labels, R permutations.
"""

from collections.abc import Sequence

import numpy as np

from moe_ray.analytics.analysis import ExpertPreference, LayerSpecialisation, Specialisation
from moe_ray.analytics.counts import LabelCounts
from moe_ray.analytics.significance import entropy_bits, excess, information_bits, max_t

# Most shares of labels that are listed of one kind.
MAX_SHARES = 1 << 15


def specialisation(counts: LabelCounts, layers: Sequence[int]) -> Specialisation:
    """What the experts of each layer know of the label.

    Args:
        layers: number of each layer in the model.
    """
    labels, mass_LEM = counts.labels, counts.mass_LEM.numpy()
    permuted_RLEM = counts.permuted_RLEM.numpy()
    bits_L = information_bits(mass_LEM)
    permuted_bits_RL = np.stack([information_bits(mass.astype(np.float64)) for mass in permuted_RLEM])
    _, p_L = max_t(bits_L, permuted_bits_RL)
    baseline_L = permuted_bits_RL.mean(axis=0)
    z_LEM, p_LEM = max_t(excess(mass_LEM), np.stack([excess(mass).astype(np.float32) for mass in permuted_RLEM]))
    totals_M = np.bincount(labels.ids_NS.ravel(), minlength=len(labels.names))
    is_listed = mass_LEM.size <= MAX_SHARES
    return Specialisation(
        kind=labels.kind,
        labels=labels.names,
        label_shares=tuple(totals_M / totals_M.sum()),
        label_bits=entropy_bits(totals_M),
        permutations=labels.permutations,
        units=labels.units,
        permuted=labels.permuted,
        layers=tuple(
            LayerSpecialisation(
                layer=number,
                bits=bits_L[i],
                baseline_bits=baseline_L[i],
                excess_bits=bits_L[i] - baseline_L[i],
                p_value=p_L[i],
                shares=_shares(mass_LEM[i]) if is_listed else (),
                experts=_preferences(labels.names, mass_LEM[i], z_LEM[i], p_LEM[i]),
            )
            for i, number in enumerate(layers)
        ),
    )


def _preferences(
    names: Sequence[str], mass_EM: np.ndarray, z_EM: np.ndarray, p_EM: np.ndarray
) -> tuple[ExpertPreference, ...]:
    label_share_M = mass_EM.sum(axis=0) / max(mass_EM.sum(), 1e-30)
    preferences = []
    for expert, (mass_M, z_M) in enumerate(zip(mass_EM, z_EM, strict=True)):
        best = int(z_M.argmax())
        share = float(mass_M[best] / max(mass_M.sum(), 1e-30))
        is_used = mass_M.sum() > 0
        preferences.append(
            ExpertPreference(
                expert=expert,
                label=names[best] if is_used else None,
                share=share,
                lift=share / max(float(label_share_M[best]), 1e-30) if is_used else 0.0,
                z=float(z_M[best]) if is_used else 0.0,
                p_value=float(p_EM[expert, best]) if is_used else 1.0,
            )
        )
    return tuple(preferences)


def _shares(mass_EM: np.ndarray) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(mass_M / max(mass_M.sum(), 1e-30)) for mass_M in mass_EM)

"""How the routing of the same tokens differs between two checkpoints.

Shapes: L MoE layers, T tokens, E experts, W bytes that hold E bits.
"""

from collections.abc import Sequence

import numpy as np

from moe_ray.analytics.analysis import Drift, LayerDrift
from moe_ray.analytics.counts import DriftChoices


def drift(
    before: DriftChoices, after: DriftChoices, steps: tuple[int, int], layers: Sequence[int], num_experts: int
) -> Drift:
    """Drift between two passes over the same text with the same layers.

    Args:
        steps: of both checkpoints.
        layers: number of each layer in the model.
    """
    tables = zip(*before.tables(), *after.tables(), strict=True)
    return Drift(
        from_step=steps[0],
        to_step=steps[1],
        tokens=before.tables()[1].shape[1],
        layers=tuple(
            _layer(number, num_experts, *of_layer) for number, of_layer in zip(layers, tables, strict=True)
        ),
    )


def _layer(
    number: int,
    num_experts: int,
    old_TW: np.ndarray,
    old_first_T: np.ndarray,
    old_second_T: np.ndarray,
    new_TW: np.ndarray,
    new_first_T: np.ndarray,
    new_second_T: np.ndarray,
) -> LayerDrift:
    common_T = np.bitwise_count(old_TW & new_TW).sum(axis=1)
    any_T = np.bitwise_count(old_TW | new_TW).sum(axis=1)
    # Sets that are both empty, as expert choice makes them, are the same.
    jaccard_T = np.where(any_T > 0, common_T / np.maximum(any_T, 1), 1.0)
    has_two_T = (old_second_T < num_experts) & (new_second_T < num_experts)
    swapped_T = (old_first_T == new_second_T) & (old_second_T == new_first_T) & has_two_T
    return LayerDrift(
        layer=number,
        changed=float((old_TW != new_TW).any(axis=1).mean()),
        jaccard=float(jaccard_T.mean()),
        first_changed=float((old_first_T != new_first_T).mean()),
        swapped=float(swapped_T.sum() / has_two_T.sum()) if has_two_T.any() else None,
    )

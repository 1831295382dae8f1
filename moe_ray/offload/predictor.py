"""Which experts the next layer will choose, from which ones it chose before for tokens routed alike.

Shapes: L MoE layers, E experts, T tokens, K experts a token.
"""

import numpy as np

# Counts of an expert are halved when so many tokens were counted, so that old habits are forgotten.
_MOST_COUNTED = 512


class Predictor:
    """Counts pairs of experts that tokens meet in one layer and the next; 4 * L * E * E bytes."""

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self._num_experts = num_experts
        # Tokens of an expert of a layer by expert of the layer after it, and all tokens of it.
        self._pairs_LEE = np.zeros((num_layers - 1, num_experts, num_experts), dtype=np.float32)
        self._tokens_LE = np.zeros((num_layers - 1, num_experts), dtype=np.float32)

    def learn(self, layer: int, before_TK: np.ndarray, after_TK: np.ndarray) -> None:
        """Count what the same tokens chose in a layer and in the next; numbers from E on are no experts."""
        before_TE, after_TE = self._chosen(before_TK), self._chosen(after_TK)
        self._pairs_LEE[layer] += before_TE.T @ after_TE
        self._tokens_LE[layer] += before_TE.sum(axis=0)
        full_E = self._tokens_LE[layer] > _MOST_COUNTED
        if full_E.any():
            self._pairs_LEE[layer, full_E] /= 2
            self._tokens_LE[layer, full_E] /= 2

    def likelihood(self, layer: int, ids_TK: np.ndarray) -> np.ndarray:
        """Of each expert of the layer after this one, that any of the tokens will choose it: [E].

        A token's is the mean over its experts of the share of their tokens that chose it; tokens are taken to
        choose independently.
        """
        chosen_TE = self._chosen(ids_TK)
        shares_EE = self._pairs_LEE[layer] / np.maximum(self._tokens_LE[layer], 1)[:, None]
        share_TE = chosen_TE @ shares_EE / np.maximum(chosen_TE.sum(axis=1, keepdims=True), 1)
        return 1 - np.prod(1 - np.minimum(share_TE, 1), axis=0)

    def _chosen(self, ids_TK: np.ndarray) -> np.ndarray:
        chosen_TE = np.zeros((len(ids_TK), self._num_experts + 1), dtype=np.float32)
        chosen_TE[np.arange(len(ids_TK))[:, None], np.minimum(ids_TK, self._num_experts)] = 1
        return chosen_TE[:, :-1]

"""Which block of a prefix follows which: counts of what was asked, and what they say will be asked next."""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import pairwise

# Blocks whose followers are counted, a few megabytes.
MAX_BLOCKS = 16_384
# Followers of a block, the rarest of which gives way to a new one.
_MAX_FOLLOWERS = 4
# Counts of a block are halved when they reach so much together, so that old habits are forgotten.
_MOST_COUNTED = 16
# A prediction ends where it is less likely than this to have been right so far, or after so many blocks.
_LEAST_LIKELY = 0.5
MAX_PREDICTED = 16


class Successors:
    """Learns from chains of digests; used by one thread.

    Args:
        max_blocks: most blocks whose followers are known; those that were met least recently are forgotten.
    """

    def __init__(self, max_blocks: int = MAX_BLOCKS) -> None:
        self._max_blocks = max_blocks
        self._counts: OrderedDict[bytes, dict[bytes, int]] = OrderedDict()

    def learn(self, chain: Iterable[bytes]) -> None:
        """Count each block of a prompt as the follower of the one before it."""
        for before, after in pairwise(chain):
            counts = self._counts.setdefault(before, {})
            self._counts.move_to_end(before)
            if after not in counts and len(counts) == _MAX_FOLLOWERS:
                del counts[min(counts, key=counts.__getitem__)]
            counts[after] = counts.get(after, 0) + 1
            if sum(counts.values()) >= _MOST_COUNTED:
                self._counts[before] = {digest: count // 2 for digest, count in counts.items() if count > 1}
        while len(self._counts) > self._max_blocks:
            self._counts.popitem(last=False)

    def predict(self, last: bytes) -> Sequence[bytes]:
        """The blocks that will likely follow a prompt which ends with this one, in order."""
        found: list[bytes] = []
        likelihood = 1.0
        while len(found) < MAX_PREDICTED and (counts := self._counts.get(last)):
            last = max(counts, key=counts.__getitem__)
            likelihood *= counts[last] / sum(counts.values())
            if likelihood < _LEAST_LIKELY:
                break
            found.append(last)
        return found

"""How long a queue is in seconds: its length over the rate at which texts end (Little's law)."""

import time
from collections import deque
from collections.abc import Callable

# Before so many texts have ended, or so many seconds of queueing have passed, the rate says nothing.
_FEW_TEXTS = 8
_FEW_SECONDS = 5.0
# The rate is that of the last texts, however long that took.
_LAST_TEXTS = 64


class Pace:
    """Measures only while texts wait: before, batches are not full and texts end otherwise.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since: float | None = None
        self._ends: deque[float] = deque(maxlen=_LAST_TEXTS)

    def record(self, waiting: int, ended: int) -> None:
        """Take note of a step: of the texts that wait after it, and those that ended with it."""
        if not waiting:
            self._since = None
            self._ends.clear()
        elif self._since is None:
            self._since = self._clock()
        else:
            self._ends.extend([self._clock()] * ended)

    def seconds(self, texts: int) -> float:
        """Until so many texts will have ended; 0.0 where nothing is known."""
        if self._since is None:
            return 0.0
        is_full = len(self._ends) == _LAST_TEXTS
        elapsed = self._clock() - (self._ends[0] if is_full else self._since)
        if len(self._ends) < _FEW_TEXTS and elapsed < _FEW_SECONDS:
            return 0.0
        # One more than ended: where none did, the time that passed is a lower bound.
        return texts * elapsed / (len(self._ends) + 1)

"""A circuit breaker: who has failed often is not asked again for a while."""

import threading
import time


class Breaker:
    """Lets operations through until `threshold` in a row have failed, then one trial every `seconds`.

    A trial that succeeds closes it again. Safe for threads, which it does not make wait for one another.
    """

    def __init__(self, threshold: int = 5, seconds: float = 30.0) -> None:
        self._threshold = threshold
        self._seconds = seconds
        self._failures = 0
        self._next_trial = 0.0
        self._lock = threading.Lock()

    def admits(self) -> bool:
        """Whether an operation may be started; its outcome is then told to `succeeded` or `failed`."""
        with self._lock:
            now = time.monotonic()
            if self._failures < self._threshold:
                return True
            if now < self._next_trial:
                return False
            self._next_trial = now + self._seconds
            return True

    def succeeded(self) -> None:
        """An operation got an answer."""
        with self._lock:
            self._failures = 0

    def failed(self) -> None:
        """An operation got none, after all its retries."""
        with self._lock:
            self._failures += 1
            self._next_trial = time.monotonic() + self._seconds

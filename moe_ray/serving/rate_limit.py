"""Limits of requests and tokens a minute: token buckets (Turner 1986), one pair a key.

Each replica keeps to its share of a limit, the limit divided by the replicas that run. So a key whose requests all
meet one replica gets less than its limit, never more but for what is below. A request is let in while tokens are
left, and pays for what it took when it ends: a key may overdraw by the requests that it has running, and then
waits until the debt is paid.
"""

import math
import time
from collections.abc import Callable

from moe_ray.errors import RequestError
from moe_ray.serving.api_keys import ApiKey


class Bucket:
    """Holds up to a minute's worth, at least one, and fills steadily.

    Args:
        per_minute: the limit at this moment.
        clock: seconds.
    """

    def __init__(self, per_minute: Callable[[], float], clock: Callable[[], float]) -> None:
        self._per_minute = per_minute
        self._clock = clock
        self._filled = clock()
        self._level = max(per_minute(), 1.0)

    def wait(self) -> float:
        """Seconds until it holds one; 0: now."""
        now, per_minute = self._clock(), self._per_minute()
        self._level = min(self._level + (now - self._filled) * per_minute / 60, max(per_minute, 1.0))
        self._filled = now
        return max(1.0 - self._level, 0.0) * 60 / per_minute

    def take(self, amount: float) -> None:
        """Take more than there is if need be."""
        self._level -= amount


class RateLimiter:
    """What each key may still do.

    Args:
        count_replicas: how many share the limits now.
    """

    def __init__(self, count_replicas: Callable[[], int], clock: Callable[[], float] = time.monotonic) -> None:
        self._count_replicas = count_replicas
        self._clock = clock
        self._requests: dict[str, Bucket] = {}
        self._tokens: dict[str, Bucket] = {}

    def admit(self, key: ApiKey) -> None:
        """Count a request.

        Raises:
            RequestError: the key has used up its limit (429).
        """
        requests = self._bucket(self._requests, key.name, key.requests_per_minute)
        tokens = self._bucket(self._tokens, key.name, key.tokens_per_minute)
        for bucket, kind in ((requests, "requests"), (tokens, "tokens")):
            seconds = bucket.wait() if bucket else 0.0
            # Sums of floats may miss a full one by rounding.
            if seconds > 1e-6:
                raise RequestError(
                    f"the key {key.name!r} has used up its {kind} of this minute.",
                    f"try again in {math.ceil(seconds)} s.",
                    status=429,
                    code="rate_limit_exceeded",
                    retry_after=math.ceil(seconds),
                )
        if requests:
            requests.take(1)

    def charge(self, key: ApiKey, tokens: int) -> None:
        """Count tokens that a request took."""
        bucket = self._bucket(self._tokens, key.name, key.tokens_per_minute)
        if bucket:
            bucket.take(tokens)

    def _bucket(self, buckets: dict[str, Bucket], name: str, limit: int | None) -> Bucket | None:
        if limit is None:
            return None
        if name not in buckets:
            buckets[name] = Bucket(lambda: limit / max(self._count_replicas(), 1), self._clock)
        return buckets[name]

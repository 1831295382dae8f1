"""What others ask of a training process while it trains: to save, to make way for another world, to stop.

Whoever asks does so on any rank, from any thread; the ranks learn of it in the exchange of the next step and act
together.
"""

import signal
import threading
from collections.abc import Sequence
from enum import IntEnum


class Request(IntEnum):
    """What is asked, in the order of weight."""

    SAVE = 0
    RESTART = 1
    STOP = 2


_asked: set[Request] = set()
_lock = threading.Lock()


def ask(request: Request) -> None:
    """Ask this process."""
    with _lock:
        _asked.add(request)


def asked() -> list[float]:
    """What this rank adds to the exchange: one number for each kind of request."""
    with _lock:
        return [float(request in _asked) for request in Request]


def answered(request: Request) -> None:
    """The ranks have acted."""
    with _lock:
        _asked.discard(request)


def heaviest(sums: Sequence[float]) -> Request | None:
    """The weightiest request that any rank made."""
    return max((request for request in Request if sums[request] > 0), default=None)


def restart_on_sigterm() -> None:
    """Take SIGTERM as the notice that this process or its node will go. Call it on the main thread."""
    signal.signal(signal.SIGTERM, lambda *_: ask(Request.RESTART))

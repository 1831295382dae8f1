"""Log lines that say the same again and again are left out, and counted."""

import logging
import re
import threading
from dataclasses import dataclass

_MOST = 5
_SECONDS = 60.0
_KEPT = 1000
_NUMBERS = re.compile(r"\d+")


@dataclass
class _Window:
    began: float
    lines: int = 0


class Repeats(logging.Filter):
    """Lets through five lines a minute that differ in nothing but numbers.

    The next one afterwards has the attribute `suppressed`: how many were left out before it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._windows: dict[tuple[str, int, str], _Window] = {}
        self._lock = threading.Lock()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the line is written."""
        key = (record.name, record.levelno, _NUMBERS.sub("#", record.getMessage()))
        with self._lock:
            window = self._windows.get(key)
            if window is None or record.created - window.began >= _SECONDS:
                record.suppressed = max(0, window.lines - _MOST) if window else 0
                self._forget(record.created)
                window = self._windows[key] = _Window(record.created)
            window.lines += 1
            return window.lines <= _MOST

    def _forget(self, now: float) -> None:
        """Keep the table small: those whose time has passed without a further line, but not what they counted."""
        if len(self._windows) >= _KEPT:
            old = [key for key, window in self._windows.items() if now - window.began >= _SECONDS]
            for key in old or list(self._windows):
                del self._windows[key]

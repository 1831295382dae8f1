"""Where the time of a training step goes."""

import time
from collections import defaultdict
from collections.abc import Generator
from contextlib import contextmanager

import torch


class PhaseClock:
    """Exclusive seconds of named phases: a phase inside another is not counted in the outer one.

    On CUDA the device is synchronised at every border while the clock is enabled, so enable it only for the
    steps that are reported.
    """

    def __init__(self, device: torch.device, enabled: bool = True) -> None:
        self.enabled = enabled
        self._device = device
        self._seconds: dict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def phase(self, name: str) -> Generator[None]:
        """Count the time inside the `with` block as `name`."""
        if not self.enabled:
            yield
            return
        self._cross_border()
        self._open.append(name)
        try:
            yield
        finally:
            self._cross_border()
            self._open.pop()

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call."""
        seconds, self._seconds = dict(self._seconds), defaultdict(float)
        return seconds

    def _cross_border(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        if self._open:
            self._seconds[self._open[-1]] += now - self._since
        self._since = now

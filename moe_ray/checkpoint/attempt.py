"""Which start of the workers trains a run: one that was taken for dead must not touch its successors' work."""

from collections.abc import Callable
from dataclasses import dataclass

from moe_ray.errors import ConfigError
from moe_ray.storage import Storage

_FILE = "attempt"


@dataclass(frozen=True)
class Attempt:
    """One start of the workers.

    Attributes:
        run: the storage of the run.
        name: no other start has it.
        is_ours: whether the job of this start still trains the run.
    """

    run: Storage
    name: str
    is_ours: Callable[[], bool]

    def claim(self) -> None:
        """Make this the start that trains the run.

        Raises:
            ConfigError: another job trains it.
            StorageError: the storage cannot be written now.
        """
        if not self.is_ours():
            raise self._superseded()
        self.run.write(_FILE, self.name.encode())

    def check(self) -> None:
        """Raise unless this still is the start that trains the run; asked before anything of it is changed.

        Raises:
            ConfigError: another job or a later start of this one trains it.
            StorageError: the storage cannot be read now.
        """
        if not self.is_ours():
            raise self._superseded()
        # Last, so that least time passes between this look and what follows.
        try:
            current = self.run.read(_FILE).decode(errors="replace")
        except FileNotFoundError:
            current = ""
        if current != self.name:
            raise self._superseded()

    def _superseded(self) -> ConfigError:
        return ConfigError(
            f"the run {self.run.uri!r} is trained by another job, or by a later start of this one.",
            "leave it to that job, or stop it and run this command again.",
        )

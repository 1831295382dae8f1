"""Only one driver trains a run: who holds its lease says so in a file, again and again."""

import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from moe_ray.errors import ConfigError, StorageError
from moe_ray.storage.base import Storage
from moe_ray.storage.breaker import Breaker
from moe_ray.storage.lock import try_lock
from moe_ray.storage.uri import open_storage

_logger = logging.getLogger(__name__)
LEASE = "driver.json"
_RENEWALS = 3
_POLLS = 15
_SETTLING = 10


def _never() -> bool:
    return False


@contextmanager
def hold(
    storage: Storage, name: str = LEASE, seconds: float = 15.0, stop_waiting: Callable[[], bool] = _never
) -> Generator["Lease"]:
    """Hold the lease of a run while the block runs.

    A lease whose holder has died is taken over: at once where both are of one machine that can lock the folder,
    else after the file has not changed for `seconds`. Clocks of different machines are never compared.

    Two that start at the same moment are told apart by reading back. Should one be so slow that both go on, then
    `Lease.is_mine` of the earlier one becomes False, and `fence` keeps it from publishing.

    Args:
        storage: the folder of the run.
        name: file of the lease.
        seconds: silence after which a holder counts as dead; it renews its lease three times as often.
        stop_waiting: asked while another's lease is watched; when true, the lease is given up.

    Raises:
        ConfigError: another job trains the run, or may still do so when waiting was stopped.
        StorageError: storage failed for longer than it is retried.
    """
    with try_lock(storage.local) as locked:
        if locked is False:
            raise _refusal(storage, _read(storage, name))
        _wait_until_free(storage, name, seconds, stop_waiting, locked is True)
        lease = Lease(storage, name, seconds, _take(storage, name, seconds))
        try:
            yield lease
        finally:
            lease.end()


def fence(storage: Storage, token: str, name: str = LEASE) -> bool:
    """Whether the lease still is the one with this token; asked before something is published in its name.

    Raises:
        StorageError: it could not be read.
    """
    content = _read(storage, name)
    return content is not None and _parse(content).token == token


class Lease:
    """A lease that is held."""

    def __init__(self, storage: Storage, name: str, seconds: float, claim: "_Claim") -> None:
        # Renewals that come late are worse than none: another may have the lease by then.
        interval = seconds / _RENEWALS
        self._storage = open_storage(storage.uri, retry_seconds=interval, breaker=Breaker(seconds=interval))
        self._name = name
        self._interval = interval
        self._claim = claim
        self._lost = threading.Event()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    @property
    def token(self) -> str:
        """Tells this lease from all others; workers give it to `fence`."""
        return self._claim.token

    def is_mine(self) -> bool:
        """Whether nobody has taken the lease over or removed it; a storage that fails is no sign of that."""
        if not self._lost.is_set():
            with suppress(StorageError):
                self._look()
        return not self._lost.is_set()

    def end(self) -> None:
        """Stop renewing, and remove the file if it still is this lease's."""
        self._ended.set()
        self._thread.join()
        try:
            if self._look():
                self._storage.delete(self._name)
        except StorageError as error:
            _logger.warning("the lease stays behind, and delays the next start: %s", error.problem)

    def _look(self) -> bool:
        if not fence(self._storage, self.token, self._name):
            self._lost.set()
        return not self._lost.is_set()

    def _renew(self) -> None:
        while not self._ended.wait(self._interval):
            try:
                if not self._look():
                    _logger.error("another job has taken over the run %s", self._storage.uri)
                    return
                self._claim = replace(self._claim, renewals=self._claim.renewals + 1)
                self._storage.write(self._name, self._claim.encoded())
            except StorageError as error:
                _logger.warning("the lease could not be renewed: %s", error.problem)


@dataclass(frozen=True)
class _Claim:
    """Content of a lease file. One that nobody here wrote has empty fields."""

    token: str = ""
    host: str = ""
    machine: str = ""
    pid: int = 0
    since: str = ""
    renewals: int = 0

    def encoded(self) -> bytes:
        return json.dumps(asdict(self)).encode()


def _parse(content: bytes) -> _Claim:
    try:
        return _Claim(**json.loads(content))
    except (ValueError, TypeError):
        return _Claim()


def _new_claim() -> _Claim:
    since = datetime.now(UTC).isoformat(timespec="seconds")
    return _Claim(secrets.token_hex(16), socket.gethostname(), _machine(), os.getpid(), since)


def _machine() -> str:
    """What tells this machine from all others, and from itself before it was started anew."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()


def _read(storage: Storage, name: str) -> bytes | None:
    try:
        return storage.read(name)
    except FileNotFoundError:
        return None


def _wait_until_free(
    storage: Storage, name: str, seconds: float, stop_waiting: Callable[[], bool], locked: bool
) -> None:
    """Return when there is no lease, or its holder has shown no life for `seconds`."""
    content = _read(storage, name)
    if content is None or (locked and _parse(content).machine == _machine()):
        return
    first_seen = last_seen = time.monotonic()
    while last_seen - first_seen < seconds:
        time.sleep(seconds / _POLLS)
        now_there = _read(storage, name)
        if now_there is None:
            return
        if now_there != content or stop_waiting():
            raise _refusal(storage, now_there)
        now = time.monotonic()
        if now - last_seen > seconds / _RENEWALS:
            # Storage was away, for the holder as well.
            first_seen = now
        last_seen = now


def _take(storage: Storage, name: str, seconds: float) -> _Claim:
    """Write a claim, and see that no other was written over it."""
    claim = _new_claim()
    storage.write(name, claim.encoded())
    time.sleep(seconds / _SETTLING)
    content = _read(storage, name)
    if content is None or _parse(content).token != claim.token:
        raise _refusal(storage, content)
    return claim


def _refusal(storage: Storage, content: bytes | None) -> ConfigError:
    holder = _parse(content) if content is not None else _Claim()
    who = f" (host {holder.host}, process {holder.pid}, since {holder.since})" if holder.token else ""
    return ConfigError(
        f"the run {storage.uri!r} is being trained by another job{who}.",
        "wait for it or stop it, or set another train.name.",
    )

"""Follow a run: a replica moves to each newer good checkpoint between two requests.

The new weights are loaded beside the old ones in a thread of their own. Each request is answered to its end by the
service that was the newest when it came; a service that has been replaced is closed after its last request.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from moe_ray.checkpoint.catalog import cache_folder, checkpoint_name, list_steps, read_step
from moe_ray.config import build_config
from moe_ray.errors import CheckpointError, ConfigError, StorageError
from moe_ray.serving.completions import CompletionService
from moe_ray.serving.engine.stats import EngineStats
from moe_ray.storage import open_storage
from moe_ray.storage.lock import try_lock

_logger = logging.getLogger(__name__)


@dataclass
class _Serving:
    """A service, its routes, and how many requests are with it."""

    service: CompletionService
    app: Any
    active: int = 0


class Follower:
    """The ASGI application of the newest good checkpoint of a run.

    A checkpoint that is damaged or of another architecture is refused once, with a line in the log. Replicas of a
    node load one after another.

    Args:
        run: path or address of the run.
        load: makes a service of a checkpoint, given its path or address; raises CheckpointError if it is damaged.
        make: the routes of a service.
        poll_seconds: between two looks at the run.
    """

    def __init__(
        self,
        run: str,
        load: Callable[[str], CompletionService],
        make: Callable[[CompletionService], ASGIApp],
        poll_seconds: float,
    ) -> None:
        self._run = open_storage(run)
        self._load, self._make, self._poll_seconds = load, make, poll_seconds
        self._refused: set[int] = set()
        service = load(run)
        self._current = _Serving(service, make(service))
        # Guards the current service, the counts and the end.
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._follow, name="follow", daemon=True)
        self._thread.start()

    @property
    def is_ready(self) -> bool:
        """Whether requests are answered."""
        return self._current.service.is_ready

    def stats(self) -> EngineStats:
        """Of the newest service; one that has been replaced holds only what it finishes."""
        return self._current.service.stats()

    @property
    def routes(self) -> Sequence[Any]:
        """Those of the application; Serve names requests by them."""
        return self._current.app.routes

    @property
    def router(self) -> Any:
        """The application's, for the same."""
        return self._current.app.router

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer with the service that is the newest now."""
        if scope["type"] != "http":
            # A lifespan lasts as long as the server and is no request of a service.
            return await self._current.app(scope, receive, send)
        with self._changed:
            serving = self._current
            serving.active += 1
        try:
            await serving.app(scope, receive, send)
        finally:
            with self._changed:
                serving.active -= 1
                self._changed.notify_all()

    def close(self) -> None:
        """Stop to follow, and stop the engine."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        self._current.service.close()

    def _follow(self) -> None:
        while not self._wait(lambda: False, self._poll_seconds):
            try:
                # Another replica of this node loads now if the lock is held: this one's turn comes later.
                with try_lock(cache_folder(self._run)) as held:
                    service = self._load_newer() if held is not False else None
                if service is not None:
                    self._replace(service)
            except (OSError, StorageError) as error:
                _logger.warning("the run cannot be followed now: %s", error)
            except Exception:
                # The old weights go on serving whatever happens here.
                _logger.exception("a newer checkpoint could not be served")

    def _wait(self, condition: Callable[[], bool], seconds: float | None = None) -> bool:
        """Until the condition is true or the time is up; returns whether to end."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or condition(), seconds)
            return self._closing

    def _load_newer(self) -> CompletionService | None:
        """The service of the newest good checkpoint that is newer than the current one."""
        for step in reversed(list_steps(self._run)):
            if step <= self._current.service.step:
                break
            if step in self._refused:
                continue
            # Refused before it is tried: a failure that is not of the storage would recur at each look.
            self._refused.add(step)
            try:
                self._check_architecture(step)
                return self._load(self._run.child(checkpoint_name(step)).uri)
            except (CheckpointError, ConfigError) as error:
                _logger.warning("refused the checkpoint of step %d: %s", step, error)
            except (OSError, StorageError):
                self._refused.discard(step)
                raise
        return None

    def _check_architecture(self, step: int) -> None:
        if build_config(read_step(self._run, step).config).model != self._current.service.architecture:
            raise CheckpointError(
                f"{checkpoint_name(step)} is of another architecture.", "start the application again to serve it."
            )

    def _replace(self, service: CompletionService) -> None:
        new, old = _Serving(service, self._make(service)), self._current
        with self._changed:
            self._current = new
        _logger.info("serving the checkpoint of step %d", service.step)
        self._wait(lambda: not old.active)
        old.service.close()

"""What answers requests: an engine in a thread of this process, or another program behind the same methods."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

from moe_ray.serving.engine.request import Request
from moe_ray.serving.engine.stats import EngineStats

if TYPE_CHECKING:
    from moe_ray.serving.engine.thread import Stream

T = TypeVar("T")


class EngineService(Protocol):
    """Accepts requests from event loops; see `EngineThread` for what each method promises."""

    @property
    def is_alive(self) -> bool:
        """Whether requests are accepted; once false it stays so."""
        ...

    def check(self, requests: Sequence[Request]) -> None:
        """Raise a RequestError (400) if one cannot be served."""
        ...

    def submit(self, requests: Sequence[Request]) -> "Stream":
        """Queue all requests or none."""
        ...

    def cancel(self, request_ids: Sequence[str]) -> None:
        """Drop requests; those that have ended are ignored."""
        ...

    async def call(self, function: Callable[[], T]) -> T:
        """Run a function of the model where the model is; a RequestError (400) if that is elsewhere."""
        ...

    def stats(self) -> EngineStats:
        """What the engine has done and holds."""
        ...

    def stop(self) -> None:
        """End all requests with an error, and the engine."""
        ...

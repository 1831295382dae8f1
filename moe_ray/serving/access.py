"""What stands before the routes: request ids, API keys, rate limits, audit log and counts, as ASGI middleware."""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moe_ray.errors import RequestError
from moe_ray.serve_config import ServeConfig
from moe_ray.serving.api_keys import ApiKey, find_key, load_keys
from moe_ray.serving.audit import AuditLog
from moe_ray.serving.metrics import NO_KEY, Metrics
from moe_ray.serving.rate_limit import RateLimiter
from moe_ray.serving.responses import error_response
from moe_ray.serving.usage import Usage, begin_usage, new_id

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

REQUEST_ID = "x-request-id"
_ALLOWED_ID = re.compile(r"[A-Za-z0-9._-]{1,100}")
# Open to all: these say nothing of anybody's texts.
_OPEN = frozenset({"/healthz", "/readyz", "/openapi.json"})


@dataclass(frozen=True)
class Access:
    """Who may use an application, and what is written down of it.

    Attributes:
        keys: none: anybody may.
        count_replicas: how many share the limits of the keys now.
        answers_id: whether answers get the request id here; Ray Serve adds it itself.
        metrics: where requests are counted.
    """

    keys: tuple[ApiKey, ...] = ()
    audit: AuditLog | None = None
    count_replicas: Callable[[], int] = lambda: 1
    answers_id: bool = True
    metrics: Metrics = field(default_factory=Metrics)


def open_access(
    config: ServeConfig,
    replica: str,
    count_replicas: Callable[[], int],
    answers_id: bool = True,
    counts: "tuple[DataclassInstance, ...]" = (),
) -> Access:
    """The access that the settings give.

    Args:
        replica: what its metrics are labelled with.
        counts: objects whose numbers /metrics shows beside the engine's.

    Raises:
        ConfigError: the keys cannot be read, or the audit log not be written.
    """
    audit = None if config.audit_log is None else AuditLog(config.audit_log, config.audit_prompts)
    return Access(load_keys(config.api_keys_file), audit, count_replicas, answers_id, Metrics(replica, counts))


def identify(keys: Sequence[ApiKey], authorization: str) -> ApiKey | None:
    """Whose key an Authorization header holds."""
    scheme, _, presented = authorization.partition(" ")
    return find_key(keys, presented.strip()) if scheme.lower() == "bearer" else None


class Observer:
    """Gives each request its id; counts it and writes it down when it has ended, however that was."""

    def __init__(self, app: ASGIApp, access: Access, routes: Sequence[BaseRoute] = ()) -> None:
        self._app = app
        self._access = access
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.monotonic()
        status, first_seconds = "none", None
        given = Headers(scope=scope).get(REQUEST_ID)
        is_good = given is None or _ALLOWED_ID.fullmatch(given) is not None
        usage = begin_usage(given if given is not None and is_good else new_id())

        async def watch(message: Message) -> None:
            nonlocal status, first_seconds
            if message["type"] == "http.response.start":
                status = str(message["status"])
                if self._access.answers_id:
                    MutableHeaders(scope=message)[REQUEST_ID] = usage.request_id
            elif message.get("more_body") and message.get("body") and first_seconds is None:
                first_seconds = time.monotonic() - began
            await send(message)

        try:
            if is_good:
                await self._app(scope, receive, watch)
            else:
                fix = "send up to 100 letters, digits, dots, dashes and underscores."
                await error_response(RequestError(f"{REQUEST_ID} is not allowed.", fix))(scope, receive, watch)
        finally:
            self._end(scope, status, usage, time.monotonic() - began, first_seconds)

    def _end(self, scope: Scope, status: str, usage: Usage, seconds: float, first_seconds: float | None) -> None:
        route = self._route_of(scope)
        self._access.metrics.count(route, status, usage, seconds, first_seconds)
        audit = self._access.audit
        if audit is not None:
            fields = {
                "request_id": usage.request_id,
                "key": usage.key.name if usage.key else NO_KEY,
                "method": scope["method"],
                "route": route,
                "status": status,
                "prompt_tokens": usage.prompt_tokens,
                "completion_tokens": usage.completion_tokens,
                "seconds": round(seconds, 4),
            }
            audit.write(fields | ({"prompt": usage.prompt} if audit.with_prompts else {}))

    def _route_of(self, scope: Scope) -> str:
        """The path of the route and not of the request, whose variety has no end."""
        if "route" in scope:
            return scope["route"].path
        # Refused before a route was looked for.
        paths = {route.path for route in self._routes if isinstance(route, Route)}
        return scope["path"] if scope["path"] in paths else "unknown"


class Guard:
    """Lets requests with a key in that has not used up its limits; without keys all."""

    def __init__(self, app: ASGIApp, access: Access, usage: Callable[[], Usage]) -> None:
        self._app = app
        self._keys = access.keys
        self._limiter = RateLimiter(access.count_replicas)
        self._usage = usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application, or refuse."""
        if scope["type"] != "http" or not self._keys or scope["path"] in _OPEN:
            await self._app(scope, receive, send)
            return
        try:
            key = self._identify(Headers(scope=scope).get("authorization", ""))
            usage = self._usage()
            usage.key = key
            self._limiter.admit(key)
        except RequestError as error:
            await error_response(error)(scope, receive, send)
            return
        try:
            await self._app(scope, receive, send)
        finally:
            self._limiter.charge(key, usage.prompt_tokens + usage.completion_tokens)

    def _identify(self, authorization: str) -> ApiKey:
        key = identify(self._keys, authorization)
        if key is None:
            fix = "send Authorization: Bearer KEY with a key of this server."
            raise RequestError("the API key is missing or wrong.", fix, status=401, code="invalid_api_key")
        return key

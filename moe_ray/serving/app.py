"""The HTTP routes. Every answer that is no success has OpenAI's error body."""

import asyncio
import json
import logging
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NoReturn

from fastapi import FastAPI
from fastapi.routing import APIRoute
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moe_ray.errors import RequestError
from moe_ray.serving.access import Access, Guard, Observer
from moe_ray.serving.completions import CompletionService
from moe_ray.serving.crowd import Crowd
from moe_ray.serving.metrics import Metrics
from moe_ray.serving.openai.chat import ChatCompletion, ChatCompletionChunk, ChatRequest
from moe_ray.serving.openai.completions import Completion, CompletionRequest
from moe_ray.serving.openai.document import describe, document_requests
from moe_ray.serving.openai.embeddings import EmbeddingRequest, Embeddings, RoutingRequest, Routings
from moe_ray.serving.openai.errors import ANY, GUARDED, error_body, error_responses
from moe_ray.serving.openai.models import Model, ModelList, Status
from moe_ray.serving.responses import error_response, json_response
from moe_ray.serving.usage import current_usage

_logger = logging.getLogger(__name__)


def make_app(service: CompletionService, access: Access | None = None) -> FastAPI:
    """The ASGI application that serves a model; without an access to anybody, as in tests."""
    access = access or Access()
    access.metrics.watch(service.stats)
    app = FastAPI(title="moe_ray", docs_url=None, redoc_url=None, redirect_slashes=False)
    # Each goes around those before it.
    app.add_middleware(Shortcut, routes=app.routes)
    app.add_middleware(Guard, access=access, usage=current_usage)
    app.add_middleware(Crowd, most=service.max_http_requests)
    app.add_middleware(ErrorBoundary)
    app.add_middleware(Observer, access=access, routes=app.routes)
    app.exception_handler(RequestError)(_answer_request_error)
    app.exception_handler(HTTPException)(_answer_http_exception)
    _add_model_routes(app, service)
    _add_health_routes(app, service, access.metrics)

    @app.post("/v1/completions", **describe(CompletionRequest, Completion, Completion))
    async def complete(request: Request) -> Response:
        """Continue a text."""
        return await service.complete(await read_json(request, service.max_body_bytes, service.max_body_seconds))

    @app.post("/v1/chat/completions", **describe(ChatRequest, ChatCompletion, ChatCompletionChunk))
    async def chat(request: Request) -> Response:
        """Answer a conversation."""
        return await service.chat(await read_json(request, service.max_body_bytes, service.max_body_seconds))

    @app.post("/v1/embeddings", **describe(EmbeddingRequest, Embeddings))
    async def embed(request: Request) -> Response:
        """Turn texts into vectors."""
        return await service.embed(await read_json(request, service.max_body_bytes, service.max_body_seconds))

    @app.post("/v1/routing", **describe(RoutingRequest, Routings))
    async def route(request: Request) -> Response:
        """Show which experts each token of a text meets."""
        return await service.route(await read_json(request, service.max_body_bytes, service.max_body_seconds))

    document_requests(app, needs_key=bool(access.keys))
    return app


def _add_model_routes(app: FastAPI, service: CompletionService) -> None:
    @app.get("/v1/models", responses={200: {"model": ModelList}, **error_responses(*GUARDED)})
    async def list_models() -> Response:
        """The one model that is served."""
        return json_response({"object": "list", "data": [service.model_body]})

    @app.get("/v1/models/{name:path}", responses={200: {"model": Model}, **error_responses(*GUARDED, 404)})
    async def get_model(name: str) -> Response:
        """One model."""
        service.check_model(name)
        return json_response(service.model_body)


def _add_health_routes(app: FastAPI, service: CompletionService, metrics: Metrics) -> None:
    @app.get("/healthz", responses={200: {"model": Status}, **error_responses(*ANY)})
    async def is_alive() -> Response:
        """The process answers."""
        return json_response({"status": "ok"})

    @app.get("/readyz", responses={200: {"model": Status}, **error_responses(*ANY, 503)})
    async def is_ready() -> Response:
        """The model is loaded and its engine runs."""
        if not service.is_ready:
            raise RequestError("the engine has stopped.", "try again later.", status=503, code="overloaded")
        return json_response({"status": "ok"})

    text = {"content": {"text/plain": {"schema": {"type": "string"}}}}
    found = {200: {"description": "Prometheus' text format.", **text}, **error_responses(*GUARDED)}

    @app.get("/metrics", response_class=PlainTextResponse, responses=found)
    async def show_metrics() -> Response:
        """The metrics of the replica that answers."""
        return Response(metrics.text(), media_type=CONTENT_TYPE_PLAIN_0_0_4)


async def read_json(request: Request, max_bytes: int, max_seconds: float) -> dict[str, Any]:
    """Read a JSON object, never more than `max_bytes` of it, nor for longer than `max_seconds`.

    Raises:
        RequestError: the body is too large (413), too slow (408), not declared as JSON (415) or no JSON object
            (400).
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise RequestError(
            f"the content type is {media_type[:100]!r}.", "send Content-Type: application/json.", status=415
        )
    length = request.headers.get("content-length", "")
    body = bytearray()
    if not (length.isascii() and length.isdigit() and int(length[:20]) > max_bytes):
        try:
            async with asyncio.timeout(max_seconds):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > max_bytes:
                        break
                else:
                    return _decode(bytes(body))
        except TimeoutError:
            raise RequestError(
                f"the body did not come within {max_seconds:g} s.", "send all of it at once.", status=408
            ) from None
    raise RequestError(f"the body is larger than {max_bytes} bytes.", "send less at a time.", status=413)


def _decode(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(
            body.decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_refuse_duplicates
        )
    except RecursionError:
        raise RequestError("the body is nested too deeply.", "send flat JSON.") from None
    except ValueError as error:
        raise RequestError(f"the body is not valid JSON: {str(error)[:200]}.", "send a JSON object.") from None
    if not isinstance(value, dict):
        raise RequestError("the body is no JSON object.", 'send {"model": …, "prompt": …}.')
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a key occurs twice")
    return value


async def _answer_request_error(_: Request, error: RequestError) -> Response:
    return error_response(error)


async def _answer_http_exception(request: Request, error: HTTPException) -> Response:
    problem = f"{request.method} {request.url.path[:200]}: {error.detail}."
    body = error_body(RequestError(problem, "see /openapi.json for the routes.", status=error.status_code))
    return json_response(body, error.status_code, dict(error.headers or {}))


class Shortcut:
    """Answers POST requests past FastAPI's own layers, which cost more than all of ours together.

    Args:
        routes: those of the application, which may be added later.
    """

    def __init__(self, app: ASGIApp, routes: Sequence[BaseRoute]) -> None:
        self._app = app
        self._routes = routes

    @cached_property
    def _posts(self) -> dict[str, APIRoute]:
        routes = [route for route in self._routes if isinstance(route, APIRoute)]
        return {route.path: route for route in routes if "POST" in (route.methods or ())}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the endpoint of the path, or else the application."""
        route = self._posts.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if route is None:
            await self._app(scope, receive, send)
            return
        scope["route"] = route
        try:
            response = await route.endpoint(Request(scope, receive))
        except RequestError as error:
            response = error_response(error)
        await response(scope, receive, send)


class ErrorBoundary:
    """Answers what no handler expected with a bare 500 that names the request id of the log."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application."""
        started = False

        async def watch(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, watch)
        except ClientDisconnect:
            _logger.info("a client left before its request was complete")
        except Exception:
            if started or scope["type"] != "http":
                raise
            request_id = current_usage().request_id
            _logger.exception("request %r failed", request_id)
            error = RequestError(f"internal error in request {request_id}.", "try again.", status=500)
            await error_response(error)(scope, receive, send)

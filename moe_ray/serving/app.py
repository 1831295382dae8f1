"""The HTTP routes. Every answer that is no success has OpenAI's error body."""

import json
import logging
from typing import Any, NoReturn

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moe_ray.errors import RequestError
from moe_ray.serving.completions import CompletionService
from moe_ray.serving.openai.base import to_json
from moe_ray.serving.openai.chat import ChatCompletion, ChatCompletionChunk, ChatRequest
from moe_ray.serving.openai.completions import Completion, CompletionRequest
from moe_ray.serving.openai.document import describe, document_requests
from moe_ray.serving.openai.embeddings import EmbeddingRequest, Embeddings, RoutingRequest, Routings
from moe_ray.serving.openai.errors import error_body, error_responses
from moe_ray.serving.openai.models import Model, ModelList, Status

_logger = logging.getLogger(__name__)
_RETRY_AFTER_SECONDS = "1"


def make_app(service: CompletionService) -> FastAPI:
    """The ASGI application that serves a model."""
    app = FastAPI(title="moe_ray", docs_url=None, redoc_url=None, redirect_slashes=False)
    app.add_middleware(ErrorBoundary)
    app.exception_handler(RequestError)(_answer_request_error)
    app.exception_handler(HTTPException)(_answer_http_exception)
    _add_model_routes(app, service)
    _add_health_routes(app, service)

    @app.post("/v1/completions", **describe(CompletionRequest, Completion, Completion))
    async def complete(request: Request) -> Response:
        """Continue a text."""
        return await service.complete(await read_json(request, service.max_body_bytes))

    @app.post("/v1/chat/completions", **describe(ChatRequest, ChatCompletion, ChatCompletionChunk))
    async def chat(request: Request) -> Response:
        """Answer a conversation."""
        return await service.chat(await read_json(request, service.max_body_bytes))

    @app.post("/v1/embeddings", **describe(EmbeddingRequest, Embeddings))
    async def embed(request: Request) -> Response:
        """Turn texts into vectors."""
        return await service.embed(await read_json(request, service.max_body_bytes))

    @app.post("/v1/routing", **describe(RoutingRequest, Routings))
    async def route(request: Request) -> Response:
        """Show which experts each token of a text meets."""
        return await service.route(await read_json(request, service.max_body_bytes))

    document_requests(app)
    return app


def _add_model_routes(app: FastAPI, service: CompletionService) -> None:
    @app.get("/v1/models", responses={200: {"model": ModelList}, **error_responses(500)})
    async def list_models() -> Response:
        """The one model that is served."""
        return _json({"object": "list", "data": [service.model_body]})

    @app.get("/v1/models/{name:path}", responses={200: {"model": Model}, **error_responses(404, 500)})
    async def get_model(name: str) -> Response:
        """One model."""
        service.check_model(name)
        return _json(service.model_body)


def _add_health_routes(app: FastAPI, service: CompletionService) -> None:
    @app.get("/healthz", responses={200: {"model": Status}, **error_responses(500)})
    async def is_alive() -> Response:
        """The process answers."""
        return _json({"status": "ok"})

    @app.get("/readyz", responses={200: {"model": Status}, **error_responses(500, 503)})
    async def is_ready() -> Response:
        """The model is loaded and its engine runs."""
        if not service.is_ready:
            raise RequestError("the engine has stopped.", "try again later.", status=503, code="overloaded")
        return _json({"status": "ok"})


async def read_json(request: Request, max_bytes: int) -> dict[str, Any]:
    """Read a JSON object, never more than `max_bytes` of it.

    Raises:
        RequestError: the body is too large (413), not declared as JSON (415) or no JSON object (400).
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise RequestError(
            f"the content type is {media_type[:100]!r}.", "send Content-Type: application/json.", status=415
        )
    length = request.headers.get("content-length", "")
    body = bytearray()
    if not (length.isascii() and length.isdigit() and int(length[:20]) > max_bytes):
        async for chunk in request.stream():
            body += chunk
            if len(body) > max_bytes:
                break
        else:
            return _decode(bytes(body))
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


def _json(body: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(to_json(body), status, headers, media_type="application/json")


async def _answer_request_error(_: Request, error: RequestError) -> Response:
    headers = {"retry-after": _RETRY_AFTER_SECONDS} if error.status == 503 else None
    return _json(error_body(error), error.status, headers)


async def _answer_http_exception(request: Request, error: HTTPException) -> Response:
    problem = f"{request.method} {request.url.path[:200]}: {error.detail}."
    body = error_body(RequestError(problem, "see /openapi.json for the routes.", status=error.status_code))
    return _json(body, error.status_code, dict(error.headers or {}))


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
            request_id = Request(scope).headers.get("x-request-id", "unknown")[:100]
            _logger.exception("request %r failed", request_id)
            error = RequestError(f"internal error in request {request_id}.", "try again.", status=500)
            await _json(error_body(error), 500)(scope, receive, send)

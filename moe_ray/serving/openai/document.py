"""What `/openapi.json` says of the routes with a body."""

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from moe_ray.serving.openai.base import Answer, Fields
from moe_ray.serving.openai.chat import ChatCompletionChunk, ChatRequest
from moe_ray.serving.openai.completions import CompletionRequest
from moe_ray.serving.openai.embeddings import EmbeddingRequest, RoutingRequest
from moe_ray.serving.openai.errors import ENGINE, GENERATING, error_responses

_OPEN = ("/healthz", "/readyz")
_REFERENCE = "#/components/schemas/{model}"
# FastAPI finds the other bodies itself.
_BODIES: tuple[type[BaseModel], ...] = (
    CompletionRequest,
    ChatRequest,
    EmbeddingRequest,
    RoutingRequest,
    ChatCompletionChunk,
)


def describe(body: type[Fields], answer: type[Answer], event: type[Answer] | None = None) -> dict[str, Any]:
    """FastAPI's arguments of a route that reads its body itself.

    Args:
        event: what the events of a stream hold; None: the route does not stream.
    """
    success: dict[str, Any] = {"model": answer}
    if event is not None:
        said = f"With stream: events that each hold a {event.__name__} or, last, an ErrorBody; then [DONE]."
        success["content"] = {"text/event-stream": {"schema": {"type": "string", "description": said}}}
    schema = {"$ref": _REFERENCE.format(model=body.__name__)}
    request = {"required": True, "content": {"application/json": {"schema": schema}}}
    errors = error_responses(*(GENERATING if "timeout" in body.model_fields else ENGINE))
    return {"responses": {200: success, **errors}, "openapi_extra": {"requestBody": request}}


def document_requests(app: FastAPI, needs_key: bool) -> None:
    """Add the schemas that `describe` refers to, and the API key, to the document of an application."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        document = generate()
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        _, found = models_json_schema([(body, "validation") for body in _BODIES], ref_template=_REFERENCE)
        schemas.update(found["$defs"])
        _forget_validation(document)
        if needs_key:
            document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            for path, operations in document["paths"].items():
                for operation in operations.values():
                    operation["security"] = [] if path in _OPEN else [{"key": []}]
        return document

    # As FastAPI's documentation says to extend it.
    app.openapi = openapi


def _forget_validation(document: dict[str, Any]) -> None:
    """Drop the 422 that FastAPI adds to each route with a parameter: ours take any text."""
    for path in document["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        document["components"]["schemas"].pop(name, None)

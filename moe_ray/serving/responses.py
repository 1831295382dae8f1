"""JSON answers, and those to errors."""

from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from moe_ray.errors import RequestError
from moe_ray.serving.openai.base import to_json
from moe_ray.serving.openai.errors import error_body

_RETRY_AFTER_SECONDS = 1


def json_response(body: Mapping[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A JSON answer."""
    return Response(to_json(body), status, headers, media_type="application/json")


def error_response(error: RequestError) -> Response:
    """The answer to a request that failed, in OpenAI's form."""
    headers = {}
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    if error.status in (429, 503):
        headers["retry-after"] = str(error.retry_after or _RETRY_AFTER_SECONDS)
    return json_response(error_body(error), error.status, headers)

"""The error body, and which statuses each route may answer."""

from typing import Any, Literal

from moe_ray.errors import RequestError
from moe_ray.serving.openai.base import Answer

# Every status that is no success, by what it means.
STATUSES = {
    400: "The request is malformed, or a field is unknown, unsupported or out of range.",
    401: "The API key is missing or wrong.",
    404: "There is no such model or route.",
    405: "The route has another method.",
    408: "The body did not come in time.",
    413: "The body is too large.",
    415: "The body is not declared as JSON.",
    429: "The API key has used up a limit; Retry-After says when to come back.",
    500: "The server failed; the log names the request id.",
    503: "There is no room, none in time, or the engine has stopped; Retry-After says when to come back.",
    504: "The request's timeout passed before its answer was complete.",
}
# Those of every route; of those that need a key; of those with a body that the engine works on; of those with a
# timeout.
ANY = (400, 500)
GUARDED = (*ANY, 401, 429)
ENGINE = (*GUARDED, 404, 408, 413, 415, 503)
GENERATING = (*ENGINE, 504)


class ErrorDetails(Answer):
    """What was wrong and what to do about it."""

    message: str
    type: Literal["invalid_request_error", "server_error"]
    param: str | None
    code: str | None


class ErrorBody(Answer):
    """The body of every answer that is no success."""

    error: ErrorDetails


def error_body(error: RequestError) -> dict[str, Any]:
    """An `ErrorBody`."""
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    return {"error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}}


def error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """FastAPI's `responses` of a route that may answer these statuses."""
    return {status: {"model": ErrorBody, "description": STATUSES[status]} for status in statuses}

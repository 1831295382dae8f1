"""Refuse requests in OpenAI's form before Ray Serve, which holds more of them, does so in plain text."""

from starlette.types import ASGIApp, Receive, Scope, Send

from moe_ray.errors import RequestError
from moe_ray.serving.responses import error_response


class Crowd:
    """Lets a number of POST requests in at a time; those of probes always.

    Args:
        most: well above what the engine holds: slow clients that send or read count too.
    """

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app = app
        self._most = most
        self._inside = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application, or refuse."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        if self._inside >= self._most:
            problem = f"{self._inside} requests are being read, answered or waited for already."
            error = RequestError(problem, "try again later.", status=503, code="overloaded")
            await error_response(error)(scope, receive, send)
            return
        self._inside += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._inside -= 1

"""Tells of alerts: in the log, and by a webhook that nobody waits for."""

import http.client
import ipaddress
import json
import logging
import os
import queue
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

from moe_ray.errors import ConfigError
from moe_ray.telemetry.alerts import Alert, State

WEBHOOK_VARIABLE = "MOE_RAY_WEBHOOK_URL"
_TIMEOUT_SECONDS = 5.0
_PAUSES = (0.5, 2.0, 8.0)
_QUEUED = 256
_logger = logging.getLogger(__name__)

Notify = Callable[[Alert], None]


def log_alert(alert: Alert) -> None:
    """A line in the log, with the action while it fires."""
    if alert.state is State.RESOLVED:
        _logger.info("%s", alert.summary)
        return
    level = logging.ERROR if alert.rule.severity == "critical" else logging.WARNING
    _logger.log(level, "%s: %s. Fix: %s", alert.rule.name, alert.summary, alert.rule.action)


class Webhook:
    """POSTs each alert as JSON, from a thread; what cannot be sent is said in the log and given up.

    The body is `Alert.record()` with a `text` for people, which chat services show. The URL, whose path is a
    secret with most services, is in no log line; redirects are not followed.

    Raises:
        ConfigError: the URL is not https, nor http to this machine.
    """

    def __init__(self, url: str) -> None:
        self._url = _checked(url)
        self._queue: queue.Queue[Alert | None] = queue.Queue(_QUEUED)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._send_all, name="webhook", daemon=True)
        self._thread.start()

    def __call__(self, alert: Alert) -> None:
        """Send soon."""
        try:
            self._queue.put_nowait(alert)
        except queue.Full:
            _logger.error("too many alerts wait for the webhook; %s is not sent", alert.rule.name)

    def close(self, seconds: float = 10.0) -> None:
        """Send what waits, but no longer than that."""
        self._closing.set()
        try:
            self._queue.put(None, timeout=seconds)
        except queue.Full:
            return
        self._thread.join(seconds)

    def _send_all(self) -> None:
        while (alert := self._queue.get()) is not None:
            self._send(alert)

    def _send(self, alert: Alert) -> None:
        is_over = alert.state is State.RESOLVED
        text = alert.summary if is_over else f"[{alert.state}] {alert.rule.name}: {alert.summary}"
        body = json.dumps({"text": text, **alert.record()}).encode()
        reason = ""
        for pause in (*_PAUSES, None):
            try:
                status = self._post(body)
            except (OSError, ValueError, http.client.HTTPException) as error:
                reason = type(error).__name__
            else:
                reason = f"status {status}"
                if 200 <= status < 300:
                    return
                if status < 500 and status != 429:
                    break
            if pause is None or self._closing.wait(pause):
                break
        _logger.error("the webhook at %s did not take %s: %s", self._url.hostname, alert.rule.name, reason)

    def _post(self, body: bytes) -> int:
        url = self._url
        kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
        connection = kind(url.hostname or "", url.port, timeout=_TIMEOUT_SECONDS)
        path = (url.path or "/") + (f"?{url.query}" if url.query else "")
        try:
            connection.request("POST", path, body, {"Content-Type": "application/json"})
            return connection.getresponse().status
        finally:
            connection.close()


def open_webhook(file: str | None) -> Webhook | None:
    """The webhook whose URL stands in a file or else in `MOE_RAY_WEBHOOK_URL`; None without either.

    Raises:
        ConfigError: the file cannot be read, or the URL is not allowed.
    """
    url = os.environ.get(WEBHOOK_VARIABLE)
    if file is not None:
        try:
            url = Path(file).expanduser().read_text(encoding="utf-8").strip()
        except (OSError, ValueError):
            raise ConfigError(
                f"telemetry.webhook_file={file!r} cannot be read.", "name a file that holds the URL."
            ) from None
    return Webhook(url) if url else None


def tell(alerts: Iterable[Alert], notify: Iterable[Notify]) -> None:
    """Each of the alerts to each of those who want to know."""
    for alert in alerts:
        for one in notify:
            one(alert)


def _checked(url: str) -> SplitResult:
    fix = "give an https:// URL, or an http:// one of this machine, such as http://127.0.0.1:9000/alerts."
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        raise ConfigError("the webhook's URL is malformed.", fix) from None
    is_local = parts.scheme == "http" and _is_loopback(parts.hostname or "")
    if not parts.hostname or parts.username is not None or not (parts.scheme == "https" or is_local):
        raise ConfigError(f"the webhook's URL, to {parts.hostname!r}, is not safe.", fix)
    return parts


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

"""A headless Chromium that opens a page from a file and tells what became of it."""

import asyncio
import base64
import contextlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest

_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--remote-debugging-port=0",
)
_SECONDS = 90


@dataclass
class Tab:
    """An open page.

    Attributes:
        errors: uncaught exceptions, and messages of the console that are errors or warnings.
        requests: URLs that the page asked for, without itself and `data:`.
    """

    socket: aiohttp.ClientWebSocketResponse
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    _number: int = 0

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        """A command of the DevTools protocol."""
        self._number += 1
        await self.socket.send_json({"id": self._number, "method": method, "params": params})
        while True:
            message = await self.socket.receive_json(timeout=_SECONDS)
            if message.get("id") == self._number:
                assert "error" not in message, message
                return message["result"]
            self._note(message)

    async def evaluate(self, expression: str) -> Any:
        """Value of a JavaScript expression, awaited if it is a promise."""
        result = await self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    async def screenshot(self, path: Path) -> None:
        """The whole page as a PNG."""
        result = await self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(result["data"]))

    async def print(self, path: Path) -> None:
        """The page as a PDF."""
        path.write_bytes(base64.b64decode((await self.call("Page.printToPDF", printBackground=True))["data"]))

    def _note(self, message: dict[str, Any]) -> None:
        params = message.get("params", {})
        match message.get("method"):
            case "Runtime.exceptionThrown":
                self.errors.append(str(params["exceptionDetails"]))
            case "Runtime.consoleAPICalled" if params["type"] in ("error", "warning", "assert"):
                self.errors.append(str(params["args"]))
            case "Log.entryAdded" if params["entry"]["level"] in ("error", "warning"):
                self.errors.append(params["entry"]["text"])
            case "Network.requestWillBeSent":
                url = params["request"]["url"]
                if not url.startswith(("data:", "file:")):
                    self.requests.append(url)


def chromium() -> str:
    """The program; skips the test where there is none."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    pytest.skip("there is no Chromium; Debian's package is chromium")


@contextlib.asynccontextmanager
async def opened(page: Path, width: int, *, scheme: str = "light") -> AsyncIterator[Tab]:
    """The page in a window of this width, once its charts are drawn.

    Args:
        scheme: of colours that the user prefers, light or dark.
    """
    with tempfile.TemporaryDirectory(prefix="chr-", ignore_cleanup_errors=True) as profile:
        command = [chromium(), *_FLAGS, f"--user-data-dir={profile}", "about:blank"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        try:
            port = await asyncio.wait_for(asyncio.to_thread(_port, process), _SECONDS)
            async with aiohttp.ClientSession(trust_env=False) as session:
                async with session.get(f"http://127.0.0.1:{port}/json/list") as response:
                    (target,) = [each for each in await response.json() if each["type"] == "page"]
                async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                    yield await _open(Tab(socket), page, width, scheme)
        finally:
            process.kill()
            process.communicate()


async def _open(tab: Tab, page: Path, width: int, scheme: str) -> Tab:
    for domain in ("Page", "Runtime", "Log", "Network"):
        await tab.call(f"{domain}.enable")
    await tab.call(
        "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
    )
    media = [{"name": "prefers-color-scheme", "value": scheme}]
    await tab.call("Emulation.setEmulatedMedia", features=media)
    await tab.call("Page.navigate", url=page.absolute().as_uri())
    look = "const look = () => document.body?.dataset.drawn ? done(true) : setTimeout(look, 50); look()"
    await asyncio.wait_for(tab.evaluate(f"new Promise(done => {{ {look} }})"), _SECONDS)
    return tab


def _port(process: subprocess.Popen[str]) -> int:
    """Chromium says on stderr where it listens."""
    assert process.stderr is not None
    for line in process.stderr:
        if match := re.search(r"ws://127\.0\.0\.1:(\d+)/", line):
            return int(match[1])
    raise AssertionError("Chromium ended before it listened")

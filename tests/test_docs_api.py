"""The examples of the page on the HTTP API run against a real server."""

import json
import shlex
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator

import pytest

from moe_ray.serve_config import ServeConfig
from moe_ray.serving.openai.chat import ChatRequest
from moe_ray.serving.openai.completions import CompletionRequest
from moe_ray.serving.openai.errors import STATUSES
from moe_ray.serving.reference import document
from tests.chat_model import NAME, load_chat_model, served, write_chat_folder
from tests.test_docs import ROOT, blocks


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = write_chat_folder(tmp_path_factory.mktemp("hf") / NAME)
    with served(load_chat_model(folder), ServeConfig()) as url:
        yield url


def test_client_example(url: str) -> None:
    (snippet,) = blocks("api", "python")
    command = [sys.executable, "-c", snippet.replace("http://127.0.0.1:8000", url)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    assert set(json.loads(lines[-2])) == {"animal", "legs"}
    assert lines[-1] == "2 32"


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
@pytest.mark.parametrize(("example", "key"), [(0, "choices"), (1, "data")])
def test_curl_examples(url: str, example: int, key: str) -> None:
    command = (
        blocks("api", "bash")[example]
        .replace("http://127.0.0.1:8000", url)
        .replace("MODEL", NAME)
        .replace("\\\n", "")
    )
    output = subprocess.run(shlex.split(command), check=True, capture_output=True, text=True).stdout
    assert json.loads(output)[key]


def test_the_document_is_what_an_endpoint_with_keys_says(url: str) -> None:
    written = json.loads((ROOT / "docs" / "openapi.json").read_text(encoding="utf-8"))
    assert written == document(), "docs/openapi.json is stale: make docs"
    assert written["components"].pop("securitySchemes") == {"key": {"type": "http", "scheme": "bearer"}}
    for operations in written["paths"].values():
        for operation in operations.values():
            operation.pop("security")
    assert json.loads(urllib.request.urlopen(f"{url}/openapi.json", timeout=30).read()) == written


def test_page_names_every_field_and_status() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    unsupported = {"suffix", "tools", "tool_choice", "parallel_tool_calls", "functions", "function_call"}
    unsupported |= {"modalities", "audio", "prediction", "service_tier", "store"}
    for name in {*CompletionRequest.model_fields, *ChatRequest.model_fields} - unsupported:
        assert f"`{name}`" in page or f"`{name}." in page, name
    for status in STATUSES:
        assert f"| {status} |" in page

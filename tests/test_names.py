"""Names that come from outside lead to no other file, and ids of one key's requests are of no use to another."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from moe_ray.checkpoint.manifest import FileEntry, Manifest, decode_manifest, encode_manifest
from moe_ray.config import build_config
from moe_ray.data.shards import Index, Shard, read_index, write_index
from moe_ray.errors import CheckpointError, ConfigError, DataError
from moe_ray.serve_config import ServeConfig
from moe_ray.serving.access import open_access
from moe_ray.serving.api_keys import load_keys, make_key
from tests.chat_model import NAME, load_chat_model, served, write_chat_folder

OUTSIDE = ["../x", "/etc/passwd", "a/../../x", "a/b", "~/x", "%2e%2e/x", "..", ""]
BODY = {"model": NAME, "prompt": "the cat", "max_tokens": 2, "temperature": 0}


@pytest.mark.parametrize("name", [*OUTSIDE, ".", "a\0b", "a\\b"])
def test_of_a_run(name: str) -> None:
    with pytest.raises(ConfigError, match=r"train\.name"):
        build_config({"train": {"name": name}}, [])


@pytest.mark.parametrize("name", [*OUTSIDE, "train-../x-00000.bin"])
def test_of_prepared_data(tmp_path: Path, name: str) -> None:
    shard = Shard(name, "train", "a", 1, 1, 1, "0", "0")
    write_index(tmp_path, Index("0", 0, 10, "0", "<u2", ("a",), (shard,)))
    with pytest.raises(DataError, match="no shard"):
        read_index(tmp_path)


@pytest.mark.parametrize("name", OUTSIDE)
def test_of_a_file_of_a_checkpoint(name: str) -> None:
    entry = FileEntry(name=name, kind="model", size=1, checksum="0")
    numbers = dict.fromkeys(("step", "tokens", "data_position", "rng_seed", "world_size", "ep"), 1)
    manifest = Manifest(data_digest="0", metrics={}, config={}, files=(entry,), **numbers)
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        decode_manifest(encode_manifest(manifest), "manifest.json")


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", "a b", "~"])
def test_of_a_key(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("MOE_RAY_API_KEYS", make_key("a")[1].replace("a", name, 1))
    with pytest.raises(ConfigError, match="no API key"):
        load_keys(None)


@dataclass(frozen=True)
class Endpoint:
    """A guarded endpoint, with the headers of two keys."""

    http: httpx.Client
    first: dict[str, str]
    second: dict[str, str]


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    folder = tmp_path_factory.mktemp("endpoint")
    keys = [make_key(name) for name in ("first", "second")]
    file = folder / "keys"
    file.write_text("\n".join(line for _, line in keys))
    file.chmod(0o600)
    config = ServeConfig(api_keys_file=str(file))
    model = load_chat_model(write_chat_folder(folder / NAME))
    with (
        served(model, config, open_access(config, "r1", lambda: 1)) as url,
        httpx.Client(base_url=url, timeout=60) as http,
    ):
        yield Endpoint(http, *({"authorization": f"Bearer {key}"} for key, _ in keys))


def test_no_route_but_those_of_health_answers_without_a_key(endpoint: Endpoint) -> None:
    paths = endpoint.http.get("/openapi.json").json()["paths"]
    assert len(paths) > 5
    for path, methods in paths.items():
        for method in methods:
            answer = endpoint.http.request(method, path.replace("{model}", NAME), json={})
            assert answer.status_code == (200 if path in ("/healthz", "/readyz") else 401), path


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "..", "%2e%2e%2fx", f"{NAME}/../../x"])
def test_of_a_model(endpoint: Endpoint, name: str) -> None:
    answer = endpoint.http.post("/v1/completions", json=BODY | {"model": name}, headers=endpoint.first)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    assert "root:" not in answer.text
    assert endpoint.http.get(f"/v1/models/{name}", headers=endpoint.first).status_code == 404


@pytest.mark.parametrize("name", ["../x", "a/b", "/etc/passwd", "~"])
def test_of_a_request(endpoint: Endpoint, name: str) -> None:
    answer = endpoint.http.post("/v1/completions", json=BODY, headers=endpoint.first | {"x-request-id": name})
    assert answer.status_code == 400


def test_a_request_is_not_visible_to_another_key(endpoint: Endpoint) -> None:
    """Not by its id, not in metrics, and not by asking with the same id again."""
    http, mine = endpoint.http, {"x-request-id": "secret-id-1"}
    first = http.post("/v1/completions", json=BODY, headers=endpoint.first | mine).json()
    for route in ("completions", "chat/completions", "responses", "requests"):
        for known in ("secret-id-1", first["id"]):
            answer = http.get(f"/v1/{route}/{known}", headers=endpoint.second)
            assert answer.status_code == 404, route
    assert "secret-id-1" not in http.get("/metrics", headers=endpoint.second).text
    again = http.post("/v1/completions", json=BODY | {"prompt": "the mat"}, headers=endpoint.second | mine)
    assert again.status_code == 200
    assert again.json()["id"] != first["id"]
    alone = http.post("/v1/completions", json=BODY | {"prompt": "the mat"}, headers=endpoint.second).json()
    assert again.json()["choices"] == alone["choices"]

"""Replicas that come, go and are killed under load, on a cluster of its own behind either proxy."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import yaml

from cluster.ingress import find_haproxy
from cluster.local import ClusterError, LocalCluster
from cluster.processes import find_marked
from tests.chat_model import NAME, write_chat_folder
from tests.conftest import free_port
from tests.waiting import until

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(900)]
PATIENCE = 300
MOST = 4
# Tokens: longer than a deployment takes, than replicas take to go, and of other requests.
LONG, MIDDLE, SHORT = 20_000, 8_000, 40


class Endpoint:
    """A cluster that serves a tiny model, and what the dashboard says of its replicas."""

    def __init__(self, folder: Path, proxy: str) -> None:
        self.folder, self.proxy = folder, proxy
        self.cluster = LocalCluster(folder / "cluster")
        self.model = write_chat_folder(folder / NAME, max_context=2 * LONG)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.settings: dict[str, str] = {}

    def start(self) -> None:
        self.head = self.cluster.start(MOST + 4, self.proxy)
        self.env = os.environ | self.cluster.environment(self.head)

    def deploy(self, **settings: object) -> None:
        """Put settings into effect, and wait until only replicas that have them run."""
        defaults = {"min_replicas": 2, "max_replicas": MOST, "scale_down_seconds": 5, "runner": "torch"}
        defaults["kv_cache_bytes"] = 2**27
        args = {f"serve.{name}": str(value) for name, value in (defaults | settings).items()}
        # Serve keeps replicas that have them already.
        old = set() if args == self.settings else set(self.replicas("RUNNING"))
        self.settings = args
        application = {
            "name": "moe_lm",
            "import_path": "serve_apps.moe_lm:build",
            "args": {"checkpoint": str(self.model), "serve.weights_folder": "", **args},
        }
        options = {"host": "127.0.0.1", "port": self.port}
        file = self.folder / "serve.yaml"
        file.write_text(yaml.safe_dump({"http_options": options, "applications": [application]}))
        command = [str(Path(sys.executable).parent / "serve"), "deploy", str(file)]
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=PATIENCE)
        assert not done.returncode, done.stderr
        until(lambda: (running := set(self.replicas("RUNNING"))) and not running & old, PATIENCE)

    def deployment(self) -> dict[str, Any]:
        """What the dashboard knows; a busy machine, or a controller that starts anew, answers late."""
        answers: list[Any] = []

        def ask() -> bool:
            with suppress(ClusterError):
                answers.append(self.cluster.get(self.head, "/api/serve/applications/")["applications"])
            return bool(answers)

        until(ask, PATIENCE)
        return answers[0].get("moe_lm", {}).get("deployments", {}).get("LanguageModel", {})

    def wanted(self) -> int:
        return self.deployment().get("target_num_replicas", 0)

    def replicas(self, state: str) -> list[int]:
        """Processes of the replicas in a state."""
        return [replica["pid"] for replica in self.deployment().get("replicas", ()) if replica["state"] == state]

    def processes(self, title: str) -> list[int]:
        """Those of the cluster with a title."""
        found = []
        for process in find_marked(self.head.temp_dir):
            with suppress(psutil.NoSuchProcess):  # it has ended since
                found += [process.pid] if title in " ".join(process.cmdline()) else []
        return found

    def kill(self, pid: int) -> None:
        """End a process of the cluster as a crash does."""
        assert pid in {process.pid for process in find_marked(self.head.temp_dir)}
        os.kill(pid, signal.SIGKILL)

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=PATIENCE, trust_env=False)


@pytest.fixture(scope="module", params=["haproxy", pytest.param("plain", marks=pytest.mark.exhaustive)])
def endpoint(request) -> Iterator[Endpoint]:
    if request.param == "haproxy" and find_haproxy() is None:
        pytest.skip("there is no HAProxy")
    # Paths of sockets are short.
    with tempfile.TemporaryDirectory(prefix="rs-", dir="/tmp") as folder:
        endpoint = Endpoint(Path(folder), request.param)
        try:
            endpoint.start()
            yield endpoint
        finally:
            endpoint.cluster.stop()


def body(**fields: object) -> dict:
    return {"model": NAME, "prompt": "the cat", "max_tokens": SHORT, "ignore_eos": True, **fields}


@contextmanager
def load(clients: int, ask: Callable[[], None]) -> Iterator[None]:
    """Clients that ask again and again; at the end raises what one of them met."""
    done = threading.Event()

    def work() -> None:
        while not done.is_set():
            ask()

    with ThreadPoolExecutor(clients) as pool:
        asking = [pool.submit(work) for _ in range(clients)]
        try:
            yield
        finally:
            done.set()
    for future in asking:
        future.result()


class Asker:
    """Asks for short texts, once or as patiently as the `openai` client does by itself."""

    def __init__(self, endpoint: Endpoint, is_patient: bool = False) -> None:
        self._client = endpoint.client()
        self._patient = openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key="none", http_client=endpoint.client())
        self._is_patient = is_patient
        self.count = 0

    def __call__(self) -> None:
        if self._is_patient:
            self._patient.completions.create(model=NAME, prompt="the cat", max_tokens=SHORT)
        else:
            answer = self._client.post("/v1/completions", json=body())
            assert answer.status_code == 200, answer.text
        self.count += 1


def read_stream(endpoint: Endpoint, begun: threading.Semaphore, tokens: int) -> list[str]:
    """The events of a stream."""
    fields = {"max_tokens": tokens, "stream": True}
    events: list[str] = []
    with endpoint.client() as client, client.stream("POST", "/v1/completions", json=body(**fields)) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            if line.startswith("data: "):
                events.append(line[6:])
                if len(events) == 1:
                    begun.release()
    return events


@contextmanager
def streams(
    endpoint: Endpoint, count: int, tokens: int = LONG, wait: bool = True
) -> Iterator[list[Future[list[str]]]]:
    """Long streams, which have begun unless that is not waited for; they have ended when the context has."""
    begun = threading.Semaphore(0)
    with ThreadPoolExecutor(count) as pool:
        futures = [pool.submit(read_stream, endpoint, begun, tokens) for _ in range(count)]
        for _ in futures if wait else ():
            assert begun.acquire(timeout=PATIENCE)
        yield futures


def assert_whole(streams: list[Future[list[str]]]) -> None:
    for stream in streams:
        events = stream.result()
        assert events[-1] == "[DONE]"
        assert json.loads(events[-2])["choices"][0]["finish_reason"] == "length"


def test_replicas_come_and_go_with_the_load_and_finish_their_streams(endpoint: Endpoint) -> None:
    endpoint.deploy()
    with ExitStack() as stack:
        with load(24, Asker(endpoint)):
            until(lambda: len(endpoint.replicas("RUNNING")) == MOST, PATIENCE)
            # Two replicas are enough for them.
            running = stack.enter_context(streams(endpoint, 6, MIDDLE))
        until(lambda: endpoint.wanted() == 2, PATIENCE)
        assert not any(stream.done() for stream in running)
    assert_whole(running)


@pytest.mark.exhaustive
def test_another_deployment_cuts_no_stream_and_fails_no_request(endpoint: Endpoint) -> None:
    endpoint.deploy()
    with streams(endpoint, 4) as running, load(2, Asker(endpoint)):
        endpoint.deploy(max_queued_requests=63)
        assert not any(stream.done() for stream in running)
    assert_whole(running)


def kill_one(endpoint: Endpoint, asker: Asker) -> None:
    """Kill a replica; answers come before and after Serve has noticed."""
    victim, before = endpoint.replicas("RUNNING")[0], asker.count
    endpoint.kill(victim)
    until(lambda: victim not in endpoint.replicas("RUNNING"), PATIENCE)
    until(lambda: asker.count > before + 16, PATIENCE)


def test_a_killed_replica_loses_no_answer(endpoint: Endpoint) -> None:
    endpoint.deploy(min_replicas=3)
    asker = Asker(endpoint, is_patient=endpoint.proxy == "plain")
    with load(8, asker):
        for _ in range(3):
            until(lambda: len(endpoint.replicas("RUNNING")) >= 3, PATIENCE)
            kill_one(endpoint, asker)


def waiting_requests(endpoint: Endpoint, asked: int) -> dict[str, float]:
    """Of each replica; so many are asked at a time, as the proxy asks the one with less to do."""
    with ThreadPoolExecutor(asked) as pool, endpoint.client() as client:
        texts = list(pool.map(lambda _: client.get("/metrics").text, range(asked)))
    pattern = re.compile(r"^moe_serve_waiting({.*}) (.*)$", re.MULTILINE)
    return {labels: float(value) for text in texts for labels, value in pattern.findall(text)}


@pytest.mark.exhaustive
def test_only_what_has_not_begun_is_asked_again(endpoint: Endpoint) -> None:
    # So many that either replica has some of each.
    few = 4
    endpoint.deploy(max_replicas=2, max_batch_size=1)
    until(lambda: len(waiting_requests(endpoint, few)) == 2, PATIENCE)
    # More than HAProxy keeps.
    large = body(user="x" * 200_000)
    with (
        endpoint.client() as client,
        ThreadPoolExecutor(few) as pool,
        streams(endpoint, 2, MIDDLE) as begun,
        streams(endpoint, few, SHORT, wait=False) as waiting,
    ):
        until(lambda: sum(waiting_requests(endpoint, few).values()) == few, PATIENCE)
        posted = [pool.submit(client.post, "/v1/completions", json=large) for _ in range(few)]
        until(lambda: sum(waiting_requests(endpoint, 2 * few).values()) == 2 * few, PATIENCE)
        endpoint.kill(endpoint.replicas("RUNNING")[0])
    (broken,) = (stream for stream in begun if stream.exception())
    assert type(broken.exception()) is httpx.RemoteProtocolError
    assert_whole([stream for stream in begun if stream is not broken])
    # HAProxy closes some connections instead of answering.
    cut = [future for future in posted if isinstance(future.exception(), httpx.RemoteProtocolError)]
    codes = [future.result().status_code for future in posted if future not in cut]
    assert set(codes) <= {200, 500}
    assert 0 < codes.count(200) < few
    if endpoint.proxy == "haproxy":
        assert_whole(waiting)
    else:
        refused = [stream for stream in waiting if stream.exception()]
        assert 0 < len(refused) < few
        assert {type(stream.exception()) for stream in refused} == {httpx.HTTPStatusError}


@pytest.mark.exhaustive
def test_a_new_controller_keeps_the_replicas(endpoint: Endpoint) -> None:
    endpoint.deploy()
    asker = Asker(endpoint)
    with load(24, asker):
        until(lambda: len(endpoint.replicas("RUNNING")) == MOST, PATIENCE)
        (controller,) = endpoint.processes("ServeController")
        replicas = endpoint.replicas("RUNNING")
        endpoint.kill(controller)
        until(lambda: endpoint.processes("ServeController") not in ([controller], []), PATIENCE)
        until(lambda: endpoint.replicas("RUNNING"), PATIENCE)
        before = asker.count
        while asker.count < before + 500:
            assert set(endpoint.replicas("RUNNING")) == set(replicas)
            assert endpoint.wanted() == MOST

"""What the monitor observes of a Ray cluster and of endpoints: nodes, replicas, and what Ray's agents report."""

import atexit
import http.client
import json
import multiprocessing
import time
import urllib.request
from collections.abc import Collection, Iterable, Iterator

from prometheus_client.parser import text_string_to_metric_families

from moe_ray.telemetry.catalogue import CATALOGUE
from moe_ray.telemetry.rules import RULES
from moe_ray.telemetry.samples import Sample

_SECONDS = 5.0
_JOIN_SECONDS = 30.0
# Ray ends a driver after a minute without its cluster.
_HUNG_SECONDS = 120.0
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
_NAMES = {CATALOGUE[term.metric].exposed_name: term.metric for rule in RULES for term in rule.terms}


def endpoint_samples(urls: Iterable[str]) -> list[Sample]:
    """Whether each endpoint's `/readyz` answers."""
    return [Sample("moe_cluster_ready", {"app": url}, float(_is_ready(url))) for url in urls]


def _is_ready(url: str) -> bool:
    try:
        with _opener.open(f"{url.rstrip('/')}/readyz", timeout=_SECONDS) as answer:
            return answer.status == 200
    except (OSError, ValueError, http.client.HTTPException):
        return False


class ClusterWatch:
    """Observes the Ray cluster that RAY_ADDRESS names; what died before the first answer counts as known.

    A driver whose cluster goes away hangs for a minute and is then ended by Ray: another process is the driver, is
    not waited for longer than a few seconds, and is replaced when it ends.

    Attributes:
        agents: addresses of the nodes' metrics agents, as of the last answer.
    """

    def __init__(self) -> None:
        self.agents: list[str] = []
        self._wait_seconds = _JOIN_SECONDS
        self._asked_at: float | None = None
        self._start()

    def samples(self) -> list[Sample]:
        """Nodes, and replicas by state.

        Raises:
            OSError: the cluster does not answer, or not in time.
        """
        is_hung = self._asked_at is not None and time.monotonic() - self._asked_at > _HUNG_SECONDS
        if is_hung or not self._driver.is_alive():
            self._driver.kill()
            self._driver.join()
            self._start()
        if self._asked_at is None:
            self._asked_at = time.monotonic()
            self._pipe.send_bytes(b"samples")
        wait_seconds, self._wait_seconds = self._wait_seconds, _SECONDS
        if not self._pipe.poll(wait_seconds):
            raise TimeoutError(f"Ray has not answered for {time.monotonic() - self._asked_at:.0f} s")
        self._asked_at = None
        try:
            reply = json.loads(self._pipe.recv_bytes())
        except EOFError:
            raise OSError("Ray has ended its driver: the cluster is gone") from None
        if "error" in reply:
            raise OSError(reply["error"])
        self.agents = reply["agents"]
        return [Sample(*sample) for sample in reply["samples"]]

    def _start(self) -> None:
        # Here, so that a monitor without a cluster does not import Ray.
        from cluster.ray_state import answer

        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._driver = context.Process(target=answer, args=(theirs,), name="ray-driver", daemon=True)
        self._driver.start()
        # While it waits for a cluster it heeds no milder signal.
        atexit.register(self._driver.kill)
        # Else the end of the driver would not be noticed.
        theirs.close()
        self._asked_at = None


def agent_samples(urls: Iterable[str], watched: Collection[str] = ()) -> list[Sample]:
    """What metrics agents of nodes report of what rules look at.

    Args:
        watched: runs whose logs are followed: what agents say of them would be counted twice.

    Raises:
        OSError: an agent does not answer.
        ValueError: it answers something else than metrics.
    """
    return [sample for url in urls for sample in _scrape(url) if sample.labels.get("run") not in watched]


def _scrape(url: str) -> Iterator[Sample]:
    with _opener.open(url, timeout=_SECONDS) as answer:
        text = answer.read().decode()
    # Of thousands of lines, those that rules look at.
    lines = [line for line in text.splitlines() if line.partition("{")[0] in _NAMES]
    for family in text_string_to_metric_families("\n".join(lines) + "\n"):
        for found in family.samples:
            yield Sample(_NAMES[found.name], found.labels, found.value)

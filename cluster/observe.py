"""What the monitor observes of a Ray cluster and of endpoints: nodes, replicas, and what Ray's agents report."""

import http.client
import logging
import urllib.request
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import ray
import ray.exceptions
from prometheus_client.parser import text_string_to_metric_families
from ray.core.generated.common_pb2 import ActorDiedErrorContext, NodeDeathInfo  # ty: ignore
from ray.serve.context import _get_global_client
from ray.serve.schema import DeploymentDetails, ServeInstanceDetails

from moe_ray.telemetry.catalogue import CATALOGUE
from moe_ray.telemetry.rules import RULES
from moe_ray.telemetry.samples import Sample

_SECONDS = 5.0
_REPLICA = "ServeReplica:"
_UNEXPECTED = NodeDeathInfo.Reason.Value("UNEXPECTED_TERMINATION")
# Serve ends replicas by other means.
_DIED = {ActorDiedErrorContext.Reason.Value(name) for name in ("WORKER_DIED", "NODE_DIED")}
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


def join() -> None:
    """Join the cluster that RAY_ADDRESS names, as a driver that needs nothing of it."""
    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level=logging.WARNING)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)


class ClusterWatch:
    """Observes the Ray cluster that this process has joined; what died before counts as known."""

    def __init__(self) -> None:
        self._lost_before = len(_lost_nodes())
        self._died_before = _dead_replicas()

    def samples(self) -> list[Sample]:
        """Nodes, and replicas by state.

        Raises:
            OSError: the cluster does not answer.
        """
        try:
            alive = sum(node["Alive"] for node in ray.nodes())
            lost = len(_lost_nodes()) - self._lost_before
            return [
                Sample("moe_cluster_nodes", {}, alive),
                Sample("moe_cluster_nodes_lost", {}, lost),
                *self._replica_samples(),
            ]
        except ray.exceptions.RayError as error:
            raise OSError(str(error)) from None

    def _replica_samples(self) -> Iterator[Sample]:
        died = _dead_replicas()
        for app, deployments in _applications().items():
            states: Counter[str] = Counter({"RUNNING": 0})
            wanted = 0
            for deployment in deployments:
                states.update(replica.state.value for replica in deployment.replicas)
                wanted += deployment.target_num_replicas or 0
            yield Sample("moe_cluster_replicas_wanted", {"app": app}, wanted)
            yield Sample("moe_cluster_replicas_lost", {"app": app}, died[app] - self._died_before[app])
            for state, count in states.items():
                yield Sample("moe_cluster_replicas", {"app": app, "state": state}, count)


def agent_samples() -> list[Sample]:
    """What the metrics agents of all nodes report of what rules look at.

    Raises:
        OSError: an agent does not answer.
        ValueError: it answers something else than metrics.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    urls = [f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics" for node in nodes]
    return [sample for url in urls for sample in _scrape(url)]


def _scrape(url: str) -> Iterator[Sample]:
    with _opener.open(url, timeout=_SECONDS) as answer:
        text = answer.read().decode()
    # Of thousands of lines, those that rules look at.
    lines = [line for line in text.splitlines() if line.partition("{")[0] in _NAMES]
    for family in text_string_to_metric_families("\n".join(lines) + "\n"):
        for found in family.samples:
            yield Sample(_NAMES[found.name], found.labels, found.value)


def _applications() -> dict[str, list[DeploymentDetails]]:
    # `serve.status()` leaves out how many replicas are wanted.
    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return {}
    details = ServeInstanceDetails(**client.get_serve_details())
    return {name: list(app.deployments.values()) for name, app in details.applications.items()}


def _lost_nodes() -> list[str]:
    return [node["NodeID"] for node in ray.nodes() if node["DeathReason"] == _UNEXPECTED]


def _dead_replicas() -> Counter[str]:
    """By application, how many replicas have ever died by themselves or with their node."""
    actors = ray._private.state.state.actor_table(None, actor_state_name="DEAD")  # ty: ignore
    return Counter(
        actor["ActorClassName"].split(":")[1]
        for actor in actors.values()
        if actor["ActorClassName"].startswith(_REPLICA) and _has_died(actor["DeathCause"])
    )


def _has_died(cause: Any) -> bool:
    return cause.HasField("oom_context") or cause.actor_died_error_context.reason in _DIED

"""Nodes beside the head of a local cluster, which Ray's own autoscaler starts and ends on this machine.

Ray's fake provider stands in for a cloud: a node is a raylet with its workers, with as many logical CPUs as asked
for. Nodes of the group `cpu` stand for those that stay, nodes of `spot` for those that a cloud takes back: they
carry the resource `spot`, one a CPU, as the spot machines of cluster/aws.yaml do.
"""

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import psutil

from cluster.processes import find_marked
from moe_ray.errors import ConfigError

GROUPS = ("cpu", "spot")
_HEAD_ID = "f" * 51 + "00000"
_HEAD_TYPE = "ray.head.default"
_NODE_ID, _NODE_TYPE = "RAY_CLOUD_INSTANCE_ID", "RAY_NODE_TYPE_NAME"
_OBJECT_STORE_BYTES = 100_000_000
# Ray takes more, and would start a process for each.
MOST_CPUS = 1024
# What the autoscaler reads without asking whether it is there: there are no machines to set up.
_NO_SETUP = {"auth": {}, "file_mounts": {}, "cluster_synced_files": []} | {
    f"{kind}_commands": []
    for kind in (
        "initialization",
        "setup",
        "head_setup",
        "worker_setup",
        "head_start_ray",
        "worker_start_ray",
    )
}
# Variables of all processes of a cluster with such nodes.
ENVIRONMENT = {
    "RAY_FAKE_CLUSTER": "1",
    "RAY_enable_autoscaler_v2": "1",
    # By it the autoscaler tells nodes apart, whose addresses are all the same.
    _NODE_ID: _HEAD_ID,
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": _HEAD_ID,
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    # A killed node refuses connections and is missed after two seconds; a busy one is waited for.
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "3",
    # Replicas share nodes, so that the others can go when the load does.
    "RAY_SERVE_USE_PACK_SCHEDULING_STRATEGY": "1",
}


@dataclass(frozen=True)
class NodePlan:
    """Which nodes the autoscaler may start.

    Attributes:
        cpu: least and most nodes of the group `cpu`.
        spot: least and most nodes of the group `spot`.
        most: nodes of both groups together; None: the most of each.
        cpus_per_node: logical CPUs of a node; can be more than there are.
        idle_seconds: a node without work for longer ends.
    """

    cpu: tuple[int, int] = (1, 4)
    spot: tuple[int, int] = (0, 0)
    most: int | None = None
    cpus_per_node: int = 4
    idle_seconds: float = 60.0

    def __post_init__(self) -> None:
        for option, (least, most) in (("--nodes", self.cpu), ("--spot-nodes", self.spot)):
            if not 0 <= least <= most:
                raise ConfigError(f"{option} {least},{most} is no range.", "write MIN,MAX, such as 1,4.")
        if not self.cpu[1] + self.spot[1]:
            raise ConfigError("--nodes 0,0 leaves no node that could work.", "write MIN,MAX, such as 0,4.")
        if not max(1, self.cpu[0] + self.spot[0]) <= self.limit:
            raise ConfigError(
                f"--max-nodes {self.most} is fewer than the least of both groups.", "raise it, or lower those."
            )
        if not 1 <= self.cpus_per_node <= MOST_CPUS:
            raise ConfigError(
                f"--cpus-per-node {self.cpus_per_node} is no number of CPUs.", f"use 1 to {MOST_CPUS}."
            )
        if not 0 < self.idle_seconds < math.inf:
            raise ConfigError(
                f"--idle-seconds {self.idle_seconds:g} must be positive.", "use a positive number of seconds."
            )

    @property
    def limit(self) -> int:
        """Nodes of both groups together, at most."""
        return self.cpu[1] + self.spot[1] if self.most is None else self.most

    def __str__(self) -> str:
        ranges = [f"{name} {least} to {most}" for name, (least, most) in self._groups().items() if most]
        each = f"{self.cpus_per_node} CPUs each, ended after {self.idle_seconds:g} s"
        return f"{', '.join(ranges)}, at most {self.limit}, {each}"

    def write(self, file: Path, gcs_address: str) -> None:
        """Write the configuration that `ray start --autoscaling-config` takes."""
        types = {name: self._node_type(name, *limits) for name, limits in self._groups().items()}
        head = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
        config = {
            "cluster_name": "local",
            "max_workers": self.limit,
            "idle_timeout_minutes": self.idle_seconds / 60,
            "upscaling_speed": 100.0,
            "provider": {
                "type": "external",
                "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
                "gcs_address": gcs_address,
                "head_node_id": _HEAD_ID,
                "launch_multiple": True,
                "use_node_id_as_ip": True,
                "disable_node_updaters": True,
                "disable_launch_config_check": True,
            },
            "available_node_types": {_HEAD_TYPE: head, **types},
            "head_node_type": _HEAD_TYPE,
            **_NO_SETUP,
        }
        file.write_text(json.dumps(config, indent=1), encoding="utf-8")

    def _groups(self) -> dict[str, tuple[int, int]]:
        return dict(zip(GROUPS, (self.cpu, self.spot), strict=True))

    def _node_type(self, group: str, least: int, most: int) -> dict[str, object]:
        resources = {"CPU": self.cpus_per_node, "object_store_memory": _OBJECT_STORE_BYTES}
        if group == "spot":
            resources |= {"spot": self.cpus_per_node}
        return {"resources": resources, "node_config": {}, "min_workers": least, "max_workers": most}


@dataclass(frozen=True)
class LocalNode:
    """A node that runs, and all its processes."""

    node_id: str
    group: str
    processes: tuple[psutil.Process, ...]


def running_nodes(marker: str) -> list[LocalNode]:
    """The nodes of a cluster beside its head, oldest first.

    Args:
        marker: of the cluster's processes.
    """
    found: dict[str, list[psutil.Process]] = {}
    groups: dict[str, str] = {}
    for process in find_marked(marker):
        try:
            environment = process.environ()
        except psutil.Error:  # it has ended
            continue
        node_id, group = environment.get(_NODE_ID), environment.get(_NODE_TYPE)
        if node_id and group and node_id != _HEAD_ID:
            found.setdefault(node_id, []).append(process)
            groups[node_id] = group
    return [LocalNode(node_id, groups[node_id], tuple(found[node_id])) for node_id in sorted(found)]


def count_nodes(gcs_address: str) -> dict[str, Counter[str]]:
    """By group, how many nodes are active, idle, pending and failed, as the autoscaler sees them.

    The variables of a client of the cluster must have been set before Ray is imported.
    """
    from ray.autoscaler.v2.sdk import get_cluster_status

    status = get_cluster_status(gcs_address)
    counts: dict[str, Counter[str]] = {group: Counter() for group in GROUPS}
    for state, nodes in (
        ("active", status.active_nodes),
        ("idle", status.idle_nodes),
        ("pending", status.pending_nodes),
        ("failed", status.failed_nodes),
    ):
        for node in nodes:
            if node.ray_node_type_name in counts:
                counts[node.ray_node_type_name][state] += 1
    for launch in (*status.pending_launches, *status.failed_launches):
        if launch.ray_node_type_name in counts:
            counts[launch.ray_node_type_name][launch.state.value.lower()] += launch.count
    return counts

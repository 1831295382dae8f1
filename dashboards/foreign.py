"""Metrics of Ray and Prometheus that the dashboards use where the catalogue has none, as Ray 2.60 reports them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Foreign:
    """One metric, or a histogram without its suffix.

    Attributes:
        name: as Prometheus sees it.
        labels: those that dashboards filter or group by.
    """

    name: str
    unit: str
    help: str
    labels: tuple[str, ...] = ()


_APP = ("application", "deployment")
_SERVE = (
    Foreign("ray_serve_autoscaling_total_requests", "requests", "Requests that the autoscaler counts.", _APP),
    Foreign("ray_serve_autoscaling_desired_replicas", "", "Replicas that the policy wants, before limits.", _APP),
    Foreign("ray_serve_autoscaling_target_replicas", "", "Replicas that Serve aims at, after limits.", _APP),
    Foreign("ray_serve_autoscaling_policy_execution_time_ms", "ms", "Time of one decision.", _APP),
    Foreign("ray_serve_deployment_queued_queries", "requests", "Requests that no replica has taken yet.", _APP),
    Foreign("ray_serve_replica_processing_queries", "requests", "Requests in a replica.", _APP),
    Foreign("ray_serve_deployment_replica_starts_total", "", "Replicas that have started.", _APP),
    Foreign("ray_serve_replica_startup_latency_ms", "ms", "Time from a replica's request to its start.", _APP),
)
_NODE = ("ip",)
_NODES = (
    Foreign("ray_node_cpu_utilization", "percent", "Processors of a node in use.", _NODE),
    Foreign("ray_node_mem_used", "bytes", "Memory of a node in use.", _NODE),
    Foreign("ray_node_mem_total", "bytes", "Memory of a node.", _NODE),
    Foreign("ray_node_disk_utilization_percentage", "percent", "The disk of Ray's files in use.", _NODE),
    Foreign("ray_node_disk_io_read_speed", "bytes/s", "Read from disks.", _NODE),
    Foreign("ray_node_disk_io_write_speed", "bytes/s", "Written to disks.", _NODE),
    Foreign("ray_node_network_receive_speed", "bytes/s", "Received from the network.", _NODE),
    Foreign("ray_node_network_send_speed", "bytes/s", "Sent to the network.", _NODE),
    Foreign("ray_node_gpus_utilization", "percent", "Use of a GPU of a node.", _NODE),
    Foreign("ray_node_gram_used", "MB", "Memory of a GPU of a node in use.", _NODE),
    Foreign("ray_component_rss_bytes", "bytes", "Resident memory of a kind of process.", ("ip", "Component")),
    Foreign("ray_object_store_used_memory", "bytes", "Object store in use.", ("NodeAddress",)),
    Foreign("ray_resources", "", "Resources that Ray grants, by state.", ("Name", "State")),
    Foreign("ray_actors", "", "Actors by state.", ("State",)),
    Foreign("autoscaler_active_nodes", "", "Nodes that Ray's autoscaler counts.", ("NodeType",)),
    Foreign("autoscaler_pending_nodes", "", "Nodes that Ray's autoscaler has asked for.", ("NodeType",)),
)
_PROMETHEUS = (
    Foreign("ALERTS", "", "Rules that hold, from Prometheus.", ("alertname", "alertstate", "severity")),
    Foreign("up", "", "1 if a target answered its last scrape, else 0.", ("job", "instance")),
)

FOREIGN: dict[str, Foreign] = {metric.name: metric for metric in (*_SERVE, *_NODES, *_PROMETHEUS)}

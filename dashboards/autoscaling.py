"""How many replicas and nodes there are, how many are wanted, and what makes them wanted."""

from dashboards.frame import Row, frame
from dashboards.panels import alert_line, line, number, states
from dashboards.queries import Query

_NOW = Row(
    "Now",
    (
        number(
            "Replicas that run", Query('sum by (app) (moe_cluster_replicas{state="RUNNING"})', "{{app}}"), width=6
        ),
        number("Replicas wanted", Query("moe_cluster_replicas_wanted", "{{app}}"), width=6),
        number("Requests that wait", Query("sum (moe_serve_waiting)", "waiting"), width=6),
        number("Nodes", Query("moe_cluster_nodes", "nodes"), width=6),
    ),
)
_REPLICAS = Row(
    "Do replicas follow the load?",
    (
        line(
            "Replicas by state",
            Query("sum by (app, state) (moe_cluster_replicas)", "{{state}} {{app}}"),
            stacked=True,
            least=0,
        ),
        line(
            "What autoscaling decides",
            Query("ray_serve_autoscaling_desired_replicas", "the policy wants {{deployment}}"),
            Query("ray_serve_autoscaling_target_replicas", "within limits {{deployment}}"),
            Query("moe_cluster_replicas_wanted", "Serve wants {{app}}"),
            least=0,
        ),
        alert_line("Running of wanted replicas", "{{app}}", "ReplicasMissing", unit="ratio"),
        states("The endpoint answers /readyz", Query("moe_cluster_ready", "{{app}}"), ("EndpointNotReady",)),
        alert_line("Replicas lost in ten minutes", "{{app}}", "ReplicaDied"),
        line(
            "Starts of replicas",
            Query(
                "sum by (deployment) (increase(ray_serve_deployment_replica_starts_total[5m]))",
                "{{deployment}}, in five minutes",
            ),
            bars=True,
        ),
    ),
)
_DEMAND = Row(
    "What asks for replicas?",
    (
        line(
            "Requests that the autoscaler counts",
            Query("sum by (deployment) (ray_serve_autoscaling_total_requests)", "all {{deployment}}"),
            Query("sum by (deployment) (ray_serve_replica_processing_queries)", "in replicas {{deployment}}"),
            Query("sum by (deployment) (ray_serve_deployment_queued_queries)", "not yet taken {{deployment}}"),
            least=0,
        ),
        line(
            "Tokens still to be computed, by replica",
            Query("moe_serve_queued_tokens", "{{replica}}"),
            stacked=True,
        ),
        line(
            "Mean time of a replica's start",
            Query(
                "sum by (deployment) (ray_serve_replica_startup_latency_ms_sum) "
                "/ sum by (deployment) (ray_serve_replica_startup_latency_ms_count)",
                "{{deployment}}",
            ),
            least=0,
        ),
    ),
)
_NODES = Row(
    "Does the cluster have room?",
    (
        line(
            "CPUs that Ray grants",
            Query('sum by (State) (ray_resources{Name="CPU"})', "{{State}}"),
            stacked=True,
            least=0,
        ),
        line(
            "Nodes of Ray's autoscaler",
            Query("sum (autoscaler_active_nodes)", "active"),
            Query("sum (autoscaler_pending_nodes)", "asked for"),
            least=0,
        ),
        line(
            "Time of a decision",
            Query("ray_serve_autoscaling_policy_execution_time_ms", "{{deployment}}"),
            least=0,
        ),
    ),
)

AUTOSCALING = frame("autoscaling", "Autoscaling", __doc__, (_NOW, _REPLICAS, _DEMAND, _NODES))

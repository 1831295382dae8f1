"""Whether all is well, and whether machines have processor, memory, disk and GPU to spare."""

from dashboards.frame import Row, frame
from dashboards.looks import BLUE, ORANGE, SKY, VERMILLION
from dashboards.panels import alert_line, line, states
from dashboards.queries import Query

_HEALTH = Row(
    "Is all well?",
    (
        states(
            "Health of components",
            Query("moe_health_score", "{{component}}"),
            steps={None: VERMILLION, 0.5: ORANGE, 1: BLUE},
        ),
        states(
            "Alerts that fired",
            Query("max by (alert) (moe_alert_firing) > 0", "{{alert}}"),
            steps={None: SKY, 1: VERMILLION},
            width=16,
        ),
        alert_line("Observations that failed", "{{source}}", "MonitorBlind"),
        alert_line("Components that are reported no more", "components", "MonitorGone", or_zero=True),
        states(
            "Targets that answer Prometheus",
            Query("up", "{{job}} {{instance}}"),
            steps={None: VERMILLION, 1: BLUE},
        ),
    ),
)
_NODES = Row(
    "Nodes of the Ray cluster",
    (
        line("Nodes", Query("moe_cluster_nodes", "alive"), Query("moe_cluster_nodes_lost", "lost"), least=0),
        alert_line("Nodes lost in ten minutes", "nodes", "NodeLost"),
        line("Actors", Query("sum by (State) (ray_actors)", "{{State}}"), stacked=True, least=0),
        line("Processors in use", Query("ray_node_cpu_utilization", "{{ip}}"), least=0, most=100),
        line(
            "Memory in use",
            Query("ray_node_mem_used", "used {{ip}}"),
            Query("ray_node_mem_total", "all {{ip}}"),
            least=0,
        ),
        line("Disk in use", Query("ray_node_disk_utilization_percentage", "{{ip}}"), least=0, most=100),
        line(
            "Disk traffic",
            Query("ray_node_disk_io_read_speed", "read {{ip}}"),
            Query("ray_node_disk_io_write_speed", "written {{ip}}"),
        ),
        line(
            "Network traffic",
            Query("ray_node_network_receive_speed", "received {{ip}}"),
            Query("ray_node_network_send_speed", "sent {{ip}}"),
        ),
        line("Object store in use", Query("ray_object_store_used_memory", "{{NodeAddress}}"), least=0),
        line(
            "Memory of the largest kinds of processes",
            Query("topk(7, sum by (Component) (ray_component_rss_bytes))", "{{Component}}"),
            least=0,
        ),
        line("GPUs in use", Query("ray_node_gpus_utilization", "{{ip}} {{GpuIndex}}"), least=0, most=100),
        line("GPU memory in use", Query("ray_node_gram_used", "{{ip}} {{GpuIndex}}"), least=0),
    ),
)
_HOST = Row(
    "The monitor's machine",
    (
        line("Processors in use", Query("moe_host_cpu_ratio", "in use"), least=0, most=1),
        line(
            "Memory",
            Query("moe_host_memory_used_bytes", "in use"),
            Query("moe_host_memory_total_bytes", "all"),
            least=0,
        ),
        alert_line("Memory in use", "in use", "MemoryPressure", unit="ratio"),
        line("GPUs in use", Query("moe_host_gpu_utilization_ratio", "GPU {{gpu}}"), least=0, most=1),
        line(
            "GPU memory",
            Query("moe_host_gpu_memory_used_bytes", "in use {{gpu}}"),
            Query("moe_host_gpu_memory_total_bytes", "all {{gpu}}"),
            least=0,
        ),
        alert_line("GPU memory in use", "GPU {{gpu}}", "GpuMemoryPressure", unit="ratio"),
    ),
)

CLUSTER = frame("cluster", "Cluster", __doc__, (_HEALTH, _NODES, _HOST))

"""For each rule, samples over 100 ticks with which it fires at the end, and ones with which it does not."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

TICK = 7  # No multiple of it is a window, whose border versions of Prometheus treat differently.
TICKS = 100
Value = float | None


@dataclass(frozen=True)
class Series:
    """A series by tick; None: it has ended."""

    metric: str
    labels: dict[str, str]
    values: tuple[Value, ...]


def series(metric: str, value: float | Callable[[int], Value], **labels: str) -> Series:
    """A constant, or a function of the tick."""
    of = value if callable(value) else lambda _: value
    return Series(f"moe_{metric}", labels, tuple(of(tick) for tick in range(TICKS)))


def _run(metric: str, value: float | Callable[[int], Value], **labels: str) -> Series:
    return series(metric, value, run="r", **labels)


def _unfinished(step: int = 50) -> list[Series]:
    return [_run("train_step", step), _run("train_target_steps", 100)]


def _stopped(metric: str, tick: int) -> Series:
    """The time of something that has happened at each tick until then."""
    return _run(metric, lambda now: TICK * min(now, tick))


def _late(before: float, after: float, at: int = 50) -> Callable[[int], float]:
    return lambda tick: after if tick >= at else before


def _requests(status: str, per_tick: float) -> Series:
    return series("serve_http_requests", lambda tick: per_tick * tick, status=status, route="/v1/completions")


def _disk(free: float) -> list[Series]:
    return [series("host_disk_free_bytes", free, path="/d"), series("host_disk_total_bytes", 1000, path="/d")]


def _replicas(running: int) -> list[Series]:
    return [
        series("cluster_replicas", running, app="a", state="RUNNING"),
        series("cluster_replicas", 3, app="a", state="STARTING"),
        series("cluster_replicas_wanted", 2, app="a"),
    ]


FIRES: dict[str, list[Series]] = {
    "TrainingStalled": [*_unfinished(), _run("train_log_seconds", 5), _stopped("train_last_step_time", 60)],
    "LossExploding": [_run("train_loss_over_best", _late(1, 1.8, 99))],
    "LossRising": [_run("train_loss_over_best", _late(1, 1.2, 50))],
    "StepsSkipped": [_run("train_skipped_steps", _late(0, 1, 90))],
    "WorkersFailing": [_run("train_events", lambda tick: tick // 10, event="failure")],
    "ExpertCollapse": [
        _run("train_step", 20),
        _run("expert_collapse", 0.1, layer="0"),
        _run("expert_collapse", _late(0.3, 0.8), layer="1"),
    ],
    "TokensDropped": [_run("train_step", 500), _run("expert_dropped_fraction", 0.2)],
    "CheckpointOld": [
        *_unfinished(),
        _run("checkpoint_due_seconds", 20),
        _run("checkpoint_last_time", lambda _: 7),
    ],
    "CheckpointFailing": [_run("checkpoint_failures", _late(0, 1, 99))],
    "StorageUnreachable": [_run("storage_reachable", _late(1, 0, 90))],
    "DiskNearlyFull": _disk(50),
    "DiskFull": _disk(1),
    "EndpointNotReady": [series("cluster_ready", _late(1, 0, 90), app="a")],
    "ReplicasMissing": _replicas(1),
    "ReplicaDied": [series("cluster_replicas_lost", _late(0, 1, 90), app="a")],
    "QueueGrowing": [
        series("serve_waiting", 30, replica="1"),
        series("serve_waiting", 0, replica="2"),
        series("serve_running", 8, replica="1"),
        series("serve_running", 8, replica="2"),
    ],
    "RequestErrors": [_requests("200", 20), _requests("500", 1)],
    "RequestsRefused": [_requests("200", 20), _requests("503", 4)],
    "KVPreemptions": [series("serve_preemptions", lambda tick: tick, replica="1")],
    "NodeLost": [series("cluster_nodes_lost", _late(0, 1, 90))],
    "MemoryPressure": [series("host_memory_used_bytes", 95), series("host_memory_total_bytes", 100)],
    "GpuMemoryPressure": [
        series("host_gpu_memory_used_bytes", 99, gpu="0"),
        series("host_gpu_memory_total_bytes", 100, gpu="0"),
    ],
    "MonitorBlind": [series("monitor_errors", _late(0, 1, 80), source="ray")],
    "MonitorGone": [series("health_score", lambda tick: 1 if tick < 40 else None, component="host")],
}
QUIET: dict[str, list[Series]] = {
    # The run is finished.
    "TrainingStalled": [*_unfinished(100), _run("train_log_seconds", 5), _stopped("train_last_step_time", 60)],
    "LossExploding": [_run("train_loss_over_best", lambda tick: 1 + tick % 5 / 20)],
    # It falls again before five minutes are over.
    "LossRising": [_run("train_loss_over_best", lambda tick: 1.3 if tick % 40 else 1)],
    # Long ago.
    "StepsSkipped": [_run("train_skipped_steps", _late(0, 3, 5))],
    "WorkersFailing": [
        _run("train_events", lambda tick: tick, event="start"),
        _run("train_events", _late(0, 1), event="failure"),
    ],
    "ExpertCollapse": [_run("train_step", 20), _run("expert_collapse", lambda tick: tick / 150, layer="0")],
    "TokensDropped": [_run("train_step", 500), _run("expert_dropped_fraction", 0.05)],
    # Checkpoints are meant to be rare.
    "CheckpointOld": [
        *_unfinished(),
        _run("checkpoint_due_seconds", 400),
        _run("checkpoint_last_time", lambda _: 7),
    ],
    "CheckpointFailing": [_run("checkpoint_failures", _late(1, 0, 99))],
    "StorageUnreachable": [_run("storage_reachable", lambda tick: 0 if tick % 3 else 1)],
    "DiskNearlyFull": _disk(200),
    "DiskFull": _disk(50),
    "EndpointNotReady": [series("cluster_ready", 1, app="a")],
    "ReplicasMissing": _replicas(2),
    "ReplicaDied": [series("cluster_replicas_lost", _late(0, 1, 5), app="a")],
    "QueueGrowing": [series("serve_waiting", 5, replica="1"), series("serve_running", 8, replica="1")],
    "RequestErrors": [_requests("200", 20), _requests("503", 4), _requests("500", 0)],
    "RequestsRefused": [_requests("200", 20), _requests("429", 4), _requests("503", 0.2)],
    "KVPreemptions": [series("serve_preemptions", 500, replica="1")],
    # Before the monitor's last ten minutes.
    "NodeLost": [series("cluster_nodes_lost", 1)],
    "MemoryPressure": [series("host_memory_used_bytes", 85), series("host_memory_total_bytes", 100)],
    "GpuMemoryPressure": [
        series("host_gpu_memory_used_bytes", 90, gpu="0"),
        series("host_gpu_memory_total_bytes", 100, gpu="0"),
    ],
    "MonitorBlind": [series("monitor_errors", lambda tick: tick % 2, source="ray")],
    "MonitorGone": [series("health_score", 1, component="host")],
}


def ticks(case: list[Series]) -> Iterator[tuple[int, list[tuple[Series, Value]]]]:
    """Time and values of each tick."""
    for tick in range(TICKS):
        yield TICK * tick, [(one, one.values[tick]) for one in case]

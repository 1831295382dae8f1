"""Every alert: when it fires, for whom, and what to do about it.

Prometheus' rules, the alerts in process, the health of components and the tests are made from this one table;
docs/runbook.md has a paragraph for each.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from moe_ray.telemetry.catalogue import CATALOGUE
from moe_ray.telemetry.conditions import Condition, Term

Severity = Literal["warning", "critical"]
Component = Literal["training", "experts", "checkpoint", "storage", "serving", "cluster", "host", "monitor"]
COMPONENTS: tuple[Component, ...] = get_args(Component)
RUNBOOK = "docs/runbook.md"


@dataclass(frozen=True)
class Rule:
    """One row.

    Attributes:
        conditions: all must hold. The first gives the alert its labels and its value; the others, whose labels
            are among these, say when it means anything.
        for_seconds: how long they must hold without a break.
        cooldown_seconds: how long after one notification no other is sent of the same labels.
        summary: one line; `{value}` and the labels are filled in.
        action: what to do, naming the setting.
        digits: of the value, behind the point.
    """

    name: str
    component: Component
    severity: Severity
    conditions: tuple[Condition, ...]
    summary: str
    action: str
    for_seconds: int = 0
    cooldown_seconds: int = 600
    digits: int = 0

    @property
    def by(self) -> tuple[str, ...]:
        """Labels of its alerts."""
        return self.conditions[0].by

    @property
    def promql(self) -> str:
        """The expression for Prometheus."""
        first, *others = self.conditions
        guards = [f" and on ({', '.join(other.by)}) ({other.promql})" for other in others]
        return f"({first.promql}){''.join(guards)}" if guards else first.promql

    @property
    def terms(self) -> tuple[Term, ...]:
        """All numbers that it is made from."""
        pairs = ((condition.term, condition.over) for condition in self.conditions)
        return tuple(term for pair in pairs for term in pair if term is not None)

    @property
    def sources(self) -> frozenset[str]:
        """What reports its metrics."""
        return frozenset(CATALOGUE[term.metric].source for term in self.terms)

    @property
    def runbook(self) -> str:
        """Where to read on."""
        return f"{RUNBOOK}#{self.name.lower()}"


_RUN, _APP = ("run",), ("app",)
_UNFINISHED = Condition(
    Term("moe_train_step", aggregate="min"),
    "<",
    1,
    _RUN,
    over=Term("moe_train_target_steps", aggregate="min"),
)
_STEP_AGE = Term("moe_train_last_step_time", "age", aggregate="min")

_TRAINING = (
    Rule(
        "TrainingStalled",
        "training",
        "critical",
        (
            Condition(_STEP_AGE, ">", 60, _RUN),
            Condition(_STEP_AGE, ">", 10, _RUN, over=Term("moe_train_log_seconds")),
            _UNFINISHED,
        ),
        "run {run} has logged no step for {value} s, ten times longer than usual",
        "look for a hung worker in `ray status` and the run's events.jsonl; after parallel.timeout_seconds it is "
        "restarted. If the run was ended, start the same command again.",
    ),
    Rule(
        "LossExploding",
        "training",
        "critical",
        (Condition(Term("moe_train_loss_over_best"), ">", 1.5, _RUN),),
        "the loss of run {run} is {value} times the lowest that it has been",
        "go on from a checkpoint before the rise, with a lower optim.lr or optim.clip_norm or a longer "
        "optim.warmup_steps.",
        digits=2,
    ),
    Rule(
        "LossRising",
        "training",
        "warning",
        (Condition(Term("moe_train_loss_over_best"), ">", 1.15, _RUN),),
        "the loss of run {run} has stayed {value} times above the lowest that it has been",
        "lower optim.lr or lengthen optim.warmup_steps; look whether the data changed at that step.",
        for_seconds=300,
        digits=2,
    ),
    Rule(
        "StepsSkipped",
        "training",
        "warning",
        (Condition(Term("moe_train_skipped_steps", "increase", 600), ">", 0, _RUN),),
        "run {run} skipped {value} steps in ten minutes because they were not finite",
        "lower optim.lr or lengthen optim.warmup_steps; after train.max_bad_steps in a row training stops.",
    ),
    Rule(
        "WorkersFailing",
        "training",
        "warning",
        (
            Condition(
                Term("moe_train_events", "increase", 1800, (("event", "failure"),), "sum"),
                ">",
                2,
                _RUN,
            ),
        ),
        "workers of run {run} failed {value} times in half an hour",
        "read the reasons in the run's events.jsonl: out of memory asks for a lower train.micro_batch, lost nodes "
        "for parallel.workers as [least, most], full disks for space.",
    ),
)
_EXPERTS = (
    Rule(
        "ExpertCollapse",
        "experts",
        "critical",
        (
            Condition(Term("moe_expert_collapse"), ">", 0.7, _RUN),
            # Routers that have just begun to learn sway.
            Condition(Term("moe_train_step"), ">", 15, _RUN),
        ),
        "run {run} sends its tokens to few experts: its worst layer has {value} of the largest imbalance",
        "raise model.load_balancing_loss_weight (0.01 to 0.03), or with model.expert_bias raise "
        "model.expert_bias_update_rate; a lower optim.lr or longer optim.warmup_steps helps too.",
        digits=2,
    ),
    Rule(
        "TokensDropped",
        "experts",
        "warning",
        (Condition(Term("moe_expert_dropped_fraction"), ">", 0.1, _RUN),),
        "experts of run {run} had no room for {value} of the routed tokens",
        "raise model.capacity_factor or model.load_balancing_loss_weight, or set model.capacity_factor=null to "
        "drop none.",
        for_seconds=300,
        digits=2,
    ),
)
_CHECKPOINT = (
    Rule(
        "CheckpointOld",
        "checkpoint",
        "warning",
        (
            Condition(Term("moe_checkpoint_last_time", "age", aggregate="min"), ">", 600, _RUN),
            Condition(
                Term("moe_checkpoint_last_time", "age", aggregate="min"),
                ">",
                3,
                _RUN,
                over=Term("moe_checkpoint_due_seconds"),
            ),
            _UNFINISHED,
        ),
        "the newest checkpoint of run {run} is {value} s old, three times more than checkpoint.every means",
        "look for failed checkpoints in the run's log and for space and speed of train.storage.",
    ),
    Rule(
        "CheckpointFailing",
        "checkpoint",
        "critical",
        (Condition(Term("moe_checkpoint_failures"), ">", 0, _RUN),),
        "{value} checkpoints in a row of run {run} could not be written",
        "free space or mend train.storage; a loss now costs all steps since the last one, and after "
        "checkpoint.max_failures the workers start anew.",
    ),
)
_STORAGE = (
    Rule(
        "StorageUnreachable",
        "storage",
        "critical",
        (Condition(Term("moe_storage_reachable", aggregate="min"), "<", 1, _RUN),),
        "the storage of run {run} takes no file",
        "see whether train.storage is mounted, has space and the right permissions, and whether its credentials "
        "are valid; `jobs/doctor.py` says which of these fails.",
        for_seconds=20,
    ),
    Rule(
        "DiskNearlyFull",
        "storage",
        "warning",
        (
            Condition(
                Term("moe_host_disk_free_bytes", aggregate="min"),
                "<",
                0.1,
                ("path",),
                over=Term("moe_host_disk_total_bytes", aggregate="min"),
            ),
        ),
        "{value} of the disk of {path} are free",
        "delete runs, lower checkpoint.keep_last and checkpoint.keep_every, or move train.storage.",
        for_seconds=60,
        digits=3,
    ),
    Rule(
        "DiskFull",
        "storage",
        "critical",
        (
            Condition(
                Term("moe_host_disk_free_bytes", aggregate="min"),
                "<",
                0.02,
                ("path",),
                over=Term("moe_host_disk_total_bytes", aggregate="min"),
            ),
        ),
        "{value} of the disk of {path} are free: the next checkpoint may not fit",
        "free space now: delete runs or checkpoints that nobody needs; then lower checkpoint.keep_last.",
        digits=3,
    ),
)
_SERVING = (
    Rule(
        "EndpointNotReady",
        "serving",
        "critical",
        (Condition(Term("moe_cluster_ready", aggregate="min"), "<", 1, _APP),),
        "the endpoint of {app} does not answer /readyz",
        "see `serve status` and the replicas' logs; without a healthy replica none is ready: look at "
        "the checkpoint and the memory of the nodes.",
        for_seconds=15,
    ),
    Rule(
        "ReplicasMissing",
        "serving",
        "warning",
        (
            Condition(
                Term("moe_cluster_replicas", where=(("state", "RUNNING"),), aggregate="sum"),
                "<",
                1,
                _APP,
                over=Term("moe_cluster_replicas_wanted", aggregate="sum"),
            ),
        ),
        "only {value} of the wanted replicas of {app} run",
        "see `ray status` for resources that are asked for and missing: add nodes, or lower serve.min_replicas, "
        "serve.cpus_per_replica or what else runs there.",
        for_seconds=120,
        digits=2,
    ),
    Rule(
        "ReplicaDied",
        "serving",
        "warning",
        (Condition(Term("moe_cluster_replicas_lost", "rise", 600), ">", 0, _APP),),
        "{value} replicas of {app} died in ten minutes",
        "Serve starts others by itself. Read the end of the replica's log; memory that ran out asks for a lower "
        "serve.kv_cache_bytes or serve.max_batch_size.",
    ),
    Rule(
        "QueueGrowing",
        "serving",
        "warning",
        (
            Condition(
                Term("moe_serve_waiting", aggregate="sum"),
                ">",
                1,
                over=Term("moe_serve_running", aggregate="sum"),
            ),
        ),
        "{value} times as many requests wait as run",
        "raise serve.max_replicas or add nodes; serve.max_queued_requests bounds how long clients wait.",
        for_seconds=30,
        digits=1,
    ),
    Rule(
        "RequestErrors",
        "serving",
        "critical",
        (
            Condition(
                Term("moe_serve_http_requests", "increase", 300, (("status", "5.[0-24-9]"),), "sum"),
                ">",
                0.02,
                over=Term("moe_serve_http_requests", "increase", 300, aggregate="sum"),
            ),
        ),
        "{value} of the requests of five minutes failed with an error of the server",
        "read the replicas' logs for the request ids of the failed answers.",
        digits=3,
    ),
    Rule(
        "RequestsRefused",
        "serving",
        "warning",
        (
            Condition(
                Term("moe_serve_http_requests", "increase", 300, (("status", "503"),), "sum"),
                ">",
                0.05,
                over=Term("moe_serve_http_requests", "increase", 300, aggregate="sum"),
            ),
        ),
        "{value} of the requests of five minutes were refused because of overload",
        "raise serve.max_replicas, or serve.max_queued_requests if clients may wait longer.",
        for_seconds=60,
        digits=3,
    ),
    Rule(
        "KVPreemptions",
        "serving",
        "warning",
        (Condition(Term("moe_serve_preemptions", "increase", 300, aggregate="sum"), ">", 10),),
        "{value} times in five minutes a request lost its KV blocks to another and is computed again",
        "raise serve.kv_cache_bytes or lower serve.max_batch_size.",
    ),
)
_CLUSTER = (
    Rule(
        "NodeLost",
        "cluster",
        "critical",
        (Condition(Term("moe_cluster_nodes_lost", "rise", 600), ">", 0),),
        "{value} nodes died in ten minutes",
        "training and serving go on with the rest. See the node's machine and raylet.out; memory that ran out "
        "shows in the kernel's log.",
    ),
)
_HOST = (
    Rule(
        "MemoryPressure",
        "host",
        "warning",
        (
            Condition(
                Term("moe_host_memory_used_bytes"),
                ">",
                0.9,
                over=Term("moe_host_memory_total_bytes"),
            ),
        ),
        "{value} of the machine's memory is in use",
        "lower train.micro_batch, serve.kv_cache_bytes or the number of workers and replicas on this machine; Ray "
        "ends processes at 0.95.",
        for_seconds=30,
        digits=2,
    ),
    Rule(
        "GpuMemoryPressure",
        "host",
        "warning",
        (
            Condition(
                Term("moe_host_gpu_memory_used_bytes"),
                ">",
                0.97,
                ("gpu",),
                over=Term("moe_host_gpu_memory_total_bytes"),
            ),
        ),
        "{value} of the memory of GPU {gpu} is in use",
        "lower train.micro_batch or shard what is replicated with parallel.shard_dense.",
        for_seconds=120,
        digits=2,
    ),
)
_MONITOR = (
    Rule(
        "MonitorBlind",
        "monitor",
        "warning",
        (Condition(Term("moe_monitor_errors"), ">", 0, ("source",)),),
        "the monitor cannot observe {source}",
        "its log says why. Until then rules about it do not fire.",
        for_seconds=30,
    ),
    Rule(
        "MonitorGone",
        "monitor",
        "critical",
        (Condition(Term("moe_health_score", "gone", 3600, aggregate="count"), ">", 0),),
        "the monitor reported {value} components within the hour and reports them no more",
        "start jobs/monitor.py again.",
    ),
)

RULES: tuple[Rule, ...] = (
    *_TRAINING,
    *_EXPERTS,
    *_CHECKPOINT,
    *_STORAGE,
    *_SERVING,
    *_CLUSTER,
    *_HOST,
    *_MONITOR,
)

# Who is gone cannot say so.
IN_PROCESS: tuple[Rule, ...] = tuple(rule for rule in RULES if rule.name != "MonitorGone")

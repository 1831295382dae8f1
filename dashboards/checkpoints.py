"""How much a loss of workers would cost now, what checkpoints cost, and whether their storage is well."""

from dashboards.frame import Row, frame
from dashboards.panels import alert_line, line, number, states
from dashboards.queries import Query

_NOW = Row(
    "Now",
    (
        number("Newest checkpoint", Query("moe_checkpoint_last_step", "{{run}}"), width=6),
        number(
            "Its age",
            Query("time() - moe_checkpoint_last_time", "{{run}}"),
            "seconds",
            ("CheckpointOld",),
            6,
            "The alert also asks that it is three times older than usual and that the run is not finished.",
        ),
        number(
            "Steps that a loss would cost", Query("moe_train_step - moe_checkpoint_last_step", "{{run}}"), width=6
        ),
        number("Failures in a row", Query("moe_checkpoint_failures", "{{run}}"), None, ("CheckpointFailing",), 6),
    ),
)
_COST = Row(
    "What do they cost?",
    (
        line(
            "Training and its newest checkpoint",
            Query("moe_train_step", "step {{run}}"),
            Query("moe_checkpoint_last_step", "checkpoint {{run}}"),
        ),
        line(
            "Age and usual distance of checkpoints",
            Query("time() - moe_checkpoint_last_time", "age {{run}}"),
            Query("moe_checkpoint_due_seconds", "usual {{run}}"),
            unit="seconds",
            least=0,
        ),
        line(
            "Time of the last one",
            Query("moe_checkpoint_stall_seconds", "training stood still {{run}}"),
            Query("moe_checkpoint_write_seconds", "until visible {{run}}"),
            least=0,
        ),
        alert_line("Failures in a row", "{{run}}", "CheckpointFailing", width=12),
        line("Steps done again after a loss", Query("moe_train_redone_steps", "{{run}}"), width=12, least=0),
    ),
)
_STORAGE = Row(
    "Is the storage well?",
    (
        states(
            "Storage answers and takes a file", Query("moe_storage_reachable", "{{run}}"), ("StorageUnreachable",)
        ),
        alert_line("Free part of watched disks", "{{path}}", "DiskFull", "DiskNearlyFull", unit="ratio"),
        line(
            "Free space of watched disks",
            Query("moe_host_disk_free_bytes", "free {{path}}"),
            Query("moe_host_disk_total_bytes", "size {{path}}"),
            least=0,
        ),
    ),
)

CHECKPOINTS = frame("checkpoints", "Checkpoints", __doc__, (_NOW, _COST, _STORAGE))

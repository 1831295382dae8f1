"""How far a run is, whether it learns, where its time goes, and what happened to its workers."""

from dashboards.frame import Row, frame
from dashboards.panels import alert_line, line, number
from dashboards.queries import Query

_NOW = Row(
    "Now",
    (
        number("Done", Query("moe_train_step / moe_train_target_steps", "{{run}}"), "ratio"),
        number("Loss", Query("moe_train_loss", "{{run}}")),
        number("Held-out perplexity", Query("moe_train_val_perplexity", "{{run}}")),
        number("Speed", Query("moe_train_tokens_per_second", "{{run}}")),
        number("Workers", Query("moe_train_world_size", "{{run}}")),
        number(
            "Since the last step",
            Query("time() - moe_train_last_step_time", "{{run}}"),
            "seconds",
            ("TrainingStalled",),
            note="The alert also asks that it is ten times longer than usual and that the run is not finished.",
        ),
    ),
)
_LEARNING = Row(
    "Does it learn?",
    (
        line("Loss", Query("moe_train_loss", "training {{run}}"), Query("moe_train_val_loss", "held out {{run}}")),
        line(
            "Perplexity",
            Query("moe_train_perplexity", "training {{run}}"),
            Query("moe_train_val_perplexity", "held out {{run}}"),
            logarithmic=True,
        ),
        line(
            "Held-out perplexity by domain",
            Query("moe_train_val_domain_perplexity", "{{domain}} {{run}}"),
            logarithmic=True,
        ),
        alert_line("Loss over its lowest", "{{run}}", "LossExploding", "LossRising", unit="times"),
        line("Gradient norm before clipping", Query("moe_train_grad_norm", "{{run}}"), logarithmic=True),
        line("Learning rate", Query("moe_train_lr", "{{run}}")),
        line(
            "Auxiliary losses before their weights",
            Query("moe_train_load_balancing_loss", "load balancing {{run}}"),
            Query("moe_train_router_z_loss", "router z {{run}}"),
        ),
        alert_line("Skipped steps in ten minutes", "{{run}}", "StepsSkipped"),
        line(
            "Tokens and steps so far",
            Query("moe_train_tokens", "tokens {{run}}"),
            Query("moe_train_step", "steps {{run}}"),
            logarithmic=True,
        ),
    ),
)
_TIME = Row(
    "Where does the time go?",
    (
        line("Tokens per second", Query("moe_train_tokens_per_second", "{{run}}"), least=0),
        line("Time of a step", Query("moe_train_step_seconds", "{{run}}"), least=0),
        line(
            "Time of a step by phase",
            Query("sum by (phase) (moe_train_phase_seconds)", "{{phase}}"),
            stacked=True,
            least=0,
        ),
        line("Memory of rank 0", Query("moe_train_memory_bytes", "{{run}}"), width=12, least=0),
        line(
            "Time between logged steps",
            Query("moe_train_log_seconds", "usual {{run}}"),
            Query("time() - moe_train_last_step_time", "since the last {{run}}"),
            width=12,
            least=0,
        ),
    ),
)
_WORKERS = Row(
    "What happened to its workers?",
    (
        line(
            "Workers and expert parallelism",
            Query("moe_train_world_size", "workers {{run}}"),
            Query("moe_train_ep", "ranks of a set of experts {{run}}"),
            least=0,
        ),
        line(
            "Events a minute",
            Query("sum by (event) (increase(moe_train_events[1m]))", "{{event}}"),
            stacked=True,
            bars=True,
        ),
        alert_line("Failures in half an hour", "{{run}}", "WorkersFailing"),
        line("Resumed at", Query("moe_train_resumed_step", "{{run}}")),
        line("Steps done again", Query("moe_train_redone_steps", "{{run}}")),
        line("Jobs that train", Query("moe_train_submission", "{{submission}} {{run}}"), least=0),
    ),
)
_SWEEPS = Row(
    "How far are sweeps?",
    (
        line("Trials by status", Query("moe_sweep_trials", "{{status}} {{run}}"), stacked=True, least=0),
        line("Objective of the best trial", Query("moe_sweep_best", "{{run}}")),
        line("Steps of all trials", Query("moe_sweep_steps", "{{run}}"), least=0),
    ),
)

TRAINING = frame("training", "Training", __doc__, (_NOW, _LEARNING, _TIME, _WORKERS, _SWEEPS))

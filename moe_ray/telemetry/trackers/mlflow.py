"""MLflow: a run of an experiment, in a tracking server or an SQLite file."""

import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag

from moe_ray.telemetry.trackers.run import Log, TrackedRun

_TAG = "moe_ray.id"
_MOST_LETTERS = 500
_MOST_PARAMS, _MOST_METRICS = 100, 1000


@contextmanager
def track(run: TrackedRun) -> Generator[Log]:
    """Log to the run that has this one's id in a tag, or begin it."""
    uri = run.config.telemetry.mlflow_uri or f"sqlite:///{run.folder / 'mlflow.db'}"
    client = MlflowClient(uri)
    found = _find_or_create(client, run)
    run_id = found.info.run_id
    _log_settings(client, found, run.settings)
    client.update_run(run_id, status="RUNNING")

    def log(step: int, numbers: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, step) for name, value in numbers.items()]
        for start in range(0, len(metrics), _MOST_METRICS):
            client.log_batch(run_id, metrics[start : start + _MOST_METRICS])

    try:
        yield log
    finally:
        client.set_terminated(run_id)


def _find_or_create(client: MlflowClient, run: TrackedRun) -> Run:
    project = run.config.telemetry.project
    experiment = client.get_experiment_by_name(project)
    experiment_id = experiment.experiment_id if experiment else client.create_experiment(project)
    runs = client.search_runs([experiment_id], f"tags.`{_TAG}` = '{run.id}'")
    if runs:
        return runs[0]
    return client.create_run(experiment_id, tags={_TAG: run.id}, run_name=run.config.train.name)


def _log_settings(client: MlflowClient, found: Run, settings: Mapping[str, object]) -> None:
    """MLflow never changes a parameter: settings that differ from those of the run's start become tags."""
    known = found.data.params
    texts = {name: str(value)[:_MOST_LETTERS] for name, value in settings.items()}
    new = [Param(name, text) for name, text in texts.items() if name not in known]
    for start in range(0, len(new), _MOST_PARAMS):
        client.log_batch(found.info.run_id, params=new[start : start + _MOST_PARAMS])
    changed = [RunTag(name, text) for name, text in texts.items() if known.get(name, text) != text]
    client.log_batch(found.info.run_id, tags=changed)

"""The undisturbed run, the disturbed one, and what differs between them."""

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import yaml

from moe_ray.config import Config, build_config
from moe_ray.errors import ConfigError, StorageError, TrainingError
from moe_ray.storage import Storage, open_storage
from moe_ray.telemetry.run_log import RUN_SETTINGS, read_events, read_metrics
from moe_ray.training.chaos.cluster import own_address
from moe_ray.training.chaos.faults import NotPossibleError, Options, Stage, strike
from moe_ray.training.chaos.network import insert_proxy
from moe_ray.training.chaos.process import TrainJob
from moe_ray.training.chaos.report import LossDifference, Row, differing_steps, loss_difference, problems
from moe_ray.training.chaos.schedule import Planned, settle_steps
from moe_ray.training.chaos.trace import Strike, Trace

_POLL_SECONDS = 0.2
_TELL_SECONDS = 10.0
_PATIENCE_SECONDS = 300.0
Say = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """What came of a chaos run.

    Attributes:
        rows: one a planned fault.
        loss: against the undisturbed run.
        wrong: what breaks the promises of training, a sentence each.
    """

    rows: tuple[Row, ...]
    loss: LossDifference
    wrong: tuple[str, ...]


def run_chaos(
    config: Config, arguments: Sequence[str], plan: Sequence[Planned], options: Options, seed: int, say: Say
) -> Outcome:
    """Train twice, undisturbed and under the planned faults, on the cluster that this process is connected to.

    Args:
        config: what `arguments` say, with absolute storage.
        arguments: of `jobs/train.py`.
        seed: chooses the victims.
        say: told what happens.

    Raises:
        ConfigError: a run of an earlier chaos job is in the way.
        TrainingError: one of the runs did not come to its end.
    """
    names = [f"{config.train.name}-{suffix}" for suffix in ("reference", "chaos")]
    reference, disturbed = (_with(config, name=name) for name in names)
    run = open_storage(disturbed.train.run_uri)
    if run.list():
        raise ConfigError(
            f"the run {run.uri!r} is there already.",
            "remove it, or set another train.name to compare two new runs.",
        )
    _check_reference(reference)
    logs = Path(tempfile.mkdtemp(prefix="moe_ray-chaos-"))
    say(f"the runs are {reference.train.run_uri} and {run.uri}, their output is in {logs}")
    with ExitStack() as cleanup:
        job = _start(reference, arguments, logs / "reference.log", cleanup)
        _await_end(job, reference, say)
        storage, proxy = insert_proxy(disturbed.train.storage, own_address())
        job = _start(_with(disturbed, storage=storage), arguments, logs / "chaos.log", cleanup)
        stage = Stage(disturbed, options, run, job, proxy, np.random.default_rng(seed), cleanup, logs)
        rows = [_strike_and_follow(planned, stage, say) for planned in plan]
        _await_end(job, disturbed, say)
    return _compare(rows, reference, disturbed)


def _check_reference(config: Config) -> None:
    """A reference of other settings would show differences that no fault has made."""
    run = open_storage(config.train.run_uri)
    try:
        then = build_config(yaml.safe_load(run.read(RUN_SETTINGS)))
    except FileNotFoundError:
        return
    then = _with(then, name=config.train.name, storage=config.train.storage, log_every=config.train.log_every)
    for section in ("optim", "train"):
        if getattr(then, section) != getattr(config, section):
            raise ConfigError(
                f"the run {run.uri!r} was made with other settings in {section!r}.",
                "remove it, or set another train.name to compare two new runs.",
            )


def _with(config: Config, **train: Any) -> Config:
    return config.model_copy(update={"train": config.train.model_copy(update=train)})


def _start(config: Config, arguments: Sequence[str], log_file: Path, cleanup: ExitStack) -> TrainJob:
    train = config.train
    # By each logged step the two runs are compared.
    overrides = [f"train.name={train.name}", f"train.storage={train.storage}", "train.log_every=1"]
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    job = TrainJob([*arguments, *overrides], environment, log_file)
    cleanup.callback(job.end)
    return job


def _await_end(job: TrainJob, config: Config, say: Say) -> None:
    say(f"training {config.train.name} to step {config.train.steps}")
    tell = _progress(config, say)
    while (code := job.exit_code()) is None:
        tell()
        time.sleep(_POLL_SECONDS)
    if code != 0:
        raise _failure(job, config)


def _progress(config: Config, say: Say) -> Callable[[], None]:
    """A function that, called often, now and then tells the newest step."""
    run, told = open_storage(config.train.run_uri), time.monotonic()

    def tell() -> None:
        nonlocal told
        if time.monotonic() - told > _TELL_SECONDS:
            told = time.monotonic()
            say(f"step {_newest_step(run)} of {config.train.steps}")

    return tell


def _failure(job: TrainJob, config: Config) -> TrainingError:
    return TrainingError(
        f"the run {config.train.name} ended with exit code {job.exit_code()}; it said last: {job.last_words()}",
        f"see {job.log_file}.",
    )


def _strike_and_follow(planned: Planned, stage: Stage, say: Say) -> Row:
    """Wait for the step, strike, and wait until training has gone on for a while."""
    if not _wait(stage, lambda: _newest_step(stage.run) >= planned.step, say):
        return Row(planned.fault, planned.step, note="the run had ended", was_run=False)
    say(f"step {_newest_step(stage.run)}: {planned.fault}")
    try:
        hit = strike(planned.fault, stage)
    except NotPossibleError as error:
        say(f"not run: {error}")
        return Row(planned.fault, planned.step, note=str(error), was_run=False)
    time.sleep(max(0.0, hit.time - time.time()))
    before = [line for line in read_metrics(stage.run) if line["time"] <= hit.time]
    at = Strike(
        planned.fault, hit.time, before[-1]["step"], before[-1]["resumed_step"], hit.note, hit.damaged_step
    )
    trace, settle = Trace(at), settle_steps(stage.config)

    def has_settled() -> bool:
        trace.look(read_metrics(stage.run), read_events(stage.run))
        return trace.has_settled(settle)

    _wait(stage, has_settled, say)
    has_settled()
    row = _row(trace)
    detected, recovered = _seconds(row.detection_seconds), _seconds(row.recovery_seconds)
    say(f"{hit.note}: detected after {detected}, trains after {recovered}")
    return row


def _wait(stage: Stage, condition: Callable[[], bool], say: Say) -> bool:
    """Whether the condition came true before the run ended.

    Raises:
        TrainingError: the run failed, or nothing happened for too long.
    """
    patience = _PATIENCE_SECONDS + stage.config.parallel.timeout_seconds
    step, since = -1, time.monotonic()
    tell = _progress(stage.config, say)
    while not condition():
        tell()
        if (code := stage.job.exit_code()) is not None:
            if code != 0:
                raise _failure(stage.job, stage.config)
            return condition()
        now_at = _newest_step(stage.run)
        if now_at != step:
            step, since = now_at, time.monotonic()
        if time.monotonic() - since > patience:
            raise TrainingError(f"the run stands still at step {step} for {patience:.0f} s.", f"see {stage.logs}.")
        time.sleep(_POLL_SECONDS)
    return True


def _newest_step(run: Storage) -> int:
    return max((line["step"] for line in read_metrics(run)), default=0)


def _row(trace: Trace) -> Row:
    at, resumed = trace.strike, trace.resumed_step
    trusted = at.damaged_step is not None and resumed is not None and resumed >= at.damaged_step
    return Row(
        at.fault,
        at.step,
        trace.detection_seconds,
        trace.recovery_seconds,
        trace.redone_steps,
        note=at.note,
        wrong=f"the damaged checkpoint of step {at.damaged_step} was used" if trusted else "",
    )


def _compare(rows: Sequence[Row], reference: Config, disturbed: Config) -> Outcome:
    try:
        expected, found = (read_metrics(open_storage(c.train.run_uri)) for c in (reference, disturbed))
    except StorageError as error:
        raise TrainingError(f"the logs cannot be compared: {error.problem}", error.fix) from None
    lost, loss = differing_steps(expected, found), loss_difference(expected, found)
    shared = _share(rows, lost)
    return Outcome(tuple(shared), loss, tuple(problems(shared, len(lost), loss, disturbed)))


def _share(rows: Sequence[Row], lost: Sequence[int]) -> list[Row]:
    """Rows with the lost steps that lie between what each fault threw back to and the same of the next one."""
    struck = [row for row in rows if row.was_run]
    starts = [row.step - row.redone for row in struck]
    ends = [*starts[1:], float("inf")]
    counts = {
        id(row): sum(start < step <= end for step in lost)
        for row, start, end in zip(struck, starts, ends, strict=False)
    }
    return [replace(row, lost=counts.get(id(row), 0)) for row in rows]


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} s"

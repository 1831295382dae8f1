"""Hands trials to Ray Tune, and keeps the board up to date with what Tune says of them."""

import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from moe_ray.config import Config
from moe_ray.errors import ConfigError, UserError
from moe_ray.submission import inherited
from moe_ray.training.trainer import StopSwitch
from moe_ray.tuning.board import Board
from moe_ray.tuning.objective import score
from moe_ray.tuning.space import grace_steps
from moe_ray.tuning.trial_run import TrialRun
from moe_ray.tuning.trials import Trial

# A trial's own process needs next to nothing; this keeps it on the node of the sweep, where its data are.
_SHARE_OF_NODE = 1e-4


@dataclass(frozen=True)
class Work:
    """What is to be done.

    Attributes:
        take: the next trial to run; None after the last.
        settings: of the run of a trial.
        room: how many trials may run now.
        ended: told of each trial that has ended.
        show: called several times a second.
        after: step up to which runs were logged before.
        until: step after which they end; None: the last.
    """

    take: Callable[[], Trial | None]
    settings: Callable[[Trial], Config]
    room: Callable[[], int]
    ended: Callable[[Trial], None]
    show: Callable[[], None]
    after: int = 0
    until: int | None = None


def run_trials(board: Board, work: Work, scheduler: FIFOScheduler, switch: StopSwitch) -> None:
    """Run trials until there are no more, or the switch is pressed: then they save and end, and stay `running`.

    Raises:
        ConfigError: runs do not log the objective.
    """
    # What Tune would print and write of each trial, the board has.
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    os.environ |= {
        "RAY_AIR_NEW_OUTPUT": "0",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
        "TUNE_DISABLE_SIGINT_HANDLER": "1",
        "TUNE_FORCE_TRIAL_CLEANUP_S": str(board.config.parallel.timeout_seconds),
        "TUNE_GLOBAL_CHECKPOINT_S": "3600",
    }
    follow = _Follow(board, work)
    with tempfile.TemporaryDirectory(prefix="moe_ray-sweep-") as scratch:
        tune.Tuner(
            tune.with_resources(TrialRun, tune.PlacementGroupFactory([{_this_node(): _SHARE_OF_NODE}])),
            tune_config=tune.TuneConfig(
                search_alg=_Feed(board, work, switch),
                scheduler=scheduler,
                num_samples=-1,
                trial_dirname_creator=lambda trial: f"trial-{trial.config['number']}",
            ),
            run_config=tune.RunConfig(
                name="sweep",
                storage_path=scratch,
                failure_config=tune.FailureConfig(max_failures=board.config.sweep.retries),
                callbacks=[follow],
                stop=_Stop(switch, follow),
                verbose=0,
            ),
        ).fit()
    board.write()
    if follow.problem is not None:
        raise follow.problem


def asha(config: Config, past: Mapping[int, list[dict[str, Any]]]) -> FIFOScheduler:
    """Successive halving (Li et al. 2018) over steps.

    Args:
        past: records of the runs of trials that have ended, by number: what they reached counts at each rung.
    """
    scheduler = _Asha(config)
    for number, records in past.items():
        trial: Any = SimpleNamespace(trial_id=f"past-{number}")
        scheduler.on_trial_add(None, trial)  # ty: ignore
        for record in records:
            scheduler.on_trial_result(None, trial, {"records": [record]})
    return scheduler


class _Asha(ASHAScheduler):
    def __init__(self, config: Config) -> None:
        sweep = config.sweep
        super().__init__(
            time_attr="step",
            metric="score",
            mode="min",
            max_t=config.train.steps,
            grace_period=grace_steps(config),
            reduction_factor=sweep.reduction_factor,
            stop_last_trials=False,
        )
        self._sweep = sweep

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        record = (result.get("records") or [{}])[-1]
        value = score(self._sweep, record)
        if value is None:
            return TrialScheduler.CONTINUE
        return super().on_trial_result(tune_controller, trial, {"step": record["step"], "score": value})


class _NotKept:
    """Tune pickles what it is given, for a way to resume that is not ours."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _Feed(_NotKept, Searcher):
    """Gives Tune a trial whenever there is room for one."""

    def __init__(self, board: Board, work: Work, switch: StopSwitch) -> None:
        super().__init__()
        self._board = board
        self._work = work
        self._switch = switch

    def suggest(self, trial_id: str) -> Any:
        if self._switch.is_pressed:
            return Searcher.FINISHED
        if len(self._board.with_status("running")) >= max(1, self._work.room()):
            return None
        while (trial := self._work.take()) is not None:
            try:
                settings = self._work.settings(trial)
            except UserError as error:
                self._board.change(trial.number, status="infeasible", reason=str(error))
                continue
            self._board.change(trial.number, status="running", reason=None)
            return {
                "number": trial.number,
                "settings": settings.model_dump(mode="json"),
                "environment": inherited(),
                "metric": self._board.config.sweep.metric,
                "after": self._work.after,
            }
        return Searcher.FINISHED

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        """The callback has more to go by."""

    def save(self, checkpoint_path: str) -> None:
        """The board is saved."""


class _Follow(_NotKept, tune.Callback):
    def __init__(self, board: Board, work: Work) -> None:
        self.problem: ConfigError | None = None
        self._board = board
        self._work = work

    def on_step_end(self, iteration: int, trials: list[Any], **_: Any) -> None:
        self._work.show()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        number = trial.config["number"]
        self._board.change(number, attempts=self._board.trials[number].attempts + 1)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any
    ) -> None:
        number = trial.config["number"]
        self._board.log(number, result["records"], result["seconds"])
        told = {name: result[name] for name in ("status", "reason") if name in result}
        if told:
            self._board.change(number, **told)
        self._check_objective(result["records"])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        number = trial.config["number"]
        now = self._board.trials[number]
        if now.status == "running" and now.steps >= (self._work.until or self._board.last_step(now)):
            self._board.change(number, status="finished", reason=None)
        elif now.status == "running":
            self._board.change(number, status="stopped", reason=f"worse than others at step {now.steps}")
        self._work.ended(self._board.trials[number])

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        number = trial.config["number"]
        reason = self._board.trials[number].reason or "its process died."
        self._board.change(number, status="failed", reason=reason)
        self._work.ended(self._board.trials[number])

    def _check_objective(self, records: list[dict[str, Any]]) -> None:
        metric = self._board.config.sweep.metric
        for record in records:
            if "val_loss" in record and metric not in record:
                numbers = sorted(name for name, value in record.items() if isinstance(value, int | float))
                self.problem = ConfigError(
                    f"runs do not log sweep.metric={metric!r}.", f"use one of {', '.join(numbers)}."
                )


class _Stop(_NotKept, tune.Stopper):
    def __init__(self, switch: StopSwitch, follow: _Follow) -> None:
        self._switch = switch
        self._follow = follow

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._switch.is_pressed or self._follow.problem is not None


def _this_node() -> str:
    mine = ray.get_runtime_context().get_node_id()
    node = next(node for node in ray.nodes() if node["NodeID"] == mine)
    return next(
        name for name in node["Resources"] if name.startswith("node:") and name != "node:__internal_head__"
    )

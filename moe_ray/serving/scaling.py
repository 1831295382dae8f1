"""How many replicas the load needs: quickly up, slowly down, never to and fro.

Replicas are added as soon as the mean load of the last seconds exceeds the target of those there are. They are
taken away once the rest would have carried the highest load of a longer window with room to spare, as in the
stabilization window of Kubernetes' horizontal pod autoscaler. Between the two limits lies noise that changes
nothing: 1/3 of the load upwards, and any downwards that is shorter than the window.

Serve's controller unpickles this module by its source, where moe_ray need not be installed: standard library only.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Of the target, what the replicas that stay may carry when others go.
_DOWN_SHARE = 0.75
# Replicas report twice a second.
_FRESH_SECONDS = 5.0


@dataclass(frozen=True)
class Rule:
    """What is aimed at.

    Attributes:
        requests: that wait or run, of a replica.
        queued_tokens: that are still to be computed, of a replica.
        down_seconds: how long fewer replicas must have been enough.
    """

    least: int
    most: int
    requests: float
    queued_tokens: float
    down_seconds: float


@dataclass(frozen=True)
class Load:
    """Of all replicas that run.

    Attributes:
        is_complete: whether each of them has told its part.
    """

    requests: float
    queued_tokens: float
    is_complete: bool


@dataclass(frozen=True)
class History:
    """What was enough lately.

    Attributes:
        since: when it begins, in seconds.
        peaks: (time, replicas) of the highest needs, each higher than all later ones.
    """

    since: float
    peaks: tuple[tuple[float, int], ...] = ()


def decide(rule: Rule, replicas: int, load: Load, now: float, history: History | None) -> tuple[int, History]:
    """The replicas that there should be.

    Args:
        replicas: that there should be until now.
        history: that of the last decision; None: nothing is known of the time before, so none is taken away soon.
    """
    history = history or History(now)
    needed = max(load.requests / rule.requests, load.queued_tokens / rule.queued_tokens)
    if load.is_complete:
        history = _remember(history, rule, now, math.ceil(needed / _DOWN_SHARE))
    wanted = max(replicas, math.ceil(needed))
    if load.is_complete and now - history.since >= rule.down_seconds:
        wanted = max(math.ceil(needed), min(replicas, history.peaks[0][1]))
    return min(max(wanted, rule.least), rule.most), history


def _remember(history: History, rule: Rule, now: float, enough: int) -> History:
    peaks = [peak for peak in history.peaks if peak[1] > enough and now - peak[0] <= rule.down_seconds]
    return History(history.since, (*peaks, (now, enough)))


class QueuePolicy:
    """The rule as a policy of Ray Serve, which calls it several times a second.

    Args:
        rule: fields of a `Rule`.
    """

    def __init__(self, **rule: Any) -> None:
        self._rule = Rule(**rule)

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """Decide, given Serve's `AutoscalingContext`; what its replicas report are means of the last seconds."""
        found: Mapping[str, Mapping[Any, float]] = context.aggregated_metrics or {}
        load = Load(
            # With those that wait in proxies, as all do while no replica runs.
            context.total_queued_requests + sum(found.get("requests", {}).values()),
            sum(found.get("queued_tokens", {}).values()),
            _is_complete(context),
        )
        replicas, history = decide(
            self._rule,
            context.target_num_replicas,
            load,
            context.current_time,
            context.policy_state.get("history"),
        )
        return replicas, {"history": history}


def _is_complete(context: Any) -> bool:
    """Whether each replica that runs has reported lately: an overwhelmed one is late, and must not look idle."""
    reports = (context.raw_metrics or {}).get("queued_tokens", {})
    series = [reports.get(replica) for replica in context.running_replicas]
    return bool(series) and all(s and context.current_time - s[-1].timestamp <= _FRESH_SECONDS for s in series)

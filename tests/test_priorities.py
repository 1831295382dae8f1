"""What training leaves to replicas, and what it asks the autoscaler for; tests/test_nodes.py has real nodes."""

import pytest

from moe_ray.config import build_config
from moe_ray.errors import ConfigError
from moe_ray.training.cluster_view import fit
from moe_ray.training.node_request import Steps

WORKER = {"CPU": 1.0, "spot": 1.0}


def test_replicas_take_first_where_they_cost_the_fewest_workers() -> None:
    spot, other = {"CPU": 3.0, "spot": 3.0}, {"CPU": 2.0}
    assert fit([spot, other], WORKER) == 3
    assert fit([spot, other], WORKER, [{"CPU": 1.0}] * 2) == 3
    assert fit([spot, other], WORKER, [{"CPU": 1.0}] * 4) == 1
    # Two claims of two CPUs: the other node has room for one, and one of three CPUs is left here.
    assert fit([spot, other], WORKER, [{"CPU": 2.0}] * 2) == 1


def test_what_has_no_place_anywhere_costs_no_worker() -> None:
    nodes = [{"CPU": 3.0, "spot": 3.0}] * 2
    assert fit(nodes, WORKER, [{"CPU": 4.0}, {"GPU": 1.0}]) == 6
    assert fit(nodes, WORKER, [{"CPU": 1.0}] * 100) == 0
    assert nodes[0] == {"CPU": 3.0, "spot": 3.0}


def test_a_request_is_halved_until_it_is_feasible() -> None:
    steps, now, limit, asked = Steps(), 0.0, 6, []
    for _ in range(60):
        now += 1.0
        number = steps.next(8, 2, bool(asked) and asked[-1] > limit, now)
        asked.append(number)
    assert asked[0] == 8
    assert asked[-1] == 5
    # The nodes have come: all is asked for again, and stepwise less.
    assert steps.next(8, 5, False, now) == 8
    assert steps.next(8, 5, True, now + steps.ANSWER_SECONDS) == 6


def test_a_request_that_never_is_feasible_ends_at_what_there_is() -> None:
    steps = Steps()
    asked = [steps.next(8, 2, True, float(second)) for second in range(int(Steps.RETRY_SECONDS) - 1)]
    assert asked[-1] == 2
    assert steps.next(8, 2, True, Steps.RETRY_SECONDS) == 8, "limits may have changed"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["parallel.yield_after_seconds=2"], r"parallel.workers=1 is a fixed number.*\[min, max\]"),
        (["parallel.resources={CPU: 1}"], "parallel.resources names 'CPU'.*parallel.cpus_per_worker"),
        (["parallel.resources={spot: -1}"], "parallel.resources.spot"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config({}, overrides)

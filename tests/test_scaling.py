"""How many replicas there are: the rule alone, and as Serve's controller gets it."""

import json
import math
import random
import subprocess
import sys
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_ray.serve_config import ServeConfig
from moe_ray.serving.autoscaling import make_autoscaling_config
from moe_ray.serving.scaling import Load, QueuePolicy, Rule, decide

RULE = Rule(least=2, most=16, requests=4.0, queued_tokens=1000.0, down_seconds=30.0)
TICK = 0.1
LOADS = st.floats(0, 1e6)


class Controller:
    """Decides ten times a second."""

    def __init__(self, replicas=2, now=1e9):
        self.replicas, self.now, self.history = replicas, now, None

    def see(self, requests, tokens=0.0, is_complete=True):
        load = Load(requests, tokens, is_complete)
        self.replicas, self.history = decide(RULE, self.replicas, load, self.now, self.history)
        self.now += TICK
        return self.replicas

    def see_for(self, seconds, requests, **load):
        return [self.see(requests, **load) for _ in range(round(seconds / TICK))]


@given(st.floats(0.1, 100), st.integers(0, 2**32), st.floats(0, 1 / 3 - 1e-6), st.floats(0, 1))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_noise_at_steady_load_never_takes_replicas_away(requests, seed, above, below):
    rng, controller = random.Random(seed), Controller()
    seen = [controller.see(requests * (1 + rng.uniform(-below, above))) for _ in range(3000)]
    assert seen == sorted(seen)
    assert 2 <= seen[-1] <= max(2, math.ceil(requests * (1 + above) / RULE.requests))


@pytest.mark.parametrize("load", [{"requests": 400}, {"requests": 1, "tokens": 64_000}])
def test_replicas_come_at_once_and_go_late(load):
    controller = Controller()
    controller.see_for(60, 1)
    assert controller.see(**load) == 16
    controller.see_for(5, **load)
    seen = controller.see_for(60, 1)
    assert set(seen) == {16, 2}
    assert seen.index(2) * TICK == pytest.approx(30, abs=2 * TICK)


def test_a_short_peak_is_remembered():
    controller = Controller()
    for _ in range(10):
        controller.see_for(1, 40)
        assert set(controller.see_for(28, 1)) == {10}


def test_some_go_when_the_rest_has_room_to_spare():
    controller = Controller(replicas=10)
    assert set(controller.see_for(100, 28)) == {10}
    assert controller.see_for(100, 27)[-1] == 9
    assert controller.see_for(100, 4.1)[-1] == 2


def test_without_all_reports_replicas_come_but_do_not_go():
    controller = Controller(replicas=8)
    controller.see_for(31, 30)
    assert set(controller.see_for(300, 0, is_complete=False)) == {8}
    assert controller.see(40, is_complete=False) == 10


def test_a_new_controller_takes_none_away_soon():
    controller = Controller(replicas=12)
    assert set(controller.see_for(20, 0, is_complete=False) + controller.see_for(9, 1)) == {12}
    assert controller.see_for(30, 1)[-1] == 2


@given(st.lists(st.tuples(LOADS, LOADS, st.booleans(), st.floats(0, 1e4)), max_size=50), st.integers(0, 100))
@settings(deadline=None, derandomize=True)
def test_bounds_are_kept(loads, replicas):
    controller = Controller(replicas)
    for requests, tokens, is_complete, pause in loads:
        controller.now += pause
        assert 2 <= controller.see(requests, tokens, is_complete) <= 16


def context(state, now, queued=0.0, **reports):
    """Of a controller with two replicas, given (requests, time) that each reported last."""
    return SimpleNamespace(
        total_queued_requests=queued,
        aggregated_metrics={
            "requests": {name: requests for name, (requests, _) in reports.items()},
            "queued_tokens": dict.fromkeys(reports, 0.0),
        },
        raw_metrics={
            "queued_tokens": {name: [SimpleNamespace(timestamp=time)] for name, (_, time) in reports.items()}
        },
        running_replicas=["a", "b"],
        target_num_replicas=6,
        policy_state=state,
        current_time=now,
    )


def test_a_replica_that_tells_nothing_keeps_all():
    policy, state = QueuePolicy(**vars(RULE)), {}
    for now in range(100):
        replicas, state = policy(context(state, now, a=(1.0, now)))
        assert replicas == 6
    for now in range(100, 200):
        replicas, state = policy(context(state, now, a=(1.0, now), b=(1.0, 90)))
        assert replicas == 6
    for now in range(200, 300):
        replicas, state = policy(context(state, now, a=(1.0, now), b=(1.0, now - 1)))
    assert replicas == 2
    nothing = {"aggregated_metrics": None, "raw_metrics": None, "running_replicas": []}
    assert policy(SimpleNamespace(**vars(context({}, 0)) | nothing))[0] == 6
    assert policy(SimpleNamespace(**vars(context({}, 0, queued=30.0)) | nothing))[0] == 8


def test_the_controller_needs_no_moe_ray():
    config = make_autoscaling_config(ServeConfig(max_replicas=9, target_ongoing_requests=2.0))
    fields = {"aggregated_metrics": {"requests": {"a": 14.0}}, "raw_metrics": {}, "running_replicas": ["a"]}
    fields |= {"total_queued_requests": 0.0, "target_num_replicas": 2, "policy_state": {}, "current_time": 0.0}
    found = subprocess.run(
        [
            sys.executable,
            "-c",
            "import json, sys; sys.modules['moe_ray'] = None; from types import SimpleNamespace as Context;"
            "from ray import cloudpickle; policy = cloudpickle.loads(sys.stdin.buffer.read());"
            "context = Context(**json.loads(sys.argv[2])); print(policy(**json.loads(sys.argv[1]))(context)[0])",
            json.dumps(config.policy.policy_kwargs),
            json.dumps(fields),
        ],
        input=config.policy.get_serialized_policy_def(),
        capture_output=True,
        check=True,
        timeout=60,
    )
    assert found.stdout.split() == [b"7"]

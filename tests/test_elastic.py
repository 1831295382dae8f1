"""Training on a real cluster whose workers and nodes are lost, hang, get notice and come back.

Routing is by hash: among the 200,000 choices that a learned router makes here a few are so close that the rounding
of another world decides them otherwise, with no fault at all. tests/test_schedules.py holds the learned one.
"""

import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_ray.checkpoint.inference import load_for_inference
from moe_ray.config import build_config
from moe_ray.telemetry.run_log import read_events
from tests.multi_node import ElasticJob, Nodes, signal_worker, start_nodes
from tests.tiny import copy_corpus, run, tiny_settings

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]
EVERY = 8


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with start_nodes(2) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def make_settings(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    folder = tmp_path_factory.mktemp("elastic")
    (folder / "corpus").mkdir()
    corpus = copy_corpus(folder / "corpus")

    def make(name: str, steps: int, num_experts: int = 8) -> dict[str, Any]:
        tree = tiny_settings(corpus, folder / "runs", name)
        tree["model"] |= {"num_experts": num_experts, "router": "hash"}
        tree["optim"] |= {"lr": 1e-3}
        tree["train"] |= {"steps": steps, "eval_every": steps, "global_batch": 48, "micro_batch": 2}
        tree["checkpoint"] |= {"every": EVERY}
        tree["parallel"] = {"workers": [1, 4], "ep": "auto", "grow_after_seconds": 1, "timeout_seconds": 10}
        return tree

    return make


@pytest.fixture(scope="module")
def undisturbed(make_settings: Callable[..., dict[str, Any]]) -> Callable[..., tuple[list[dict[str, Any]], Path]]:
    """Metrics and folder of a run of one process, by steps and experts; made once."""
    made: dict[tuple[int, int], tuple[list[dict[str, Any]], Path]] = {}

    def get(steps: int, num_experts: int = 8) -> tuple[list[dict[str, Any]], Path]:
        if (steps, num_experts) not in made:
            settings = make_settings(f"undisturbed-{steps}-{num_experts}", steps, num_experts)
            config = build_config(settings, ["parallel.workers=1", "parallel.ep=1"])
            made[steps, num_experts] = run(config), config.train.run_dir
        return made[steps, num_experts]

    return get


def check_equal(job: ElasticJob, reference: tuple[list[dict[str, Any]], Path]) -> list[dict[str, Any]]:
    """Every step used the same samples, and losses and final weights are those of the undisturbed run."""
    metrics, (expected, folder) = job.finish(), reference
    assert [m["sample_checksum"] for m in metrics] == [m["sample_checksum"] for m in expected]
    assert [m["loss"] for m in metrics] == pytest.approx([m["loss"] for m in expected], rel=1e-4)
    ours, theirs = (load_for_inference(path).model.state_dict() for path in (job.run_dir, folder))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-4 * float(tensor.abs().max()))
    return metrics


def test_run_survives_losses_and_notices_and_grows(
    nodes: Nodes, make_settings: Callable[..., dict[str, Any]], undisturbed: Callable[..., Any]
) -> None:
    nodes.resize(2)
    with ElasticJob(nodes, make_settings("faults", 160)) as job:
        job.wait_until(lambda m: m["step"] >= 10 and m["world_size"] == 2)
        killed = job.resumed_after(lambda: signal_worker(signal.SIGKILL))
        assert 0 < killed["redone_steps"] <= EVERY
        noticed = job.resumed_after(lambda: signal_worker(signal.SIGTERM))
        assert noticed["redone_steps"] <= 1
        grown = job.resumed_after(nodes.add, world_size=3)
        assert grown["redone_steps"] == 0
        drained = job.resumed_after(nodes.drain, world_size=2)
        assert drained["redone_steps"] <= 1
        nodes.lose()  # the drained one: nothing of the run is there any more
        lost = job.resumed_after(nodes.lose, world_size=1)
        assert lost["redone_steps"] <= EVERY
        metrics = check_equal(job, undisturbed(160))
        assert {(m["world_size"], m["ep"]) for m in metrics} == {(1, 1), (2, 2), (3, 1)}
        kinds = [event["event"] for event in read_events(job.run_dir)]
        assert kinds.count("failure") == 2
        assert {"start", "restart", "resize", "drain"} <= set(kinds)


@pytest.mark.slow
def test_worker_that_hangs_is_lost(
    nodes: Nodes, make_settings: Callable[..., dict[str, Any]], undisturbed: Callable[..., Any]
) -> None:
    nodes.resize(2)
    with ElasticJob(nodes, make_settings("hang", 60)) as job:
        job.wait_until(lambda m: m["step"] >= 10 and m["world_size"] == 2)
        hung = []
        resumed = job.resumed_after(lambda: hung.append(signal_worker(signal.SIGSTOP)))
        assert resumed["redone_steps"] <= EVERY
        assert not hung[0].is_running()
        check_equal(job, undisturbed(60))


@pytest.mark.slow
@pytest.mark.parametrize(
    "seed", [pytest.param(seed, marks=[pytest.mark.exhaustive] if seed >= 1 else []) for seed in range(12)]
)
def test_curve_is_that_of_an_undisturbed_run(
    nodes: Nodes, make_settings: Callable[..., dict[str, Any]], undisturbed: Callable[..., Any], seed: int
) -> None:
    """A seeded schedule of a loss and a gain, or two losses."""
    draw = random.Random(seed)
    num_experts = (8, 6)[seed % 2]
    nodes.resize(draw.randint(2, 4))
    with ElasticJob(nodes, make_settings(f"schedule-{seed}", 60, num_experts)) as job:
        for step in (draw.randint(3, 15), draw.randint(20, 30)):
            job.wait_until(lambda m, step=step: m["step"] >= step)
            size = len(nodes.nodes)
            losses = [lambda: signal_worker(signal.SIGKILL)] + [nodes.lose] * (size > 1)
            change = draw.choice([*losses, *[nodes.add] * (2 * (size < 4))])
            resumed = job.resumed_after(change)
            assert resumed["redone_steps"] <= EVERY
        metrics = check_equal(job, undisturbed(60, num_experts))
        assert all(num_experts % m["ep"] == 0 and m["world_size"] % m["ep"] == 0 for m in metrics)

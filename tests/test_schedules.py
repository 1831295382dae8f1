"""Twelve seeded schedules of losses and gains, in real processes: the curve is that of an undisturbed run.

The same on a Ray cluster: tests/test_elastic.py.
"""

import random
import time
from pathlib import Path

import pytest
import torch

from moe_ray.checkpoint.inference import load_for_inference
from moe_ray.config import Config, build_config
from moe_ray.data.prepare import prepare
from moe_ray.telemetry.run_log import read_metrics
from tests.tiny import copy_corpus, rank_main, run, tiny_settings
from tests.worlds import kill_world, start_world

EVERY = 4


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_corpus(tmp_path_factory.mktemp("corpus"))


def make_config(corpus: Path, name: str, num_experts: int, workers: int) -> Config:
    tree = tiny_settings(corpus, corpus / "runs", name)
    tree["model"]["num_experts"] = num_experts
    tree["optim"] |= {"lr": 1e-3}
    tree["train"] |= {"steps": 24, "eval_every": 24}
    tree["checkpoint"] |= {"every": EVERY}
    tree["parallel"] = {"workers": [1, workers], "ep": "auto"}
    return build_config(tree)


@pytest.fixture(scope="module", params=[8, 6])
def undisturbed(request: pytest.FixtureRequest, corpus: Path) -> Config:
    config = make_config(corpus, f"undisturbed-{request.param}", request.param, 1)
    run(config)
    return config


def run_until(config: Config, step: int) -> None:
    """Train, and SIGKILL every rank once `step` is logged."""
    world = start_world(config.parallel.max_workers, rank_main, config, prepare(config))
    try:
        while not any(metrics["step"] >= step for metrics in read_metrics(config.train.run_dir)):
            assert all(process.is_alive() for process in world), "the run ended before it could be killed"
            time.sleep(0.001)
    finally:
        kill_world(world)


@pytest.mark.parametrize("seed", range(6))
def test_curve_is_that_of_an_undisturbed_run(corpus: Path, undisturbed: Config, seed: int) -> None:
    num_experts = undisturbed.model.num_experts
    draw = random.Random(f"{num_experts}-{seed}")
    worlds = [draw.randint(1, 4)]
    while len(worlds) < 3:
        worlds.append(draw.choice([size for size in range(1, 5) if size != worlds[-1]]))
    configs = [make_config(corpus, f"{num_experts}-{seed}", num_experts, size) for size in worlds]
    for config, step in zip(configs, (draw.randint(2, 9), draw.randint(12, 20)), strict=False):
        run_until(config, step)
    metrics, expected = run(configs[-1]), read_metrics(undisturbed.train.run_dir)
    assert [m["sample_checksum"] for m in metrics] == [m["sample_checksum"] for m in expected]
    assert [m["loss"] for m in metrics] == pytest.approx([m["loss"] for m in expected], rel=1e-4)
    assert max(m["redone_steps"] for m in metrics) <= EVERY
    ours, theirs = (
        load_for_inference(config.train.run_dir).model.state_dict() for config in (configs[-1], undisturbed)
    )
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-4 * float(tensor.abs().max()))

"""AutoML through `jobs/sweep.py` on a real Ray cluster, and the training of what it recommends."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from moe_ray.config import load_config
from moe_ray.storage import open_storage
from moe_ray.tuning.trials import read_trials
from tests.conftest import RayCluster
from tests.tiny import copy_corpus, run, tiny_settings

# Most of it for the ladder, so that the model that is trained in the end is small.
BUDGET, LADDER_SHARE = 3e11, 0.8


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
def test_a_budget_becomes_a_trained_model(ray_cluster: RayCluster, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    settings = tiny_settings(copy_corpus(corpus), tmp_path, "auto")
    settings["model"]["vocab_size"] = 300
    # Of the trials, some have more steps and some have fewer.
    settings["train"] |= {"global_batch": 8, "steps": 400}
    settings["parallel"] = {"cpus_per_worker": 0.5}
    settings["sweep"] = {
        "auto": True,
        "budget": BUDGET,
        "ladder_share": LADDER_SHARE,
        "trials": 12,
        "concurrent": 3,
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "jobs/sweep.py", str(tmp_path / "config.yaml")]
    environment = os.environ | {"RAY_ADDRESS": ray_cluster.address}
    job = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1700)
    assert job.returncode == 0, job.stdout + job.stderr
    folder = tmp_path / "auto"
    trials = read_trials(open_storage(str(folder)))
    assert [trial.status for trial in trials] == ["finished"] * 12
    found, best = json.loads((folder / "auto.json").read_text()), load_config(folder / "best.yaml")
    assert f"recommended: {found['label']}; predicted loss {found['loss']['middle']:.3f}" in job.stdout
    tokens = sum(trial.steps * trial.values["train.global_batch"] * 32 * trial.flops_per_token for trial in trials)
    assert tokens + found["flops"] <= BUDGET
    assert b"Recommendation" in (folder / "sweep.html").read_bytes()
    *_, last = run(best)
    assert last["step"] == best.train.steps
    assert last["val_loss"] < max(trial.metrics["val_loss"] for trial in trials)

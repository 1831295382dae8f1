"""The commands and snippets of the pages on architectures and routers do what the pages say."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from moe_ray.telemetry.run_log import read_metrics
from tests.tiny import copy_corpus, tiny_settings

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("architectures", "routers")


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_snippet_prints_the_costs_of_a_model() -> None:
    (snippet,) = blocks("architectures", "python")
    output = subprocess.run([sys.executable, "-c", snippet], check=True, capture_output=True, text=True).stdout
    total, active, flops = map(int, output.split())
    assert total > active > 0
    assert flops > 6 * active / 2


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_commands_train(page: str, tmp_path: Path) -> None:
    settings = tiny_settings(copy_corpus(tmp_path), tmp_path / "runs", "unused")
    settings["train"]["dtype"] = "bfloat16"
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(settings))
    (tmp_path / "cosine_router.py").write_text(blocks("routers", "python")[0])
    (command,) = blocks(page, "bash")
    command = command.replace("jobs/configs/small.yaml", "tiny.yaml").replace("jobs/", f"{ROOT}/jobs/")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    subprocess.run(shlex.split(command), cwd=tmp_path, env=environment, check=True, timeout=200)
    (run_dir,) = (tmp_path / "runs").iterdir()
    metrics = read_metrics(run_dir)
    assert metrics[-1]["step"] == 12
    assert metrics[-1]["loss"] < metrics[0]["loss"]

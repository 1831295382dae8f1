"""A real Prometheus of the test, with the project's own configuration."""

import math
import shlex
import subprocess
import time
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlencode

import httpx
import yaml

from tests.grafana import FOLDER
from tests.waiting import until


class Prometheus:
    """Scrapes once a second what a service discovery file and the monitor's port name, and evaluates the rules.

    Args:
        command: as the docs give it; its paths and port are replaced.
    """

    def __init__(self, command: str, folder: Path, port: int, targets_file: Path, monitor_port: int) -> None:
        settings = yaml.safe_load((FOLDER / "prometheus.yaml").read_text(encoding="utf-8"))
        settings["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        settings["rule_files"] = [str(FOLDER / name) for name in settings["rule_files"]]
        ray, monitor = settings["scrape_configs"]
        ray["file_sd_configs"][0] |= {"files": [str(targets_file)], "refresh_interval": "1s"}
        monitor["static_configs"][0]["targets"] = [f"127.0.0.1:{monitor_port}"]
        config = folder / "prometheus.yaml"
        config.write_text(yaml.safe_dump(settings))
        self._url, self._began = f"http://127.0.0.1:{port}", time.time()
        for old, new in (
            ("dashboards/prometheus.yaml", config),
            ("runs/prometheus", folder / "tsdb"),
            (":9090", port),
        ):
            assert old in command
            command = command.replace(old, f":{new}" if old == ":9090" else str(new))
        self._log = (folder / "prometheus.log").open("w")
        self._process = subprocess.Popen(shlex.split(command), stdout=self._log, stderr=subprocess.STDOUT)

    def __enter__(self) -> Self:
        until(self._is_ready, 60)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(30)
        self._log.close()

    def has_data(self, expr: str) -> bool:
        """Whether an expression had a number at some moment since the start."""
        query = {"query": expr, "start": self._began, "end": time.time(), "step": 2}
        series = self.get(f"query_range?{urlencode(query)}")["result"]
        return any(math.isfinite(float(value)) for one in series for _, value in one["values"])

    def get(self, path: str) -> Any:
        """What its HTTP interface answers."""
        answer = httpx.get(f"{self._url}/api/v1/{path}", timeout=60).json()
        assert answer["status"] == "success", f"{path}\n{answer}"
        return answer["data"]

    def _is_ready(self) -> bool:
        assert self._process.poll() is None, "see prometheus.log"
        try:
            return httpx.get(f"{self._url}/-/ready").status_code == 200
        except httpx.HTTPError:
            return False

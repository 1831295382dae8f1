"""What Ray's metrics agent shows of a real training run and a real endpoint: every row of the catalogue."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from moe_ray.telemetry.catalogue import CATALOGUE
from moe_ray.telemetry.run_log import read_events, read_metrics
from tests.conftest import RayCluster, free_port
from tests.tiny import copy_corpus, tiny_settings
from tests.waiting import until

pytestmark = pytest.mark.cluster
# Nothing here is a sweep.
UNUSED: set[str] = set()


class Agent:
    """The metrics of the test cluster's only node, found as Prometheus finds them."""

    def __init__(self, temp_dir: Path) -> None:
        self._discovery = temp_dir / "prom_metrics_service_discovery.json"

    def targets(self) -> list[str]:
        (group,) = json.loads(self._discovery.read_text())
        return group["targets"]

    def scrape(self) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
        """Values by metric and labels, without those that Ray adds."""
        found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
        for target in self.targets():
            try:
                text = httpx.get(f"http://{target}/metrics").text
            except httpx.HTTPError:
                continue
            for family in text_string_to_metric_families(text):
                for sample in family.samples:
                    ours = {"le", *(label for metric in CATALOGUE.values() for label in metric.labels)}
                    labels = tuple(sorted((k, v) for k, v in sample.labels.items() if k in ours))
                    found.setdefault(sample.name, {})[labels] = sample.value
        return found

"""What Ray's metrics agent shows of a real training run and a real endpoint: every row of the catalogue."""

import json
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from moe_ray.telemetry.catalogue import CATALOGUE

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

"""The catalogue, and what it refuses."""

import logging
import re
from dataclasses import fields
from pathlib import Path

import pytest

from moe_ray.ray_metrics import RayMetrics
from moe_ray.serving.affinity.stats import AffinityStats
from moe_ray.serving.engine.stats import EngineStats
from moe_ray.serving.metrics import Growth, Metrics
from moe_ray.serving.usage import Usage
from moe_ray.telemetry.catalogue import CATALOGUE
from moe_ray.telemetry.document import with_tables
from moe_ray.telemetry.samples import EVENTS, Sample, event_sample


@pytest.mark.parametrize("metric", CATALOGUE.values(), ids=CATALOGUE)
def test_rows_are_well_formed(metric):
    assert re.fullmatch(r"moe(_[a-z0-9]+)+", metric.name)
    assert metric.kind != "counter" or not metric.name.endswith("_total")
    assert metric.help.endswith(".")
    assert metric.series >= 1
    constant = {"serve": {"replica"}, "monitor": set()}.get(metric.source, {"run"})
    assert (metric.series == 1) == (set(metric.labels) == constant)
    assert bool(metric.buckets) == (metric.kind == "histogram")
    assert metric.unit in metric.name.split("_") or metric.unit not in ("bytes", "seconds")


def read_samples(metrics, growth):
    found = {}
    for name, labels, value in growth.samples(metrics.families()):
        key = name, *labels.values()
        found[key] = [*found.get(key, ()), value]
    return found


def test_a_replica_has_every_row_and_no_other():
    metrics = Metrics("r", [AffinityStats()])
    metrics.watch(EngineStats)
    metrics.count("/v1/x", "200", Usage(prompt_tokens=1), 0.1, 0.1)
    rows = {name for name, metric in CATALOGUE.items() if metric.source == "serve"}
    assert {name for name, *_ in read_samples(metrics, Growth())} == rows
    assert {
        f"moe_serve_{field.name}" for numbers in (EngineStats, AffinityStats) for field in fields(numbers)
    } < rows


def test_counters_and_buckets_grow_by_what_was_added():
    stats = EngineStats(generated_tokens=10, running=2)
    metrics, growth = Metrics("r"), Growth()
    metrics.watch(lambda: stats)
    for seconds in (0.004, 0.3, 0.3, 500):
        metrics.count("/v1/x", "200", Usage(prompt_tokens=5), seconds, None)
    metrics.count("/v1/y", "200", Usage(), 0.02, None)
    found = read_samples(metrics, growth)
    assert found["moe_serve_generated_tokens", "r"] == [10]
    assert found["moe_serve_http_requests", "r", "/v1/x", "200", "none"] == [4]
    assert found["moe_serve_key_tokens", "r", "none", "prompt"] == [20]
    # Upper bounds of the buckets; what is above the last is twice the last.
    assert found["moe_serve_http_seconds", "r", "/v1/x"] == [0.005, 0.5, 0.5, 240]
    assert found["moe_serve_http_seconds", "r", "/v1/y"] == [0.025]

    stats = EngineStats(generated_tokens=4, running=1)  # another engine took its place
    metrics.count("/v1/x", "200", Usage(), 1.0, None)
    found = read_samples(metrics, growth)
    assert found["moe_serve_generated_tokens", "r"] == [4]
    assert found["moe_serve_running", "r"] == [1]
    assert found["moe_serve_http_requests", "r", "/v1/x", "200", "none"] == [1]
    assert found["moe_serve_http_seconds", "r", "/v1/x"] == [1.0]
    assert ("moe_serve_http_seconds", "r", "/v1/y") not in found


def test_what_is_not_in_the_catalogue_is_refused():
    metrics = RayMetrics()
    with pytest.raises(AssertionError, match="moe_train_los is not in the catalogue"):
        metrics.send([Sample("moe_train_los", {"run": "r"}, 1.0)])
    with pytest.raises(AssertionError, match="moe_train_loss has the labels"):
        metrics.send([Sample("moe_train_loss", {"run": "r", "layer": "1"}, 1.0)])


def test_series_have_a_bound_that_is_said_once(caplog):
    metrics = RayMetrics()
    bound = CATALOGUE["moe_train_events"].series
    metrics.send(event_sample("r", event, 0) for event in EVENTS)
    with caplog.at_level(logging.WARNING, "moe_ray"):
        metrics.send(event_sample("r", f"kind-{number}") for number in range(bound - len(EVENTS)))
        assert not caplog.records
        for _ in range(2):
            metrics.send(event_sample("r", f"more-{number}") for number in range(5))
            metrics.send([event_sample("r", "start")])
    (record,) = caplog.records
    assert record.getMessage() == f"moe_train_events has more than {bound} series; more are left out"


def test_the_page_of_metrics_is_of_this_catalogue():
    page = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert all(metric.exposed_name in page for metric in CATALOGUE.values())
    assert with_tables(page) == page, "docs/metrics.md is stale: make docs"

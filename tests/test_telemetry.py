"""A real training run and a real endpoint: what Ray's metrics agent shows of them, their logs, and a tracker."""

import json
import math
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from moe_ray.config import Config, build_config
from moe_ray.telemetry.catalogue import CATALOGUE
from moe_ray.telemetry.run_log import read_events, read_metrics
from moe_ray.telemetry.samples import EVENTS, Sample, submission_samples, training_samples
from tests.conftest import RayCluster, free_port
from tests.test_trackers import read_tensorboard
from tests.tiny import copy_corpus, tiny_settings
from tests.waiting import until

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
LABELS = {"le", *(label for metric in CATALOGUE.values() for label in metric.labels)}
# By metric and labels, without the labels that Ray adds.
Values = dict[tuple[str, frozenset[tuple[str, str]]], float]


def scrape(cluster: RayCluster) -> Values:
    """All that Prometheus gets from the addresses that Ray's service discovery names."""
    (group,) = json.loads((cluster.temp_dir / "prom_metrics_service_discovery.json").read_text())
    found: Values = {}
    for target in group["targets"]:
        try:
            text = httpx.get(f"http://{target}/metrics").text
        except httpx.HTTPError:
            continue  # the autoscaler's port, where there is none
        found |= parse(text)
    return found


def parse(text: str) -> Values:
    samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
    return {
        (sample.name, frozenset((k, v) for k, v in sample.labels.items() if k in LABELS)): sample.value
        for sample in samples
        if "moe_" in sample.name and not sample.name.endswith("_created")
    }


def exposed(sample: Sample) -> tuple[str, frozenset[tuple[str, str]]]:
    return CATALOGUE[sample.name].exposed_name, frozenset(sample.labels.items())


def names_of(source: str) -> set[str]:
    """As Prometheus sees them; of a histogram the number of its observations."""
    metrics = [metric for metric in CATALOGUE.values() if metric.source == source]
    return {metric.exposed_name + ("_count" if metric.kind == "histogram" else "") for metric in metrics}


SECRET = uuid.uuid4().hex
SUBMISSION = "raysubmit_measured"
PROMPT = "the quick brown fox jumps over"


@dataclass(frozen=True)
class Run:
    """One that has just ended on the cluster."""

    config: Config
    output: str


@pytest.fixture(scope="module")
def run(ray_cluster: RayCluster, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("metrics")
    corpus = folder / "corpus"
    corpus.mkdir()
    settings = tiny_settings(copy_corpus(corpus), folder / "runs", "measured")
    settings["parallel"] = {"workers": 2, "ep": 2, "cpus_per_worker": 0.5}
    settings["model"] |= {"num_layers": 3, "num_dense_layers": 1}
    settings["telemetry"] = {"log_format": "json", "log_level": "debug", "trackers": ["tensorboard"]}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    # What the job server gives to a driver.
    submission = {"RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"metadata": {"job_submission_id": SUBMISSION}})}
    ended = subprocess.run(
        [sys.executable, "jobs/train.py", str(folder / "config.yaml")],
        env=os.environ | submission | {"RAY_ADDRESS": ray_cluster.address, "AWS_SECRET_ACCESS_KEY": SECRET},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=230,
    )
    assert ended.returncode == 0, ended.stdout
    return Run(build_config(settings), ended.stdout)


def test_training_is_shown_as_it_was_logged(ray_cluster: RayCluster, run: Run) -> None:
    config = run.config
    logged = read_metrics(config.train.run_dir)
    expected: Values = {exposed(sample): sample.value for sample in submission_samples("measured", SUBMISSION)}
    for record in logged:
        for sample in training_samples(record, config):
            is_counter = CATALOGUE[sample.name].kind == "counter"
            before = expected.get(exposed(sample), 0.0) if is_counter else 0.0
            expected[exposed(sample)] = before + sample.value
    assert {name for name, _ in expected} == names_of("train")
    assert {dict(labels)["layer"] for name, labels in expected if name == "ray_moe_expert_load"} == {"1", "2"}
    until(lambda: exposed(training_samples(logged[-1], config)[0]) in scrape(ray_cluster))
    found = scrape(ray_cluster)
    assert {key: found.get(key, math.nan) for key in expected} == pytest.approx(expected)

    counts = dict.fromkeys(EVENTS, 0)
    for event in read_events(config.train.run_dir):
        counts[event["event"]] += 1
    assert counts["start"] == 1
    for event, count in counts.items():
        labels = frozenset({"run": "measured", "event": event}.items())
        assert found["ray_moe_train_events_total", labels] == pytest.approx(count)


def test_training_logs_say_who_speaks(run: Run) -> None:
    # Ray puts the process before the lines of others.
    lines = [json.loads(line[line.index("{") :]) for line in run.output.splitlines() if '{"time"' in line]
    assert {line["run"] for line in lines} == {"measured"}
    assert {(line["logger"], line.get("rank")) for line in lines} >= {
        ("moe_ray.training.launcher", 0),
        ("moe_ray.training.events", None),
    }
    assert len({line["job"] for line in lines if "job" in line}) == 1
    assert SECRET not in run.output


def test_tensorboard_shows_what_was_logged(run: Run) -> None:
    curve, _ = read_tensorboard(run.config.train.run_dir / "trackers", "measured")
    assert dict(curve) == pytest.approx({m["step"]: m["loss"] for m in read_metrics(run.config.train.run_dir)})


def test_gauges_of_workers_that_are_gone_are_forgotten(ray_cluster: RayCluster, run: Run) -> None:
    step = ("ray_moe_train_step", frozenset({("run", "measured")}))
    until(lambda: step not in scrape(ray_cluster), seconds=60)


@pytest.fixture(scope="module")
def url(ray_cluster: RayCluster, run: Run) -> Iterator[str]:
    """A replica that serves the run, with all caches."""
    from ray import serve
    from ray.serve.config import HTTPOptions

    from serve_apps.moe_lm import build

    path, port = run.config.train.run_dir, free_port()
    serve.start(http_options=HTTPOptions(host="127.0.0.1", port=port))
    try:
        args = {"checkpoint": str(path), "serve.min_replicas": "1", "serve.max_replicas": "1"}
        serve.run(build(args | {"serve.response_cache_bytes": "1000000"}), name="measured")
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()


def test_requests_are_shown_as_the_replica_counts_them(ray_cluster: RayCluster, url: str) -> None:
    body = {"model": "measured", "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
    for _ in range(3):
        assert httpx.post(f"{url}/v1/completions", json=body, timeout=60).status_code == 200
    with httpx.stream("POST", f"{url}/v1/completions", json=body | {"stream": True}, timeout=60) as answer:
        assert answer.read()
    assert httpx.post(f"{url}/v1/completions", json={}).status_code == 400
    requests = ("route", "/v1/completions")

    def of_completions(values: Values) -> Values:
        """What no later request changes; the sum is of the bounds of buckets in Ray."""
        by_request = ("_bucket", "_count", "http_requests_total")
        return {
            (name.removeprefix("ray_"), labels): value
            for (name, labels), value in values.items()
            if name.endswith(by_request) and requests in labels
        }

    own = of_completions(parse(httpx.get(f"{url}/metrics").text))
    count = [value for (name, _), value in own.items() if name == "moe_serve_http_seconds_count"]
    assert count == [5]
    (replica,) = {value for name, labels in own for key, value in labels if key == "replica"}
    of_replica = frozenset({("replica", replica)})

    def shown() -> Values:
        """Without what replicas of other tests have left with the agent."""
        return {key: value for key, value in of_completions(scrape(ray_cluster)).items() if of_replica <= key[1]}

    until(lambda: shown() == own)
    found = scrape(ray_cluster)
    assert {name for name, _ in found if "moe_serve" in name} >= names_of("serve")
    assert found["ray_moe_serve_response_cache_hits_total", of_replica] == 3
    assert found["ray_moe_serve_generated_tokens_total", of_replica] == 8
    assert found["ray_moe_serve_blocks_total", of_replica] > 0


def test_replicas_log_neither_prompts_nor_keys(ray_cluster: RayCluster, url: str) -> None:
    headers = {"authorization": f"Bearer {SECRET}"}
    for body in ({"model": "measured", "prompt": PROMPT, "max_tokens": 2}, {"model": PROMPT, "prompt": PROMPT}):
        httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=60)

    def logged() -> str:
        files = (ray_cluster.temp_dir / "session_latest" / "logs").glob("worker-*")
        return "\n".join(file.read_text(errors="replace") for file in files)

    until(lambda: '"message": "serving ' in logged())
    (line,) = [json.loads(line) for line in logged().splitlines() if '"message": "serving ' in line]
    assert line["replica"]
    assert line["level"] == "info"
    assert PROMPT not in logged()
    assert SECRET not in logged()

"""Each rule fires and stays quiet where it should, and Prometheus and the evaluation in process agree about it."""

import random
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from moe_ray.config import setting_names
from moe_ray.telemetry.alerts import Alert, Alerts
from moe_ray.telemetry.catalogue import CATALOGUE
from moe_ray.telemetry.prometheus_rules import rules_yaml
from moe_ray.telemetry.rules import RULES, Rule
from moe_ray.telemetry.sample_store import SampleStore
from moe_ray.telemetry.samples import Sample
from tests.alert_cases import FIRES, QUIET, TICK, TICKS, Series, Value, ticks

NAMES = [rule.name for rule in RULES]
BY_NAME = {rule.name: rule for rule in RULES}
PROMTOOL = shutil.which("promtool")
FILE = Path("dashboards/rules.yaml").resolve()
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="promtool is of Debian's package prometheus")


def firing(rule: Rule, case: list[Series]) -> list[list[Alert]]:
    """Those that fire at each tick, evaluated in process."""
    store, alerts, found = SampleStore(), Alerts([rule]), []
    for now, values in ticks(case):
        present = [Sample(one.metric, one.labels, value) for one, value in values if value is not None]
        store.add(now, present, source="case")
        alerts.update(store, now)
        found.append(alerts.active())
    return found


def ask_promtool(folder: Path, rule: Rule, case: list[Series], found: list[list[Alert]]) -> str:
    """What `promtool test rules` has against what was found in process; nothing if it agrees."""
    text = rules_yaml()
    (folder / "rules.yaml").write_text(text)
    annotations = {
        r["alert"]: r["annotations"] for group in yaml.safe_load(text)["groups"] for r in group["rules"]
    }
    tests = [
        {
            "eval_time": f"{tick * TICK}s",
            "alertname": rule.name,
            "exp_alerts": [expected(alert, annotations[rule.name]) for alert in found[tick]],
        }
        for tick in range(TICKS)
    ]
    inputs = [
        {"series": prometheus_name(one), "values": " ".join(map(prometheus_value, one.values))} for one in case
    ]
    group = {"interval": f"{TICK}s", "input_series": inputs, "alert_rule_test": tests}
    suite = {"rule_files": ["rules.yaml"], "evaluation_interval": f"{TICK}s", "tests": [group]}
    (folder / "test.yaml").write_text(yaml.safe_dump(suite))
    assert PROMTOOL is not None
    done = subprocess.run(
        [PROMTOOL, "test", "rules", "test.yaml"], cwd=folder, capture_output=True, text=True, timeout=60
    )
    return "" if done.returncode == 0 else done.stdout + done.stderr


def expected(alert: Alert, annotations: dict[str, str]) -> dict[str, Any]:
    labels = {"severity": alert.rule.severity, "component": alert.rule.component, **dict(alert.labels)}
    return {"exp_labels": labels, "exp_annotations": annotations | {"summary": alert.summary}}


def prometheus_name(one: Series) -> str:
    labels = ",".join(f'{name}="{value}"' for name, value in one.labels.items())
    return f"{CATALOGUE[one.metric].exposed_name}{{{labels}}}"


def prometheus_value(value: Value) -> str:
    return "stale" if value is None else f"{value:.17g}"


@pytest.mark.parametrize("name", NAMES)
def test_fires_and_stays_quiet(name):
    rule = BY_NAME[name]
    alerts = firing(rule, FIRES[name])[-1]
    assert len(alerts) == 1
    assert "{" not in alerts[0].summary
    assert not firing(rule, QUIET[name])[-1]


@needs_promtool
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cases", [FIRES, QUIET], ids=["fires", "quiet"])
def test_prometheus_agrees(name, cases, tmp_path):
    rule, case = BY_NAME[name], cases[name]
    assert ask_promtool(tmp_path, rule, case, firing(rule, case)) == ""


@needs_promtool
def test_promtool_says_where_it_disagrees(tmp_path):
    rule, case = BY_NAME["ExpertCollapse"], FIRES["ExpertCollapse"]
    late = [[], *firing(rule, case)[:-1]]
    assert "FAILED" in ask_promtool(tmp_path, rule, case, late)


@needs_promtool
@pytest.mark.parametrize("name", NAMES)
def test_prometheus_agrees_on_random_samples(name, tmp_path):
    rule, drawn = BY_NAME[name], random.Random(name)
    case = [one for term in rule.terms for one in random_series(rule, term.metric, term.where, drawn)]
    case = list({prometheus_name(one): one for one in case}.values())
    assert ask_promtool(tmp_path, rule, case, firing(rule, case)) == ""


def random_series(
    rule: Rule, metric: str, where: tuple[tuple[str, str], ...], drawn: random.Random
) -> list[Series]:
    """Three series of a metric, with gaps, that wander around what the rule compares with."""
    made = []
    for number in "123":
        labels = dict.fromkeys(CATALOGUE[metric].labels, number) | {"instance": number}
        for label, pattern in where:
            labels[label] = drawn.choice([re.sub(r"\[.*\]", "2", pattern).replace(".", "0"), "other"])
        limits = [condition.threshold or 1 for condition in rule.conditions]
        values: list[Value] = []
        level = 0.0
        for tick in range(TICKS):
            if drawn.random() < 0.1:
                level = drawn.choice(limits) * drawn.choice([0, 0.5, 0.9, 1.1, 3, 30])
            if CATALOGUE[metric].kind == "counter":
                previous = next((value for value in reversed(values) if value is not None), 0.0)
                level = 0.0 if drawn.random() < 0.02 else previous + drawn.choice([0, 0, 0, 1, 7])
            is_time = CATALOGUE[metric].unit == "unix seconds"
            value = max(0.0, TICK * tick - level) if is_time else level
            values.append(None if drawn.random() < 0.03 else value)
        made.append(Series(metric, labels, tuple(values)))
    return made


def test_each_rule_has_cases_and_a_paragraph_in_the_runbook():
    assert list(FIRES) == list(QUIET) == NAMES
    headings = re.findall(r"^### (\w+)$", Path("docs/runbook.md").read_text(), re.MULTILINE)
    assert headings == NAMES


def test_settings_that_actions_name_exist():
    known = set(setting_names())
    for rule in RULES:
        named = re.findall(r"\b(?:model|data|parallel|optim|train|checkpoint|telemetry|serve)\.\w+", rule.action)
        assert set(named) <= known, rule.name


def test_the_committed_file_is_made_from_the_table():
    assert FILE.read_text() == rules_yaml(), "run `make dashboards`"

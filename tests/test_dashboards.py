"""The dashboards are those of the generator, complete, readable by Grafana, and ask for metrics that exist."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from itertools import combinations
from typing import Any

import promql_parser
import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from dashboards.foreign import FOREIGN
from dashboards.generate import FOLDER, files
from moe_ray.telemetry.catalogue import CATALOGUE
from moe_ray.telemetry.rules import RULES
from tests.grafana import BOARDS, Asked, asked, panels

each_board = pytest.mark.parametrize("name", BOARDS)
# Labels of every metric that a query may use, by the name that Prometheus has.
LABELS = {metric.exposed_name: metric.labels for metric in CATALOGUE.values()} | {
    metric.name: metric.labels for metric in FOREIGN.values()
}
HISTOGRAM = re.compile("_(bucket|sum|count)$")


def test_files_are_fresh() -> None:
    made = files()
    assert {f"grafana/{name}.json" for name in BOARDS} | {"rules.yaml"} == set(made)
    stale = [path for path, content in made.items() if (FOLDER / path).read_text(encoding="utf-8") != content]
    assert stale == [], "run `make dashboards`"


def selectors(node: Any) -> Iterator[promql_parser.VectorSelector]:
    """All that an expression selects."""
    if isinstance(node, promql_parser.VectorSelector):
        yield node
    for field in ("expr", "lhs", "rhs", "param", "vector_selector"):
        yield from selectors(child) if (child := getattr(node, field, None)) is not None else ()
    for child in getattr(node, "args", None) or ():
        yield from selectors(child)


def metric_of(selector: promql_parser.VectorSelector) -> str:
    assert selector.name is not None
    return selector.name if selector.name in LABELS else HISTOGRAM.sub("", selector.name)


@pytest.mark.parametrize("query", list(asked()), ids=lambda query: query.where)
def test_query_parses_and_asks_for_what_exists(query: Asked) -> None:
    found = list(selectors(promql_parser.parse(query.filled())))
    assert found
    for selector in found:
        metric = metric_of(selector)
        assert metric in LABELS
        assert {matcher.name for matcher in selector.matchers.matchers} <= set(LABELS[metric])
    known = {label for selector in found for label in LABELS[metric_of(selector)]} | {"le"}
    grouped = re.findall(r"\bby \(([^)]*)\)", query.expr)
    assert {label.strip() for labels in grouped for label in labels.split(",") if label.strip()} <= known


def test_everything_of_the_catalogue_is_shown() -> None:
    shown = {metric_of(s) for query in asked() for s in selectors(promql_parser.parse(query.filled()))}
    assert {metric.exposed_name for metric in CATALOGUE.values()} - shown == set()
    assert set(FOREIGN) - shown == set()


def test_every_alert_has_a_panel_with_its_threshold() -> None:
    told = {name: panel for board in BOARDS.values() for panel in panels(board) for name in alerts_of(panel)}
    assert set(told) == {rule.name for rule in RULES}
    for rule in RULES:
        steps = told[rule.name]["fieldConfig"]["defaults"]["thresholds"]["steps"]
        assert rule.conditions[0].threshold in [step["value"] for step in steps]


def alerts_of(panel: dict[str, Any]) -> list[str]:
    return re.findall(r"^\*\*(\w+)\*\*", panel["description"], re.MULTILINE)


@each_board
def test_grid(name: str) -> None:
    places = [panel["gridPos"] for panel in BOARDS[name]["panels"]]
    assert all(place["x"] + place["w"] <= 24 and place["w"] >= 4 for place in places)
    for a, b in combinations(places, 2):
        beside = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        assert beside or a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
    cells = {
        (x, y) for p in places for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])
    }
    assert len(cells) == 24 * (max(y for _, y in cells) + 1), "holes"


@each_board
def test_panels_explain_themselves(name: str) -> None:
    shown = panels(BOARDS[name])
    headings = [panel["title"] for panel in BOARDS[name]["panels"] if panel["type"] == "row"]
    assert len(set(headings)) == len(headings) > 1
    assert all(panel["description"] and panel["fieldConfig"]["defaults"]["unit"] for panel in shown)
    assert all(
        target["legendFormat"] for panel in shown if panel["type"] != "table" for target in panel["targets"]
    )
    ids = [panel["id"] for panel in BOARDS[name]["panels"]]
    assert ids == sorted(set(ids))


@each_board
def test_references(name: str) -> None:
    board = BOARDS[name]
    variables = [variable["name"] for variable in board["templating"]["list"]]
    text = json.dumps([panels(board), board["annotations"], board["templating"]])
    used = set(re.findall(r"\$\{?([a-z]\w*)", text))
    assert used == set(variables)
    for thing in (*panels(board), *(t for panel in panels(board) for t in panel["targets"])):
        assert thing["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    for panel in panels(board):
        refs = [target["refId"] for target in panel["targets"]]
        assert len(set(refs)) == len(refs)


def test_identities() -> None:
    assert [board["uid"] for board in BOARDS.values()] == list(BOARDS)
    assert all(len(name) <= 40 for name in BOARDS)
    assert len({board["title"] for board in BOARDS.values()}) == len(BOARDS)


@each_board
def test_models_of_grafana_keep_every_field(name: str) -> None:
    register_default_plugins()
    again = json.loads(json.dumps(Dashboard.from_json(BOARDS[name]), cls=JSONEncoder))
    for mine, its in zip(BOARDS[name]["annotations"]["list"], again["annotations"]["list"], strict=True):
        # What the model of annotations does not know: fields of Prometheus.
        its |= {key: mine[key] for key in ("titleFormat", "textFormat", "tagKeys", "step")}
    assert again == BOARDS[name]


def test_provisioning() -> None:
    (source,) = yaml.safe_load((FOLDER / "provisioning/datasources/prometheus.yaml").read_text())["datasources"]
    assert (source["name"], source["type"]) == ("Prometheus", "prometheus"), "what Ray's dashboard asks for"
    providers = yaml.safe_load((FOLDER / "provisioning/dashboards/moe_ray.yaml").read_text())["providers"]
    assert {provider["folder"] for provider in providers} == {"Ray"}
    assert providers[0]["options"]["path"].replace("$MOE_RAY_DASHBOARDS", str(FOLDER)) == str(FOLDER / "grafana")


def test_prometheus_reads_its_configuration() -> None:
    if shutil.which("promtool") is None:
        pytest.skip("there is no promtool: apt-get install prometheus")
    command = ["promtool", "check", "config", str(FOLDER / "prometheus.yaml")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert f"{len(RULES)} rules found" in result.stdout

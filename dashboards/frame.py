"""A dashboard around its panels: grid, variables, annotations and links to the others."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.models import dashboard as models

from dashboards.looks import ORANGE, PURPLE, SOURCE
from dashboards.panels import Panel
from dashboards.queries import Query, exposed

TAG = "moe_ray"
# Made by Ray itself, by uid; its own dashboard embeds them.
RAY_BOARDS = {"Ray": "rayDefaultDashboard", "Ray Serve": "rayServeDashboard", "Ray Train": "rayTrainDashboard"}
# Where the values of a variable are found: label and metric.
_VALUES = {
    "run": ("Run", "run", "moe_train_step"),
    "layer": ("Layer", "layer", "moe_expert_load_cv"),
    "app": ("Application", "application", "ray_serve_autoscaling_target_replicas"),
    "replica": ("Replica", "replica", "moe_serve_running"),
    "node": ("Node", "ip", "ray_node_cpu_utilization"),
}
_EVENTS = Query(
    "(moe_train_events - moe_train_events offset 1m > 0) or (moe_train_events unless moe_train_events offset 1m)",
    "",
)
_FIRING = Query('ALERTS{alertstate="firing"}', "")


@dataclass(frozen=True)
class Row:
    """Panels under one heading, from left to right; their widths fill lines of 24."""

    title: str
    panels: tuple[Panel, ...]


class _Annotation(models.AnnotationQuery):
    """One from Prometheus, whose own fields the SDK does not know."""

    def __init__(self, name: str, query: Query, color: str, title: str, text: str, tags: str) -> None:
        super().__init__(name, SOURCE, icon_color=color, expr=query.expr)
        self._extra = {"titleFormat": title, "textFormat": text, "tagKeys": tags, "step": "15s"}

    def to_json(self) -> dict[str, object]:
        return super().to_json() | self._extra


def frame(name: str, title: str, description: str, rows: tuple[Row, ...]) -> models.Dashboard:
    """The dashboard, with the variables that its queries use; its uid is `moe-ray-` and the name."""
    builder = (
        builders.Dashboard(title)
        .uid(f"moe-ray-{name}")
        .description(description)
        .tags([TAG])
        .time("now-1h", "now")
        .refresh("30s")
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
    )
    for link in _links():
        builder.link(link.keep_time(True))
    for row in rows:
        builder.with_row(builders.Row(row.title))
        for panel in row.panels:
            builder.with_panel(panel)
    board = builder.build()
    assert board.panels is not None
    for number, panel in enumerate(board.panels, 1):
        panel.id_val = number
    used = _used_variables(board)
    board.templating = models.DashboardDashboardTemplating(list_val=[_source(), *map(_variable, used)])
    board.annotations = models.AnnotationContainer(list_val=_annotations("run" in used))
    return board


def _links() -> Iterator[builders.DashboardLink]:
    others = builders.DashboardLink("Mixture of Experts").type(models.DashboardLinkType.DASHBOARDS)
    yield others.tags([TAG]).include_vars(True)
    for title, uid in RAY_BOARDS.items():
        yield builders.DashboardLink(title).type(models.DashboardLinkType.LINK).url(f"/d/{uid}")


def _used_variables(board: models.Dashboard) -> list[str]:
    exprs = [target.expr for panel in board.panels or [] for target in getattr(panel, "targets", None) or []]
    return [name for name in _VALUES if any(re.search(rf"\${name}\b", expr) for expr in exprs)]


def _source() -> models.VariableModel:
    return builders.DatasourceVariable("datasource").label("Data source").type("prometheus").build()


def _variable(name: str) -> models.VariableModel:
    label, key, metric = _VALUES[name]
    within = '{run=~"$run"}' if name == "layer" else ""
    query = f"label_values({exposed(metric)}{within}, {key})"
    builder = (
        builders.QueryVariable(name)
        .label(label)
        .datasource(SOURCE)
        .query({"query": query, "refId": name})
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.NATURAL_ASC)
        .multi(True)
        .include_all(True)
        .current(models.VariableOption(text="All", value="$__all"))
    )
    # A repeated panel needs the values themselves.
    return (builder if name == "layer" else builder.all_value(".*")).build()


def _annotations(of_runs: bool) -> list[models.AnnotationQuery]:
    alerts = _Annotation("Alerts", _FIRING, ORANGE, "{{alertname}}", "{{severity}}", "alertname,severity")
    events = _Annotation("Events of runs", _EVENTS, PURPLE, "{{event}}", "run {{run}}", "run,event")
    return [alerts, events] if of_runs else [alerts]

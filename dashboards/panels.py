"""Panels of the kinds that the dashboards have, in one look.

Every query has a hue of Okabe and Ito's palette, which colour-blind people tell apart, and each of its series a
shade of it. Panels that show the number of an alert rule have the rule's threshold. The grid is 24 wide.
"""

from typing import TypeVar

from grafana_foundation_sdk.builders import common, heatmap, stat, statetimeline, table, timeseries
from grafana_foundation_sdk.builders.dashboard import FieldColor
from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.models.common import (
    BigValueColorMode,
    BigValueGraphMode,
    GraphDrawStyle,
    GraphThresholdsStyleMode,
    LegendDisplayMode,
    LegendPlacement,
    ScaleDistribution,
    StackingMode,
    TableColoredBackgroundCellOptions,
    TooltipDisplayMode,
    VisibilityMode,
)
from grafana_foundation_sdk.models.dashboard import DataTransformerConfig, DynamicConfigValue, FieldColorModeId
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from dashboards.looks import HUES, SOURCE, describe, thresholds, unit_of
from dashboards.queries import Query
from moe_ray.telemetry.rules import RULES

Panel = timeseries.Panel | stat.Panel | heatmap.Panel | table.Panel | statetimeline.Panel
_P = TypeVar("_P", timeseries.Panel, stat.Panel, heatmap.Panel, table.Panel, statetimeline.Panel)
_NUMBERS = {rule.name: rule.conditions[0].number for rule in RULES}


def line(
    title: str,
    *queries: Query,
    unit: str | None = None,
    alerts: tuple[str, ...] = (),
    note: str = "",
    width: int = 8,
    stacked: bool = False,
    bars: bool = False,
    logarithmic: bool = False,
    least: float | None = None,
    most: float | None = None,
) -> timeseries.Panel:
    """Series over time.

    Args:
        unit: a key of `looks.UNITS`; default: that of the first query's metric.
        alerts: rules whose number the panel shows.
        note: what the help of its metrics does not say.
    """
    style = GraphThresholdsStyleMode.DASHED if alerts else GraphThresholdsStyleMode.OFF
    legend = common.VizLegendOptions().display_mode(LegendDisplayMode.LIST).placement(LegendPlacement.BOTTOM)
    panel = (
        _dressed(timeseries.Panel(), title, queries, unit, alerts, note)
        .span(width)
        .height(8)
        .legend(legend.show_legend(True))
        .tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI))
        .draw_style(GraphDrawStyle.BARS if bars else GraphDrawStyle.LINE)
        .line_width(1 if stacked else 2)
        .fill_opacity(70 if bars or stacked else 0)
        .show_points(VisibilityMode.AUTO)
        .thresholds_style(common.GraphThresholdsStyleConfig().mode(style))
    )
    if stacked:
        panel.stacking(common.StackingConfig().mode(StackingMode.NORMAL))
    if logarithmic:
        panel.scale_distribution(common.ScaleDistributionConfig().type(ScaleDistribution.LOG).log(10))
    if least is not None:
        panel.min(least)
    if most is not None:
        panel.max(most)
    for query, hue in enumerate(HUES[: len(queries)]):
        color = {"mode": FieldColorModeId.SHADES, "fixedColor": hue}
        panel.override_by_query(_ref(query), [DynamicConfigValue(id_val="color", value=color)])
    return panel


def alert_line(
    title: str, legend: str, *alerts: str, unit: str | None = None, width: int = 8, or_zero: bool = False
) -> timeseries.Panel:
    """The number that one or several rules compare, with their thresholds; `or_zero`: 0 where it has no value."""
    (number,) = {_NUMBERS[name] for name in alerts}
    text = f"{number} or vector(0)" if or_zero else number
    return line(title, Query(text, legend), unit=unit, alerts=alerts, width=width)


def number(
    title: str, query: Query, unit: str | None = None, alerts: tuple[str, ...] = (), width: int = 4, note: str = ""
) -> stat.Panel:
    """The newest value, above its course."""
    return (
        _dressed(stat.Panel(), title, (query,), unit, alerts, note)
        .span(width)
        .height(4)
        .color_mode(BigValueColorMode.VALUE if alerts else BigValueColorMode.NONE)
        .graph_mode(BigValueGraphMode.AREA)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    )


def heat(title: str, query: Query, unit: str | None = None, width: int = 8, repeat: str = "") -> heatmap.Panel:
    """A row for each series, in the order of their names, over time; once a value of the variable `repeat`."""
    scale = heatmap.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme("Viridis").steps(64).min(0)
    panel = (
        _dressed(heatmap.Panel(), title, (query,), unit)
        .span(width)
        .height(8)
        .calculate(False)
        .scale_distribution(common.ScaleDistributionConfig().type(ScaleDistribution.LINEAR))
        .color(scale)
        .show_legend()
        .cell_values(heatmap.CellValues().unit(unit_of((query,), unit)))
    )
    return panel.repeat(repeat).repeat_direction("h").max_per_row(3) if repeat else panel


def matrix(title: str, query: Query, row: str, column: str, width: int = 24, most: float = 1) -> table.Panel:
    """The newest values as a table of two labels, coloured by value up to `most`."""
    grouped = {"rowField": row, "columnField": column, "valueField": "Value", "emptyValue": "null"}
    panel = _dressed(table.Panel(), title, (), None, note=describe((query,)))
    return (
        panel.with_target(
            Dataquery().expr(query.expr).ref_id("A").format(PromQueryFormat.TABLE).instant().datasource(SOURCE)
        )
        .span(width)
        .height(10)
        .unit(unit_of((query,), None))
        .min(0)
        .max(most)
        .decimals(0)
        .min_width(44)
        .color_scheme(FieldColor().mode(FieldColorModeId.CONTINUOUS_BLUES))
        .cell_options(TableColoredBackgroundCellOptions())
        .with_transformation(_sorted_by(column))
        .with_transformation(DataTransformerConfig(id_val="groupingToMatrix", options=grouped))
        .with_transformation(_sorted_by(rf"{row}\{column}"))
        .override_by_regexp(
            rf"{row}\\{column}", [DynamicConfigValue(id_val="custom.cellOptions", value={"type": "auto"})]
        )
    )


def states(
    title: str,
    query: Query,
    alerts: tuple[str, ...] = (),
    steps: dict[float | None, str] | None = None,
    width: int = 8,
) -> statetimeline.Panel:
    """A bar for each series, coloured as its alerts or `steps` say: these give the colour from a value on."""
    return (
        _dressed(statetimeline.Panel(), title, (query,), None, alerts)
        .span(width)
        .height(8)
        .thresholds(thresholds(alerts, steps))
        .color_scheme(FieldColor().mode(FieldColorModeId.THRESHOLDS))
        .fill_opacity(90)
        .line_width(0)
        .show_value(VisibilityMode.NEVER)
        .merge_values(True)
    )


def _dressed(
    panel: _P,
    title: str,
    queries: tuple[Query, ...],
    unit: str | None,
    alerts: tuple[str, ...] = (),
    note: str = "",
) -> _P:
    """What panels of all kinds have."""
    panel.title(title).datasource(SOURCE).description(describe(queries, alerts, note))
    for place, query in enumerate(queries):
        target = Dataquery().expr(query.expr).legend_format(query.legend).ref_id(_ref(place)).range()
        panel.with_target(target.datasource(SOURCE))
    if queries:
        panel.unit(unit_of(queries, unit))
    if alerts:
        panel.thresholds(thresholds(alerts))
    return panel


def _sorted_by(field: str) -> DataTransformerConfig:
    return DataTransformerConfig(id_val="sortBy", options={"sort": [{"field": field}]})


def _ref(place: int) -> str:
    return "ABCDEFG"[place]

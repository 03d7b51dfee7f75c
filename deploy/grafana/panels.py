"""How panels look: one small helper per kind, so that dashboards read as lists of questions.

Owns sizes, units' spelling, thresholds' colours and the template variables; knows no metric.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from grafana_foundation_sdk.builders import (
    bargauge,
    common,
    dashboard,
    heatmap,
    prometheus,
    stat,
    statetimeline,
    table,
    timeseries,
)
from grafana_foundation_sdk.models import common as common_models
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models import prometheus as prometheus_models

SECONDS, BYTES, SHARE, PER_SECOND, PLAIN = "s", "bytes", "percentunit", "reqps", "short"
SOURCE = models.DataSourceRef(type_val="prometheus", uid="${datasource}")
# Steps of thresholds: from which value on which colour.
BAD_WHEN_HIGH = ((None, "green"), (0.01, "orange"), (0.05, "red"))
BAD_WHEN_LOW = ((None, "red"), (0.9, "orange"), (0.99, "green"))
NEARLY_FULL = ((None, "green"), (0.8, "orange"), (0.95, "red"))
Queries = Mapping[str, str]
"""Legend (a Grafana template) to PromQL."""


def query(expr: str, legend: str, ref: str = "A", *, instant: bool = False) -> prometheus.Dataquery:
    built = prometheus.Dataquery().expr(expr).legend_format(legend).ref_id(ref)
    if instant:
        return built.instant().format(prometheus_models.PromQueryFormat.TABLE)
    return built.range()


_Panel = TypeVar(
    "_Panel", timeseries.Panel, stat.Panel, bargauge.Panel, statetimeline.Panel, table.Panel
)


def _with_targets(panel: _Panel, queries: Queries, *, instant: bool = False) -> _Panel:
    for index, (legend, expr) in enumerate(queries.items()):
        panel = panel.with_target(query(expr, legend, chr(ord("A") + index), instant=instant))
    return panel.datasource(SOURCE)


def lines(
    title: str, description: str, queries: Queries, unit: str = PLAIN, *, most: float | None = None
) -> timeseries.Panel:
    """Lines over time, half the width; the axis starts at 0."""
    panel = (
        timeseries.Panel()
        .title(title)
        .description(description)
        .unit(unit)
        .min(0)
        .span(12)
        .height(8)
        .line_width(1)
        .fill_opacity(8)
        .show_points(common_models.VisibilityMode.NEVER)
        .legend(
            common.VizLegendOptions()
            .display_mode(common_models.LegendDisplayMode.TABLE)
            .placement(common_models.LegendPlacement.BOTTOM)
            .calcs(["lastNotNull", "max"])
            .show_legend(True)
        )
        .tooltip(
            common.VizTooltipOptions()
            .mode(common_models.TooltipDisplayMode.MULTI)
            .sort(common_models.SortOrder.DESCENDING)
        )
    )
    if most is not None:
        panel = panel.max(most)
    return _with_targets(panel, queries)


def number(
    title: str,
    description: str,
    expr: str,
    unit: str = PLAIN,
    *,
    steps: Sequence[tuple[float | None, str]] = ((None, "green"),),
) -> stat.Panel:
    """One big number, a sixth of the width; `steps` colours it from each value on."""
    panel = (
        stat.Panel()
        .title(title)
        .description(description)
        .unit(unit)
        .span(4)
        .height(4)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .thresholds(
            dashboard.ThresholdsConfig()
            .mode(models.ThresholdsMode.ABSOLUTE)
            .steps([models.Threshold(value=value, color=color) for value, color in steps])
        )
    )
    return _with_targets(panel, {title: expr})


def bars(title: str, description: str, queries: Queries, unit: str = PLAIN) -> bargauge.Panel:
    """One horizontal bar per series, now; a third of the width."""
    panel = (
        bargauge.Panel()
        .title(title)
        .description(description)
        .unit(unit)
        .min(0)
        .span(8)
        .height(8)
        .orientation(common_models.VizOrientation.HORIZONTAL)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    )
    return _with_targets(panel, queries)


def heat(title: str, description: str, expr: str, unit: str = SECONDS) -> heatmap.Panel:
    """Buckets of a histogram over time, half the width."""
    panel = (
        heatmap.Panel()
        .title(title)
        .description(description)
        .span(12)
        .height(8)
        .calculate(False)
        .y_axis(heatmap.YAxisConfig().unit(unit))
        .datasource(SOURCE)
    )
    buckets = query(expr, "{{le}}").format(prometheus_models.PromQueryFormat.HEATMAP)
    return panel.with_target(buckets)


def states(title: str, description: str, expr: str, names: Sequence[str]) -> statetimeline.Panel:
    """States over time, full width; the expression's value is an index into `names`."""
    colors = ("text", "blue", "light-blue", "yellow", "green", "orange", "red")
    mapping = models.ValueMap(
        options={
            str(index): models.ValueMappingResult(text=name, color=color, index=index)
            for index, (name, color) in enumerate(zip(names, colors, strict=True))
        }
    )
    panel = (
        statetimeline.Panel()
        .title(title)
        .description(description)
        .span(24)
        .height(8)
        .mappings([mapping])
    )
    return _with_targets(panel, {"{{level}}": expr})


def level_table(
    title: str, description: str, columns: Mapping[str, tuple[str, str]]
) -> table.Panel:
    """One row per level, full width. `columns`: heading to (PromQL by level, unit)."""
    panel = table.Panel().title(title).description(description).span(24).height(9)
    renamed = {"level": "level"}
    hidden = {"Time": True}
    for index, (heading, (_, unit)) in enumerate(columns.items(), start=1):
        ref = chr(ord("A") + index - 1)
        renamed[f"Value #{ref}"] = heading
        hidden[f"Time {index}"] = True
        panel = panel.override_by_name(heading, [models.DynamicConfigValue("unit", unit)])
    panel = panel.with_transformation(
        models.DataTransformerConfig(
            id_val="joinByField", options={"byField": "level", "mode": "outer"}
        )
    ).with_transformation(
        models.DataTransformerConfig(
            id_val="organize", options={"excludeByName": hidden, "renameByName": renamed}
        )
    )
    expressions = {heading: expr for heading, (expr, _) in columns.items()}
    return _with_targets(panel, expressions, instant=True)


def page(
    uid: str, title: str, description: str, rows: Mapping[str, Sequence[Any]]
) -> models.Dashboard:
    """A dashboard of titled rows of panels, with the variables that all dashboards share."""
    built = (
        dashboard.Dashboard(title)
        .uid(uid)
        .description(description)
        .tags(["pressgate"])
        .timezone("browser")
        .refresh("10s")
        .time("now-30m", "now")
        .readonly()
        .with_variable(
            dashboard.DatasourceVariable("datasource").label("Source").type("prometheus")
        )
    )
    for name, metric in (
        ("model", "pressgate_variant_state"),
        ("level", "pressgate_variant_state"),
        ("policy", "pressgate_requests_total"),
    ):
        built = built.with_variable(_label(name, metric))
    built = built.link(
        dashboard.DashboardLink("Pressgate")
        .type(models.DashboardLinkType.DASHBOARDS)
        .tags(["pressgate"])
        .include_vars(True)
        .keep_time(True)
    )
    number = 0
    for heading, panels in rows.items():
        built = built.with_row(dashboard.Row(heading))
        for panel in panels:
            number += 1
            built = built.with_panel(panel.id(number))
    return built.build()


def _label(name: str, metric: str) -> dashboard.QueryVariable:
    return (
        dashboard.QueryVariable(name)
        .label(name.capitalize())
        .datasource(SOURCE)
        .query(f"label_values({metric}, {name})")
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(models.VariableOption(selected=True, text="All", value="$__all"))
    )

"""What a dashboard consists of, and the JSON that Grafana takes for it (schema 36: Grafana 10 and newer).

Grafana's own library for this, grafana-foundation-sdk, is not used: of its releases, one for each version of Grafana,
pip takes the one for the oldest as the newest.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

Json = dict[str, Any]
Kind = Literal["stat", "timeseries", "heatmap", "state-timeline"]

COLUMNS = 24
"""Of Grafana's grid."""
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
GREEN, ORANGE, RED, BLUE = "green", "orange", "red", "blue"
_SCHEMA = 36
ALL = ".*"
"""Also true of series that do not have the label, as without Kubernetes."""


@dataclass(frozen=True)
class Query:
    """PromQL, and what its series are called; the name may hold `{{label}}`."""

    expr: str
    legend: str = ""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One panel.

    Attributes:
        title: what it shows.
        description: what that means, and what to do where it is bad.
        kind: how it is shown.
        queries: what it shows.
        unit: of its values, as Grafana calls it.
        steps: colours and the least value of each; the first from the bottom on, whatever its value.
        texts: shown in place of a value, with a colour.
        names: whether a stat shows the name of its series instead of the value.
        stacked: whether series add up.
        minimum: bottom of the axis; None for what there is.
        maximum: top of it.
    """

    title: str
    description: str
    queries: tuple[Query, ...]
    kind: Kind = "timeseries"
    unit: str = "short"
    steps: tuple[tuple[str, float], ...] = ((GREEN, 0),)
    texts: tuple[tuple[float, str, str], ...] = ()
    names: bool = False
    stacked: bool = False
    minimum: float | None = 0
    maximum: float | None = None


@dataclass(frozen=True)
class Row:
    """Panels side by side, of equal width.

    Attributes:
        title: above them.
        height: in Grafana's units of 30 pixels.
        panels: as many as divide 24.
    """

    title: str
    height: int
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Variable:
    """What a dashboard can be narrowed to, with all of it to begin with.

    Attributes:
        name: of the variable.
        label: of it, for people.
        metric: whose series have the values.
        of: their label that has them.
    """

    name: str
    label: str
    metric: str
    of: str


@dataclass(frozen=True)
class Dashboard:
    """A dashboard; its file is NAME.json."""

    name: str
    title: str
    description: str
    variables: tuple[Variable, ...]
    rows: tuple[Row, ...]

    @property
    def panels(self) -> list[Panel]:
        """All of them."""
        return [panel for row in self.rows for panel in row.panels]

    def json(self) -> str:
        """What Grafana takes."""
        model = {
            "uid": f"feddymem-{self.name}",
            "title": self.title,
            "description": self.description,
            "tags": ["feddymem"],
            "schemaVersion": _SCHEMA,
            "version": 1,
            "editable": True,
            "graphTooltip": 1,
            "refresh": "30s",
            "time": {"from": "now-6h", "to": "now"},
            "timezone": "browser",
            "links": [_LINKS],
            "annotations": {"list": []},
            "templating": {"list": [_DATASOURCES, *map(_variable, self.variables)]},
            "panels": list(self._placed()),
        }
        return json.dumps(model, indent=1) + "\n"

    def _placed(self) -> Iterator[Json]:
        number, top = 0, 0
        for row in self.rows:
            number += 1
            place = {"x": 0, "y": top, "w": COLUMNS, "h": 1}
            yield {"id": number, "type": "row", "title": row.title, "collapsed": False, "gridPos": place, "panels": []}
            top += 1
            width = COLUMNS // len(row.panels)
            for column, panel in enumerate(row.panels):
                number += 1
                place = {"x": column * width, "y": top, "w": width, "h": row.height}
                yield {"id": number, "gridPos": place, **_panel(panel)}
            top += row.height


_LINKS = {
    "type": "dashboards",
    "title": "FedDyMem",
    "tags": ["feddymem"],
    "asDropdown": False,
    "icon": "external link",
    "includeVars": True,
    "keepTime": True,
    "targetBlank": False,
    "tooltip": "",
    "url": "",
}
_DATASOURCES = {
    "type": "datasource",
    "name": "datasource",
    "label": "Prometheus",
    "query": "prometheus",
    "refresh": 1,
    "regex": "",
    "hide": 0,
    "includeAll": False,
    "multi": False,
    "skipUrlSync": False,
    "current": {},
    "options": [],
}


def _variable(variable: Variable) -> Json:
    query = f"label_values({variable.metric}, {variable.of})"
    return {
        "type": "query",
        "name": variable.name,
        "label": variable.label,
        "datasource": DATASOURCE,
        "definition": query,
        "query": {"query": query, "refId": variable.name},
        "refresh": 2,
        "regex": "",
        "sort": 1,
        "hide": 0,
        "includeAll": True,
        "allValue": ALL,
        "multi": True,
        "skipUrlSync": False,
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
        "options": [],
    }


def _panel(panel: Panel) -> Json:
    colour = {"mode": "palette-classic" if panel.kind == "timeseries" else "thresholds"}
    defaults: Json = {
        "unit": panel.unit,
        "color": colour,
        "mappings": [
            {"type": "value", "options": {f"{value:g}": {"index": index, "text": text, "color": of_it}}}
            for index, (value, text, of_it) in enumerate(panel.texts)
        ],
        "thresholds": {
            "mode": "absolute",
            "steps": [
                {"color": of_it, "value": None if index == 0 else value}
                for index, (of_it, value) in enumerate(panel.steps)
            ],
        },
        "custom": _custom(panel),
    }
    if panel.kind == "timeseries":
        limits = {"min": panel.minimum, "max": panel.maximum}
        defaults |= {name: limit for name, limit in limits.items() if limit is not None}
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": DATASOURCE,
        "targets": [_target(panel, query, chr(ord("A") + index)) for index, query in enumerate(panel.queries)],
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": _options(panel),
    }


def _target(panel: Panel, query: Query, name: str) -> Json:
    now = panel.kind == "stat"
    return {
        "refId": name,
        "datasource": DATASOURCE,
        "editorMode": "code",
        "expr": query.expr,
        "legendFormat": query.legend,
        "instant": now,
        "range": not now,
        "format": "heatmap" if panel.kind == "heatmap" else "time_series",
    }


def _custom(panel: Panel) -> Json:
    """What Grafana calls so: how series are drawn."""
    if panel.kind == "timeseries":
        return {
            "drawStyle": "line",
            "lineWidth": 1,
            "fillOpacity": 30 if panel.stacked else 0,
            "showPoints": "never",
            "spanNulls": False,
            "stacking": {"mode": "normal" if panel.stacked else "none", "group": "A"},
            "thresholdsStyle": {"mode": "line" if len(panel.steps) > 1 else "off"},
        }
    return {"fillOpacity": 80, "lineWidth": 0} if panel.kind == "state-timeline" else {}


def _options(panel: Panel) -> Json:
    legend = {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []}
    options: dict[Kind, Json] = {
        "stat": {
            "colorMode": "background",
            "graphMode": "none",
            "justifyMode": "auto",
            "orientation": "auto",
            "textMode": "name" if panel.names else "auto",
            "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        },
        "timeseries": {"legend": legend, "tooltip": {"mode": "multi", "sort": "desc"}},
        "state-timeline": {
            "legend": legend,
            "mergeValues": True,
            "rowHeight": 0.9,
            "showValue": "never",
            "tooltip": {"mode": "single", "sort": "none"},
        },
        "heatmap": {
            "calculate": False,
            "cellGap": 1,
            "color": {"mode": "scheme", "scheme": "Blues", "steps": 64, "exponent": 0.5, "fill": "dark-blue"},
            "legend": {"show": True},
            "tooltip": {"mode": "single", "yHistogram": False},
            "yAxis": {"axisPlacement": "left", "unit": panel.unit},
        },
    }
    return options[panel.kind]

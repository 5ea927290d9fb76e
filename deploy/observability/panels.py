"""A Grafana dashboard as rows of panels, the PromQL that panels are made of, and the JSON that Grafana reads."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

EMPTY_UNTIL = "Empty until "
COLUMNS = 24
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_TRACES = {"type": "tempo", "uid": "${traces}"}


@dataclass(frozen=True)
class Panel:
    title: str
    #: (PromQL, legend)
    queries: tuple[tuple[str, str], ...]
    unit: str = "short"
    about: str = ""
    #: What has to happen before it shows anything.
    until: str = ""
    stat: bool = False
    width: int = 8

    @property
    def height(self) -> int:
        return 4 if self.stat else 8


@dataclass(frozen=True)
class Requests:
    """A table of single requests from Tempo, the highest of the first column first; a click opens the trace."""

    title: str
    #: TraceQL
    query: str
    #: Attributes of the spans found.
    columns: tuple[str, ...]
    about: str
    last: str
    width: int = COLUMNS
    height: int = 9


@dataclass(frozen=True)
class Row:
    title: str
    panels: tuple[Panel | Requests, ...]


@dataclass(frozen=True)
class Dashboard:
    uid: str
    title: str
    about: str
    rows: tuple[Row, ...]
    #: (name, query)
    variables: tuple[tuple[str, str], ...] = ()


# -- queries -----------------------------------------------------------------------------------------------------------

R = "$__rate_interval"


def rate(metric: str, where: str = "", by: str = "") -> str:
    return f"sum{_by(by)} (rate({metric}{_in(where)}[{R}]))"


def total(metric: str, where: str = "", by: str = "") -> str:
    return f"sum{_by(by)} ({metric}{_in(where)})"


def highest(metric: str, where: str = "", by: str = "") -> str:
    return f"max{_by(by)} ({metric}{_in(where)})"


def share(part: str, whole: str, where: str = "", by: str = "") -> str:
    return f"{rate(part, where, by)} / {rate(whole, where, by)}"


def quantile(q: float, metric: str, where: str = "", by: str = "") -> str:
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({q}, sum by ({labels}) (rate({metric}_bucket{_in(where)}[{R}])))"


def quantiles(metric: str, where: str = "") -> tuple[tuple[str, str], ...]:
    return tuple((quantile(q, metric, where), f"p{q * 100:g}") for q in (0.5, 0.95, 0.99))


def _in(where: str) -> str:
    return f"{{{where}}}" if where else ""


def _by(by: str) -> str:
    return f" by ({by})" if by else ""


# -- as Grafana has it -------------------------------------------------------------------------------------------------


def as_json(dashboard: Dashboard) -> str:
    panels: list[dict[str, Any]] = []
    y = 0
    for row in dashboard.rows:
        panels.append(_row(row, len(panels) + 1, y))
        y += 1
        x = height = 0
        for panel in row.panels:
            if x + panel.width > COLUMNS:
                x, y, height = 0, y + height, 0
            number = len(panels) + 1
            panels.append(
                _requests(panel, number, x, y) if isinstance(panel, Requests) else _panel(panel, number, x, y)
            )
            x, height = x + panel.width, max(height, panel.height)
        y += height
    whole = {
        "uid": dashboard.uid,
        "title": dashboard.title,
        "description": dashboard.about,
        "tags": ["tandem"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "timezone": "",
        "annotations": {"list": []},
        "links": [{"title": "Tandem", "type": "dashboards", "tags": ["tandem"], "asDropdown": True, "keepTime": True}],
        "templating": {"list": [*_source_variables(dashboard), *(_variable(*v) for v in dashboard.variables)]},
        "panels": panels,
    }
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


def _source_variables(dashboard: Dashboard) -> list[dict[str, Any]]:
    kinds = [("datasource", "Data source", "prometheus")]
    if any(isinstance(panel, Requests) for row in dashboard.rows for panel in row.panels):
        kinds.append(("traces", "Traces", "tempo"))
    return [{"name": n, "label": label, "type": "datasource", "query": kind, "hide": 0} for n, label, kind in kinds]


def _variable(name: str, query: str) -> dict[str, Any]:
    return {
        "name": name,
        "type": "query",
        "datasource": _SOURCE,
        "definition": query,
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "sort": 1,
        "multi": False,
        "includeAll": False,
    }


def _row(row: Row, number: int, y: int) -> dict[str, Any]:
    place = {"h": 1, "w": COLUMNS, "x": 0, "y": y}
    return {"id": number, "type": "row", "title": row.title, "collapsed": False, "gridPos": place, "panels": []}


def _panel(panel: Panel, number: int, x: int, y: int) -> dict[str, Any]:
    about = " ".join(filter(None, (panel.about, f"{EMPTY_UNTIL}{panel.until}." if panel.until else "")))
    targets = [
        {"refId": chr(ord("A") + i), "expr": expr, "legendFormat": legend or "__auto", "datasource": _SOURCE}
        for i, (expr, legend) in enumerate(panel.queries)
    ]
    defaults: dict[str, Any] = {"unit": panel.unit, "min": 0}
    if not panel.stat:
        defaults["custom"] = {"lineWidth": 1, "fillOpacity": 8, "showPoints": "never", "spanNulls": False}
    stat = {"reduceOptions": {"calcs": ["lastNotNull"]}, "graphMode": "area", "colorMode": "none"}
    series = {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi", "sort": "desc"}}
    return {
        "id": number,
        "type": "stat" if panel.stat else "timeseries",
        "title": panel.title,
        "description": about,
        "datasource": _SOURCE,
        "gridPos": {"h": panel.height, "w": panel.width, "x": x, "y": y},
        "targets": targets,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": stat if panel.stat else series,
    }


def _requests(panel: Requests, number: int, x: int, y: int) -> dict[str, Any]:
    columns = ", ".join(f"span.{name}" for name in panel.columns)
    target = {
        "refId": "A",
        "datasource": _TRACES,
        "queryType": "traceql",
        "query": f"{panel.query} | select({columns})",
        "tableType": "spans",
        "limit": 200,
        "spss": 1,
    }
    return {
        "id": number,
        "type": "table",
        "title": panel.title,
        "description": panel.about,
        "datasource": _TRACES,
        "gridPos": {"h": panel.height, "w": panel.width, "x": x, "y": y},
        "timeFrom": panel.last,
        "targets": [target],
        "fieldConfig": {"defaults": {}, "overrides": []},
        "options": {"showHeader": True, "sortBy": [{"displayName": panel.columns[0], "desc": True}]},
    }

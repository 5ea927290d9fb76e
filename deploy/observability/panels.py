"""A Grafana dashboard as rows of panels, the PromQL that panels are made of, and the JSON that Grafana reads."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

EMPTY_UNTIL = "Empty until "
COLUMNS = 24
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}


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
class Row:
    title: str
    panels: tuple[Panel, ...]


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
            panels.append(_panel(panel, len(panels) + 1, x, y))
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
        "templating": {"list": [_source_variable(), *(_variable(*v) for v in dashboard.variables)]},
        "panels": panels,
    }
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


def _source_variable() -> dict[str, Any]:
    return {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus", "hide": 0}


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

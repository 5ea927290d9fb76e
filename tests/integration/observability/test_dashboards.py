"""Every query of every dashboard brings data from a Prometheus that scrapes a running cluster; rules are tried."""

from __future__ import annotations

import asyncio
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tandem.telemetry import spans
from tests.harness.cluster import Cluster, wait_for
from tests.integration.observability.load import MODEL, SERVICES, load
from tests.integration.observability.prometheus import Prometheus

FOLDER = Path(__file__).resolve().parents[3] / "deploy" / "observability"
ALERTS = FOLDER / "alerts.yaml"
RULE_TESTS = sorted(FOLDER.glob("alerts_*test.yaml"))
DASHBOARDS = sorted((FOLDER / "grafana").glob("*.json"))
#: What a panel says of itself that shows nothing while all is well.
EMPTY_UNTIL = "Empty until "
#: Panels may say so, but not many.
MOST_EMPTY = 5
VARIABLES = {"$__rate_interval": "1m", "$model": MODEL, "$tenant": "acme"}

needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None or shutil.which("promtool") is None,
    reason="NOT TESTED: dashboards and alert rules need prometheus and promtool (Debian package `prometheus`)",
)


@pytest.fixture(scope="module")
def prometheus(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    with Prometheus(cluster, tmp_path_factory.mktemp("prometheus"), ALERTS) as made:
        wait_for(lambda: "unknown" not in made.targets().values() and made.targets(), 30, "all targets scraped")
        yield made


def panels(file: Path, source: str = "prometheus") -> list[dict[str, Any]]:
    found = [panel for panel in json.loads(file.read_text())["panels"] if panel["type"] != "row"]
    return [panel for panel in found if panel["datasource"]["type"] == source]


def test_the_files_are_what_their_source_says() -> None:
    subprocess.run([sys.executable, FOLDER / "dashboards.py", "--check"], check=True, timeout=60)


def test_few_panels_are_empty_while_all_is_well() -> None:
    assert DASHBOARDS
    empty = [(f.name, p["title"]) for f in DASHBOARDS for p in panels(f) if EMPTY_UNTIL in p["description"]]
    assert len(empty) <= MOST_EMPTY, empty


def test_tables_of_traces_ask_for_attributes_that_spans_have() -> None:
    tables = [panel for file in DASHBOARDS for panel in panels(file, "tempo")]
    assert tables
    for table in tables:
        query = table["targets"][0]["query"]
        names = re.findall(r"\bspan\.([a-z_.]+)", query)
        assert names and set(names) <= set(spans.ATTRIBUTES), query
        assert table["options"]["sortBy"][0]["displayName"] in names


@needs_prometheus
def test_prometheus_finds_and_scrapes_every_process(cluster: Cluster, prometheus: Prometheus) -> None:
    wanted = {p["name"] for kind in SERVICES for p in cluster.processes(kind)}
    wait_for(lambda: prometheus.targets() == dict.fromkeys(wanted, "up"), 30, "all up")


@needs_prometheus
def test_every_query_brings_data(cluster: Cluster, prometheus: Prometheus) -> None:
    before = float(prometheus.query("sum(tandem_offered_requests_total)")[0]["value"][1])
    asyncio.run(load(cluster, rounds=1))

    def scraped() -> bool:
        now = prometheus.query("sum(tandem_offered_requests_total)")
        return float(now[0]["value"][1]) >= before + 8

    wait_for(scraped, 30, "the load is scraped")
    failed = []

    def look() -> bool:
        """Again when something is missing: a rate needs two scrapes on either side of the load."""
        failed[:] = [f"{f.name}: {title}: {query}" for f, title, query in _wanted() if not _has_data(prometheus, query)]
        return not failed

    try:
        wait_for(look, 20, "data for every panel")
    except AssertionError:
        raise AssertionError("no data for:\n" + "\n".join(failed)) from None


def _wanted() -> Iterator[tuple[Path, str, str]]:
    for file in DASHBOARDS:
        for panel in panels(file):
            for target in panel["targets"]:
                if EMPTY_UNTIL not in panel["description"]:
                    yield file, panel["title"], _filled(target["expr"])


def _filled(query: str) -> str:
    for variable, value in VARIABLES.items():
        query = query.replace(variable, value)
    assert "$" not in query, query
    return query


def _has_data(prometheus: Prometheus, query: str) -> bool:
    return any(math.isfinite(float(series["value"][1])) for series in prometheus.query(query))


@needs_prometheus
def test_panels_that_are_empty_while_all_is_well_have_queries_that_parse(prometheus: Prometheus) -> None:
    for file in DASHBOARDS:
        for panel in panels(file):
            for target in panel["targets"]:
                prometheus.query(_filled(target["expr"]))


@needs_prometheus
def test_metrics_of_the_alerts_are_there(prometheus: Prometheus) -> None:
    """A rule on a name that nobody gives out is silent for ever."""
    rules = [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]
    names = {name for rule in rules for name in re.findall(r"\b(?:tandem_[a-z_]+|up)\b", rule["expr"])}
    assert names
    for name in names:
        assert prometheus.query(f"count({name})"), name


@needs_prometheus
@pytest.mark.timeout(400)
def test_alert_rules() -> None:
    done = subprocess.run(
        ["promtool", "test", "rules", *map(str, RULE_TESTS)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_test() -> None:
    rules, tests = ALERTS.read_text(), "".join(file.read_text() for file in RULE_TESTS)
    alerts = re.findall(r"- alert: (\w+)", rules)
    assert alerts
    for alert in alerts:
        assert f'alertname="{alert}", alertstate="firing"' in tests, alert

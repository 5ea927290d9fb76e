"""What a process gives out to Prometheus, and whether it is what the table of metrics says."""

from __future__ import annotations

import urllib.request
from collections.abc import Mapping

from prometheus_client.core import Metric as Family
from prometheus_client.parser import text_string_to_metric_families

from tandem.telemetry.metric_table import DOMAINS, TABLE, Kind, Metric

#: A suffix that the exposition format gives to a histogram's series.
_HISTOGRAM_SERIES = ("_bucket", "_sum", "_count")


def scrape(address: str) -> dict[str, Family]:
    """By the names of the table: a counter's ends in ``_total``."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    families = {}
    for family in text_string_to_metric_families(text):
        name = family.name + "_total" if family.type == "counter" else family.name
        assert name not in families, f"{name} is there twice"
        families[name] = family
    return families


def value(families: Mapping[str, Family], metric: Metric, **labels: str) -> float:
    """Sum over the series that have these labels; of a histogram, the count."""
    wanted = metric.name + ("_count" if metric.kind is Kind.HISTOGRAM else "")
    return sum(
        sample.value
        for sample in families[metric.name].samples
        if sample.name == wanted and labels.items() <= sample.labels.items()
    )


def differences(families: Mapping[str, Family], service: str, domains: Mapping[str, set[str]]) -> list[str]:
    """Between what a process gives out and what the table says it does."""
    rows = {metric.name: metric for metric in TABLE}
    found = []
    for name, family in families.items():
        metric = rows.get(name)
        if metric is None or service not in metric.services:
            found.append(f"{name}: not in the table for {service}")
        elif family.type != metric.kind.value:
            found.append(f"{name}: {family.type}, not {metric.kind.value}")
        else:
            found += _of_samples(metric, family, domains)
    return found


def _of_samples(metric: Metric, family: Family, domains: Mapping[str, set[str]]) -> list[str]:
    found = []
    if family.documentation != metric.help and not metric.name.startswith("process_"):
        found.append(f"{metric.name}: help {family.documentation!r}")
    bounds = set()
    for sample in family.samples:
        labels = dict(sample.labels)
        if metric.kind is Kind.HISTOGRAM:
            assert sample.name.removeprefix(metric.name) in _HISTOGRAM_SERIES, sample.name
            if (bound := labels.pop("le", None)) is not None:
                bounds.add(float(bound))
        if set(labels) != set(metric.label_names):
            found.append(f"{metric.name}: labels {sorted(labels)}")
            continue
        for label in metric.labels:
            known = label.values or domains[DOMAINS.get(label.name, label.name)]
            if labels[label.name] not in known:
                found.append(f"{metric.name}: {label.name}={labels[label.name]!r}")
    if bounds and bounds != {*metric.buckets, float("inf")}:
        found.append(f"{metric.name}: buckets {sorted(bounds)}")
    return found

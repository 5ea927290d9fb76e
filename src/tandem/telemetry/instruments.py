"""Instruments of one process, made from the rows of ``metric_table``, and what Prometheus reads of them.

Made for a hot path of plain Python: a counter is an int in a slot, a histogram a list of them; whoever counts keeps
the bound cell, so that nothing is looked up by labels when something happens. What is known elsewhere anyway is not
counted again but read at each scrape (``watch``).

Not thread-safe, and need not be: cells change and ``read`` runs on the event loop's thread.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import NamedTuple

from tandem.telemetry.metric_table import DOMAINS, OTHER, Kind, Label, Metric

Labels = tuple[str, ...]
#: (label values, value) for a counter or gauge.
Reading = Iterable[tuple[Labels, float]]


class Counter:
    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def add(self, amount: float = 1) -> None:
        self.value += amount


class Histogram:
    __slots__ = ("_bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self._bounds, value)] += 1
        self.sum += value


class Sample(NamedTuple):
    """Of one series. ``counts``: a histogram's, per bucket; ``value`` is then its sum."""

    labels: Labels
    value: float
    counts: tuple[int, ...] = ()


class Instruments:
    """``domains``: the values of labels that the deployment file decides ("model", "tenant", "class"), and of any
    other label whose row leaves them open."""

    def __init__(self, service: str, domains: Mapping[str, Collection[str]]) -> None:
        self._service = service
        self._domains = dict(domains)
        self._counters: dict[Metric, dict[Labels, Counter]] = {}
        self._histograms: dict[Metric, dict[Labels, Histogram]] = {}
        self._watched: dict[Metric, list[Callable[[], Reading]]] = {}

    def allow(self, domains: Mapping[str, Collection[str]]) -> None:
        """The deployment file has changed. What has been counted stays."""
        for label, values in domains.items():
            self._domains[label] = {*self._domains[label], *values}

    def counter(self, metric: Metric, *labels: str) -> Counter:
        """The cell of these label values."""
        self._check(metric, Kind.COUNTER)
        cells = self._counters.setdefault(metric, {})
        bounded = self._bounded(metric, labels)
        return cells.get(bounded) or cells.setdefault(bounded, Counter())

    def histogram(self, metric: Metric, *labels: str) -> Histogram:
        self._check(metric, Kind.HISTOGRAM)
        cells = self._histograms.setdefault(metric, {})
        bounded = self._bounded(metric, labels)
        return cells.get(bounded) or cells.setdefault(bounded, Histogram(metric.buckets))

    def watch(self, metric: Metric, read: Callable[[], Reading]) -> None:
        """``read`` is asked at each scrape: quick, and on the loop."""
        if metric.kind is Kind.HISTOGRAM:
            raise ValueError(f"{metric.name} is a histogram")
        self._check(metric, metric.kind)
        self._watched.setdefault(metric, []).append(read)

    def watch_one(self, metric: Metric, read: Callable[[], float], *labels: str) -> None:
        self.watch(metric, lambda: [(labels, read())])

    def read(self) -> list[tuple[Metric, list[Sample]]]:
        """Everything, now."""
        found: list[tuple[Metric, list[Sample]]] = []
        for metric, counters in self._counters.items():
            found.append((metric, [Sample(labels, cell.value) for labels, cell in counters.items()]))
        for metric, histograms in self._histograms.items():
            found.append((metric, [Sample(labels, h.sum, tuple(h.counts)) for labels, h in histograms.items()]))
        for metric, readers in self._watched.items():
            readings: dict[Labels, float] = {}
            for read in readers:
                for labels, value in read():
                    bounded = self._bounded(metric, labels)
                    readings[bounded] = readings.get(bounded, 0.0) + value
            found.append((metric, [Sample(labels, value) for labels, value in readings.items()]))
        return found

    def _check(self, metric: Metric, kind: Kind) -> None:
        if metric.kind is not kind or self._service not in metric.services:
            raise ValueError(f"{metric.name} is a {metric.kind.value} of {', '.join(metric.services)}")

    def _bounded(self, metric: Metric, labels: Labels) -> Labels:
        if len(labels) != len(metric.labels):
            raise ValueError(f"{metric.name} has labels {metric.label_names}, not {labels}")
        return tuple(map(self._value, metric.labels, labels))

    def _value(self, label: Label, value: str) -> str:
        known = label.values or self._domains[DOMAINS.get(label.name, label.name)]
        return value if value in known else OTHER

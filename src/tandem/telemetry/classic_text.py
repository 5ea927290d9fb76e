"""What ``Instruments.read`` gave, in Prometheus' classic text format.

The library's writer spends its time on names and labels, which do not change between scrapes: here each series' are
written once and kept (there are as many as series, and those are bounded). It runs in a scrape's own thread, which
shares the interpreter with the event loop: between two metrics it steps aside, so that the loop never waits for a
whole scrape.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from prometheus_client.utils import floatToGoString

from tandem.telemetry.instruments import Labels, Sample
from tandem.telemetry.metric_table import Kind, Metric

#: Long enough for a thread that waits for the interpreter to get it.
_ASIDE_S = 1e-4
_ESCAPES = str.maketrans({"\\": r"\\", "\n": r"\n", '"': r"\""})
_HELP_ESCAPES = str.maketrans({"\\": r"\\", "\n": r"\n"})


class ClassicText:
    def __init__(self) -> None:
        #: By metric, then by labels: of each line, all but the number.
        self._series: dict[str, dict[Labels, list[str]]] = {}

    def of(self, read: Iterable[tuple[Metric, list[Sample]]]) -> str:
        parts: list[str] = []
        for metric, samples in read:
            help_text = metric.help.translate(_HELP_ESCAPES)
            parts.append(f"# HELP {metric.name} {help_text}\n# TYPE {metric.name} {metric.kind.value}\n")
            known = self._series.setdefault(metric.name, {})
            lines_of = _histogram_lines if metric.kind is Kind.HISTOGRAM else _line
            for sample in samples:
                names = known.get(sample.labels)
                if names is None:
                    names = known[sample.labels] = _names(metric, sample.labels)
                parts.append(lines_of(names, sample))
            time.sleep(_ASIDE_S)
        return "".join(parts)


def _line(names: list[str], sample: Sample) -> str:
    return f"{names[0]}{sample.value!r}\n"


def _histogram_lines(names: list[str], sample: Sample) -> str:
    *buckets, count, sum_ = names
    total, lines = 0, []
    for name, in_bucket in zip(buckets, sample.counts, strict=True):
        total += in_bucket
        lines.append(f"{name}{total}\n")
    return f"{''.join(lines)}{count}{total}\n{sum_}{sample.value!r}\n"


def _names(metric: Metric, labels: Labels) -> list[str]:
    pairs = dict(zip(metric.label_names, labels, strict=True))
    if metric.kind is not Kind.HISTOGRAM:
        return [_name(metric.name, pairs)]
    bounds = [*map(floatToGoString, metric.buckets), "+Inf"]
    buckets = [_name(f"{metric.name}_bucket", {**pairs, "le": bound}) for bound in bounds]
    return [*buckets, _name(f"{metric.name}_count", pairs), _name(f"{metric.name}_sum", pairs)]


def _name(name: str, labels: dict[str, str]) -> str:
    inside = ",".join(f'{label}="{value.translate(_ESCAPES)}"' for label, value in sorted(labels.items()))
    return f"{name}{{{inside}}} " if inside else f"{name} "

"""Figures over time: one bucket a second, a bounded number of them. Pure; times in seconds of the console's clock.

TTFT and hit rate are over requests whose traces ended in that second; traces that are there only because a request was
slow or failed are left out. Rates are the frontends' own counts; where those are not to be had, of traces, too. Of the
times between tokens each request has its own median and 99th percentile: p50 is the median of the former, p99 the 99th
percentile of the latter.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from services.console.frontend_counts import Counts
from services.console.summary import Summary

LENGTH_S = 900
#: Values that one bucket keeps of each figure, for its percentiles.
_MOST_VALUES = 400


@dataclass(slots=True)
class Bucket:
    at: int
    ttft_s: list[float] = field(default_factory=list)
    itl_p50_s: list[float] = field(default_factory=list)
    itl_p99_s: list[float] = field(default_factory=list)
    ended: float = 0
    failed: float = 0
    good: float = 0
    input_tokens: float = 0
    output_tokens: float = 0
    #: Of traced requests, for the hit rate.
    prompt_tokens: int = 0
    cached_tokens: int = 0
    queued: int = 0
    in_flight: int = 0


class Series:
    """``ended`` counts requests, however they ended: goodput is over these. ``counted``: rates come from counters."""

    def __init__(self, *, counted: bool) -> None:
        self._counted = counted
        self._buckets: deque[Bucket] = deque(maxlen=LENGTH_S)

    def _bucket(self, now: float) -> Bucket:
        at = int(now)
        if not self._buckets or self._buckets[-1].at < at:
            last = self._buckets[-1] if self._buckets else None
            begin = max(last.at + 1, at - LENGTH_S + 1) if last else at
            for second in range(begin, at + 1):
                self._buckets.append(Bucket(second))
        return self._buckets[-1]

    def request_ended(self, summary: Summary, now: float) -> None:
        bucket = self._bucket(now)
        if not self._counted:
            bucket.ended += 1
            bucket.failed += bool(summary.error)
            bucket.good += not summary.error and summary.slo_met is not False
            bucket.input_tokens += summary.input_tokens
            bucket.output_tokens += summary.output_tokens
        if summary.why not in ("", "sampled"):
            return
        if not summary.error:
            bucket.prompt_tokens += summary.input_tokens
            bucket.cached_tokens += min(summary.cached_tokens, summary.input_tokens)
        if summary.ttft_s is not None and len(bucket.ttft_s) < _MOST_VALUES:
            bucket.ttft_s.append(summary.ttft_s)

    def count(self, counts: Counts, now: float, over_s: float) -> None:
        """``counts`` are of the last ``over_s`` seconds, and are taken to have come evenly."""
        self._bucket(now)
        seconds = min(max(1, round(over_s)), len(self._buckets))
        for bucket in islice(reversed(self._buckets), seconds):
            bucket.ended += counts.offered / seconds
            bucket.good += counts.good / seconds
            bucket.failed += counts.failed / seconds
            bucket.input_tokens += counts.input_tokens / seconds
            bucket.output_tokens += counts.output_tokens / seconds

    def decoded(self, p50_s: float, p99_s: float, now: float) -> None:
        """One request's own percentiles of the time between its tokens."""
        bucket = self._bucket(now)
        if len(bucket.itl_p50_s) < _MOST_VALUES:
            bucket.itl_p50_s.append(p50_s)
            bucket.itl_p99_s.append(p99_s)

    def cluster(self, queued: int, in_flight: int, now: float) -> None:
        bucket = self._bucket(now)
        bucket.queued, bucket.in_flight = queued, in_flight

    def points(self, now: float, span_s: int = 300, step_s: int = 5) -> dict[str, Any]:
        """Columns, oldest first; ``t`` is seconds before now (negative). None = nothing happened."""
        self._bucket(now)
        end = int(now) // step_s * step_s
        groups: dict[int, list[Bucket]] = {at: [] for at in range(end - span_s, end, step_s)}
        for bucket in self._buckets:
            group = groups.get(bucket.at // step_s * step_s)
            if group is not None:
                group.append(bucket)
        rows = [_point(group, step_s) for group in groups.values()]
        columns: dict[str, Any] = {"t": [at - now for at in groups]}
        for name in _NAMES:
            columns[name] = [row.get(name) for row in rows]
        return {"step_s": step_s, "columns": columns}

    def recent(self, now: float, span_s: int = 60) -> dict[str, Any]:
        """The last ``span_s`` seconds as one point."""
        self._bucket(now)
        return _point([b for b in self._buckets if b.at > now - span_s], span_s)


_NAMES = (
    "ttft_p50_s", "ttft_p99_s", "itl_p50_s", "itl_p99_s", "requests_per_s", "failed_per_s", "goodput_per_s",
    "attainment", "hit_rate", "input_tokens_per_s", "output_tokens_per_s", "queued", "in_flight",
)  # fmt: skip


def _point(buckets: list[Bucket], span_s: int) -> dict[str, Any]:
    if not buckets:
        return {}
    ttft = sorted(v for b in buckets for v in b.ttft_s)
    itl_p50 = sorted(v for b in buckets for v in b.itl_p50_s)
    itl_p99 = sorted(v for b in buckets for v in b.itl_p99_s)
    ended, prompts = sum(b.ended for b in buckets), sum(b.prompt_tokens for b in buckets)
    good = sum(b.good for b in buckets)
    return {
        "ttft_p50_s": _percentile(ttft, 0.5),
        "ttft_p99_s": _percentile(ttft, 0.99),
        "itl_p50_s": _percentile(itl_p50, 0.5),
        "itl_p99_s": _percentile(itl_p99, 0.99),
        "requests_per_s": ended / span_s,
        "failed_per_s": sum(b.failed for b in buckets) / span_s,
        "goodput_per_s": good / span_s,
        "attainment": good / ended if ended else None,
        "hit_rate": sum(b.cached_tokens for b in buckets) / prompts if prompts else None,
        "input_tokens_per_s": sum(b.input_tokens for b in buckets) / span_s,
        "output_tokens_per_s": sum(b.output_tokens for b in buckets) / span_s,
        "queued": max(b.queued for b in buckets),
        "in_flight": max(b.in_flight for b in buckets),
    }


def _percentile(ordered: list[float], share: float) -> float | None:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None

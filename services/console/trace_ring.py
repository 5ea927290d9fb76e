"""A bounded memory of traces: the newest ones, and slow and failed ones for longer. Pure.

Two rings. Every trace enters the first; whatever falls out of it goes to the second if it was slow or failed, else it
is forgotten. Spans of a trace arrive from several processes, late and in any order; what is asked of a trace is worked
out when it is asked.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping

from services.console.spans import Span
from services.console.summary import ROOT_ATTRIBUTES, Slo, Summary, summarise

MAX_SPANS = 512
#: A trace is slow when its first token came later than that of this share of its contemporaries.
SLOW_SHARE = 0.95
_LEAST_CONTEMPORARIES = 20
_CONTEMPORARIES = 500


class Trace:
    __slots__ = ("_slos", "_summary", "dropped", "seen", "slow", "spans", "trace_id")

    def __init__(self, trace_id: str, seen: int, slos: Mapping[str, Slo]) -> None:
        self.trace_id = trace_id
        self._slos = slos
        #: Order of arrival of its first span.
        self.seen = seen
        self.spans: dict[str, Span] = {}
        self.dropped = 0
        self.slow = False
        self._summary: Summary | None = None

    def add(self, span: Span) -> None:
        if len(self.spans) >= MAX_SPANS and span.span_id not in self.spans:
            self.dropped += 1
            return
        self.spans[span.span_id] = span
        self._summary = None

    @property
    def summary(self) -> Summary:
        if self._summary is None:
            self._summary = summarise(self.trace_id, self.spans.values(), self._slos)
        return self._summary

    @property
    def failed(self) -> bool:
        return bool(self.summary.error)


class TraceRing:
    """``on_end`` hears each trace once, when its root span has arrived. ``slos``: by request class; for traces that
    begin from now on."""

    def __init__(
        self, size: int, kept: int, slos: Mapping[str, Slo], on_end: Callable[[Trace], None] = lambda _: None
    ) -> None:
        self.slos = slos
        self._size, self._kept_size = size, kept
        self._recent: OrderedDict[str, Trace] = OrderedDict()
        self._kept: OrderedDict[str, Trace] = OrderedDict()
        self._on_end = on_end
        self._ended: set[str] = set()
        self._first_token_s: deque[float] = deque(maxlen=_CONTEMPORARIES)
        self.spans_received = 0

    def __len__(self) -> int:
        return len(self._recent) + len(self._kept)

    def add(self, span: Span) -> None:
        self.spans_received += 1
        trace = self._recent.get(span.trace_id) or self._kept.get(span.trace_id)
        if trace is None:
            trace = self._recent[span.trace_id] = Trace(span.trace_id, self.spans_received, self.slos)
            self._make_room()
        trace.add(span)
        # Only these can be a root; of the others no summary is made.
        if not span.parent_id or (span.attributes.keys() >= ROOT_ATTRIBUTES and trace.summary.root_id == span.span_id):
            self._end(trace)

    def _end(self, trace: Trace) -> None:
        if trace.trace_id in self._ended:
            return
        self._ended.add(trace.trace_id)
        trace.slow = self._is_slow(trace.summary)
        self._on_end(trace)

    def _is_slow(self, summary: Summary) -> bool:
        took = _lateness(summary)
        ranked = sorted(self._first_token_s)
        self._first_token_s.append(took)
        if summary.slo_met is False:
            return True
        return len(ranked) >= _LEAST_CONTEMPORARIES and took > ranked[int(SLOW_SHARE * len(ranked))]

    def _make_room(self) -> None:
        while len(self._recent) > self._size:
            trace_id, trace = self._recent.popitem(last=False)
            if self._kept_size and (trace.slow or trace.failed):
                self._kept[trace_id] = trace
            else:
                self._ended.discard(trace_id)
        while len(self._kept) > self._kept_size:
            self._ended.discard(self._kept.popitem(last=False)[0])

    def newest_first(self) -> Iterator[Trace]:
        yield from reversed(self._recent.values())
        yield from reversed(self._kept.values())

    def find(self, wanted: str) -> Trace | None:
        """By trace id, or by request id; the start of either will do if it has 6 characters."""
        found = self._recent.get(wanted) or self._kept.get(wanted)
        if found is not None or not wanted:
            return found
        alike = [t for t in self.newest_first() if wanted in (t.summary.request_id, t.trace_id)]
        if not alike and len(wanted) >= 6:
            alike = [
                t
                for t in self.newest_first()
                if t.trace_id.startswith(wanted) or t.summary.request_id.startswith(wanted)
            ]
        return alike[0] if alike else None

    def slowest(self, since_unix_ns: float, limit: int) -> list[Trace]:
        """Requests that have ended since then: the latest first token first; without one, the whole counts."""
        found = [t for t in self.newest_first() if t.summary.ended and t.summary.end_ns >= since_unix_ns]
        return sorted(found, key=lambda trace: _lateness(trace.summary), reverse=True)[:limit]

    def search(self, text: str, tenant: str, only: str, limit: int) -> list[Trace]:
        """``only``: "", "slow" or "failed". Newest first."""
        found = []
        for trace in self.newest_first():
            summary = trace.summary
            if not summary.is_request:
                continue
            if (only == "slow" and not trace.slow) or (only == "failed" and not trace.failed):
                continue
            if tenant and summary.tenant != tenant:
                continue
            if text and text not in f"{summary.request_id} {trace.trace_id} {summary.model}".lower():
                continue
            found.append(trace)
            if len(found) >= limit:
                break
        return found


def _lateness(summary: Summary) -> float:
    return summary.ttft_s if summary.ttft_s is not None else summary.duration_s

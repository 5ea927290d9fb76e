"""A trace as Chrome's trace-event JSON, which Perfetto (ui.perfetto.dev) and chrome://tracing open. Pure.

A process of the cluster is a process there, and spans of it that overlap without one holding the other get threads
of their own. Times are microseconds since the trace's first span.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from services.console.spans import Span


def chrome_trace(spans: Iterable[Span]) -> dict[str, Any]:
    ordered = sorted(spans, key=lambda span: (span.start_ns, -span.end_ns))
    origin = ordered[0].start_ns if ordered else 0
    pids: dict[str, int] = {}
    lanes: dict[int, list[list[Span]]] = {}
    events: list[dict[str, Any]] = []
    for span in ordered:
        process = " ".join(dict.fromkeys(part for part in (span.service, span.instance) if part)) or "unknown"
        pid = pids.setdefault(process, len(pids) + 1)
        lane = _lane(lanes.setdefault(pid, []), span)
        events.append(
            {
                "ph": "X", "name": span.name, "cat": "error" if span.error else "span", "pid": pid, "tid": lane + 1,
                "ts": (span.start_ns - origin) / 1e3, "dur": (span.end_ns - span.start_ns) / 1e3,
                "args": {**span.attributes, "span_id": span.span_id, "parent_id": span.parent_id, "error": span.error},
            }
        )  # fmt: skip
        for event in span.events:
            events.append(
                {
                    "ph": "i", "s": "t", "name": event.name, "pid": pid, "tid": lane + 1,
                    "ts": (event.at_ns - origin) / 1e3, "args": dict(event.attributes),
                }
            )  # fmt: skip
    named = [{"ph": "M", "name": "process_name", "pid": pid, "args": {"name": name}} for name, pid in pids.items()]
    trace_id = ordered[0].trace_id if ordered else ""
    return {"traceEvents": named + events, "displayTimeUnit": "ms", "otherData": {"trace_id": trace_id}}


def _lane(lanes: list[list[Span]], span: Span) -> int:
    """The first thread on which it nests: every open span there holds it whole."""
    for number, stack in enumerate(lanes):
        while stack and stack[-1].end_ns <= span.start_ns:
            stack.pop()
        if not stack or span.end_ns <= stack[-1].end_ns:
            stack.append(span)
            return number
    lanes.append([span])
    return len(lanes) - 1

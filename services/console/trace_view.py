"""A trace as the page and `tandem trace` get it: spans in the order of the tree; where its time went and why it was
placed so, in words. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from services.console import where_time_went
from services.console.placement_words import candidates, in_words
from services.console.spans import Span
from services.console.trace_ring import Trace
from tandem.telemetry import spans as names


def listed(trace: Trace) -> dict[str, Any]:
    """One line of the list. Seconds; ``None`` = not known."""
    summary = trace.summary
    return {
        "trace_id": trace.trace_id,
        "request_id": summary.request_id,
        "name": summary.name,
        "model": summary.model,
        "tenant": summary.tenant,
        "class": summary.request_class,
        "start_unix_ms": summary.start_ns / 1e6,
        "duration_s": summary.duration_s,
        "ttft_s": summary.ttft_s,
        "tpot_s": summary.tpot_s,
        "queue_s": summary.queue_s,
        "input_tokens": summary.input_tokens,
        "cached_tokens": summary.cached_tokens,
        "output_tokens": summary.output_tokens,
        "attempts": summary.attempts,
        "prefill_worker": summary.prefill_worker,
        "decode_worker": summary.decode_worker,
        "error": summary.error,
        "ended": summary.ended,
        "slow": trace.slow,
        "slo_met": summary.slo_met,
        "why": summary.why,
        "spans": len(trace.spans),
    }


def whole(trace: Trace) -> dict[str, Any]:
    spans = sorted(trace.spans.values(), key=lambda span: (span.start_ns, -span.end_ns))
    origin = spans[0].start_ns if spans else 0
    routes = [span for span in spans if span.name == names.ROUTE.name]
    return {
        **listed(trace),
        "dropped_spans": trace.dropped,
        "where_time_went": where_time_went.in_words(spans),
        "placements": [
            {
                "attempt": int(route.number(names.ATTEMPT) or 0),
                "words": in_words(route),
                "candidates": [
                    {"where": c.where, "cached_tokens": c.cached_tokens, "score": c.score, "chosen": c.chosen,
                     "terms": c.terms}
                    for c in candidates(route)
                ],
            }
            for route in routes
        ],
        "tree": [_span(span, depth, origin) for span, depth in in_tree_order(spans)],
    }  # fmt: skip


def in_tree_order(spans: Iterable[Span]) -> list[tuple[Span, int]]:
    """Depth first, children by their beginning. A span whose parent is not here is a root."""
    ordered = sorted(spans, key=lambda span: (span.start_ns, -span.end_ns))
    known = {span.span_id for span in ordered}
    children: dict[str, list[Span]] = {}
    for span in ordered:
        parent = span.parent_id if span.parent_id in known and span.parent_id != span.span_id else ""
        children.setdefault(parent, []).append(span)
    found: list[tuple[Span, int]] = []
    stack = [(span, 0) for span in reversed(children.get("", []))]
    while stack:
        span, depth = stack.pop()
        found.append((span, depth))
        stack += [(child, depth + 1) for child in reversed(children.pop(span.span_id, []))]
    return found


def _span(span: Span, depth: int, origin_ns: int) -> dict[str, Any]:
    return {
        "id": span.span_id,
        "depth": depth,
        "name": span.name,
        "service": span.service,
        "instance": span.instance,
        "begin_ms": (span.start_ns - origin_ns) / 1e6,
        "end_ms": (span.end_ns - origin_ns) / 1e6,
        "attributes": span.attributes,
        "events": [
            {"name": e.name, "at_ms": (e.at_ns - origin_ns) / 1e6, "attributes": e.attributes} for e in span.events
        ],
        "error": span.error,
    }

"""W3C Trace Context, level 1: the ``traceparent`` header of HTTP, the metadata of gRPC, the field of Submit on NATS.

``tracestate`` belongs to other vendors' systems and ends at the frontend, which the recommendation allows.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_HEADER = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_SAMPLED = 0x01


class TraceContext(NamedTuple):
    """One span of one trace, as those below it know it."""

    trace_id: int
    span_id: int
    sampled: bool

    @property
    def header(self) -> str:
        return f"00-{self.trace_id:032x}-{self.span_id:016x}-{'01' if self.sampled else '00'}"


def parse(header: str) -> TraceContext | None:
    """None for what is no valid ``traceparent``: whoever sent it is ignored, never refused."""
    found = _HEADER.fullmatch(header)
    if found is None:
        return None
    version, trace_id, span_id, flags, more = found.groups()
    if version == "ff" or (version == "00" and more):
        return None
    context = TraceContext(int(trace_id, 16), int(span_id, 16), bool(int(flags, 16) & _SAMPLED))
    return context if context.trace_id and context.span_id else None


def sampled(header: str) -> TraceContext | None:
    """Of a header that we wrote ourselves: its context if the request is traced, else None, at the cost of a glance."""
    return parse(header) if header.endswith("1") else None


def trace_of(header: str) -> str:
    """The trace id for a log line; "-" without one."""
    return header[3:35] or "-"

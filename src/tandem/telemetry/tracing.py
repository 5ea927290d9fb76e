"""Spans after the fact: while a request runs, a process keeps plain numbers; at its end it says what they were.

``Tracing`` is one process's end of it. Off (nobody to send to), it is a flag that is false, and no tracing SDK is
imported. On, none is before the first traced request has ended. ``emit`` never blocks and
never raises; what an exporter cannot send, it drops.

Times are the process's monotonic clock. They become wall clock when a record is emitted, all of one record by one
offset, so that a step of the wall clock moves a request's spans together.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from msgspec import Struct

from tandem.telemetry.propagation import TraceContext, parse
from tandem.telemetry.sampling import Sampler, SamplingPolicy

Value = str | bool | int | float | Sequence[str] | Sequence[int] | Sequence[float]
Attributes = Mapping[str, Value]

_NO_ATTRIBUTES: Attributes = {}


class Moment(NamedTuple):
    """An event within a span."""

    name: str
    at_s: float
    attributes: Attributes = _NO_ATTRIBUTES


@dataclass(slots=True)
class SpanRecord:
    """What one span will say. ``span_id`` 0 = any; ``parent_id`` 0 = none, it is the root."""

    name: str
    start_s: float
    end_s: float
    attributes: dict[str, Value]
    events: Sequence[Moment] = ()
    #: Code and words of what went wrong.
    error: tuple[str, str] | None = None
    span_id: int = 0
    parent_id: int = 0
    #: The parent is another process's.
    remote_parent: bool = True
    #: Answers a client.
    server: bool = False


class Sink(Protocol):
    """Where records go (``export.OtlpSink``)."""

    def take(self, trace_id: int, records: Sequence[SpanRecord]) -> None: ...

    def adopt(self) -> None:
        """Takes the spans of libraries of this process, too: those below a sampled one of ours."""
        ...

    async def close(self) -> None:
        """Sends what is left, for a moment."""
        ...


class Trace(Struct):
    """A request's place in its trace, as the frontend keeps it."""

    context: TraceContext
    parent_id: int
    why: str = "sampled"


@dataclass(slots=True)
class Tracing:
    """``sink`` None: off."""

    sink: Sink | None = None
    sampler: Sampler = field(default_factory=lambda: Sampler(SamplingPolicy(ratio=0.0)))
    # Ids must differ between processes, and nothing hangs on their being unforeseeable.
    rng: random.Random = field(default_factory=random.Random)

    @property
    def enabled(self) -> bool:
        return self.sink is not None

    def begin(self, traceparent: str, now: float) -> Trace:
        """The request's own span in its trace, new or the client's, sampled or not."""
        parent = parse(traceparent) if traceparent else None
        trace_id = parent.trace_id if parent is not None else self.new_trace_id()
        sampled = self.sampler.samples(trace_id, parent.sampled if parent is not None else None, now)
        context = TraceContext(trace_id, self.new_span_id(), sampled)
        return Trace(context, parent.span_id if parent is not None else 0)

    def new_trace_id(self) -> int:
        return self.rng.getrandbits(128) or 1

    def new_span_id(self) -> int:
        return self.rng.getrandbits(64) or 1

    def emit(self, trace_id: int, records: Sequence[SpanRecord]) -> None:
        if self.sink is not None:
            for record in records:
                record.span_id = record.span_id or self.new_span_id()
            self.sink.take(trace_id, records)

    def adopt(self) -> None:
        """Spans that libraries in this process make by themselves (vLLM) go the same way."""
        if self.sink is not None:
            self.sink.adopt()

    async def close(self) -> None:
        if self.sink is not None:
            await self.sink.close()


#: For processes and tests that trace nothing.
OFF = Tracing()

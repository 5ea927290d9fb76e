"""Records to OTLP, through OpenTelemetry's own batch processor and exporters.

The SDK is imported, and its threads start, when the first record comes: in a thread of its own, off the event loop.
Until then records wait, so many at most. Each destination has a queue of its own (``OTEL_BSP_*``); a full one drops.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from tandem.telemetry import spans
from tandem.telemetry.tracing import SpanRecord

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

log = logging.getLogger(__name__)

GRPC, HTTP = "grpc", "http/protobuf"
PROTOCOLS = (GRPC, HTTP)
#: Records that wait for the SDK.
_WAITING = 2048
#: Seconds between two complaints about a collector that does not answer.
_COMPLAINT_S = 60.0


@dataclass(frozen=True, slots=True)
class Destination:
    """``endpoint`` empty: where OTEL_EXPORTER_OTLP_* say, with whatever else they say (headers, certificates)."""

    protocol: str = GRPC
    endpoint: str = ""
    #: Between two batches; None = as OTEL_BSP_SCHEDULE_DELAY says.
    delay_ms: float | None = None


class OtlpSink:
    """Use from the event loop. ``resource``: attributes of this process; OTEL_RESOURCE_ATTRIBUTES go before."""

    def __init__(
        self,
        destinations: Sequence[Destination],
        resource: Mapping[str, str],
        *,
        monotonic: Callable[[], float],
        unix_ns: Callable[[], int],
        close_s: float = 2.0,
    ) -> None:
        """``close_s``: how long what is left at the end may take."""
        self._destinations = destinations
        self._resource_attributes = dict(resource)
        self._monotonic = monotonic
        self._unix_ns = unix_ns
        self._close_s = close_s
        self._resource: Any = None
        self._translate: Callable[[int, SpanRecord, int], ReadableSpan]
        self._processors: list[BatchSpanProcessor] = []
        self._exporters: list[_Counted] = []
        #: Spans to be sent, once for each destination.
        self.offered = 0
        self._waiting: deque[tuple[int, Sequence[SpanRecord], int]] = deque(maxlen=_WAITING)
        #: Spans of libraries, likewise.
        self._waiting_spans: deque[ReadableSpan] = deque(maxlen=_WAITING)
        self._up: asyncio.Event | None = None
        self._started = False

    @property
    def delivered(self) -> int:
        """Of ``offered``, those that a collector has taken: what is neither here nor on its way is lost."""
        return sum(exporter.delivered for exporter in self._exporters)

    def take(self, trace_id: int, records: Sequence[SpanRecord]) -> None:
        offset_ns = self._unix_ns() - int(self._monotonic() * 1e9)
        if self._started:
            self._put(trace_id, records, offset_ns)
            return
        self._waiting.append((trace_id, records, offset_ns))
        self.start()

    def start(self) -> None:
        """Not needed before ``take``; brings the SDK up sooner."""
        if self._up is None:
            self._up = _in_thread("otel-start", self._start, then=self._flush_waiting)

    async def close(self) -> None:
        """Sends what is left, if that does not take too long."""
        if self._up is None:
            return
        try:
            async with asyncio.timeout(self._close_s):
                await self._up.wait()
                self._flush_waiting()
                await _in_thread("otel-finish", self._finish).wait()
        except TimeoutError:
            log.warning("traces of the last moments are lost: the collector does not answer")
            for exporter in self._exporters:
                exporter.shutdown()

    def adopt(self) -> None:
        """Spans that libraries in this process make themselves (vLLM's llm_request) go the same way: those below a
        span of ours that is sampled, and no others."""
        from opentelemetry import trace
        from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
        from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased

        sink = self

        class Forward(SpanProcessor):
            def on_end(self, span: ReadableSpan) -> None:
                if sink._started:
                    sink._export(span)
                else:
                    sink._waiting_spans.append(span)

        self.start()
        provider = TracerProvider(ParentBased(ALWAYS_OFF), self._made_resource(), shutdown_on_exit=False)
        provider.add_span_processor(Forward())
        trace.set_tracer_provider(provider)

    # -- inside ----------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        """In a thread."""
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        self._translate = _translation(self._made_resource())
        for destination in self._destinations:
            try:
                exporter = _Counted(_exporter(destination))
                processor = BatchSpanProcessor(
                    cast("SpanExporter", exporter), schedule_delay_millis=destination.delay_ms
                )
            except Exception as error:  # of whatever kind the SDK raises for a wrong OTEL_* variable: the others go on
                log.error("no traces to %s: %s", destination.endpoint or "the OTLP endpoint", error or repr(error))
                continue
            self._exporters.append(exporter)
            self._processors.append(processor)

    def _flush_waiting(self) -> None:
        self._started = True
        while self._waiting:
            self._put(*self._waiting.popleft())
        while self._waiting_spans:
            self._export(self._waiting_spans.popleft())

    def _finish(self) -> None:
        for processor in self._processors:
            processor.shutdown()  # type: ignore[no-untyped-call]

    def _made_resource(self) -> Any:
        if self._resource is None:
            from opentelemetry.sdk.resources import OTELResourceDetector, Resource

            self._resource = Resource(self._resource_attributes).merge(OTELResourceDetector().detect())
        return self._resource

    def _put(self, trace_id: int, records: Sequence[SpanRecord], offset_ns: int) -> None:
        for record in records:
            self._export(self._translate(trace_id, record, offset_ns))

    def _export(self, span: ReadableSpan) -> None:
        self.offered += len(self._processors)
        for processor in self._processors:
            processor.on_end(span)


def _in_thread(name: str, work: Callable[[], None], *, then: Callable[[], None] = lambda: None) -> asyncio.Event:
    """Set when ``work`` is done in a thread of its own, which nobody waits for at the process's end, and ``then`` on
    the loop."""
    loop = asyncio.get_running_loop()
    done = asyncio.Event()

    def finished() -> None:
        then()
        done.set()

    def run() -> None:
        try:
            work()
        finally:
            with contextlib.suppress(RuntimeError):  # the loop is closed already
                loop.call_soon_threadsafe(finished)

    threading.Thread(target=run, name=name, daemon=True).start()
    return done


def _exporter(destination: Destination) -> SpanExporter:
    endpoint = destination.endpoint or None
    if destination.protocol == HTTP:
        from opentelemetry.exporter.otlp.proto.http import trace_exporter as http

        _complain_rarely(http.__name__)
        return http.OTLPSpanExporter(endpoint=endpoint)
    from opentelemetry.exporter.otlp.proto.grpc import exporter as grpc_exporter
    from opentelemetry.exporter.otlp.proto.grpc import trace_exporter as grpc

    _complain_rarely(grpc_exporter.__name__)
    return grpc.OTLPSpanExporter(endpoint=endpoint)


class _Counted:
    """An exporter, and how many spans it has got rid of."""

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter
        self.delivered = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = self._exporter.export(spans)
        if result.name == "SUCCESS":
            self.delivered += len(spans)
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return self._exporter.force_flush(timeout_millis)


def _complain_rarely(logger: str) -> None:
    logging.getLogger(logger).addFilter(_Sparse(_COMPLAINT_S))


class _Sparse(logging.Filter):
    """One record in so many seconds, by the records' own times; only errors."""

    def __init__(self, every_s: float) -> None:
        super().__init__()
        self._every_s = every_s
        self._last_s = 0.0

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.ERROR or record.created - self._last_s < self._every_s:
            return False
        self._last_s = record.created
        return True


def _translation(resource: Any) -> Callable[[int, SpanRecord, int], ReadableSpan]:
    """From (trace id, record, nanoseconds from our clock to the wall's) to the span as the SDK would have made it, had
    it been there from the start."""
    from opentelemetry.sdk.trace import Event, ReadableSpan
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope
    from opentelemetry.trace import SpanContext, SpanKind, TraceFlags
    from opentelemetry.trace.status import Status, StatusCode

    scope, unset, sampled = InstrumentationScope(spans.SCOPE), Status(StatusCode.UNSET), TraceFlags(TraceFlags.SAMPLED)

    def readable(trace_id: int, record: SpanRecord, offset_ns: int) -> ReadableSpan:
        parent = SpanContext(trace_id, record.parent_id, record.remote_parent, sampled) if record.parent_id else None
        return ReadableSpan(
            name=record.name,
            context=SpanContext(trace_id, record.span_id, False, sampled),
            parent=parent,
            resource=resource,
            attributes=record.attributes,
            events=[Event(e.name, dict(e.attributes), int(e.at_s * 1e9) + offset_ns) for e in record.events],
            kind=SpanKind.SERVER if record.server else SpanKind.INTERNAL,
            status=Status(StatusCode.ERROR, ": ".join(record.error)) if record.error else unset,
            start_time=int(record.start_s * 1e9) + offset_ns,
            end_time=int(max(record.start_s, record.end_s) * 1e9) + offset_ns,
            instrumentation_scope=scope,
        )

    return readable

"""Spans as the console keeps them, from OTLP's messages. Pure; sizes are bounded here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1 import trace_pb2

Value = str | bool | int | float | tuple["Value", ...]

MAX_ATTRIBUTES = 128
MAX_EVENTS = 64
MAX_TEXT = 16_384
_MAX_ITEMS = 256


@dataclass(frozen=True, slots=True)
class SpanEvent:
    name: str
    at_ns: int
    attributes: Mapping[str, Value]


@dataclass(frozen=True, slots=True)
class Span:
    """Times are unix nanoseconds of the clock of the process that made it; ids are hex, "" = no parent."""

    trace_id: str
    span_id: str
    parent_id: str
    name: str
    service: str
    instance: str
    start_ns: int
    end_ns: int
    attributes: Mapping[str, Value]
    events: tuple[SpanEvent, ...]
    #: "" unless its status is an error; then what it says, or "error".
    error: str

    @property
    def duration_s(self) -> float:
        return (self.end_ns - self.start_ns) / 1e9

    def text(self, name: str) -> str:
        value = self.attributes.get(name, "")
        return value if isinstance(value, str) else ""

    def number(self, name: str) -> float | None:
        value = self.attributes.get(name)
        return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def spans_of(request: ExportTraceServiceRequest) -> Iterator[Span]:
    """Malformed ones (no ids, ends before it starts) are left out."""
    for resource_spans in request.resource_spans:
        resource = _attributes(resource_spans.resource.attributes)
        service, instance = str(resource.get("service.name", "")), str(resource.get("service.instance.id", ""))
        for scope_spans in resource_spans.scope_spans:
            for span in scope_spans.spans:
                if len(span.trace_id) == 16 and len(span.span_id) == 8 and span.end_time_unix_nano:
                    yield _span(span, service, instance)


def _span(span: trace_pb2.Span, service: str, instance: str) -> Span:
    failed = span.status.code == trace_pb2.Status.STATUS_CODE_ERROR
    return Span(
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        name=span.name[:256],
        service=service[:128],
        instance=instance[:128],
        start_ns=span.start_time_unix_nano,
        end_ns=max(span.end_time_unix_nano, span.start_time_unix_nano),
        attributes=_attributes(span.attributes),
        events=tuple(
            SpanEvent(event.name[:256], event.time_unix_nano, _attributes(event.attributes))
            for event in span.events[:MAX_EVENTS]
        ),
        error=(span.status.message[:MAX_TEXT] or "error") if failed else "",
    )


def _attributes(pairs: Iterable[KeyValue]) -> dict[str, Value]:
    found: dict[str, Value] = {}
    for pair in pairs:
        if len(found) >= MAX_ATTRIBUTES:
            break
        found[pair.key[:256]] = _value(pair.value)
    return found


def _value(value: AnyValue, depth: int = 0) -> Value:
    match value.WhichOneof("value"):
        case "string_value":
            return value.string_value[:MAX_TEXT]
        case "bool_value":
            return value.bool_value
        case "int_value":
            return value.int_value
        case "double_value":
            return value.double_value
        case "bytes_value":
            return value.bytes_value[:MAX_TEXT].hex()
        case "array_value" if depth < 2:
            return tuple(_value(item, depth + 1) for item in value.array_value.values[:_MAX_ITEMS])
        case "kvlist_value" if depth < 2:
            return tuple((p.key[:256], _value(p.value, depth + 1)) for p in value.kvlist_value.values[:_MAX_ITEMS])
    return ""

"""Traces for the console's tests, as OTLP's messages and as the console's spans: named as services name them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, ArrayValue, KeyValue
from opentelemetry.proto.trace.v1 import trace_pb2

from services.console.spans import Span, spans_of
from tandem.telemetry import spans as names

MS = 1_000_000
Given = str | bool | int | float | Sequence[str] | Sequence[int] | Sequence[float]


def _any(value: Given) -> AnyValue:
    match value:
        case bool():
            return AnyValue(bool_value=value)
        case str():
            return AnyValue(string_value=value)
        case int():
            return AnyValue(int_value=value)
        case float():
            return AnyValue(double_value=value)
    return AnyValue(array_value=ArrayValue(values=[_any(item) for item in value]))


def pairs(values: Mapping[str, Given]) -> list[KeyValue]:
    return [KeyValue(key=key, value=_any(value)) for key, value in values.items()]


def export(*spans: trace_pb2.Span, service: str = "tandem-frontend") -> ExportTraceServiceRequest:
    request = ExportTraceServiceRequest()
    resource = request.resource_spans.add()
    resource.resource.attributes.extend(pairs({"service.name": service, "service.instance.id": "one"}))
    resource.scope_spans.add().spans.extend(spans)
    return request


def otlp(
    trace: int, span: int, parent: int, name: str, begin_ms: float, end_ms: float, **attributes: Given
) -> trace_pb2.Span:
    """``attributes``: by the name of the constant in tandem.telemetry.spans."""
    return trace_pb2.Span(
        trace_id=trace.to_bytes(16, "big"),
        span_id=span.to_bytes(8, "big"),
        parent_span_id=parent.to_bytes(8, "big") if parent else b"",
        name=name,
        start_time_unix_nano=int((10_000 + begin_ms) * MS),
        end_time_unix_nano=int((10_000 + end_ms) * MS),
        attributes=pairs({getattr(names, key): value for key, value in attributes.items()}),
    )


def request_spans(trace: int, *, ttft_s: float = 0.05, error: str = "", **root: Given) -> list[trace_pb2.Span]:
    """A request that was placed, prefilled remotely and decoded: the root last, as it arrives."""
    name = f"req-{trace:06d}"
    key: dict[str, Given] = {"REQUEST_ID": name, "ATTEMPT": 0, "CHOICE": 0}
    route = otlp(
        trace, 2, 1, "route", 1, 3, **key, INPUT_TOKENS=1312, TENANT="acme", REQUEST_CLASS="chat",
        DECODE_WORKER="decode-2", PREFILL_WORKER="", PREDICTED_CACHED=1024, NUM_CANDIDATES=3,
        CANDIDATE_DECODE=["decode-2", "decode-1"], CANDIDATE_PREFILL=["", ""], CANDIDATE_CACHED=[1024, 0],
        CANDIDATE_SCORE=[1.0, 2.0], CANDIDATE_CHOSEN=0, EXCLUDED_WORKER=["decode-3"], EXCLUDED_REASON=["draining"],
    )  # fmt: skip
    for term, values in (("ttft_ms", [43.0, 120.0]), ("waited_ms", [2.0, 2.0]), ("itl_ms", [6.0, 7.0])):
        route.attributes.extend(pairs({names.CANDIDATE_TERMS[term]: values}))
    ended: dict[str, Given] = {"ERROR_TYPE": error} if error else {"TIME_TO_FIRST": ttft_s, "TPOT": 6.5}
    return [
        route,
        otlp(trace, 3, 2, "queue", 2, 3, **key, QUEUE_REASON="none"),
        otlp(trace, 4, 1, "prefill", 4, 40, **key, WORKER="decode-2", INPUT_TOKENS=1312, CACHED_TOKENS=1024),
        otlp(trace, 5, 1, "decode", 40, 200, **key, WORKER="decode-2", OUTPUT_TOKENS=20, ITL_P50=6.0, ITL_P99=9.0),
        otlp(
            trace, 1, 0, "chat m", 0, 205, REQUEST_ID=name, OPERATION="chat", REQUEST_MODEL="m", TENANT="acme",
            REQUEST_CLASS="chat", INPUT_TOKENS=1312, OUTPUT_TOKENS=20, CACHED_TOKENS=1024, WHY="sampled", **ended,
            **root,
        ),
    ]  # fmt: skip


def as_spans(*spans: trace_pb2.Span) -> list[Span]:
    return list(spans_of(export(*spans)))

"""An OTLP/gRPC receiver, as any collector is one: keeps the spans that it is sent, and looks at them as a reader of
traces would, through OTLP's own messages."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.common.v1 import common_pb2
from opentelemetry.proto.trace.v1 import trace_pb2

from tests.harness.cluster import wait_for


@dataclass(frozen=True)
class Event:
    name: str
    at_ns: int
    attributes: dict[str, Any]


@dataclass(frozen=True)
class Span:
    name: str
    service: str
    instance: str
    scope: str
    trace_id: str
    span_id: str
    parent_id: str
    start_ns: int
    end_ns: int
    kind: int
    failed: bool
    status: str
    attributes: dict[str, Any]
    events: tuple[Event, ...]

    def events_of(self, name: str) -> list[Event]:
        return [event for event in self.events if event.name == name]


class OtlpReceiver(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self) -> None:
        self._server = grpc.server(ThreadPoolExecutor(4))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        self._spans: list[Span] = []
        self._lock = threading.Lock()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> OtlpReceiver:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(0.5).wait()

    def Export(self, request: Any, context: grpc.ServicerContext) -> Any:
        found = list(_spans(request))
        with self._lock:
            self._spans += found
        return trace_service_pb2.ExportTraceServiceResponse()

    # -- reading ---------------------------------------------------------------------------------------------------

    def spans(self) -> list[Span]:
        with self._lock:
            return list(self._spans)

    def of_request(self, request_id: str) -> list[Span]:
        """Every span of the trace in which that request is, oldest first."""
        spans = self.spans()
        traces = {span.trace_id for span in spans if span.attributes.get("tandem.request.id") == request_id}
        return sorted((span for span in spans if span.trace_id in traces), key=lambda span: span.start_ns)

    def wait_for(self, request_id: str, names: Iterable[str], timeout_s: float = 30.0) -> list[Span]:
        """The trace of that request, once it has at least these spans."""
        wanted = sorted(names)

        def complete() -> list[Span]:
            spans = self.of_request(request_id)
            left = list(wanted)
            for span in spans:
                if span.name in left:
                    left.remove(span.name)
            return [] if left else spans

        try:
            found: list[Span] = wait_for(complete, timeout_s, f"trace of {request_id} with {wanted}")
        except AssertionError as error:
            there = [(span.service, span.name) for span in self.of_request(request_id)]
            raise AssertionError(f"{error}; there are {there}") from None
        return found


@contextmanager
def otlp_receiver() -> Iterator[OtlpReceiver]:
    with OtlpReceiver() as receiver:
        yield receiver


def _spans(request: trace_service_pb2.ExportTraceServiceRequest) -> Iterator[Span]:
    for resource in request.resource_spans:
        about = _attributes(resource.resource.attributes)
        for scope in resource.scope_spans:
            for span in scope.spans:
                yield Span(
                    name=span.name,
                    service=about["service.name"],
                    instance=about.get("service.instance.id", ""),
                    scope=scope.scope.name,
                    trace_id=span.trace_id.hex(),
                    span_id=span.span_id.hex(),
                    parent_id=span.parent_span_id.hex(),
                    start_ns=span.start_time_unix_nano,
                    end_ns=span.end_time_unix_nano,
                    kind=span.kind,
                    failed=span.status.code == trace_pb2.Status.STATUS_CODE_ERROR,
                    status=span.status.message,
                    attributes=_attributes(span.attributes),
                    events=tuple(Event(e.name, e.time_unix_nano, _attributes(e.attributes)) for e in span.events),
                )


def _attributes(pairs: Iterable[common_pb2.KeyValue]) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: common_pb2.AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(item) for item in value.array_value.values]
    return getattr(value, kind) if kind else None

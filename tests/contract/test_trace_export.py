"""Records of ours as collectors get them, by either protocol; and what happens when there is none."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tandem.telemetry.export import GRPC, HTTP, Destination, OtlpSink
from tandem.telemetry.tracing import Moment, SpanRecord, Tracing
from tests.harness.otlp import OtlpReceiver

TRACE = 0x5A << 120 | 7


@pytest.fixture
def receiver() -> Iterator[OtlpReceiver]:
    with OtlpReceiver() as receiver:
        yield receiver


@pytest.fixture
def http_endpoint(receiver: OtlpReceiver) -> Iterator[str]:
    """OTLP over HTTP in front of the same receiver."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            assert self.path == "/v1/traces" and self.headers["content-type"] == "application/x-protobuf"
            receiver.Export(ExportTraceServiceRequest.FromString(body), None)  # type: ignore[arg-type]
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1/traces"
        server.shutdown()


def sink(*destinations: Destination, close_s: float = 30.0) -> OtlpSink:
    about = {"service.name": "tandem-router", "service.instance.id": "router", "tandem.cluster": "c"}
    return OtlpSink(destinations, about, monotonic=time.monotonic, unix_ns=time.time_ns, close_s=close_s)


def records(now: float) -> list[SpanRecord]:
    texts: dict[str, object] = {"text": "x", "number": 3, "share": 0.5, "flag": True, "list": ["a", "b"], "many": [1.5]}
    first = SpanRecord(
        "parent", now - 2.0, now - 1.0, texts, [Moment("half", now - 1.5, {"why": "so"})],  # type: ignore[arg-type]
        error=("worker_lost", "worker w is gone"), span_id=0x77, parent_id=0x99, server=True,
    )  # fmt: skip
    return [first, SpanRecord("child", now - 1.8, now - 1.2, {}, parent_id=0x77, remote_parent=False)]


@pytest.mark.parametrize("protocol", [GRPC, HTTP])
async def test_a_record_arrives_whole(protocol: str, receiver: OtlpReceiver, http_endpoint: str) -> None:
    tracing = Tracing(sink(Destination(protocol, receiver.endpoint if protocol == GRPC else http_endpoint, 50.0)))
    began_ns, now = time.time_ns(), time.monotonic()
    tracing.emit(TRACE, records(now))
    await tracing.close()
    parent, child = sorted(receiver.spans(), key=lambda span: span.name, reverse=True)
    assert (parent.trace_id, parent.span_id, parent.parent_id) == (f"{TRACE:032x}", f"{0x77:016x}", f"{0x99:016x}")
    assert child.parent_id == parent.span_id and child.span_id not in ("", parent.span_id)
    assert (parent.service, parent.instance, parent.scope, parent.kind) == ("tandem-router", "router", "tandem", 2)
    assert parent.attributes == {
        "text": "x", "number": 3, "share": 0.5, "flag": True, "list": ["a", "b"], "many": [1.5]
    }  # fmt: skip
    assert parent.failed and parent.status == "worker_lost: worker w is gone" and not child.failed
    (half,) = parent.events
    assert (half.name, half.attributes) == ("half", {"why": "so"})
    assert abs(parent.end_ns - parent.start_ns - 1_000_000_000) < 1000
    assert abs(half.at_ns - parent.start_ns - 500_000_000) < 1000
    assert abs(parent.end_ns - (began_ns - 1_000_000_000)) < 500_000_000, "on the wall clock"


async def test_both_get_it(receiver: OtlpReceiver, http_endpoint: str) -> None:
    both = sink(Destination(GRPC, receiver.endpoint, 50.0), Destination(HTTP, http_endpoint, 50.0))
    tracing = Tracing(both)
    tracing.emit(TRACE, records(time.monotonic()))
    await tracing.close()
    assert sorted(span.name for span in receiver.spans()) == ["child", "child", "parent", "parent"]


async def test_the_environment_names_the_resource(receiver: OtlpReceiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=test,service.instance.id=other")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.endpoint)
    tracing = Tracing(sink(Destination()))
    tracing.emit(TRACE, records(time.monotonic()))
    await tracing.close()
    assert {(span.service, span.instance) for span in receiver.spans()} == {("tandem-router", "other")}


@pytest.mark.parametrize("protocol", [GRPC, HTTP])
async def test_a_collector_that_is_away_holds_nobody_up(protocol: str) -> None:
    path = "/v1/traces" if protocol == HTTP else ""
    tracing = Tracing(sink(Destination(protocol, f"http://127.0.0.1:9{path}", 50.0), close_s=1.0))
    for _ in range(200):
        tracing.emit(TRACE, records(time.monotonic()))
        await asyncio.sleep(0)
    began = time.monotonic()
    await tracing.close()
    assert time.monotonic() - began < 20, "a second, and room for a busy machine"


def test_a_process_leaves_though_the_collector_is_away() -> None:
    script = """
import asyncio, time
from tandem.telemetry.export import Destination, OtlpSink
from tandem.telemetry.tracing import SpanRecord
async def main():
    away = Destination("grpc", "http://127.0.0.1:9", 50.0)
    sink = OtlpSink([away], {}, monotonic=time.monotonic, unix_ns=time.time_ns)
    sink.take(7, [SpanRecord("a", 0.0, 1.0, {}, span_id=5)])
    await sink.close()
asyncio.run(main())
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60, stderr=subprocess.DEVNULL)


_LIBRARY = """
import asyncio, sys, time
from opentelemetry import trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from tandem.telemetry.export import Destination, OtlpSink

async def main():
    about = {"service.name": "tandem-decode"}
    here = Destination("grpc", sys.argv[1], 50.0)
    sink = OtlpSink([here], about, monotonic=time.monotonic, unix_ns=time.time_ns, close_s=30.0)
    sink.adopt()
    tracer = trace.get_tracer("library")
    for number, flags in enumerate(("01", "00")):
        header = f"00-{'5a' * 16}-{'77' * 8}-{flags}"
        below = TraceContextTextMapPropagator().extract({"traceparent": header})
        tracer.start_span(f"below {flags}", context=below).end()
    tracer.start_span("of its own").end()
    await sink.close()

asyncio.run(main())
"""


def test_of_a_librarys_spans_those_below_a_sampled_one_of_ours(receiver: OtlpReceiver) -> None:
    """In a process of its own: OpenTelemetry has one tracer provider a process."""
    subprocess.run([sys.executable, "-c", _LIBRARY, receiver.endpoint], check=True, timeout=60)
    (span,) = receiver.spans()
    assert (span.name, span.service) == ("below 01", "tandem-decode")
    assert (span.trace_id, span.parent_id) == ("5a" * 16, "77" * 8)

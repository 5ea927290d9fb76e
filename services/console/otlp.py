"""The OTLP receiver: trace exports over gRPC and over HTTP with protobuf bodies. Metrics and logs are not for us."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import TraceServiceServicer
from starlette.requests import Request
from starlette.responses import Response

SERVICE_NAME = "opentelemetry.proto.collector.trace.v1.TraceService"
MAX_BODY_BYTES = 16 << 20


class TraceReceiver(TraceServiceServicer):
    def __init__(self, on_export: Callable[[ExportTraceServiceRequest], None]) -> None:
        self._on_export = on_export

    async def Export(
        self, request: ExportTraceServiceRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> ExportTraceServiceResponse:
        self._on_export(request)
        return ExportTraceServiceResponse()

    async def over_http(self, request: Request) -> Response:
        """POST /v1/traces."""
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/x-protobuf":
            return Response("only application/x-protobuf is understood here", 415)
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_BODY_BYTES:
                return Response("too large", 413)
        try:
            data = _unzipped(bytes(body)) if request.headers.get("content-encoding") == "gzip" else bytes(body)
            export = ExportTraceServiceRequest.FromString(data)
        except (DecodeError, OSError, EOFError, zlib.error):
            return Response("not an ExportTraceServiceRequest", 400)
        self._on_export(export)
        return Response(ExportTraceServiceResponse().SerializeToString(), media_type="application/x-protobuf")


def _unzipped(body: bytes) -> bytes:
    """At most ``MAX_BODY_BYTES``; OSError beyond, and for what is no gzip."""
    found = zlib.decompressobj(16 + zlib.MAX_WBITS).decompress(body, MAX_BODY_BYTES + 1)
    if len(found) > MAX_BODY_BYTES:
        raise gzip.BadGzipFile("too large")
    return found

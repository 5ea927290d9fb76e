"""Destinations that cannot be made say so."""

from __future__ import annotations

import time

import pytest

from tandem.telemetry.export import GRPC, HTTP, Destination, OtlpSink


async def test_a_wrong_option_is_named_for_each_destination(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    places = [Destination(HTTP, "http://127.0.0.1:9/wrong"), Destination(GRPC, "http://127.0.0.1:9")]
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "0")
    sink = OtlpSink(places, {}, monotonic=time.monotonic, unix_ns=time.time_ns)
    sink.start()
    await sink.close()
    errors = [r.getMessage() for r in caplog.records if r.levelname == "ERROR" and r.name == "tandem.telemetry.export"]
    assert len(errors) == 2, errors
    assert "http://127.0.0.1:9/wrong" in errors[0] and "max_queue_size" in errors[0]

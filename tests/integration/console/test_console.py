"""The console around a bus in memory: what it hears over OTLP and on the bus, its API tells."""

from __future__ import annotations

import asyncio
import gzip
import json
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc

from services.console.app import Console
from services.console.config import ConsoleSettings
from tandem.adapters import deployment
from tandem.adapters.memory_bus import MemoryBus, MemoryHub
from tandem.errors import ConfigError
from tandem.v1 import bus_pb2, types_pb2
from tandem.wire import subjects
from tests.unit.console.traces import export, request_spans

DEPLOYMENT = "{cluster: c, models: [{name: m, path: nowhere, pools: [{role: aggregated, engine: sim}]}]}"


@pytest.fixture
async def hub() -> MemoryHub:
    return MemoryHub()


@pytest.fixture
async def console(hub: MemoryHub, tmp_path: Path) -> AsyncIterator[Console]:
    settings = ConsoleSettings(deployment=str(tmp_path / "deployment.yaml"), http_port=0)
    made = Console(settings, deployment.parse(DEPLOYMENT), MemoryBus(hub))
    await made.start()
    running = asyncio.create_task(made.run())
    yield made
    await made.close()
    running.cancel()
    await asyncio.wait({running})


def fetch(console: Console, path: str, data: bytes | None = None, **headers: str) -> tuple[int, bytes]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{console.http_port}{path}", data, {k.replace("_", "-"): v for k, v in headers.items()}
    )
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


async def get(console: Console, path: str) -> Any:
    status, body = await asyncio.to_thread(fetch, console, path)
    assert status == 200, body
    return json.loads(body)


@pytest.mark.parametrize("way", ["grpc", "http", "gzip"])
async def test_spans_arrive_over_every_protocol(console: Console, way: str) -> None:
    request = export(*request_spans(7))
    if way == "grpc":
        async with grpc.aio.insecure_channel(f"127.0.0.1:{console.otlp_port}") as channel:
            await trace_service_pb2_grpc.TraceServiceStub(channel).Export(request, timeout=10)
    else:
        body, headers = request.SerializeToString(), {"content_type": "application/x-protobuf"}
        if way == "gzip":
            body, headers = gzip.compress(body), {**headers, "content_encoding": "gzip"}
        status, _ = await asyncio.to_thread(fetch, console, "/v1/traces", body, **headers)
        assert status == 200
    assert (await get(console, "/api/traces"))["traces"][0]["request_id"] == "req-000007"
    found = await get(console, "/api/traces/req-000007")
    assert found["placements"][0]["words"][0].startswith("decode-2: 1,024 of 1,312 tokens cached, predicted 41 ms")
    assert (await get(console, "/api/cluster"))["recent"]["ttft_p50_s"] == 0.05
    chrome = await get(console, f"/api/traces/{7:032x}/chrome.json")
    assert sum(event["ph"] == "X" for event in chrome["traceEvents"]) == 5


@pytest.mark.parametrize(
    ("path", "body", "headers", "status"),
    [
        ("/v1/traces", b"\xff\xff", {"content_type": "application/x-protobuf"}, 400),
        ("/v1/traces", b"junk", {"content_type": "application/x-protobuf", "content_encoding": "gzip"}, 400),
        ("/v1/traces", b"{}", {"content_type": "application/json"}, 415),
        ("/v1/traces", b"\0" * (17 << 20), {"content_type": "application/x-protobuf"}, 413),
        ("/v1/traces", None, {}, 405),
        ("/api/traces/nothing-like-it", None, {}, 404),
        ("/api/traces?only=everything", None, {}, 400),
        ("/api/traces?limit=99999999999999999", None, {}, 200),
        ("/api/series?span_s=x", None, {}, 200),
        ("/api/try", b'{"model": "m", "prompt": "x"}', {"content_type": "application/json"}, 503),
        ("/static/../app.py", None, {}, 404),
        ("/static/%2e%2e/app.py", None, {}, 404),
        ("/nothing", None, {}, 404),
    ],
)
async def test_nonsense_is_refused(
    console: Console, path: str, body: bytes | None, headers: dict[str, str], status: int
) -> None:
    try:
        answered, _ = await asyncio.to_thread(fetch, console, path, body, **headers)
    except urllib.error.URLError as refused:  # it stops reading what is too large
        assert status == 413, refused
        return
    assert answered == status


async def test_slos_are_read_again_for_the_requests_that_come_then(console: Console, tmp_path: Path) -> None:
    """The first token of each comes after 50 ms."""
    file = tmp_path / "deployment.yaml"
    for number, slo_s in ((21, "1.0"), (22, "0.01"), (23, "soon")):
        file.write_text(f"{DEPLOYMENT[:-1]}, classes: [{{name: chat, ttft_slo_s: {slo_s}}}]}}")
        console.reload()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{console.otlp_port}") as channel:
            await trace_service_pb2_grpc.TraceServiceStub(channel).Export(export(*request_spans(number)), timeout=10)
    met = {t["request_id"]: t["slo_met"] for t in (await get(console, "/api/traces"))["traces"]}
    assert met == {"req-000021": True, "req-000022": False, "req-000023": False}, "a wrong file changes nothing"


async def test_the_bus_is_shown_live(console: Console, hub: MemoryHub) -> None:
    worker = types_pb2.WorkerRef(id="aggregated-1", incarnation=1)
    bus = MemoryBus(hub)
    load = bus_pb2.LoadReport(
        worker=worker, model="m", role=types_pb2.ROLE_DECODE, running_requests=1,
        step_timings=[bus_pb2.StepTiming(duration_s=0.02, prefill_tokens=9)],
    )  # fmt: skip
    bus.publish(subjects.load("c", "aggregated-1"), load.SerializeToString())
    accepted = bus_pb2.LifecycleEvent(key=types_pb2.RequestKey(id="r-1"), phase=bus_pb2.PHASE_ACCEPTED)
    batch = bus_pb2.LifecycleEvents(worker=worker, events=[accepted])
    bus.publish(subjects.events("c", "m"), batch.SerializeToString())
    for _ in range(100):
        if console.activity.in_flight:
            break
        await asyncio.sleep(0.02)
    assert (await get(console, "/api/requests"))["requests"][0]["request_id"] == "r-1"
    reader, writer = await asyncio.open_connection("127.0.0.1", console.http_port)
    writer.write(b"GET /api/live HTTP/1.1\r\nHost: localhost\r\n\r\n")
    async with asyncio.timeout(10):
        while not (line := await reader.readline()).startswith(b"data: "):
            assert line, "the feed ended"
    writer.close()
    snapshot = json.loads(line[6:])
    assert [row["id"] for row in snapshot["rows"]] == ["aggregated-1"]
    assert snapshot["spans"][:2] == [0, 0] and snapshot["opened"][0][4] == "r-1"


async def test_a_port_that_is_taken_is_said(console: Console, hub: MemoryHub) -> None:
    settings = ConsoleSettings(deployment="", http_port=console.http_port)
    other = Console(settings, deployment.parse(DEPLOYMENT), MemoryBus(hub))
    with pytest.raises(ConfigError, match=f"cannot serve HTTP on 127.0.0.1:{console.http_port}"):
        await other.start()

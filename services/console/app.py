"""The console process: listens to the bus, to OTLP and to the routers, and shows it on a web page.

It decides nothing and nobody waits for it: requests are served the same with and without it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import uvicorn
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from services.console.activity import OUTCOMES, STATES, Activity, Delta
from services.console.cluster_view import ClusterView
from services.console.config import ConsoleSettings, addresses
from services.console.feed import Feed, encoded
from services.console.frontend_counts import FrontendCounts
from services.console.otlp import MAX_BODY_BYTES, SERVICE_NAME, TraceReceiver
from services.console.series import Series
from services.console.spans import spans_of
from services.console.summary import Slo
from services.console.trace_ring import Trace, TraceRing
from services.console.trial import Trials
from services.console.watch import Inbox, Watch
from services.console.web_app import Sources, web_app
from tandem.adapters import clock, deployment
from tandem.adapters.bus import Bus, Message
from tandem.adapters.deployment import Deployment
from tandem.adapters.grpc_server import GrpcServer
from tandem.adapters.nats_bus import NatsBus
from tandem.adapters.process_metrics import instruments_of, metrics_endpoint
from tandem.errors import ConfigError
from tandem.spacetime.model import KINDS
from tandem.telemetry import spans as names
from tandem.v1 import bus_pb2
from tandem.wire import subjects

log = logging.getLogger(__name__)

#: Ten batches a second to every page, and once a second what changes slowly.
BATCH_S = 0.1
#: Who asks the console waits no longer for routers; what they said last is shown.
LOOK_S = 0.5
STATUS_EVERY = 10
MAX_IN_FLIGHT_SHOWN = 500
CLOSE_S = 1


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The process's main listens to signals, for all of its parts."""
        yield


class Console:
    """Around a bus that the caller owns; ``start``, then ``run`` until cancelled, then ``close``."""

    def __init__(self, settings: ConsoleSettings, wanted: Deployment, bus: Bus) -> None:
        settings.check()
        self._settings = settings
        self._cluster_name = wanted.cluster
        self._models = [model.name for model in wanted.models]
        self._bus = bus
        self._began = clock.monotonic()
        self._began_unix_ms = clock.unix_milliseconds()
        self._history_ms = settings.map_history_s * 1e3
        self.activity = Activity(self._history_ms)
        counted = addresses(settings.frontend_metrics)
        #: What waited, of late: [milliseconds, requests].
        self._queue: deque[tuple[float, int]] = deque(maxlen=int(settings.map_history_s / (BATCH_S * STATUS_EVERY)) + 1)
        self.series = Series(counted=bool(counted))
        self.ring = TraceRing(settings.trace_ring, settings.kept_traces, _slos(wanted), self._trace_ended)
        self.feed = Feed(lambda: encoded("snapshot", self._snapshot()))
        self.watch = Watch(lambda: len(self.feed), clock.monotonic)
        self._inbox = Inbox(clock.monotonic)
        self.view = ClusterView(self._models, addresses(settings.routers), clock.monotonic, self.watch)
        self._counts = FrontendCounts(
            counted,
            lambda counts, over_s: self.series.count(counts, clock.monotonic(), over_s),
            clock.monotonic,
            self.watch.pause,
        )
        self._trials = Trials(addresses(settings.frontends))
        receiver = TraceReceiver(lambda export: self._inbox.put(self._take_export, export))
        sources = Sources(
            self.ring,
            self.feed,
            self._trials,
            receiver,
            self._look,
            self.cluster,
            self._points,
            self.in_flight,
            self._ready,
        )
        self._http = _Server(
            uvicorn.Config(
                web_app(sources, settings.console_token),
                log_config=None,
                access_log=False,
                lifespan="off",
                timeout_graceful_shutdown=CLOSE_S,
            )
        )
        self._grpc = GrpcServer(settings.grpc_host, settings.grpc_port, max_request_bytes=MAX_BODY_BYTES)
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(receiver, self._grpc.server)  # type: ignore[no-untyped-call]
        self._socket: socket.socket | None = None

    @property
    def http_port(self) -> int:
        assert self._socket is not None, "not started"
        return int(self._socket.getsockname()[1])

    @property
    def otlp_port(self) -> int:
        return self._grpc.port

    def reload(self) -> None:
        """The classes' SLOs anew, for requests from now on. A wrong file changes nothing."""
        try:
            wanted = deployment.read(self._settings.deployment)
        except ConfigError as error:
            log.error("deployment file not reloaded: %s", error.message)
            return
        self._inbox.work_through()
        self.ring.slos = _slos(wanted)
        log.info("reloaded the classes' SLOs")

    async def start(self) -> None:
        """ConfigError if a port is taken."""
        self._socket = _listen(self._settings.http_host, self._settings.http_port)
        await self._bus.subscribe(subjects.all_loads(self._cluster_name), self._on_load)
        for model in self._models:
            await self._bus.subscribe(subjects.events(self._cluster_name, model), self._on_events)
        await self._grpc.start(SERVICE_NAME)
        log.info("console: http://%s:%d, OTLP on port %d", self._settings.http_host, self.http_port, self.otlp_port)

    async def run(self) -> None:
        """Until cancelled; a crash in any of its loops ends it."""
        assert self._socket is not None, "not started"
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.view.run(), name="ask the routers")
            tasks.create_task(self._counts.run(), name="count requests")
            tasks.create_task(self._publish(), name="feed pages")
            tasks.create_task(self._http.serve(sockets=[self._socket]), name="serve")

    async def close(self) -> None:
        self.feed.close()
        self._http.should_exit = True
        await self._grpc.stop(CLOSE_S)
        await self._trials.close()
        await self.view.close()

    # -- what is heard ---------------------------------------------------------------------------------------------

    def _ms(self, at: float) -> float:
        return (at - self._began) * 1e3

    def _now_ms(self) -> float:
        return self._ms(clock.monotonic())

    def _on_load(self, message: Message) -> None:
        self._inbox.put(self._take_load, message.data)

    def _on_events(self, message: Message) -> None:
        self._inbox.put(self._take_events, message.data)

    def _take_load(self, data: bytes, at: float) -> None:
        self.activity.load(bus_pb2.LoadReport.FromString(data), self._ms(at))

    def _take_events(self, data: bytes, at: float) -> None:
        self.activity.events(bus_pb2.LifecycleEvents.FromString(data), self._ms(at))

    def _take_export(self, export: ExportTraceServiceRequest, at: float) -> None:
        for span in spans_of(export):
            self.ring.add(span)
            if span.name == names.DECODE.name:
                p50, p99 = span.number(names.ITL_P50), span.number(names.ITL_P99)
                if p50 is not None and p99 is not None:
                    self.series.decoded(p50 / 1e3, p99 / 1e3, at)

    def _trace_ended(self, trace: Trace) -> None:
        if trace.summary.is_request:
            self.series.request_ended(trace.summary, clock.monotonic())

    async def _look(self) -> None:
        """Somebody asks: all that was heard counts, and routers are asked, if they answer at once."""
        asleep = not self.watch.on
        self.watch.looked()
        self._inbox.work_through()
        if asleep:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await self.view.look()

    # -- what is told ----------------------------------------------------------------------------------------------

    def _ready(self) -> bool:
        return self._bus.connected

    def _snapshot(self) -> dict[str, Any]:
        """What a page needs to begin; says what the map leaves out."""
        self._inbox.work_through()
        self.activity.telling = True
        return {
            "cluster": self._cluster_name,
            "models": self._models,
            "kinds": KINDS,
            "states": STATES,
            "outcomes": OUTCOMES,
            "origin_unix_ms": self._began_unix_ms,
            "batch_ms": BATCH_S * 1e3,
            "history_ms": self._history_ms,
            "runs_per_report": self.activity.most_runs,
            **self._told(self.activity.snapshot()),
            "queue": list(self._queue),
            "status": self._status(),
        }

    def _told(self, delta: Delta) -> dict[str, Any]:
        return {**asdict(delta), "loads": list(delta.loads.values()), "now": round(self._now_ms(), 1)}

    async def _publish(self) -> None:
        count = 0
        while True:
            await asyncio.sleep(BATCH_S)
            count += 1
            self._inbox.work_through()
            self.activity.tick(self._now_ms())
            delta = self.activity.drain()
            self.activity.telling = bool(len(self.feed))
            if self.activity.telling:
                self.feed.publish(encoded("batch", self._told(delta)))
            if count % STATUS_EVERY == 0:
                now = clock.monotonic()
                self._queue.append((round(self._now_ms(), 1), self.view.queued))
                self.series.cluster(self.view.queued, len(self.activity.in_flight), now)
                if len(self.feed):
                    self.feed.publish(encoded("status", self._status()))

    def _status(self) -> dict[str, Any]:
        now = clock.monotonic()
        return {
            "at": round(self._now_ms(), 1),
            "bus": self._bus.connected,
            "spans_received": self.ring.spans_received,
            "traces": len(self.ring),
            "recent": self.series.recent(now),
            "in_flight": len(self.activity.in_flight),
            "runs_per_report": self.activity.most_runs,
            **self.view.as_data(),
        }

    def cluster(self) -> dict[str, Any]:
        return {"cluster": self._cluster_name, **self._status()}

    def _points(self, span_s: int, step_s: int) -> dict[str, Any]:
        return self.series.points(clock.monotonic(), span_s, step_s)

    def in_flight(self) -> list[dict[str, Any]]:
        """The oldest first; phases by lifecycle events, so also of requests that nobody traces."""
        now = self._now_ms()
        names_of = {row.index: row.id for row in self.activity.rows.values()}
        oldest = sorted(self.activity.in_flight, key=lambda segment: segment.begin)[:MAX_IN_FLIGHT_SHOWN]
        return [
            {
                "request_id": segment.request,
                "worker": names_of.get(segment.row, ""),
                "phase": KINDS[segment.kind],
                "for_s": round((now - segment.begin) / 1e3, 2),
            }
            for segment in oldest
        ]


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, proto)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        raise ConfigError(
            f"the console cannot serve HTTP on {host}:{port}: {error.strerror or error} "
            "(TANDEM_HTTP_HOST, TANDEM_HTTP_PORT, or `console` in the deployment file)"
        ) from None
    listening.setblocking(False)
    return listening


def _slos(wanted: Deployment) -> dict[str, Slo]:
    return {c.name: Slo(c.ttft_slo_s, c.tpot_slo_s) for c in wanted.classes}


async def run(settings: ConsoleSettings) -> None:
    """The process: until SIGTERM or SIGINT. SIGHUP reads the SLOs anew."""
    settings.check()
    leave = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, leave.set)
    wanted = deployment.read(settings.deployment)
    async with contextlib.AsyncExitStack() as stack:
        bus = await NatsBus.connect(settings.nats_url, name=settings.instance or "console")
        stack.push_async_callback(bus.close)
        console = Console(settings, wanted, bus)
        loop.add_signal_handler(signal.SIGHUP, console.reload)
        await stack.enter_async_context(metrics_endpoint(settings, instruments_of("console", wanted, bus)))
        await console.start()
        async with asyncio.TaskGroup() as tasks:
            running = tasks.create_task(console.run(), name="console")
            await leave.wait()
            await console.close()
            running.cancel()

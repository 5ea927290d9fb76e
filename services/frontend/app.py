"""The frontend process: HTTP and gRPC on one side, the bus on the other.

``Frontend`` is the whole of it around a bus that the caller owns; ``run`` is the process's main.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import NoReturn

import uvicorn

from services.frontend import connections, served_model
from services.frontend.asgi import PostedRoutes
from services.frontend.cluster import Cluster
from services.frontend.config import FrontendSettings
from services.frontend.direct import DirectConnection
from services.frontend.embedding import Embedder
from services.frontend.embeddings_route import EmbeddingsRoute
from services.frontend.generation import Generations
from services.frontend.grpc_service import InferenceService, add_to_server
from services.frontend.intake import Intake
from services.frontend.metrics import FrontendMetrics
from services.frontend.openai_routes import OpenAIRoutes
from services.frontend.tokenize_routes import TokenizeRoutes
from services.frontend.tracing import RequestTraces
from services.frontend.web_app import web_app
from tandem.adapters import clock, deployment, memory, notify
from tandem.adapters.bus import Bus
from tandem.adapters.deployment import Deployment
from tandem.adapters.grpc_server import GrpcServer
from tandem.adapters.nats_bus import NatsBus
from tandem.adapters.process_metrics import instruments_of, label_domains, metrics_endpoint, watch_tracing
from tandem.adapters.traces import open_tracing
from tandem.errors import ConfigError, Leaving
from tandem.v1 import inference_pb2

log = logging.getLogger(__name__)

#: Connections that may wait to be accepted.
BACKLOG = 2048
#: From the closing of the ports to that of idle HTTP connections, and from the last answer to the end.
LAME_DUCK_S = 0.25
#: A gRPC client is told to open another connection when it has had one for so long. One that leaves serves those that
#: it has until all of them must have been told.
GRPC_CONNECTION_AGE_S = 10.0
ALL_TOLD_S = 1.1 * GRPC_CONNECTION_AGE_S + 0.5
#: After the drain's time: for clients to read why their answers end.
LAST_WORDS_S = 2


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The process's main listens to signals, for all of its parts."""
        yield

    def stop_listening(self) -> None:
        for server in self.servers if self.started else ():
            server.close()


class Frontend:
    """Serves from ``start`` on; ``stop`` lets open answers end. ``run`` in between watches deadlines and raises what
    breaks."""

    def __init__(self, settings: FrontendSettings, wanted: Deployment, bus: Bus) -> None:
        self._settings = settings
        self._deployment = wanted
        self._draining = False
        self._last_call: asyncio.TimerHandle | None = None
        self._leaves_at = math.inf
        #: Somebody wants it to leave.
        self.leaving = asyncio.Event()
        self._stopped = asyncio.Event()
        name = settings.instance or clock.new_name("frontend")
        # A restarted frontend hears nothing that is meant for its former self.
        self.instance = f"{name}.{clock.new_incarnation():x}"
        self.cluster = Cluster(bus, cluster=wanted.cluster, instance=self.instance, patience=settings.patience)
        self.tracing = open_tracing(settings, "frontend", cluster=wanted.cluster, instance=name)
        self._traces = RequestTraces(self.tracing, wanted, clock.monotonic)
        self.generations = Generations(self.cluster, idle_s=settings.idle_s, traces=self._traces)
        self.instruments = instruments_of("frontend", wanted, bus)
        self._metrics = FrontendMetrics(self.instruments, wanted, clock.monotonic)
        watch_tracing(self.instruments, self.tracing)
        self._metrics.watch(self.generations.open_by_model, self.cluster.has_leader)
        self.generations.on_end = self._metrics.ended
        self._intake = Intake(wanted, [served_model.load(model) for model in wanted.models])
        self._metrics.watch_tokenizers({name: m.tokenizer.fell_back for name, m in self._intake.models.items()})
        openai = OpenAIRoutes(self._intake)
        tokens = TokenizeRoutes(self._intake)
        self._embedder = Embedder(self._intake, self.cluster, self._traces)
        self._embedder.on_end = self._metrics.embedded
        app = PostedRoutes(
            web_app(self._intake, self.readiness),
            {
                "/v1/chat/completions": openai.chat,
                "/v1/completions": openai.completions,
                "/v1/responses": openai.responses,
                "/v1/embeddings": EmbeddingsRoute(self._embedder).embeddings,
                "/tokenize": tokens.tokenize,
                "/detokenize": tokens.detokenize,
            },
            self._intake,
            self.generations,
            crowded=self._crowded,
            told=self._metrics.told,
        )
        self._http = _Server(
            uvicorn.Config(
                app,
                log_config=None,
                backlog=BACKLOG,
                timeout_graceful_shutdown=int(settings.drain_timeout_s) + LAST_WORDS_S,
                **connections.options(
                    DirectConnection,
                    posted=app,
                    header_timeout_s=wanted.limits.header_timeout_s,
                    write_timeout_s=wanted.limits.write_timeout_s,
                ),
            )
        )
        self._grpc = GrpcServer(
            settings.grpc_host or wanted.grpc.host,
            wanted.grpc.port if settings.grpc_port < 0 else settings.grpc_port,
            max_request_bytes=wanted.limits.max_body_bytes,
            connection_age_s=GRPC_CONNECTION_AGE_S,
        )
        self._service = InferenceService(self._intake, self.generations, self._embedder, self._metrics.told)
        add_to_server(self._service, self._grpc.server)
        self._socket: socket.socket | None = None

    @property
    def http_port(self) -> int:
        assert self._socket is not None, "not started"
        return int(self._socket.getsockname()[1])

    @property
    def grpc_port(self) -> int:
        return self._grpc.port

    def readiness(self) -> Mapping[str, object]:
        models = {name: self.cluster.has_leader(name) for name in self._intake.models}
        connected = self.cluster.connected
        ready = connected and all(models.values()) and not self._draining
        return {"ready": ready, "bus": connected, "leaders": models, "draining": self._draining}

    def _crowded(self) -> bool:
        return len(self._http.server_state.connections) > self._deployment.limits.max_connections

    def reload(self) -> None:
        """Tenants and classes anew, for requests from now on. A wrong file changes nothing."""
        try:
            wanted = deployment.read(self._settings.deployment)
            self._intake.reconfigure(wanted)
        except ConfigError as error:
            log.error("deployment file not reloaded: %s", error.message)
            return
        self.instruments.allow(label_domains(wanted))
        self._metrics.reconfigure(wanted)
        self._traces.reconfigure(wanted)
        log.info("reloaded tenants and classes")

    async def start(self) -> None:
        """Returns when connections are accepted. ConfigError if a port is taken."""
        host = self._settings.http_host or self._deployment.http.host
        port = self._deployment.http.port if self._settings.http_port < 0 else self._settings.http_port
        self._socket = _listen(host, port, shared=self._settings.http_shared)
        await self.cluster.open()
        await self._grpc.start(inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name)
        memory.give_back()  # tokenizers were read
        log.info("%s: http://%s:%d, gRPC on port %d", self.instance, host, self.http_port, self.grpc_port)

    async def run(self) -> None:
        """Until ``stop``."""
        assert self._socket is not None, "not started"
        async with asyncio.TaskGroup() as tasks:
            sweep = tasks.create_task(self.cluster.run(), name="sweep")
            await self._http.serve(sockets=[self._socket])
            await self._stopped.wait()  # answers over gRPC have deadlines too
            sweep.cancel()

    def leave(self, within_s: float) -> None:
        """Begins to. Answers that are open after ``within_s`` end with an error; told again, the sooner counts."""
        loop = asyncio.get_running_loop()
        if loop.time() + within_s < self._leaves_at:
            if self._last_call is not None:
                self._last_call.cancel()
            self._leaves_at = loop.time() + within_s
            error = Leaving("this server is leaving, and its time for open answers is over")
            self._last_call = loop.call_later(within_s, self.cluster.give_up, error)
        self.leaving.set()

    async def stop(self, vacated: Callable[[], Awaitable[None]] | None = None) -> None:
        """No new connections from now on; returns when open answers have ended, or their time is over. ``vacated`` is
        called when the ports are free for another."""
        self.leave(self._settings.drain_timeout_s)
        self._draining = True
        log.info("leaving: %d requests open", len(self.generations))
        await self._grpc.set_serving(False)
        self._grpc.stop_listening()
        self._http.stop_listening()
        if vacated is not None:
            await vacated()
        await self._see_off()
        # Who still asks hears why, and may go elsewhere. gRPC calls hear it up to the end: its own way to stop ends
        # those that it has not begun as CANCELLED, which clients do not send again.
        error = Leaving("this server is leaving")
        self.generations.refuse(error)
        self._embedder.refuse(error)
        while self._service.open and not self._too_late():  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        await asyncio.sleep(LAME_DUCK_S)  # for the last words to be written
        self._stopped.set()

    async def _see_off(self) -> None:
        """Serves what comes over the connections that are there, while there is time for it."""
        loop = asyncio.get_running_loop()
        all_told = loop.time() + ALL_TOLD_S
        await asyncio.sleep(LAME_DUCK_S)
        self._http.should_exit = True  # idle connections close; others do with their answer
        while self._busy() and loop.time() < all_told <= self._leaves_at:  # noqa: ASYNC110
            await asyncio.sleep(0.02)

    def _busy(self) -> bool:
        return bool(self._service.open or self._http.server_state.tasks)

    def _too_late(self) -> bool:
        """For a client that does not read even why its answer ends."""
        return asyncio.get_running_loop().time() > self._leaves_at + LAST_WORDS_S

    async def hang_up(self) -> None:
        """On gRPC calls; for a process that goes on."""
        await self._grpc.stop(0.0)

    async def close(self) -> None:
        if self._last_call is not None:
            self._last_call.cancel()
        await self.cluster.close()
        self._intake.close()
        await self.tracing.close()


def _listen(host: str, port: int, *, shared: bool) -> socket.socket:
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, proto)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:  # the kernel gives each new connection to one of those who listen
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listening.bind(address)
    except OSError as error:
        raise ConfigError(
            f"cannot serve HTTP on {host}:{port}: {error.strerror or error} "
            "(TANDEM_HTTP_HOST, TANDEM_HTTP_PORT, or `http` in the deployment file)"
        ) from None
    listening.setblocking(False)
    return listening


async def run(settings: FrontendSettings) -> None:
    """The process: until SIGTERM, which lets open answers end, or SIGINT, which gives them less time for it."""
    wanted = deployment.read(settings.deployment)
    bus = await NatsBus.connect(settings.nats_url, name=settings.instance or "frontend")
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(bus.close)
        frontend = Frontend(settings, wanted, bus)
        stack.push_async_callback(frontend.close)
        metrics = await stack.enter_async_context(contextlib.AsyncExitStack())
        await metrics.enter_async_context(metrics_endpoint(settings, frontend.instruments))
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGHUP, frontend.reload)
        loop.add_signal_handler(signal.SIGTERM, frontend.leave, settings.drain_timeout_s)
        loop.add_signal_handler(signal.SIGINT, frontend.leave, settings.interrupt_timeout_s)
        await frontend.start()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(frontend.run(), name="serve")
            await frontend.leaving.wait()

            async def vacated() -> None:
                if notify.supervised():  # else nobody comes in its place, and it may as well be watched to its end
                    await metrics.aclose()
                    notify.stopping()

            await frontend.stop(vacated)
    _vanish()


def _vanish() -> NoReturn:
    """Ends the process, and with it its connections. The interpreter's end would have gRPC stop in its own way, and
    answer calls that come just then with CANCELLED; a connection that closes is UNAVAILABLE."""
    logging.shutdown()
    os._exit(0)

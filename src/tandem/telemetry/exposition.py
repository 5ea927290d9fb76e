"""The Prometheus endpoint of a process: the library's HTTP server in a thread of its own.

What is counted is read on the event loop (``Instruments.read``: quick) and turned into text in the thread
(``ClassicText``: quick, too, and it steps aside). So a scrape costs the loop next to nothing, and a process whose loop
hangs fails its scrapes instead of looking well. The endpoint has no authentication: it is for a private interface. Open
it after the engine: it is a thread, and engines fork.

Only the classic text format, whatever the scraper would rather have: in OpenMetrics the library (0.26) turns ``vllm:``
into ``vllm_``, and every dashboard for vLLM looks for the colon.
"""

from __future__ import annotations

import asyncio
import gzip
import logging
import socket
import threading
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, ThreadingWSGIServer
from prometheus_client.registry import Collector

from tandem.errors import ConfigError
from tandem.telemetry.classic_text import ClassicText
from tandem.telemetry.instruments import Instruments, Sample
from tandem.telemetry.metric_table import Metric

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

log = logging.getLogger(__name__)

#: A loop that does not answer for so long hangs.
READ_TIMEOUT_S = 5.0
#: A scraper that neither asks nor reads for so long is hung up on.
SCRAPER_TIMEOUT_S = 10.0
#: As the port: no endpoint.
OFF = -1


class _Scrape:
    """What one process answers: its own numbers, then those of libraries."""

    def __init__(
        self, instruments: Instruments, loop: asyncio.AbstractEventLoop, collectors: Sequence[Collector]
    ) -> None:
        self._instruments = instruments
        self._loop = loop
        self._text = ClassicText()
        self._registry = CollectorRegistry()
        for collector in (ProcessCollector(registry=None), *collectors):
            self._registry.register(collector)

    def text(self) -> bytes:
        """In a thread. TimeoutError if the loop hangs."""
        read = asyncio.run_coroutine_threadsafe(self._read(), self._loop).result(READ_TIMEOUT_S)
        return self._text.of(read).encode() + generate_latest(self._registry)

    async def _read(self) -> list[tuple[Metric, list[Sample]]]:
        return self._instruments.read()


@asynccontextmanager
async def endpoint(
    instruments: Instruments, host: str, port: int, collectors: Sequence[Collector] = ()
) -> AsyncIterator[int]:
    """Serves ``/metrics`` (and any other path) until left; gives the port. ``port`` 0 = any free one, ``OFF`` = none.

    ``collectors``: of libraries. ConfigError if the port is taken."""
    if port == OFF:
        yield OFF
        return
    scrape = _Scrape(instruments, asyncio.get_running_loop(), collectors)
    try:
        server = make_server(host, port, _app(scrape), _Server6 if ":" in host else _Server, _Quiet)
    except OSError as error:
        raise ConfigError(
            f"cannot serve metrics on {host}:{port}: {error.strerror or error} "
            "(TANDEM_METRICS_HOST, TANDEM_METRICS_PORT)"
        ) from None
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
    log.info("metrics: http://%s:%d/metrics", host, server.server_port)
    try:
        yield server.server_port
    finally:
        # The server looks twice a second whether it is to end; only a thread need wait for that.
        threading.Thread(target=_close, args=(server,), daemon=True).start()


class _Server(ThreadingWSGIServer):
    daemon_threads = True


class _Server6(_Server):
    address_family = socket.AF_INET6


class _Quiet(WSGIRequestHandler):
    timeout = SCRAPER_TIMEOUT_S

    def log_message(self, format: str, *args: object) -> None:
        """Scrapes are no news."""


def _app(scrape: _Scrape) -> WSGIApplication:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        headers, body = [("Content-Type", CONTENT_TYPE_PLAIN_0_0_4)], scrape.text()
        if "gzip" in environ.get("HTTP_ACCEPT_ENCODING", ""):
            # Quickest; it does not hold the interpreter.
            headers.append(("Content-Encoding", "gzip"))
            body = gzip.compress(body, 1)
        start_response("200 OK", headers)
        return [body]

    return app


def _close(server: WSGIServer) -> None:
    server.shutdown()
    server.server_close()

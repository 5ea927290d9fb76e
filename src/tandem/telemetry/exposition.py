"""The Prometheus endpoint of a process: the library's HTTP server in a thread of its own.

What is counted is read on the event loop (``Instruments.read``: quick) and turned into text in the thread. So a scrape
costs the loop next to nothing, and a process whose loop hangs fails its scrapes instead of looking well. The endpoint
has no authentication: it is for a private interface. Open it after the engine: it is a thread, and engines fork.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server
from prometheus_client.core import Metric as Family
from prometheus_client.registry import Collector

from tandem.errors import ConfigError
from tandem.telemetry.instruments import Instruments, Sample, families
from tandem.telemetry.metric_table import Metric

log = logging.getLogger(__name__)

#: A loop that does not answer for so long hangs.
READ_TIMEOUT_S = 5.0
#: As the port: no endpoint.
OFF = -1


class _FromLoop(Collector):
    def __init__(self, instruments: Instruments, loop: asyncio.AbstractEventLoop) -> None:
        self._instruments = instruments
        self._loop = loop

    def collect(self) -> Iterator[Family]:
        return families(asyncio.run_coroutine_threadsafe(self._read(), self._loop).result(READ_TIMEOUT_S))

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
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    for collector in (_FromLoop(instruments, asyncio.get_running_loop()), *collectors):
        registry.register(collector)
    try:
        server, _ = start_http_server(port, host, registry)
    except OSError as error:
        raise ConfigError(
            f"cannot serve metrics on {host}:{port}: {error.strerror or error} "
            "(TANDEM_METRICS_HOST, TANDEM_METRICS_PORT)"
        ) from None
    log.info("metrics: http://%s:%d/metrics", host, server.server_port)
    try:
        yield server.server_port
    finally:
        # The server looks twice a second whether it is to end; only a thread need wait for that.
        threading.Thread(target=_close, args=(server,), daemon=True).start()


def _close(server: WSGIServer) -> None:
    server.shutdown()
    server.server_close()

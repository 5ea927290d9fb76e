"""Deadlines of an HTTP connection that uvicorn lacks: for headers that never end, and readers that never read."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEADER_TIMEOUT_S = 30.0
WRITE_TIMEOUT_S = 30.0


class Connection(HttpToolsProtocol):
    """Closed when a request's headers take longer than 30 s, or when 30 s pass in which nothing could be written.

    The second bounds what a reader that has stopped may hold: uvicorn's ``send`` waits for it, the generation's queue
    has a bound, and after this time the connection is cut, which wakes both.
    """

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start(HEADER_TIMEOUT_S)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._start(HEADER_TIMEOUT_S)

    def on_headers_complete(self) -> None:
        self._stop()
        super().on_headers_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._start(WRITE_TIMEOUT_S)

    def resume_writing(self) -> None:
        self._stop()
        super().resume_writing()

    def _start(self, seconds: float) -> None:
        self._stop()
        self._timer = self.loop.call_later(seconds, self.transport.abort)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def options() -> dict[str, Any]:
    """uvicorn's settings that make its connections these."""
    return {"http": Connection, "ws": "none", "lifespan": "off", "access_log": False, "server_header": False}

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

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._headers = _Deadline(self, HEADER_TIMEOUT_S)
        self._writing = _Deadline(self, WRITE_TIMEOUT_S)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._headers.start()

    def connection_lost(self, exc: Exception | None) -> None:
        self._headers.stop()
        self._writing.stop()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._headers.start()

    def on_headers_complete(self) -> None:
        self._headers.stop()
        super().on_headers_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._writing.start()

    def resume_writing(self) -> None:
        self._writing.stop()
        super().resume_writing()


class _Deadline:
    """Cuts the connection when ``stop`` does not come in time."""

    __slots__ = ("_connection", "_seconds", "_timer")

    def __init__(self, connection: Connection, seconds: float) -> None:
        self._connection = connection
        self._seconds = seconds
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        self.stop()
        self._timer = self._connection.loop.call_later(self._seconds, self._connection.transport.abort)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def options() -> dict[str, Any]:
    """uvicorn's settings that make its connections these."""
    return {
        "http": Connection,
        "ws": "none",
        "lifespan": "off",
        "access_log": False,
        "server_header": False,
        # Longer than clients keep theirs: else one is closed just when its client uses it again.
        "timeout_keep_alive": 75,
    }

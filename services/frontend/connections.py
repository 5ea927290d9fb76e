"""Limits of an HTTP connection that uvicorn lacks: for headers that never end, and readers that never read."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEADER_BYTES = 64 << 10
#: Answered to longer ones; uvicorn's parser has no limit, and no way to say so.
_TOO_LONG = b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


class Connection(HttpToolsProtocol):
    """Closed when a request's headers take longer than ``header_timeout_s`` or 64 KiB, or when ``write_timeout_s``
    pass in which nothing could be written.

    The second bounds what a reader that has stopped may hold: uvicorn's ``send`` waits for it, the generation's queue
    has a bound, and after this time the connection is cut, which wakes both.
    """

    def __init__(self, *args: Any, header_timeout_s: float, write_timeout_s: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._headers = _Deadline(self, header_timeout_s)
        self._writing = _Deadline(self, write_timeout_s)
        self._header_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._headers.start()

    def connection_lost(self, exc: Exception | None) -> None:
        self._headers.stop()
        self._writing.stop()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self._headers.running:
            self._header_bytes = 0
        elif (size := self._header_bytes + len(data)) > MAX_HEADER_BYTES:
            self.transport.write(_TOO_LONG)
            self.transport.close()
        else:
            self._header_bytes = size

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._headers.start()

    def on_headers_complete(self) -> None:
        self.headers_are_complete()
        super().on_headers_complete()

    def headers_are_complete(self) -> None:
        self._headers.stop()

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

    @property
    def running(self) -> bool:
        return self._timer is not None

    def start(self) -> None:
        self.stop()
        self._timer = self._connection.loop.call_later(self._seconds, self._connection.transport.abort)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def options(kind: type[Connection] = Connection, **options: Any) -> dict[str, Any]:
    """uvicorn's settings that make its connections of this kind, with these options."""
    return {
        "http": partial(kind, **options),
        "ws": "none",
        "lifespan": "off",
        "access_log": False,
        "server_header": False,
        "proxy_headers": False,  # nobody here asks for the client's address
        # Longer than clients keep theirs: else one is closed just when its client uses it again.
        "timeout_keep_alive": 75,
    }

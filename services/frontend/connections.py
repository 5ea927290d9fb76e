"""Limits of an HTTP connection that uvicorn lacks: for requests that never end, and readers that never read."""

from __future__ import annotations

import asyncio
import contextlib
from functools import partial
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

MAX_HEADER_BYTES = 64 << 10
#: Answered to longer ones; uvicorn's parser has no limit, and no way to say so.
_TOO_LONG = b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
_AROUND_A_HEADER = len(b": \r\n")
#: A client that has its answer before it has said all may go on for so long: else the reset overtakes the answer.
LINGER_S, LINGER_BYTES = 5.0, 128 << 20


class _TooLong(Exception):
    """Stops the parser."""


class Connection(HttpToolsProtocol):
    """Closed when a request's headers take longer than ``header_timeout_s``, when they and its trailers have more than
    64 KiB, or when ``write_timeout_s`` pass in which nothing could be written.

    The first runs while the client is the one to say something, and not while it waits for an answer. The last bounds
    what a reader that has stopped may hold: uvicorn's ``send`` waits for it, the generation's queue has a bound, and
    after this time the connection is cut, which wakes both. Where an answer is complete before its request is, the
    connection says no more, and reads on for a moment, for nobody.
    """

    def __init__(self, *args: Any, header_timeout_s: float, write_timeout_s: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._headers = _Deadline(self, header_timeout_s)
        self._writing = _WriteDeadline(self, write_timeout_s)
        #: Of this request's line and headers, and of its trailers.
        self._header_bytes = 0
        #: Received since the parser last told of something whole.
        self.untold_bytes = 0
        #: Where the newest request stands: its headers have begun; they are here, and its body is not.
        self._in_headers = self._in_body = False
        #: Bytes that may still come after the last answer.
        self._linger_bytes: int | None = None
        #: The cycle that is being answered; uvicorn's ``cycle`` is the newest.
        self._running: RequestResponseCycle | None = None

    @property
    def _owes_an_answer(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._headers.start()

    def connection_lost(self, exc: Exception | None) -> None:
        self._headers.stop()
        self._writing.stop()
        super().connection_lost(exc)
        running = self._running
        if running is not None and not running.response_complete:  # uvicorn tells the newest only
            running.disconnected = True
            running.message_event.set()

    def data_received(self, data: bytes) -> None:
        if self._linger_bytes is not None:
            self._linger_bytes -= len(data)
            if self._linger_bytes < 0:
                self.transport.abort()
            return
        self.untold_bytes += len(data)
        super().data_received(data)
        if self._header_bytes + self.untold_bytes > MAX_HEADER_BYTES:
            self._refuse()
        elif self.timeout_keep_alive_task is None and not self._owes_an_answer:
            self._headers.go_on()

    def send_400_response(self, msg: str) -> None:
        """Called where the parser has stopped; it does so for ``_TooLong`` too."""
        if self._header_bytes > MAX_HEADER_BYTES or self._owes_an_answer:
            self._refuse()
        else:
            super().send_400_response(msg)

    def _refuse(self) -> None:
        if self.transport.is_closing():
            return
        if not self._owes_an_answer:  # else it would stand in the midst of one
            self.transport.write(_TOO_LONG)
        self.transport.close()
        self._headers.go_on()  # for one that reads nothing, and so never takes what it is owed

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._header_bytes = self.untold_bytes = 0
        self._in_headers = True
        if not self._owes_an_answer:
            self._headers.stop()  # it begins anew in ``data_received``, unless all of the headers are in this data

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Of a trailer as well."""
        self._count(len(name) + len(value) + _AROUND_A_HEADER)
        super().on_header(name, value)

    def _count(self, size: int) -> None:
        self.untold_bytes = 0
        self._header_bytes += size
        if self._header_bytes > MAX_HEADER_BYTES:
            raise _TooLong

    def on_body(self, body: bytes) -> None:
        self.untold_bytes = 0
        super().on_body(body)

    def on_headers_complete(self) -> None:
        self.headers_are_complete()
        super().on_headers_complete()

    def headers_are_complete(self) -> None:
        self._in_headers, self._in_body = False, True
        self._headers.stop()

    def on_message_complete(self) -> None:
        self.message_is_complete()
        super().on_message_complete()

    def message_is_complete(self) -> None:
        self._in_body = False

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        unfinished = self._in_body and not self._owes_an_answer
        super().on_response_complete()
        if self.transport.is_closing():
            return
        if unfinished:
            self._linger()
        elif self.pipeline:
            self.flow.pause_reading()  # what waits is enough
        elif self._in_headers and not self._owes_an_answer:
            self._headers.start()

    def _linger(self) -> None:
        self._linger_bytes = LINGER_BYTES
        self._unset_keepalive_if_required()
        with contextlib.suppress(OSError):  # it has left already
            self.transport.write_eof()
        self._headers = _Deadline(self, LINGER_S)
        self._headers.start()

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
        self._timer = self._connection.loop.call_later(self._seconds, self.over)

    def go_on(self) -> None:
        """Starts, if it does not run."""
        if self._timer is None:
            self.start()

    def over(self) -> None:
        self._connection.transport.abort()

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class _WriteDeadline(_Deadline):
    """Begins anew where some of what waited has left: a steady reader may take its time for a long answer."""

    __slots__ = ("_waiting",)

    def start(self) -> None:
        self._waiting = self._connection.transport.get_write_buffer_size()
        super().start()

    def over(self) -> None:
        if self._connection.transport.get_write_buffer_size() < self._waiting:
            self.start()
        else:
            super().over()


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

"""The posted routes without ASGI: requests go from uvicorn's parser to ``PostedRoutes.answer`` and straight back.

What it saves, per request: ASGI's scope and messages, middleware, a task that watches for the client's leaving, and
system calls, since all that a turn of the event loop has to say leaves in one write (docs/performance.md). Everything
else about a connection stays uvicorn's: an exchange here has the face of uvicorn's request cycle, so that pipelining,
keep-alive and graceful shutdown go on as they are. Requests that are in any way unusual take the way over ASGI.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import lru_cache, partial
from http import HTTPStatus
from typing import Any

from services.frontend.asgi import BODY_TIMEOUT_S, Disconnected, Header, PostedRoutes, Response
from services.frontend.connections import Connection
from services.frontend.line import Line
from services.frontend.openai_routes import Route
from tandem.errors import InvalidRequest, PayloadTooLarge, RequestTimeout, TandemError

_STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus}
_UNKNOWN_STATUS = b"HTTP/1.1 %d \r\n"
_END = b"0\r\n\r\n"
_CLOSE = (b"connection", b"close")


@lru_cache(maxsize=64)  # nearly all answers have the same ones
def _lines(headers: tuple[Header, ...]) -> bytes:
    return b"".join([b"%b: %b\r\n" % header for header in headers])


class DirectConnection(Connection):
    def __init__(self, *args: Any, posted: PostedRoutes, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._posted = posted
        #: Of those that have come, in their order: they may be several, where a client does not wait for answers.
        self._exchanges: list[_Exchange] = []

    def on_headers_complete(self) -> None:
        route = self._route()
        if route is None:
            super().on_headers_complete()
            return
        self.headers_are_complete()
        headers = dict(self.headers)
        before = self.cycle
        exchange = _Exchange(self, self._posted, route, headers, keep_alive=self.parser.should_keep_alive())
        self._exchanges.append(exchange)
        self.cycle = exchange  # type: ignore[assignment]
        if before is not None and not before.response_complete:
            exchange.queued = True
            self.flow.pause_reading()
            self.pipeline.appendleft((exchange, self.app))  # type: ignore[arg-type]
        refused = self._posted.refused(headers)
        if refused is not None:
            exchange.fail(refused)

    def _route(self) -> Route | None:
        if self.parser.get_method() != b"POST" or self.parser.get_http_version() != "1.1":
            return None
        if self.expect_100_continue or self.parser.should_upgrade() or self._posted.crowded:
            return None
        return self._posted.route(self.url.decode("latin-1"))

    def on_body(self, body: bytes) -> None:
        cycle: object = self.cycle
        if type(cycle) is _Exchange:
            self.untold_bytes = 0
            cycle.feed(body)
        else:
            super().on_body(body)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        cycle: object = self.cycle
        if type(cycle) is _Exchange and not (cycle.whole or cycle.queued):
            cycle.expect_body()

    def on_message_complete(self) -> None:
        cycle: object = self.cycle
        if type(cycle) is _Exchange:
            self.message_is_complete()
            cycle.whole = True
            cycle.complete()
        else:
            super().on_message_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for exchange in self._exchanges:
            exchange.left()
        self._exchanges.clear()

    def begin(self, exchange: _Exchange) -> None:
        self._posted.arrivals.join(partial(self._start_asgi_task, exchange, self.app))  # type: ignore[arg-type]

    def ended(self, exchange: _Exchange) -> None:
        self._exchanges.remove(exchange)
        if exchange.whole and not exchange.keep_alive:
            self.transport.close()
        self.on_response_complete()


class _Nothing:
    """In the place of the event by which uvicorn's cycle hears of a lost connection: ``left`` says it here."""

    def set(self) -> None:
        return None


class _Exchange:
    """One request and its answer. Its task begins when the request is complete, or refused."""

    message_event = _Nothing()

    def __init__(
        self,
        connection: DirectConnection,
        posted: PostedRoutes,
        route: Route,
        headers: Mapping[bytes, bytes],
        *,
        keep_alive: bool,
    ) -> None:
        self._connection = connection
        self._posted = posted
        self._route = route
        self._headers = headers
        self.limit = posted.max_body_bytes
        self.keep_alive = keep_alive
        self.response_complete = False
        self.disconnected = False
        #: Another is being answered before it; uvicorn begins this one in its turn.
        self.queued = False
        #: All of the request has come.
        self.whole = False
        self._parts: list[bytes] = []
        self._size = 0
        self._failure: TandemError | None = None
        #: Nothing more of it is waited for; and who waits until then.
        self._received = False
        self._reader: asyncio.Future[None] | None = None
        self._on_leave: Callable[[], None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    # -- the request -----------------------------------------------------------------------------------------------

    def expect_body(self) -> None:
        """In time, from now on: nothing is read of one that waits for its turn, and most come at once."""
        if self._timer is None and not self._received:
            self._timer = self._connection.loop.call_later(BODY_TIMEOUT_S, self._too_late)

    def feed(self, part: bytes) -> None:
        if self._received:
            return
        self._size += len(part)
        if self._size > self.limit:
            self.fail(PayloadTooLarge(f"the body has more than {self.limit} bytes"))
        else:
            self._parts.append(part)

    def complete(self) -> None:
        if self._received:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._receive()
        if not self.queued:
            self._connection.begin(self)

    def _receive(self) -> None:
        self._received = True
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def fail(self, error: TandemError) -> None:
        self._failure = error
        self._parts.clear()
        self.complete()

    def _too_late(self) -> None:
        self.fail(RequestTimeout(f"the body did not arrive within {BODY_TIMEOUT_S:.0f} s"))

    async def _read_body(self) -> bytes:
        if not self._received:
            self._reader = self._connection.loop.create_future()
            await self._reader
        if self._failure is not None:
            raise self._failure
        if self.disconnected:
            raise Disconnected
        if not self._size:
            raise InvalidRequest("the body is empty; a JSON object is expected")
        parts, self._parts = self._parts, []
        return parts[0] if len(parts) == 1 else b"".join(parts)

    # -- the answer ------------------------------------------------------------------------------------------------

    def run_asgi(self, app: object) -> Coroutine[Any, Any, None]:
        """The name by which uvicorn runs its cycles; no ASGI here."""
        if self.queued:
            self.expect_body()
        response = _DirectResponse(self._connection, self, self._headers, self._posted.told)
        return self._posted.answer(self._route, self._headers, self._read_body, response, self._watch)

    def _watch(self, gone: Callable[[], None]) -> Callable[[], object]:
        self._on_leave = gone
        if self.disconnected:
            gone()
        return self._unwatch

    def _unwatch(self) -> None:
        self._on_leave = None

    def left(self) -> None:
        self.disconnected = True
        if self._timer is not None:
            self._timer.cancel()
        self._receive()
        if self._on_leave is not None:
            self._on_leave()


class _DirectResponse(Response):
    """What is written in one turn of the event loop leaves in one system call."""

    __slots__ = ("_chunked", "_connection", "_exchange", "_out")

    def __init__(
        self,
        connection: DirectConnection,
        exchange: _Exchange,
        headers: Mapping[bytes, bytes],
        told: Callable[[TandemError], None],
    ) -> None:
        super().__init__(headers, told)
        self._connection = connection
        self._exchange = exchange
        self._out: list[bytes] = []
        self._chunked = False

    async def start(self, status: int, headers: tuple[Header, ...], *, length: int | None) -> None:
        exchange = self._exchange
        self._chunked = length is None
        parts = [
            _STATUS_LINES.get(status) or _UNKNOWN_STATUS % status,
            _lines(tuple(self._connection.server_state.default_headers)),
            _lines(headers),
            b"x-request-id: %b\r\n" % self.request_id.encode(),
        ]
        if _CLOSE in headers:
            exchange.keep_alive = False
        elif not (exchange.keep_alive and exchange.whole):  # what follows of it is for nobody
            parts.append(_lines((_CLOSE,)))
        parts.append(
            b"transfer-encoding: chunked\r\n\r\n" if length is None else b"content-length: %d\r\n\r\n" % length
        )
        self._say(b"".join(parts))

    async def write(self, body: bytes) -> None:
        if self._exchange.disconnected:
            return
        self._say(b"%x\r\n%b\r\n" % (len(body), body))
        if self._connection.flow.write_paused:
            await self._connection.flow.drain()

    @property
    def offer(self) -> Callable[[bytes], bool]:
        return self._offer

    def _offer(self, body: bytes) -> bool:
        if body and not self._exchange.disconnected:
            chunk = b"%x\r\n%b\r\n" % (len(body), body)
            if self._out:  # it leaves with what was said before it
                self._out.append(chunk)
            else:
                self._connection.transport.write(chunk)
        return not self._connection.flow.write_paused

    def line(self, texts: Sequence[str | None], around: tuple[bytes, bytes], full: Callable[[], None]) -> Line | None:
        self._flush()
        return Line(texts, around, self._connection.transport.write, self._connection.flow, full)

    async def close(self, body: bytes) -> None:
        exchange = self._exchange
        if exchange.response_complete:
            return
        if self._chunked:
            body = b"%x\r\n%b\r\n%b" % (len(body), body, _END) if body else _END
        self._say(body)
        self._flush()
        exchange.response_complete = True
        if not exchange.disconnected:
            self._connection.ended(exchange)

    def over(self) -> None:
        exchange = self._exchange
        if not exchange.response_complete:  # nothing was said to a client that has left
            exchange.response_complete = True
            self._connection.transport.close()

    def _say(self, data: bytes) -> None:
        if not self._out:
            self._connection.loop.call_soon(self._flush)
        self._out.append(data)

    def _flush(self) -> None:
        if self._out and not self._exchange.disconnected:
            self._connection.transport.write(b"".join(self._out))
        self._out.clear()

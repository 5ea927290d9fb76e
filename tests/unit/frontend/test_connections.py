"""Limits of a connection, over a transport and a clock that are the test's."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from services.frontend.connections import MAX_HEADER_BYTES, Connection

TOO_LONG = b"HTTP/1.1 431 "
POST = b"POST / HTTP/1.1\r\nhost: x\r\n"
CHUNKED = POST + b"transfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\n"


class Wire(asyncio.Transport):
    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.waiting = 0
        self.closed = self.ended = self.gone = False

    def write(self, data: Any) -> None:
        self.written += data

    def close(self) -> None:
        self.closed = True

    abort = close

    def is_closing(self) -> bool:
        return self.closed

    def write_eof(self) -> None:
        if self.gone:
            raise OSError("Transport endpoint is not connected")
        self.ended = True

    def get_write_buffer_size(self) -> int:
        return self.waiting

    def pause_reading(self) -> None:
        return None

    def resume_reading(self) -> None:
        return None


class Clock:
    """The loop's part that a connection needs: what is due is called by ``pass_``, and no task ever runs."""

    def __init__(self) -> None:
        self.timers: list[Timer] = []

    def call_later(self, seconds: float, due: Callable[[], None]) -> Timer:
        self.timers.append(Timer(due))
        return self.timers[-1]

    def create_task(self, work: Any) -> asyncio.Future[None]:
        work.close()
        return asyncio.Future(loop=asyncio.new_event_loop())

    def pass_(self) -> None:
        timers, self.timers = self.timers, []
        for timer in timers:
            if not timer.cancelled:
                timer.due()


class Timer:
    def __init__(self, due: Callable[[], None]) -> None:
        self.due = due
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


async def app(scope: Any, receive: Any, send: Any) -> None:
    return None


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def connection(clock: Clock) -> Connection:
    config = uvicorn.Config(app, http="httptools", ws="none", lifespan="off", log_config=None)
    made = Connection(
        config=config,
        server_state=ServerState(),
        app_state={},
        _loop=clock,
        header_timeout_s=1.0,
        write_timeout_s=1.0,
    )
    made.connection_made(Wire())
    return made


def wire(connection: Connection) -> Wire:
    assert isinstance(connection.transport, Wire)
    return connection.transport


@pytest.mark.parametrize(
    "head",
    [
        POST + b"x-long: " + b"y" * 200_000 + b"\r\n\r\n",
        POST + b"x: y\r\n" * 20_000 + b"\r\n",
        POST + b"x-long: " + b"y" * 200_000 + b"\r\ncontent-length: 1\r\n\r\na",
        b"GET /" + b"y" * 200_000 + b" HTTP/1.1\r\n\r\n",
    ],
)
@pytest.mark.parametrize("pieces", [1, 50])
def test_a_long_head_is_refused_however_it_comes(connection: Connection, head: bytes, pieces: int) -> None:
    size = len(head) // pieces + 1
    for start in range(0, len(head), size):
        if not connection.transport.is_closing():
            connection.data_received(head[start : start + size])
    assert wire(connection).closed
    assert wire(connection).written.startswith(TOO_LONG)
    assert connection.cycle is None, "the request began"
    assert connection._headers._timer is not None, "a client that reads nothing would hold it for ever"


@pytest.mark.parametrize("more", [b"x-1: " + b"y" * 1_000 + b"\r\n", b"y" * 1_000, b"x:\r\n" * 200])
def test_trailers_have_the_same_limit(connection: Connection, more: bytes) -> None:
    connection.data_received(CHUNKED + b"x-0: ")
    sent = 0
    while not wire(connection).closed and sent < 1_000_000:
        connection.data_received(more)
        sent += len(more)
    assert sent <= MAX_HEADER_BYTES + 2 * len(more)
    assert not wire(connection).written, "in the midst of what the request's own answer may be"


def test_a_long_body_is_no_long_head(connection: Connection) -> None:
    connection.data_received(POST + b"content-length: 1000000\r\n\r\n" + b"a" * 100_000)
    for _ in range(9):
        connection.data_received(b"a" * 100_000)
    assert not wire(connection).closed
    connection.data_received(CHUNKED + b"x-0: y\r\n\r\n")
    assert not wire(connection).closed


def test_a_reader_that_has_stopped_is_cut_off(connection: Connection, clock: Clock) -> None:
    connection.data_received(POST + b"\r\n")
    wire(connection).waiting = 1_000
    connection.pause_writing()
    clock.pass_()
    assert wire(connection).closed


def test_a_slow_reader_is_cut_off_only_when_it_stops(connection: Connection, clock: Clock) -> None:
    connection.data_received(POST + b"\r\n")
    wire(connection).waiting = 1_000
    connection.pause_writing()
    for waiting in (900, 899, 500):
        wire(connection).waiting = waiting
        clock.pass_()
        assert not wire(connection).closed
    clock.pass_()
    assert wire(connection).closed


@pytest.mark.parametrize("gone", [False, True])
def test_an_early_answer_ends_what_is_said_and_soon_what_is_heard(
    connection: Connection, clock: Clock, gone: bool
) -> None:
    """``gone``: the client has left before the answer's end."""
    wire(connection).gone = gone
    connection.data_received(POST + b"content-length: 1000\r\n\r\na")
    connection.cycle.response_complete = True
    connection.on_response_complete()
    assert wire(connection).ended is not gone
    connection.data_received(b"b" * 10)
    assert not wire(connection).closed
    clock.pass_()
    assert wire(connection).closed


def test_a_whole_request_leaves_the_connection_open(connection: Connection) -> None:
    connection.data_received(POST + b"content-length: 1\r\n\r\na")
    connection.cycle.response_complete = True
    connection.on_response_complete()
    assert not wire(connection).ended
    assert not wire(connection).closed

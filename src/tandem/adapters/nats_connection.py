"""One TCP connection to a NATS server, from its INFO to its loss: the protocol's events, and what waits for a PONG."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Protocol, cast

from tandem.adapters import nats_protocol as protocol
from tandem.errors import BusUnavailable

#: Above this the server does not keep up, and what is published stays with its owner, whose buffer has a bound.
WRITE_BUFFER_BYTES = 1 << 20


class Owner(Protocol):
    def delivered(self, delivery: protocol.Delivery) -> None: ...

    def complained(self, message: str) -> None:
        """The server said -ERR."""

    def writable(self) -> None:
        """It keeps up again."""


class Connection(asyncio.Protocol):
    def __init__(self, owner: Owner) -> None:
        loop = asyncio.get_running_loop()
        self._owner = owner
        self._feed: Callable[[bytes], list[protocol.Event]] = protocol.Parser().feed
        self.transport: asyncio.Transport | None = None
        self.info: asyncio.Future[protocol.Info] = loop.create_future()
        self.lost: asyncio.Future[str] = loop.create_future()
        self._pongs: deque[asyncio.Future[None]] = deque()
        self.keeps_up = asyncio.Event()
        self.keeps_up.set()
        self._last_error = ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.use(cast("asyncio.Transport", transport))

    def use(self, transport: asyncio.Transport) -> None:
        """``transport`` from now on: TLS replaces it."""
        transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        try:
            events = self._feed(data)
        except protocol.ProtocolError as error:
            self.drop(str(error))
            return
        delivered = self._owner.delivered
        for event in events:
            if type(event) is protocol.Delivery:
                delivered(event)
            else:
                self._on_control(event)

    def _on_control(self, event: protocol.Event) -> None:
        match event:
            case protocol.Ping():
                self.write(protocol.PONG)
            case protocol.Pong():
                if self._pongs:
                    waiter = self._pongs.popleft()
                    if not waiter.done():
                        waiter.set_result(None)
            case protocol.Info():
                if not self.info.done():
                    self.info.set_result(event)
            case protocol.ServerError():
                self._last_error = event.message
                self._owner.complained(event.message)

    def ping(self) -> asyncio.Future[None]:
        """Done when the server has everything written so far."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self.lost.done():
            waiter.set_exception(BusUnavailable(f"NATS went away: {self.lost.result()}"))
            return waiter
        self._pongs.append(waiter)
        self.write(protocol.PING)
        return waiter

    @property
    def usable(self) -> bool:
        """What is written may still arrive."""
        return self.transport is not None and not self.transport.is_closing() and not self.lost.done()

    def write(self, data: bytes) -> None:
        if self.transport is not None and not self.transport.is_closing():
            self.transport.write(data)

    def pause_writing(self) -> None:
        self.keeps_up.clear()

    def resume_writing(self) -> None:
        self.keeps_up.set()
        self._owner.writable()

    def drop(self, reason: str) -> None:
        self._last_error = self._last_error or reason
        if self.transport is not None:
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        reason = self._last_error or (str(exc) if exc is not None else "closed by the server")
        if not self.info.done():
            self.info.set_exception(ConnectionError(reason))
            self.info.exception()  # read here, so that an abandoned attempt leaves no warning
        if not self.lost.done():
            self.lost.set_result(reason)
        self.keeps_up.set()  # nobody need wait for that any more
        for waiter in self._pongs:
            if not waiter.done():
                waiter.set_exception(BusUnavailable(f"NATS went away: {reason}"))
                waiter.exception()
        self._pongs.clear()

"""The bus over NATS: one connection, kept up for the life of the process.

Publishing appends to a buffer that leaves in one write per turn of the event loop; messages are handed to their
handlers straight from the socket's callback. No task, queue or lock per message: nats-py spends twice the time on the
same (docs/decisions/own-nats-client.md). What it also does: TLS, user and password or token, several servers,
reconnecting without limit. While it is away, publishing goes on into the buffer, whose bound is an error.
"""

from __future__ import annotations

import asyncio
import logging
import random
import re
import ssl
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count, cycle
from typing import Self
from urllib.parse import SplitResult, unquote, urlsplit

from tandem.adapters import nats_protocol as protocol
from tandem.adapters.bus import BusStats, Handler, Message
from tandem.adapters.clock import monotonic, new_name
from tandem.errors import BusUnavailable, ConfigError, NoWorkers, PayloadTooLarge, RequestTimeout

logger = logging.getLogger(__name__)

_NOT_A_SUBJECT = re.compile(r"\s|^$")
#: Above this the kernel does not keep up and what is published stays in our own, bounded, buffer.
_WRITE_BUFFER_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class NatsOptions:
    """``url`` may hold several servers, comma-separated, and ``user:password@`` or ``token@``."""

    url: str
    name: str = "tandem"
    user: str = ""
    password: str = field(default="", repr=False)
    token: str = field(default="", repr=False)
    tls: ssl.SSLContext | None = None  # made from the system's authorities where the server wants TLS and this is None
    inbox_prefix: str = "_INBOX"
    pending_bytes: int = 64 << 20
    connect_timeout_s: float = 5.0
    attempt_timeout_s: float = 2.0
    reconnect_wait_s: float = 0.1
    ping_interval_s: float = 5.0
    max_pings_out: int = 2


class _Connection(asyncio.Protocol):
    """One TCP connection, from INFO to its loss."""

    def __init__(self, bus: NatsBus) -> None:
        loop = asyncio.get_running_loop()
        self._bus = bus
        self._parser = protocol.Parser()
        self.transport: asyncio.Transport | None = None
        self.info: asyncio.Future[protocol.Info] = loop.create_future()
        self.lost: asyncio.Future[str] = loop.create_future()
        self.pongs: deque[asyncio.Future[None]] = deque()
        self.paused = False
        self.last_error = ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.use(transport)

    def use(self, transport: asyncio.Transport) -> None:
        transport.set_write_buffer_limits(high=_WRITE_BUFFER_BYTES)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        try:
            events = self._parser.feed(data)
        except protocol.ProtocolError as error:
            self.drop(str(error))
            return
        for event in events:
            if isinstance(event, protocol.Delivery):
                self._bus._deliver(event)
            else:
                self._on_control(event)

    def _on_control(self, event: protocol.Event) -> None:
        match event:
            case protocol.Ping():
                self.write(protocol.PONG)
            case protocol.Pong():
                if self.pongs:
                    waiter = self.pongs.popleft()
                    if not waiter.done():
                        waiter.set_result(None)
            case protocol.Info():
                if not self.info.done():
                    self.info.set_result(event)
            case protocol.ServerError():
                self.last_error = event.message
                self._bus._on_server_error(event.message)

    def ping(self) -> asyncio.Future[None]:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.pongs.append(waiter)
        self.write(protocol.PING)
        return waiter

    def write(self, data: bytes) -> None:
        if self.transport is not None and not self.transport.is_closing():
            self.transport.write(data)

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False
        self._bus._write_out()

    def drop(self, reason: str) -> None:
        self.last_error = self.last_error or reason
        if self.transport is not None:
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        reason = self.last_error or (str(exc) if exc is not None else "closed by the server")
        if not self.info.done():
            self.info.set_exception(ConnectionError(reason))
            self.info.exception()  # read here, so that an abandoned attempt leaves no warning
        if not self.lost.done():
            self.lost.set_result(reason)
        for waiter in self.pongs:
            if not waiter.done():
                waiter.set_exception(BusUnavailable(f"NATS went away: {reason}"))
                waiter.exception()
        self.pongs.clear()


@dataclass(slots=True)
class _Subscription:
    """Lives across reconnects, under the same sid."""

    bus: NatsBus
    sid: int
    subject: str
    queue: str
    handler: Handler

    async def unsubscribe(self) -> None:
        self.bus._remove(self.sid)


class NatsBus:
    """See ``tandem.adapters.bus``. Made by ``connect``."""

    def __init__(self, options: NatsOptions) -> None:
        self._options = options
        self._loop = asyncio.get_running_loop()
        self._servers: Iterator[SplitResult] = cycle(_parse_servers(options.url))
        self._connection: _Connection | None = None
        self._up = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None
        self._closed = False
        self._last_error = "not connected yet"
        self._max_payload = 0
        self._reconnected_at = 0.0
        self._out: list[bytes] = []
        self._out_bytes = 0
        self._write_scheduled = False
        self._sids = count(1)
        self._subscriptions: dict[int, _Subscription] = {}
        self._inbox = ""
        self._requests: dict[str, asyncio.Future[Message]] = {}
        self.stats = BusStats()

    @classmethod
    async def connect(cls, options: NatsOptions | str) -> Self:
        """Tries until ``connect_timeout_s``, then BusUnavailable with the last reason."""
        bus = cls(NatsOptions(options) if isinstance(options, str) else options)
        bus._keeper = asyncio.create_task(bus._keep_connected(), name="nats")
        bus._keeper.add_done_callback(bus._on_keeper_end)
        try:
            async with asyncio.timeout(bus._options.connect_timeout_s):
                await bus._up.wait()
        except BaseException as error:
            reason = bus._last_error
            await bus.close()
            if isinstance(error, TimeoutError):
                raise BusUnavailable(
                    f"NATS does not answer at {_without_secrets(bus._options.url)}: {reason}"
                ) from None
            raise
        return bus

    # --- the port

    @property
    def connected(self) -> bool:
        return self._up.is_set()

    @property
    def reconnected_at(self) -> float:
        return self._reconnected_at

    @property
    def max_payload(self) -> int:
        return self._max_payload

    def publish(self, subject: str, data: bytes, reply: str = "") -> None:
        if len(data) > self._max_payload:
            raise PayloadTooLarge(f"{len(data)} bytes; one message carries at most {self._max_payload}")
        if _NOT_A_SUBJECT.search(subject) or (reply and _NOT_A_SUBJECT.search(reply)):
            raise ValueError(f"not a subject: {subject!r}, reply {reply!r}")
        if self._closed:
            raise BusUnavailable("the bus is closed")
        command = protocol.publish(subject, reply, data)
        if self._out_bytes + len(command) > self._options.pending_bytes:
            self.stats.refused_publishes += 1
            raise BusUnavailable(f"{self._out_bytes} bytes wait for NATS already; {self._last_error or 'it is slow'}")
        self._out.append(command)
        self._out_bytes += len(command)
        if not self._write_scheduled:
            self._write_scheduled = True
            self._loop.call_soon(self._write_out)

    async def subscribe(self, subject: str, handler: Handler, *, queue: str = "") -> _Subscription:
        """Returns when the server has it. BusUnavailable if that takes longer than ``connect_timeout_s``."""
        subscription = self._add(subject, handler, queue)
        try:
            await self.flush(timeout_s=self._options.connect_timeout_s)
        except BaseException:
            self._remove(subscription.sid)
            raise
        return subscription

    async def request(self, subject: str, data: bytes, *, timeout_s: float) -> bytes:
        if not self._inbox:
            self._inbox = f"{self._options.inbox_prefix}.{new_name(self._options.name).replace('.', '-')}"
            self._add(f"{self._inbox}.*", self._on_reply, "")
        token = str(next(self._sids))
        answer: asyncio.Future[Message] = self._loop.create_future()
        self._requests[token] = answer
        try:
            async with asyncio.timeout(timeout_s):
                self.publish(subject, data, reply=f"{self._inbox}.{token}")
                message = await answer
        except TimeoutError:
            raise RequestTimeout(f"no answer from {subject} within {timeout_s:g} s") from None
        finally:
            del self._requests[token]
        if message.no_responders:
            raise NoWorkers(f"nobody listens on {subject}")
        return message.data

    async def flush(self, *, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                await self._up.wait()
                connection = self._connection
                if connection is None or self._closed:
                    raise BusUnavailable("the bus is closed")
                self._write_out(force=True)
                await connection.ping()
        except TimeoutError:
            raise BusUnavailable(f"NATS did not answer within {timeout_s:g} s: {self._last_error or 'slow'}") from None

    async def close(self) -> None:
        """Sends what is buffered if the server takes it within a second."""
        if self._closed:
            return
        if self.connected:
            with suppress(BusUnavailable):
                await self.flush(timeout_s=1.0)
        self._closed = True
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait([self._keeper])
        self._subscriptions.clear()

    # --- sending

    def _write_out(self, *, force: bool = False) -> None:
        self._write_scheduled = False
        connection = self._connection
        if not self._out or connection is None or not self._up.is_set() or (connection.paused and not force):
            return
        data = b"".join(self._out)
        self._out.clear()
        self._out_bytes = 0
        connection.write(data)

    def _command(self, command: bytes) -> None:
        """Sent in order with what was published before; not kept when there is no connection."""
        if self._connection is not None and self._up.is_set():
            self._write_out(force=True)
            self._connection.write(command)

    def _add(self, subject: str, handler: Handler, queue: str) -> _Subscription:
        if _NOT_A_SUBJECT.search(subject) or (queue and _NOT_A_SUBJECT.search(queue)):
            raise ValueError(f"not a subject: {subject!r}, queue {queue!r}")
        if self._closed:
            raise BusUnavailable("the bus is closed")
        subscription = _Subscription(self, next(self._sids), subject, queue, handler)
        self._subscriptions[subscription.sid] = subscription
        self._command(protocol.subscribe(subscription.sid, subject, queue))
        return subscription

    def _remove(self, sid: int) -> None:
        if self._subscriptions.pop(sid, None) is not None:
            self._command(protocol.unsubscribe(sid))

    # --- receiving

    def _deliver(self, delivery: protocol.Delivery) -> None:
        subscription = self._subscriptions.get(delivery.sid)
        if subscription is None:
            return
        no_responders = delivery.status == protocol.NO_RESPONDERS and not delivery.data
        try:
            subscription.handler(Message(delivery.subject, delivery.data, delivery.reply, no_responders))
        except Exception:  # one message's defect must not take the connection down: it is logged and counted
            self.stats.handler_errors += 1
            logger.exception("handler of %s failed on a message to %s", subscription.subject, delivery.subject)

    def _on_reply(self, message: Message) -> None:
        waiter = self._requests.get(message.subject.rpartition(".")[2])
        if waiter is not None and not waiter.done():
            waiter.set_result(message)

    def _on_server_error(self, message: str) -> None:
        """Permission violations leave the connection up; after anything else the server closes it."""
        self.stats.server_errors += 1
        logger.error("NATS server says: %s", message)

    # --- the connection

    async def _keep_connected(self) -> None:
        while True:
            server = next(self._servers)
            try:
                async with asyncio.timeout(self._options.attempt_timeout_s):
                    connection = await self._open(server)
            except (OSError, TimeoutError, protocol.ProtocolError, BusUnavailable) as error:
                self._last_error = str(error) or f"no answer within {self._options.attempt_timeout_s:g} s"
            else:
                await self._serve(connection)
            await asyncio.sleep(self._options.reconnect_wait_s * random.uniform(0.5, 1.5))

    async def _open(self, server: SplitResult) -> _Connection:
        """A connection that has passed INFO, TLS, CONNECT and the first PING."""
        options = self._options
        host, port = server.hostname or "", server.port or 4222
        _, connection = await self._loop.create_connection(lambda: _Connection(self), host, port)
        try:
            info = await connection.info
            assert connection.transport is not None
            if info.tls_required or options.tls is not None or server.scheme == "tls":
                context = options.tls or ssl.create_default_context()
                tls = await self._loop.start_tls(connection.transport, connection, context, server_hostname=host)
                if tls is None:
                    raise ConnectionError("the connection was lost during the TLS handshake")
                connection.use(tls)
            connection.write(protocol.connect(self._connect_fields(server)))
            await connection.ping()
        except BaseException:
            connection.drop("gave up")
            raise
        self._max_payload = info.max_payload
        return connection

    def _connect_fields(self, server: SplitResult) -> dict[str, object]:
        options = self._options
        fields: dict[str, object] = {
            "verbose": False,
            "pedantic": False,
            "lang": "python",
            "version": "1",
            "protocol": 1,
            "headers": True,
            "no_responders": True,
            "name": options.name,
        }
        user, password, token = options.user, options.password, options.token
        if not user and not token and server.username:
            if server.password:
                user, password = unquote(server.username), unquote(server.password)
            else:
                token = unquote(server.username)
        if user:
            fields |= {"user": user, "pass": password}
        if token:
            fields["auth_token"] = token
        return fields

    async def _serve(self, connection: _Connection) -> None:
        """From the hand-shake to the loss of the connection."""
        self._connection = connection
        for subscription in self._subscriptions.values():
            connection.write(protocol.subscribe(subscription.sid, subscription.subject, subscription.queue))
        if self._reconnected_at:
            self.stats.reconnects += 1
            logger.warning("NATS is back")
        self._reconnected_at = monotonic()
        self._last_error = ""
        self._up.set()
        self._write_out()
        try:
            self._last_error = await self._ping_until_lost(connection)
            logger.warning("NATS connection lost: %s", self._last_error)
        finally:
            self._up.clear()
            self._connection = None
            if connection.transport is not None:
                connection.transport.close()

    async def _ping_until_lost(self, connection: _Connection) -> str:
        unanswered: list[asyncio.Future[None]] = []
        while not connection.lost.done():
            await asyncio.wait([connection.lost], timeout=self._options.ping_interval_s)
            unanswered = [ping for ping in unanswered if not ping.done()]
            if len(unanswered) >= self._options.max_pings_out:
                connection.drop("no answer to pings")
                await connection.lost
            elif not connection.lost.done():
                unanswered.append(connection.ping())
        return connection.lost.result()

    def _on_keeper_end(self, keeper: asyncio.Task[None]) -> None:
        if not keeper.cancelled() and keeper.exception() is not None:
            self._closed = True
            logger.critical("the NATS connection's keeper failed; the bus is closed", exc_info=keeper.exception())


def _parse_servers(url: str) -> list[SplitResult]:
    servers = [urlsplit(part if "://" in part else f"nats://{part}") for part in url.split(",") if part]
    for server in servers:
        if server.scheme not in ("nats", "tls") or not server.hostname:
            raise ConfigError(f"not a NATS URL: {_without_secrets(url)}", param="url")
    if not servers:
        raise ConfigError("the NATS URL is empty", param="url")
    return servers


def _without_secrets(url: str) -> str:
    return re.sub(r"//[^/@]*@", "//***@", url)

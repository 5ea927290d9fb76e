"""The bus over NATS: one connection, kept up for the life of the process.

Publishing appends to a buffer that leaves in one write per turn of the event loop; messages are handed to their
handlers straight from the socket's callback. No task, queue or lock per message: that is what it buys over nats-py
(docs/decisions/library-clients.md). While the server is away or slow, publishing goes on into the buffer, whose bound
is an error. Also here: TLS, user and password or token, several servers, reconnecting without limit.
"""

from __future__ import annotations

import asyncio
import logging
import random
import ssl
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import count, cycle
from typing import Self
from urllib.parse import SplitResult, unquote, urlsplit

from tandem.adapters import nats_protocol as protocol
from tandem.adapters.bus import BusStats, FailureLog, Handler, Message
from tandem.adapters.clock import monotonic, new_name
from tandem.adapters.nats_connection import Connection
from tandem.errors import BusUnavailable, ConfigError, NoWorkers, PayloadTooLarge, RequestTimeout
from tandem.wire.permissions import inbox_prefix

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class NatsOptions:
    """Beyond the URL, which may hold user and password, or a token, itself."""

    user: str = ""
    password: str = field(default="", repr=False)
    token: str = field(default="", repr=False)
    #: Made from the system's authorities where the server wants TLS and this is None.
    tls: ssl.SSLContext | None = None
    inbox_prefix: str = "_INBOX"
    pending_bytes: int = 64 << 20
    connect_timeout_s: float = 5.0
    attempt_timeout_s: float = 2.0
    reconnect_wait_s: float = 0.1
    ping_interval_s: float = 5.0
    max_pings_out: int = 2


@dataclass(slots=True, eq=False)
class _Subscription:
    """Lives across reconnects, under the same sid."""

    bus: NatsBus
    sid: int
    subject: str
    queue: str
    handler: Handler
    failures: FailureLog

    async def unsubscribe(self) -> None:
        self.bus._remove(self.sid)


class NatsBus:
    """See ``tandem.adapters.bus``. Made by ``connect``."""

    def __init__(self, url: str, name: str, options: NatsOptions) -> None:
        servers = _parse_servers(url)
        self._shown = ", ".join(map(_without_user, servers))
        self._servers: Iterator[SplitResult] = cycle(servers)
        self._options = _with_user_of(servers[0], options)
        self._name = name
        self._loop = asyncio.get_running_loop()
        self._connection: Connection | None = None
        self._up = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None
        self._closed = False
        self._last_error = ""
        self._max_payload = 0
        self._reconnected_at = 0.0
        self._out: list[bytes] = []
        self._out_bytes = 0
        self._write_scheduled = False
        self._numbers = count(1)
        self._subscriptions: dict[int, _Subscription] = {}
        self._inbox = ""
        self._requests: dict[str, asyncio.Future[Message]] = {}
        self.stats = BusStats()

    @classmethod
    async def connect(cls, url: str, *, name: str = "tandem", options: NatsOptions | None = None) -> Self:
        """``url`` may name several servers, comma-separated, with ``user:password@`` or ``token@``.

        Tries until ``connect_timeout_s``, then BusUnavailable with the last reason."""
        bus = cls(url, name, options or NatsOptions())
        bus._keeper = asyncio.create_task(bus._keep_connected(), name="nats")
        bus._keeper.add_done_callback(bus._on_keeper_end)
        try:
            async with asyncio.timeout(bus._options.connect_timeout_s):
                await bus._up.wait()
        except TimeoutError:
            reason = bus._last_error
            await bus.close()
            raise BusUnavailable(f"NATS does not answer at {bus._shown}: {reason}") from None
        except BaseException:
            await bus.close()
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
        command = protocol.publish(subject, reply, data)
        if self._closed:
            raise BusUnavailable("the bus is closed")
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
            self._inbox = f"{self._options.inbox_prefix}.{new_name(self._name).replace('.', '-')}"
            self._add(f"{self._inbox}.*", self._on_reply, "")
        number = str(next(self._numbers))
        answer: asyncio.Future[Message] = self._loop.create_future()
        self._requests[number] = answer
        try:
            async with asyncio.timeout(timeout_s):
                self.publish(subject, data, reply=f"{self._inbox}.{number}")
                message = await answer
        except TimeoutError:
            raise RequestTimeout(f"no answer from {subject} within {timeout_s:g} s") from None
        finally:
            del self._requests[number]
        if message.no_responders:
            raise NoWorkers(f"nobody listens on {subject}")
        return message.data

    async def flush(self, *, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    await self._up.wait()
                    connection = self._connection
                    if connection is None or self._closed:
                        raise BusUnavailable("the bus is closed")
                    await connection.keeps_up.wait()
                    if not connection.usable:
                        raise BusUnavailable("NATS went away: what is buffered waits for it")
                    self._write_out()
                    if not self._out:
                        break
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

    def _write_out(self) -> None:
        self._write_scheduled = False
        connection = self._connection
        if not self._out or connection is None or not connection.usable or not connection.keeps_up.is_set():
            return  # it stays for the next connection, or for when this one keeps up
        data = b"".join(self._out)
        self._out.clear()
        self._out_bytes = 0
        connection.write(data)

    def writable(self) -> None:
        self._write_out()

    def _command(self, command: bytes) -> None:
        """In order with what was published before; not kept when there is no connection, which subscribes anew."""
        if self._connection is not None:
            self._out.append(command)
            self._out_bytes += len(command)
            self._write_out()

    def _add(self, subject: str, handler: Handler, queue: str) -> _Subscription:
        if not protocol.is_subject(subject) or (queue and not protocol.is_subject(queue)):
            raise ValueError(f"not a subject: {subject!r}, queue {queue!r}")
        if self._closed:
            raise BusUnavailable("the bus is closed")
        failures = FailureLog(self.stats, monotonic)
        subscription = _Subscription(self, next(self._numbers), subject, queue, handler, failures)
        self._subscriptions[subscription.sid] = subscription
        self._command(protocol.subscribe(subscription.sid, subject, queue))
        return subscription

    def _remove(self, sid: int) -> None:
        if self._subscriptions.pop(sid, None) is not None:
            self._command(protocol.unsubscribe(sid))

    # --- receiving

    def delivered(self, delivery: protocol.Delivery) -> None:
        subscription = self._subscriptions.get(delivery.sid)
        if subscription is None:
            return
        no_responders = delivery.status == protocol.NO_RESPONDERS and not delivery.data
        message = Message(delivery.subject, delivery.data, delivery.reply, no_responders)
        try:
            subscription.handler(message)
        except Exception as error:  # one message's defect must not take the connection down: it is logged and counted
            subscription.failures.failed(subscription.subject, message, error)

    def _on_reply(self, message: Message) -> None:
        waiter = self._requests.get(message.subject.rpartition(".")[2])
        if waiter is not None and not waiter.done():
            waiter.set_result(message)

    def complained(self, message: str) -> None:
        """Permission violations leave the connection up; after anything else the server closes it."""
        self.stats.server_errors += 1
        if message != self._last_error:  # attempts to reconnect hear the same over and over
            logger.error("NATS: %s", message)
        self._last_error = message

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

    async def _open(self, server: SplitResult) -> Connection:
        """A connection that has passed INFO, TLS, CONNECT and the first PING."""
        host, port = server.hostname or "", server.port or 4222
        _, connection = await self._loop.create_connection(lambda: Connection(self), host, port)
        try:
            info = await connection.info
            assert connection.transport is not None
            if info.tls_required or self._options.tls is not None or server.scheme == "tls":
                context = self._options.tls or ssl.create_default_context()
                tls = await self._loop.start_tls(connection.transport, connection, context, server_hostname=host)
                if tls is None:
                    raise ConnectionError("the connection was lost during the TLS handshake")
                connection.use(tls)
            connection.write(protocol.connect(self._connect_fields()))
            await connection.ping()
        except BaseException:
            connection.drop("gave up")
            raise
        self._max_payload = info.max_payload
        return connection

    def _connect_fields(self) -> dict[str, object]:
        options = self._options
        fields: dict[str, object] = {
            "verbose": False,
            "pedantic": False,
            "lang": "python",
            "version": "1",
            "protocol": 1,
            "headers": True,
            "no_responders": True,
            "name": self._name,
        }
        if options.user:
            fields |= {"user": options.user, "pass": options.password}
        if options.token:
            fields["auth_token"] = options.token
        return fields

    async def _serve(self, connection: Connection) -> None:
        """From the handshake to the loss of the connection."""
        for subscription in self._subscriptions.values():
            connection.write(protocol.subscribe(subscription.sid, subscription.subject, subscription.queue))
        self._connection = connection
        if self._reconnected_at:
            self.stats.reconnects += 1
            logger.info("NATS is back")
        self._reconnected_at = monotonic()
        self._last_error = ""
        self._up.set()
        self._write_out()
        try:
            self._last_error = await self._ping_until_lost(connection)
            logger.warning("NATS connection: %s", self._last_error)
        finally:
            self._up.clear()
            self._connection = None
            if connection.transport is not None:
                connection.transport.close()

    async def _ping_until_lost(self, connection: Connection) -> str:
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
        """It ends by ``close`` only; anything else is a defect, and better seen than buffered over."""
        if not keeper.cancelled() and (error := keeper.exception()) is not None:
            self._closed = True
            self._up.clear()
            logger.critical("the bus is out of order and closed", exc_info=error)


def _parse_servers(url: str) -> list[SplitResult]:
    servers = [urlsplit(part if "://" in part else f"nats://{part}") for part in url.split(",") if part]
    for server in servers:
        if server.scheme not in ("nats", "tls") or not server.hostname:
            raise ConfigError(f"not a NATS URL: {server.scheme}://{server.hostname or ''}", param="url")
    if not servers:
        raise ConfigError("the NATS URL is empty", param="url")
    return servers


def _without_user(server: SplitResult) -> str:
    return server._replace(netloc=server.netloc.rpartition("@")[2]).geturl()


def _with_user_of(server: SplitResult, options: NatsOptions) -> NatsOptions:
    if options.user or options.token or not server.username:
        return options
    if server.password is None:
        return replace(options, token=unquote(server.username))
    user = unquote(server.username)
    return replace(options, user=user, password=unquote(server.password), inbox_prefix=inbox_prefix(user))

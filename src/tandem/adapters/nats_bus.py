"""The bus over NATS, by nats-py: one connection, kept up for the life of the process.

``publish`` appends to a bounded buffer of our own that one task empties into the client in order; so it never blocks,
and while the server is away or slow the buffer's bound is an error instead of growing memory. Subscriptions get
limits far above what a handler leaves waiting (a slow consumer would lose messages silently), and what the client
complains about is logged and counted.
"""

from __future__ import annotations

import asyncio
import logging
import random
import re
import ssl
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Self
from urllib.parse import SplitResult, unquote, urlsplit

import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription as NatsSubscription

from tandem.adapters.bus import BusStats, FailureLog, Handler, Message
from tandem.adapters.clock import monotonic
from tandem.errors import BusUnavailable, ConfigError, NoWorkers, PayloadTooLarge, RequestTimeout
from tandem.wire.permissions import inbox_prefix

logger = logging.getLogger(__name__)

_NOT_A_SUBJECT = re.compile(r"\s|^$")
_NO_RESPONDERS = "503"
#: What may wait for a handler; handlers are quick callables, so only a blocked loop gets near it.
_SUBSCRIPTION_MESSAGES = 1 << 20
_SUBSCRIPTION_BYTES = 1 << 30
#: What nats-py may hold of ours before it waits for the socket; the rest stays in our own buffer.
_CLIENT_PENDING_BYTES = 1 << 20
#: Without a connection for so long: its client's reconnecting is not trusted any more.
_STUCK_S = 10.0


@dataclass(frozen=True, slots=True)
class NatsOptions:
    """Beyond the URL, which may hold user and password, or a token, itself."""

    user: str = ""
    password: str = field(default="", repr=False)
    token: str = field(default="", repr=False)
    tls: ssl.SSLContext | None = None
    inbox_prefix: str = "_INBOX"
    pending_bytes: int = 64 << 20
    connect_timeout_s: float = 5.0
    attempt_timeout_s: float = 2.0
    reconnect_wait_s: float = 0.1
    ping_interval_s: float = 5.0
    max_pings_out: int = 2


class _Subscription:
    """Outlives the client that it was made with: a new client subscribes again."""

    def __init__(self, bus: NatsBus, subject: str, queue: str, handler: Handler) -> None:
        self._bus = bus
        self._subject = subject
        self._queue = queue
        self._handler = handler
        self._failures = FailureLog(bus.stats, monotonic)
        self._inner: NatsSubscription | None = None

    async def open(self, client: Client) -> None:
        self._inner = await client.subscribe(
            self._subject,
            queue=self._queue,
            cb=self._deliver,
            pending_msgs_limit=_SUBSCRIPTION_MESSAGES,
            pending_bytes_limit=_SUBSCRIPTION_BYTES,
        )

    async def _deliver(self, msg: Msg) -> None:
        no_responders = not msg.data and (msg.headers or {}).get("Status") == _NO_RESPONDERS
        try:
            self._handler(Message(msg.subject, msg.data, msg.reply, no_responders))
        except Exception as error:  # one message's defect must not end the subscription: it is logged and counted
            self._failures.failed(self._subject, Message(msg.subject, msg.data), error)

    async def unsubscribe(self) -> None:
        self._bus._subscriptions.pop(self, None)
        if self._inner is not None:
            with suppress(nats.errors.Error):  # closed, or unsubscribed before
                await self._inner.unsubscribe()


class NatsBus:
    """See ``tandem.adapters.bus``. Made by ``connect``."""

    def __init__(self, url: str, name: str, options: NatsOptions) -> None:
        servers = _parse_servers(url)
        self._servers = [_without_user(server) for server in servers]
        self._shown = ", ".join(self._servers)
        self._name = name
        self._options = _with_user_of(servers[0], options)
        self._client = Client()
        self._up = asyncio.Event()
        self._out: deque[tuple[str, bytes, str]] = deque()
        self._out_bytes = 0
        self._waiting = asyncio.Event()
        self._all_sent = asyncio.Event()
        self._all_sent.set()
        self._subscriptions: dict[_Subscription, None] = {}
        self._gave_up = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._closed = False
        self._last_error = ""
        #: What the server itself said last; it explains the lost connection that follows.
        self._complaint = ""
        self._reconnected_at = 0.0
        self._down_at = 0.0
        self.stats = BusStats()

    @classmethod
    async def connect(cls, url: str, *, name: str = "tandem", options: NatsOptions | None = None) -> Self:
        """``url`` may name several servers, comma-separated, with ``user:password@`` or ``token@``.

        Tries until ``connect_timeout_s``, then BusUnavailable with the last reason."""
        bus = cls(url, name, options or NatsOptions())
        try:
            async with asyncio.timeout(bus._options.connect_timeout_s):
                await bus._client.connect(bus._servers, **bus._client_options())
        except (TimeoutError, OSError, nats.errors.Error) as error:
            await bus.close()
            reason = bus._complaint or bus._last_error or str(error)
            raise BusUnavailable(f"NATS does not answer at {bus._shown}: {reason}") from None
        bus._is_up()
        for work in (bus._send_forever(), bus._replace_lost_clients()):
            task = asyncio.create_task(work, name="nats")
            task.add_done_callback(bus._on_task_end)
            bus._tasks.append(task)
        return bus

    # --- the port

    @property
    def connected(self) -> bool:
        return self._up.is_set() and self._client.is_connected

    @property
    def reconnected_at(self) -> float:
        return self._reconnected_at

    @property
    def max_payload(self) -> int:
        return int(self._client.max_payload)

    def publish(self, subject: str, data: bytes, reply: str = "") -> None:
        if len(data) > self.max_payload:
            raise PayloadTooLarge(f"{len(data)} bytes; one message carries at most {self.max_payload}")
        _check_subject(subject)
        if reply:
            _check_subject(reply)
        if self._closed:
            raise BusUnavailable("the bus is closed")
        if self._out_bytes + len(data) > self._options.pending_bytes:
            self.stats.refused_publishes += 1
            raise BusUnavailable(f"{self._out_bytes} bytes wait for NATS already; {self._last_error or 'it is slow'}")
        self._out.append((subject, data, reply))
        self._out_bytes += len(data)
        self._waiting.set()
        self._all_sent.clear()

    async def subscribe(self, subject: str, handler: Handler, *, queue: str = "") -> _Subscription:
        """Returns when the server has it. BusUnavailable if that takes longer than ``connect_timeout_s``."""

        _check_subject(subject)
        subscription = _Subscription(self, subject, queue, handler)
        try:
            await subscription.open(self._client)
        except nats.errors.Error as error:
            raise BusUnavailable(f"not subscribed to {subject}: {error}") from None
        self._subscriptions[subscription] = None
        try:
            await self.flush(timeout_s=self._options.connect_timeout_s)
        except BaseException:
            await subscription.unsubscribe()
            raise
        return subscription

    async def request(self, subject: str, data: bytes, *, timeout_s: float) -> bytes:
        try:
            async with asyncio.timeout(timeout_s):
                await self._up.wait()
                answer = await self._client.request(subject, data, timeout=timeout_s)
        except nats.errors.NoRespondersError:
            raise NoWorkers(f"nobody listens on {subject}") from None
        except (TimeoutError, nats.errors.TimeoutError):
            raise RequestTimeout(f"no answer from {subject} within {timeout_s:g} s") from None
        except nats.errors.MaxPayloadError:
            raise PayloadTooLarge(f"{len(data)} bytes; one message carries at most {self.max_payload}") from None
        except nats.errors.Error as error:
            raise BusUnavailable(f"request to {subject}: {error}") from None
        return answer.data

    async def flush(self, *, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                await self._up.wait()
                await self._all_sent.wait()
                # The client's PING overtakes what it has not written yet, so one flush is no barrier; during its
                # round trip the rest is written, and the second one comes after.
                for _ in range(2):
                    await self._client.flush(timeout=timeout_s)  # type: ignore[arg-type]  # floats do as well
        except (TimeoutError, OSError, nats.errors.Error) as error:
            reason = self._last_error or str(error) or "slow"
            raise BusUnavailable(f"NATS did not answer within {timeout_s:g} s: {reason}") from None

    async def close(self) -> None:
        """Sends what is buffered if the server takes it within a second."""
        if self._closed:
            return
        if self.connected:
            with suppress(BusUnavailable):
                await self.flush(timeout_s=1.0)
        self._closed = True
        self._up.clear()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        with suppress(TimeoutError, OSError, nats.errors.Error):
            async with asyncio.timeout(1.0):
                await self._client.close()

    # --- sending

    async def _send_forever(self) -> None:
        while True:
            await self._waiting.wait()
            self._waiting.clear()
            while self._out:
                await self._up.wait()
                subject, data, reply = self._out[0]
                try:
                    await self._client.publish(subject, data, reply)
                except nats.errors.OutboundBufferLimitError:
                    await asyncio.sleep(self._options.reconnect_wait_s)
                    continue
                except nats.errors.ConnectionClosedError:  # it was given up; a new client is on its way
                    self._is_down()
                    continue
                except (OSError, RuntimeError, nats.errors.Error) as error:
                    self._complain(f"message to {subject} not sent: {error}")
                self._out.popleft()
                self._out_bytes -= len(data)
            self._all_sent.set()

    # --- the connection

    async def _replace_lost_clients(self) -> None:
        """nats-py reconnects by itself, but gives up for good on some words of the server (authorization and limits
        among them, that a restarting server may say), and a reconnect of its may die. Then a new client takes over."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(_STUCK_S):
                    await self._gave_up.wait()
            if self.connected or not (self._gave_up.is_set() or self._is_stuck()):
                continue
            with suppress(TimeoutError, OSError, RuntimeError, nats.errors.Error):
                async with asyncio.timeout(1.0):
                    await self._client.close()
            self._gave_up.clear()
            self._client = Client()
            try:
                async with asyncio.timeout(self._options.connect_timeout_s):
                    await self._client.connect(self._servers, **self._client_options())
                    for subscription in list(self._subscriptions):
                        await subscription.open(self._client)
            except (TimeoutError, OSError, RuntimeError, nats.errors.Error) as error:
                self._complain(f"no new connection: {error or 'no answer'}")
                self._gave_up.set()
                await asyncio.sleep(self._options.reconnect_wait_s)
            else:
                self._is_up()

    def _is_stuck(self) -> bool:
        return not self._up.is_set() and monotonic() - self._down_at > _STUCK_S

    def _client_options(self) -> dict[str, Any]:
        options = self._options
        return {
            "name": self._name,
            "error_cb": self._on_error,
            "disconnected_cb": self._async(self._is_down),
            "reconnected_cb": self._async(self._is_up),
            "closed_cb": self._async(self._gave_up.set),
            "connect_timeout": options.attempt_timeout_s,
            "reconnect_time_wait": options.reconnect_wait_s * random.uniform(0.5, 1.5),
            "max_reconnect_attempts": -1,
            "skip_subject_validation": True,  # done in publish and subscribe
            "ping_interval": options.ping_interval_s,
            "max_outstanding_pings": options.max_pings_out,
            "flush_timeout": options.attempt_timeout_s,
            "pending_size": _CLIENT_PENDING_BYTES,
            "inbox_prefix": options.inbox_prefix,
            "tls": options.tls,
            "user": options.user or None,
            "password": options.password or None,
            "token": options.token or None,
        }

    @staticmethod
    def _async(call: Callable[[], None]) -> Callable[[], Awaitable[None]]:
        async def run() -> None:
            call()

        return run

    def _is_up(self) -> None:
        if self._reconnected_at:
            self.stats.reconnects += 1
            logger.info("NATS is back")
        self._last_error = ""
        self._reconnected_at = monotonic()
        self._up.set()

    def _is_down(self) -> None:
        self._up.clear()
        self._down_at = monotonic()

    async def _on_error(self, error: Exception) -> None:
        if isinstance(error, OSError | nats.errors.UnexpectedEOF | nats.errors.StaleConnectionError):
            self._last_error = str(error) or type(error).__name__
            if self._up.is_set():
                logger.warning("NATS connection: %s", self._last_error)
        else:
            self._complain(str(error) or type(error).__name__)

    def _on_task_end(self, task: asyncio.Task[None]) -> None:
        """They end by ``close`` only; anything else is a defect, and better seen than buffered over."""
        if not task.cancelled() and (error := task.exception()) is not None:
            self._closed = True
            self._up.clear()
            logger.critical("the bus is out of order and closed", exc_info=error)

    def _complain(self, what: str) -> None:
        self.stats.server_errors += 1
        if what != self._last_error:  # attempts to reconnect say the same over and over
            logger.error("NATS: %s", what)
        self._last_error = self._complaint = what


def _check_subject(subject: str) -> None:
    if _NOT_A_SUBJECT.search(subject):
        raise ValueError(f"not a subject: {subject!r}")


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
    """nats-py takes what stands in a URL as it is, percent signs and all."""
    if options.user or options.token or not server.username:
        return options
    if server.password is None:
        return replace(options, token=unquote(server.username))
    user = unquote(server.username)
    return replace(options, user=user, password=unquote(server.password), inbox_prefix=inbox_prefix(user))

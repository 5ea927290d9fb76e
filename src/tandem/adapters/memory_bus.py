"""The bus without a server: clients that share a ``MemoryHub`` in one process talk to each other.

Same semantics as ``nats_bus`` (tests/contract/test_bus.py runs over both), outages included: ``hub.stop()`` is a
server that went away, ``hub.start()`` its return.
"""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from itertools import count

from tandem.adapters.bus import BusStats, FailureLog, Handler, Message
from tandem.adapters.clock import monotonic
from tandem.errors import BusUnavailable, NoWorkers, PayloadTooLarge, RequestTimeout


@dataclass(slots=True, eq=False)
class _Subscription:
    bus: MemoryBus
    subject: str
    queue: str
    handler: Handler
    failures: FailureLog

    async def unsubscribe(self) -> None:
        with suppress(ValueError):
            self.bus.hub.subscriptions.remove(self)


class MemoryHub:
    """What stands for the server."""

    def __init__(self, *, max_payload: int = 8 << 20) -> None:
        self.max_payload = max_payload
        self.subscriptions: list[_Subscription] = []
        self.clients: list[MemoryBus] = []
        self.up = asyncio.Event()
        self.up.set()
        self._turns = count()

    def stop(self) -> None:
        self.up.clear()

    def start(self) -> None:
        self.up.set()
        for client in self.clients:
            client._on_hub_start()

    def route(self, sender: MemoryBus, subject: str, data: bytes, reply: str) -> None:
        matching = [s for s in self.subscriptions if matches(s.subject, subject)]
        groups: dict[tuple[str, str], list[_Subscription]] = {}
        for subscription in matching:
            if subscription.queue:
                groups.setdefault((subscription.subject, subscription.queue), []).append(subscription)
            else:
                subscription.bus._deliver(subscription, Message(subject, data, reply))
        for members in groups.values():
            member = members[next(self._turns) % len(members)]
            member.bus._deliver(member, Message(subject, data, reply))
        if not matching and reply:
            self._bounce(sender, reply)

    def _bounce(self, sender: MemoryBus, reply: str) -> None:
        for subscription in self.subscriptions:
            if subscription.bus is sender and not subscription.queue and matches(subscription.subject, reply):
                sender._deliver(subscription, Message(reply, b"", no_responders=True))
                return


class MemoryBus:
    """See ``tandem.adapters.bus``."""

    def __init__(self, hub: MemoryHub, *, pending_bytes: int = 64 << 20) -> None:
        self.hub = hub
        self.stats = BusStats()
        self._pending_bytes = pending_bytes
        self._out: deque[tuple[str, bytes, str]] = deque()
        self._out_bytes = 0
        self._write_scheduled = False
        self._closed = False
        self._reconnected_at = monotonic()
        self._tokens = count(1)
        self._inbox = f"_INBOX.{id(self)}"
        self._requests: dict[str, asyncio.Future[Message]] = {}
        hub.clients.append(self)

    @property
    def connected(self) -> bool:
        return self.hub.up.is_set() and not self._closed

    @property
    def reconnected_at(self) -> float:
        return self._reconnected_at

    @property
    def max_payload(self) -> int:
        return self.hub.max_payload

    def publish(self, subject: str, data: bytes, reply: str = "") -> None:
        if len(data) > self.max_payload:
            raise PayloadTooLarge(f"{len(data)} bytes; one message carries at most {self.max_payload}")
        _check_subject(subject)
        if reply:
            _check_subject(reply)
        if self._closed:
            raise BusUnavailable("the bus is closed")
        if self._out_bytes + len(data) > self._pending_bytes:
            self.stats.refused_publishes += 1
            raise BusUnavailable(f"{self._out_bytes} bytes wait already")
        self._out.append((subject, bytes(data), reply))
        self._out_bytes += len(data)
        if not self._write_scheduled:
            self._write_scheduled = True
            asyncio.get_running_loop().call_soon(self._write_out)

    async def subscribe(self, subject: str, handler: Handler, *, queue: str = "") -> _Subscription:
        _check_subject(subject)
        subscription = _Subscription(self, subject, queue, handler, FailureLog(self.stats, monotonic))
        await self.flush(timeout_s=5.0)
        self.hub.subscriptions.append(subscription)
        return subscription

    async def request(self, subject: str, data: bytes, *, timeout_s: float) -> bytes:
        if not any(s.bus is self and s.subject == f"{self._inbox}.*" for s in self.hub.subscriptions):
            failures = FailureLog(self.stats, monotonic)
            self.hub.subscriptions.append(_Subscription(self, f"{self._inbox}.*", "", self._on_reply, failures))
        token = str(next(self._tokens))
        answer: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
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
                await self.hub.up.wait()
        except TimeoutError:
            raise BusUnavailable(f"no answer within {timeout_s:g} s") from None
        if self._closed:
            raise BusUnavailable("the bus is closed")
        self._write_out()

    async def close(self) -> None:
        if self._closed:
            return
        if self.connected:
            self._write_out()
        self._closed = True
        self.hub.clients.remove(self)
        self.hub.subscriptions = [s for s in self.hub.subscriptions if s.bus is not self]

    def _write_out(self) -> None:
        self._write_scheduled = False
        if not self.connected:
            return
        for _ in range(len(self._out)):  # what a handler publishes meanwhile has its own turn
            subject, data, reply = self._out.popleft()
            self._out_bytes -= len(data)
            self.hub.route(self, subject, data, reply)

    def _on_hub_start(self) -> None:
        self.stats.reconnects += 1
        self._reconnected_at = monotonic()
        self._write_out()

    def _deliver(self, subscription: _Subscription, message: Message) -> None:
        try:
            subscription.handler(message)
        except Exception as error:  # as in nats_bus: logged and counted
            subscription.failures.failed(subscription.subject, message, error)

    def _on_reply(self, message: Message) -> None:
        waiter = self._requests.get(message.subject.rpartition(".")[2])
        if waiter is not None and not waiter.done():
            waiter.set_result(message)


def matches(pattern: str, subject: str) -> bool:
    """NATS wildcards: ``*`` is one token, a final ``>`` is one or more."""
    if pattern == subject:
        return True
    wanted, given = pattern.split("."), subject.split(".")
    if wanted[-1] == ">":
        wanted.pop()
        if len(given) <= len(wanted):
            return False
        given = given[: len(wanted)]
    return len(wanted) == len(given) and all(w in ("*", g) for w, g in zip(wanted, given, strict=True))


def _check_subject(subject: str) -> None:
    if len(subject.split()) != 1 or subject != subject.strip():
        raise ValueError(f"not a subject: {subject!r}")

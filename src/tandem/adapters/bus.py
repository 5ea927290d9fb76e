"""The port to the message bus, and its in-memory twin.

What the rest relies on (tests/contract/test_bus.py runs it over both): at-most-once, ordered per publisher and
subject; a publish with a reply subject to a subject that nobody subscribes to brings back a Message with
``no_responders`` on that reply subject, to the publisher's own subscription and to nobody else's; a publish never
blocks: it is buffered, and the buffer's bound is an error.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from google.protobuf.message import DecodeError
from msgspec import Struct

from tandem.errors import InvalidRequest

log = logging.getLogger(__name__)

#: Between two lines about failures of one subscription's handler.
QUIET_S = 60.0


class Message(Struct, frozen=True):
    subject: str
    data: bytes
    reply: str = ""
    #: The server's 503: nobody subscribes to the subject that was published to with this reply subject.
    no_responders: bool = False


Handler = Callable[[Message], None]


@dataclass(slots=True)
class BusStats:
    """What went wrong so far; for the metrics. Nothing is dropped on the receiving side without being counted in
    ``malformed`` or ``handler_errors``."""

    reconnects: int = 0
    #: Publishes refused because the outgoing buffer was full.
    refused_publishes: int = 0
    #: Messages that are not what their subject is for.
    malformed: int = 0
    #: Handlers that raised for any other reason: defects.
    handler_errors: int = 0
    #: Complaints of the server, permissions among them; each is in the log.
    server_errors: int = 0


class FailureLog:
    """Counts what a subscription's handler raises, and logs the first with its trace; from then on one line a minute
    says how many more there were: whoever can publish can send nonsense, and must not fill the log with it."""

    def __init__(self, stats: BusStats, now: Callable[[], float]) -> None:
        self._stats = stats
        self._now = now
        self._logged_at = -QUIET_S
        self._unsaid = 0

    def failed(self, handler: str, message: Message, error: Exception) -> None:
        """To be called where ``error`` is being handled. ``handler``: the subject that it subscribes to."""
        malformed = isinstance(error, DecodeError | ValueError | InvalidRequest)
        if malformed:
            self._stats.malformed += 1
        else:
            self._stats.handler_errors += 1
        now = self._now()
        if now - self._logged_at < QUIET_S:
            self._unsaid += 1
            return
        more = f" ({self._unsaid} more since the last such line)" if self._unsaid else ""
        what = "malformed message to" if malformed else "handler failed on a message to"
        log.error("%s %s, %d bytes%s; handler of %s", what, message.subject, len(message.data), more, handler,
                  exc_info=error)  # fmt: skip
        self._logged_at, self._unsaid = now, 0


class Subscription(Protocol):
    async def unsubscribe(self) -> None: ...


class Bus(Protocol):
    @property
    def stats(self) -> BusStats: ...

    @property
    def connected(self) -> bool: ...

    @property
    def reconnected_at(self) -> float:
        """Monotonic time of the last (re)connect; 0.0 before the first."""
        ...

    @property
    def max_payload(self) -> int:
        """Bytes that one message may carry."""
        ...

    def publish(self, subject: str, data: bytes, reply: str = "") -> None:
        """Buffers and returns. PayloadTooLarge over ``max_payload``; BusUnavailable when closed or the buffer is
        full; ValueError for what is no subject."""
        ...

    async def subscribe(self, subject: str, handler: Handler, *, queue: str = "") -> Subscription:
        """``handler`` runs on the loop, in order, and must not raise (what it raises is logged and counted).

        Returns when the server has the subscription, so that what anybody publishes from then on arrives;
        BusUnavailable if it does not answer. Survives reconnects. With ``queue``, one member of that group gets each
        message."""
        ...

    async def request(self, subject: str, data: bytes, *, timeout_s: float) -> bytes:
        """NoWorkers if nobody listens, RequestTimeout after ``timeout_s``."""
        ...

    async def flush(self, *, timeout_s: float) -> None:
        """Returns when the server has everything published so far. BusUnavailable on time-out."""
        ...

    async def close(self) -> None: ...

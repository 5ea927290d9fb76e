"""The client's side of the NATS protocol, without any I/O: bytes in, events out; and commands as bytes.

Only what Tandem uses: core publish and subscribe, headers read no further than the status that the server puts there
(503, nobody subscribes). https://docs.nats.io/reference/reference-protocols/nats-protocol
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache

from msgspec import Struct

PING = b"PING\r\n"
PONG = b"PONG\r\n"
NO_RESPONDERS = b"503"
_STATUS_LINE = b"NATS/1.0 "
_MAX_CONTROL_LINE = 1 << 20  # INFO of a large cluster lists all its servers


class ProtocolError(Exception):
    """The server sent something that is not NATS; the connection is of no use any more."""


class Delivery(Struct, frozen=True):
    sid: int
    subject: str
    reply: str
    data: bytes
    status: bytes  # three digits, or empty


class Ping:
    pass


class Pong:
    pass


@dataclass(frozen=True, slots=True)
class Info:
    fields: dict[str, object]

    @property
    def max_payload(self) -> int:
        value = self.fields.get("max_payload")
        return value if isinstance(value, int) else 1 << 20

    @property
    def tls_required(self) -> bool:
        return self.fields.get("tls_required") is True


@dataclass(frozen=True, slots=True)
class ServerError:
    message: str


Event = Delivery | Ping | Pong | Info | ServerError

_PING, _PONG = Ping(), Pong()


class Parser:
    """Feed it what the socket gave; it returns the events that are complete now."""

    def __init__(self) -> None:
        self._rest = bytearray()
        self._needed = 0  # bytes that _rest must have before another look at it is worth while

    def feed(self, data: bytes) -> list[Event]:
        if self._rest:
            self._rest += data
            if len(self._rest) < self._needed:
                return []
            data = bytes(self._rest)
            self._rest.clear()
        events: list[Event] = []
        start = 0
        self._needed = 0
        while (eol := data.find(b"\r\n", start)) >= 0:
            line = data[start:eol]
            if line.startswith((b"MSG ", b"HMSG ")):
                sid, subject, reply, header, size = _read_line(line)
                body, end = eol + 2, eol + 2 + size
                if len(data) < end + 2:
                    self._needed = end + 2 - start
                    break
                status = b""
                if header and data.startswith(_STATUS_LINE, body):
                    status = data[body + len(_STATUS_LINE) : body + len(_STATUS_LINE) + 3]
                events.append(Delivery(sid, subject, reply, data[body + header : end], status))
                start = end + 2
            else:
                event = _control(line)
                if event is not None:
                    events.append(event)
                start = eol + 2
        if start < len(data):
            self._rest += data[start:]
            if not self._needed and len(self._rest) > _MAX_CONTROL_LINE:
                raise ProtocolError("a control line without an end")
        return events


def _read_line(line: bytes) -> tuple[int, str, str, int, int]:
    """sid, subject, reply, bytes of the header, bytes of header and payload."""
    fields = line.split()
    try:
        size = int(fields.pop())
        header = int(fields.pop()) if fields[0] == b"HMSG" else 0
        reply = fields[3].decode() if len(fields) == 4 else ""  # mostly another one each time: not worth remembering
        return int(fields[2]), fields[1].decode(), reply, header, size
    except (IndexError, ValueError):
        raise ProtocolError(f"malformed control line {line[:200]!r}") from None


def _control(line: bytes) -> Event | None:
    if line == b"PING":
        return _PING
    if line == b"PONG":
        return _PONG
    if line.startswith(b"INFO "):
        try:
            fields = json.loads(line[5:])
        except ValueError:
            raise ProtocolError("INFO is not JSON") from None
        if not isinstance(fields, dict):
            raise ProtocolError("INFO is not an object")
        return Info(fields)
    if line.startswith(b"-ERR"):
        return ServerError(line[4:].decode(errors="replace").strip().strip("'"))
    if line == b"+OK":
        return None
    raise ProtocolError(f"unknown operation {line[:200]!r}")


def connect(fields: dict[str, object]) -> bytes:
    return b"CONNECT " + json.dumps(fields).encode() + b"\r\n"


def publish(subject: str, reply: str, data: bytes) -> bytes:
    """ValueError for what is no subject."""
    if reply:
        return b"%b%b %d\r\n%b\r\n" % (_publish_head(subject), _checked(reply).encode(), len(data), data)
    return b"%b%d\r\n%b\r\n" % (_publish_head(subject), len(data), data)


@lru_cache(maxsize=1024)  # checked and encoded once for all messages to it; a reply subject seldom comes twice
def _publish_head(subject: str) -> bytes:
    return f"PUB {_checked(subject)} ".encode()


def _checked(subject: str) -> str:
    if not is_subject(subject):
        raise ValueError(f"not a subject: {subject!r}")
    return subject


def is_subject(text: str) -> bool:
    return text.split() == [text]  # without white space, and not empty


def subscribe(sid: int, subject: str, queue: str) -> bytes:
    return f"SUB {subject} {queue} {sid}\r\n".encode()


def unsubscribe(sid: int) -> bytes:
    return f"UNSUB {sid}\r\n".encode()

"""The interface of all parsers, and what they have in common.

Text goes in piece by piece, wherever its borders lie; the pieces that come out, put together, are always the same. A
call is given out when it is whole: nobody can act on half of one. What looks like a call and is none is text.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec

T = TypeVar("T")


def new_call_id() -> str:
    return "call_" + uuid.uuid4().hex[:24]


@dataclass(frozen=True, slots=True)
class Call:
    """``arguments``: JSON, as the model wrote it."""

    name: str
    arguments: str
    id: str = field(default_factory=new_call_id, compare=False)


@dataclass(slots=True)
class Parsed:
    """What has become certain."""

    text: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)

    def __add__(self, other: Parsed) -> Parsed:
        return Parsed(self.text + other.text, self.reasoning + other.reasoning, self.calls + other.calls)


class OutputParser:
    """One per choice."""

    #: Special tokens that it has to see, though they are no text.
    markers: tuple[str, ...] = ()

    def push(self, text: str) -> Parsed:
        raise NotImplementedError

    def finish(self) -> Parsed:
        """What was held back. Nothing is pushed after it."""
        raise NotImplementedError


#: Makes a choice's parser.
NewParser = Callable[[], OutputParser]


class Then(OutputParser):
    """``first`` takes the reasoning out, ``second`` the calls out of the rest."""

    def __init__(self, first: OutputParser, second: OutputParser) -> None:
        self._first = first
        self._second = second
        self.markers = first.markers + second.markers

    def push(self, text: str) -> Parsed:
        return self._rest(self._first.push(text))

    def finish(self) -> Parsed:
        return self._rest(self._first.finish()) + self._second.finish()

    def _rest(self, parsed: Parsed) -> Parsed:
        rest = self._second.push(parsed.text) if parsed.text else Parsed()
        return Parsed(rest.text, parsed.reasoning, rest.calls)


class Margins:
    """Takes away the white space around calls, and leaves that within text."""

    def __init__(self) -> None:
        self._held = ""
        self._called = False

    def text(self, text: str) -> str:
        body = text.rstrip()
        if not body:
            self._held += text
            return ""
        said = body.lstrip() if self._called else self._held + body
        self._held, self._called = text[len(body) :], False
        return said

    def call(self) -> None:
        self._held, self._called = "", True

    def finish(self) -> str:
        return "" if self._called else self._held


class _Written(msgspec.Struct):
    """How models write a call; families differ in the name of the second field."""

    name: str
    arguments: msgspec.Raw = msgspec.Raw(b"")
    parameters: msgspec.Raw = msgspec.Raw(b"")

    def call(self, call_id: str | None = None) -> Call:
        raw = bytes(self.arguments) or bytes(self.parameters) or b"{}"
        arguments = raw.decode()
        if arguments.startswith('"'):  # JSON within JSON
            arguments = msgspec.json.decode(raw, type=str)
            msgspec.json.decode(arguments)
        return Call(self.name, arguments) if call_id is None else Call(self.name, arguments, call_id)


_one = msgspec.json.Decoder(_Written)
_many = msgspec.json.Decoder(list[_Written])
_scan = json.JSONDecoder()


def read_call(text: str) -> Call:
    """ValueError for what is no call."""
    return _read(lambda: _one.decode(text).call())


def read_calls(text: str, new_id: Callable[[], str] = new_call_id) -> list[Call]:
    """Of a JSON list. ValueError for what is none of calls."""
    return _read(lambda: [written.call(new_id()) for written in _many.decode(text)])


def end_of_json(text: str, start: int) -> int:
    """Where the JSON value that begins at ``start`` ends. ValueError if none does."""
    return _read(lambda: _scan.raw_decode(text, start)[1])


def _read(what: Callable[[], T]) -> T:
    try:
        return what()
    except RecursionError:
        raise ValueError("nested too deeply") from None


def held_back(text: str, markers: Sequence[str]) -> int:
    """Length of the longest end of ``text`` that may become one of ``markers``."""
    for length in range(min(max(map(len, markers)) - 1, len(text)), 0, -1):
        end = text[-length:]
        if any(marker.startswith(end) for marker in markers):
            return length
    return 0

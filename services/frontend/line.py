"""A stream under way, packed flat: all that its next plain token touches.

Each stream is touched once per step of its engine, and other work comes between, so what a token costs is mostly memory
that no cache holds any more. Hence one object in the place of the dozen that a token passes otherwise (effect, choice,
detokenizer, delta, answer, response), and a write at once. It takes only what is plain; whatever else befalls the
stream closes it (``Journey.line``), and the long way is taken until nothing waits any more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

_encode = msgspec.json.Encoder().encode


class Flow(Protocol):
    """Of a connection."""

    @property
    def write_paused(self) -> bool: ...


class Line:
    __slots__ = ("_around", "_closing", "_flow", "_full", "_opening", "_texts", "_write")

    def __init__(
        self,
        texts: Sequence[str | None],
        around: tuple[bytes, bytes],
        write: Callable[[bytes], None],
        flow: Flow,
        full: Callable[[], None],
    ) -> None:
        """``texts``: by token, None for what is no text by itself. ``around`` a token's JSON string, in its event.
        ``full`` is called once the client's connection is."""
        self._texts = texts
        self._opening, self._closing = around
        self._around = sum(map(len, around))
        self._write = write
        self._flow = flow
        self._full = full

    def take(self, tokens: Sequence[int]) -> bool:
        """Says them: an HTTP chunk, with an event for each that says something. False, and nothing is said, unless each
        is text by itself."""
        texts = self._texts
        try:
            if len(tokens) == 1:  # by far the most, and half the time without lists
                text = texts[tokens[0]]
                if not text:
                    return text is not None
                events = _encode(text)
            else:
                pieces = [texts[token] for token in tokens]
                if None in pieces:
                    return False
                events = (self._closing + self._opening).join([_encode(piece) for piece in pieces if piece])
                if not events:
                    return True
        except IndexError:  # of the embedding matrix's padding
            return False
        self._write(b"%x\r\n%b%b%b\r\n" % (self._around + len(events), self._opening, events, self._closing))
        if self._flow.write_paused:
            self._full()
        return True

"""Reasoning that stands at the beginning, between an opening and a closing mark."""

from __future__ import annotations

from services.frontend.parsers.output import OutputParser, Parsed, held_back


class Reasoning(OutputParser):
    """``inside``: the prompt has opened it already. White space around the marks belongs to neither side."""

    def __init__(self, opening: str, closing: str, *, inside: bool = False) -> None:
        self.markers = (opening, closing)
        self._opening = opening
        self._closing = closing
        self._text = ""
        self._inside: bool | None = True if inside else None
        self._fresh = True  # nothing but white space since the last mark

    def push(self, text: str) -> Parsed:
        self._text += text
        if self._inside is None and not self._decide():
            return Parsed()
        if not self._inside:
            return Parsed(self._take(len(self._text)))
        before, found, rest = self._text.partition(self._closing)
        if not found:
            return Parsed(reasoning=self._take(len(before) - self._kept(before)))
        self._text = before.rstrip()
        said = self._take(len(self._text))
        self._text, self._inside, self._fresh = rest, False, True
        return Parsed(self._take(len(rest)), said)

    def finish(self) -> Parsed:
        if self._inside is None:
            self._fresh = False  # white space was all there was
        rest = self._take(len(self._text))
        return Parsed(reasoning=rest) if self._inside else Parsed(rest)

    def _decide(self) -> bool:
        start = self._text.lstrip()
        if start.startswith(self._opening):
            self._inside, self._text = True, start[len(self._opening) :]
        elif self._opening.startswith(start):
            return False
        else:
            self._inside, self._fresh = False, False
        return True

    def _kept(self, text: str) -> int:
        """What may be, or stand before, the closing mark."""
        keep = held_back(text, (self._closing,))
        body = text[: len(text) - keep]
        return keep + len(body) - len(body.rstrip())

    def _take(self, length: int) -> str:
        taken, self._text = self._text[:length], self._text[length:]
        if self._fresh:
            taken = taken.lstrip()
            self._fresh = not taken
        return taken

"""Cuts text, as it arrives, exactly before the first stop string, wherever the borders of the pieces lie.

Text that may still turn out to be the beginning of a stop string is held back: what has been given out never
belongs to one. "First" is the one that is complete first; of two that end together, the longer.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    def __init__(self, stops: Sequence[str]) -> None:
        """``stops``: none of them empty."""
        self._stops = tuple(stops)
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""
        #: The stop string that was found.
        self.found: str | None = None

    def push(self, text: str) -> str:
        """The part of the text so far that can be given out now. Nothing more once one was found."""
        if self.found is not None:
            return ""
        text = self._held + text
        cut = self._find(text)
        if cut is not None:
            self._held = ""
            return text[:cut]
        keep = self._partial(text)
        self._held = text[len(text) - keep :] if keep else ""
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back: no stop string came of it."""
        held, self._held = self._held, ""
        return held

    def _find(self, text: str) -> int | None:
        best: tuple[int, int] | None = None
        for stop in self._stops:
            start = text.find(stop)
            if start >= 0 and (best is None or (start + len(stop), start) < best):
                best = (start + len(stop), start)
                self.found = stop
        return best[1] if best else None

    def _partial(self, text: str) -> int:
        """Length of the longest end of ``text`` that begins a stop string."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            end = text[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0

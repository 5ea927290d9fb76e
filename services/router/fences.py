"""Requests that were cancelled before they were heard of.

The bus keeps the order of one subject, not between two: an abort may overtake its request. Whoever took the request
in afterwards would place work that its workers drop without a word, and keep room for it up to its time limit.
Pure bookkeeping; ``now`` is an argument.
"""

from __future__ import annotations

from tandem.core.types import RequestKey

#: What is overtaken is milliseconds late; a router whose loop is blocked, or that reconnects, seconds.
REMEMBERED_S = 30.0


class Fences:
    def __init__(self) -> None:
        #: (id, choice or None for all) -> (highest attempt cancelled, when that was heard), in order of hearing.
        self._cancelled: dict[tuple[str, int | None], tuple[int, float]] = {}

    def __len__(self) -> int:
        return len(self._cancelled)

    def add(self, request_id: str, max_attempt: int, choice: int | None, now: float) -> None:
        """No attempt up to ``max_attempt`` of that choice (None: of all) is wanted any more."""
        name = (request_id, choice)
        known, _ = self._cancelled.pop(name, (-1, 0.0))
        self._cancelled[name] = (max(known, max_attempt), now)
        while self._cancelled:
            oldest = next(iter(self._cancelled))
            if self._cancelled[oldest][1] + REMEMBERED_S > now:
                break
            del self._cancelled[oldest]

    def holds(self, key: RequestKey) -> bool:
        if not self._cancelled:  # as mostly: every request asks
            return False
        names: tuple[tuple[str, int | None], ...] = ((key.id, None), (key.id, key.choice))
        return any(key.attempt <= self._cancelled[name][0] for name in names if name in self._cancelled)

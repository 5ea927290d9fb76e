"""Placed requests of which nothing has been heard for a while, and what their workers say when they are asked.

Lifecycle events travel best effort. Whichever of a request's get lost, its workers know what became of it, for as long
as it takes to ask them; and if neither the worker that got the assignment nor the one that was to decode knows it, it
exists nowhere. Pure bookkeeping; ``now`` is an argument.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from msgspec import Struct

from tandem.core.types import RequestKey


class _Placed(Struct):
    workers: Sequence[str]
    heard_s: float  # or asked, whichever was later
    #: Those that did not know it when they were asked last.
    denied: tuple[str, ...] = ()


class Doubts:
    def __init__(self, ask_s: float) -> None:
        """``ask_s``: silence after which workers are asked, and asked again. Well below the time for which a worker
        remembers what it has finished."""
        self._ask_s = ask_s
        self._placed: dict[RequestKey, _Placed] = {}

    def __len__(self) -> int:
        return len(self._placed)

    def placed(self, key: RequestKey, workers: Sequence[str], now: float) -> None:
        """``workers``: who gets the assignment and who is to decode."""
        self._placed[key] = _Placed(workers, now)

    def heard(self, key: RequestKey, now: float) -> None:
        """A worker has shown that it knows it."""
        placed = self._placed.get(key)
        if placed is not None:
            placed.heard_s = now
            placed.denied = ()

    def keep(self, wanted: Callable[[RequestKey], bool]) -> None:
        """Forgets all others."""
        self._placed = {key: placed for key, placed in self._placed.items() if wanted(key)}

    def questions(self, now: float) -> dict[str, list[RequestKey]]:
        """worker -> what it is to be asked about, now."""
        asked: dict[str, list[RequestKey]] = {}
        for key, placed in self._placed.items():
            if now - placed.heard_s >= self._ask_s:
                placed.heard_s = now
                placed.denied = ()
                for worker in set(placed.workers):
                    asked.setdefault(worker, []).append(key)
        return asked

    def denied(self, key: RequestKey, worker: str) -> bool:
        """``worker`` does not know it. True when that was the last who could have."""
        placed = self._placed.get(key)
        if placed is None:
            return False
        placed.denied += (worker,)
        return all(worker in placed.denied for worker in placed.workers)

"""The prefix index as a router sees it that learns of the caches late."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from tandem.enginemodel.block_pool import CacheEvent, Removed, Stored


class LateIndex:
    """Shows each worker's cache as it was ``age_s`` ago."""

    def __init__(self, age_s: float) -> None:
        self._age_s = age_s
        self._cached: dict[str, set[int]] = {}
        self._coming: deque[tuple[float, str, CacheEvent]] = deque()

    def note(self, worker: str, at: float, events: Sequence[CacheEvent]) -> None:
        self._coming.extend((at, worker, event) for event in events)

    def lookup(self, hashes: Sequence[int], now: float) -> dict[str, int]:
        """Worker -> blocks of the longest known prefix."""
        while self._coming and self._coming[0][0] <= now - self._age_s:
            _, worker, event = self._coming.popleft()
            cached = self._cached.setdefault(worker, set())
            match event:
                case Stored(hashes=stored):
                    cached.update(stored)
                case Removed(hashes=removed):
                    cached.difference_update(removed)
                case _:
                    cached.clear()
        found = {worker: _depth(cached, hashes) for worker, cached in self._cached.items()}
        return {worker: depth for worker, depth in found.items() if depth}


def _depth(cached: set[int], hashes: Sequence[int]) -> int:
    for depth, block in enumerate(hashes):
        if block not in cached:
            return depth
    return len(hashes)

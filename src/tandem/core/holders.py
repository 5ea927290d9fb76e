"""Who holds how much of a prompt, at a cost per request that hardly grows with the fleet.

A system prompt lies on every worker. To spell that out takes longer than a placement, and nearly nobody asks: a
placement looks at the few that hold most, and at a few others by their standing. So what the prefix index answers
stays as it came, levels of (depth, bitmap of slots), and reads like a dict of all that. What every worker holds becomes
one number (``apart``).

Not compiled: mypyc has no classes that are collections of the standard library's kind.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice

#: Depth or tokens, and the slots that hold just that: bit n is slot n. The deepest comes first.
Level = tuple[int, int]
#: So many are spelt out after all: looked up in a dict, each takes a third of the time.
_FEW = 64


def _bits(bitmap: int) -> Iterator[int]:
    while bitmap:
        lowest = bitmap & -bitmap
        yield lowest.bit_length() - 1
        bitmap ^= lowest


class Depths(Mapping[int, int]):
    """slot -> leading blocks held; slots that hold none are absent. In the order of ``levels``, then of slots."""

    __slots__ = ("levels",)

    def __init__(self, levels: Sequence[Level]) -> None:
        self.levels = levels

    @classmethod
    def of(cls, depths: Mapping[int, int]) -> Depths:
        levels: dict[int, int] = {}
        for slot, depth in depths.items():
            levels[depth] = levels.get(depth, 0) | 1 << slot
        return cls(sorted(levels.items(), reverse=True))

    def __getitem__(self, slot: int) -> int:
        for depth, bitmap in self.levels:
            if bitmap >> slot & 1:
                return depth
        raise KeyError(slot)

    def __iter__(self) -> Iterator[int]:
        for _, bitmap in self.levels:
            yield from _bits(bitmap)

    def __len__(self) -> int:
        return sum(bitmap.bit_count() for _, bitmap in self.levels)


class Slots:
    """Whose they are. All workers of a model have the same block size."""

    __slots__ = ("block_size", "known", "slot_of", "worker_on")

    def __init__(self, workers: Iterable[tuple[str, int]], block_size: int) -> None:
        """``workers``: id and slot."""
        self.slot_of = dict(workers)
        self.worker_on = {slot: worker for worker, slot in self.slot_of.items()}
        self.known = sum(1 << slot for slot in self.worker_on)
        self.block_size = block_size


class Holders(Mapping[str, int]):
    """worker -> cached prompt tokens, as ``cached_by_worker`` makes it."""

    __slots__ = ("_levels", "_slots")

    def __init__(self, levels: Sequence[Level], slots: Slots) -> None:
        """``levels``: of tokens, and of ``slots`` only."""
        self._levels = levels
        self._slots = slots

    def get(self, worker: str, default: int = 0) -> int:  # type: ignore[override]  # placement asks for no other kind
        slot = self._slots.slot_of.get(worker)
        if slot is not None:
            for tokens, bitmap in self._levels:
                if bitmap >> slot & 1:
                    return tokens
        return default

    def __getitem__(self, worker: str) -> int:
        found = self.get(worker, -1)
        if found < 0:
            raise KeyError(worker)
        return found

    def __iter__(self) -> Iterator[str]:
        for _, bitmap in self._levels:
            for slot in _bits(bitmap):
                yield self._slots.worker_on[slot]

    def __len__(self) -> int:
        return sum(bitmap.bit_count() for _, bitmap in self._levels)

    def above_least(self) -> tuple[Mapping[str, int], int]:
        """Those that hold more than the least that any does, and that."""
        return _spelt(self._levels[:-1], self._slots), self._levels[-1][0] if self._levels else 0


def _spelt(levels: Sequence[Level], slots: Slots) -> Mapping[str, int]:
    """In one loop: most requests have few holders, and each request has some."""
    if sum([bitmap.bit_count() for _, bitmap in levels]) > _FEW:
        return Holders(levels, slots)
    worker_on, found = slots.worker_on, {}
    for tokens, bitmap in levels:
        while bitmap:
            lowest = bitmap & -bitmap
            found[worker_on[lowest.bit_length() - 1]] = tokens
            bitmap ^= lowest
    return found


def cached_by_worker(depths: Depths, slots: Slots) -> Mapping[str, int]:
    """worker -> cached prompt tokens; slots that are nobody's are left out. Those that hold most come first."""
    size, known = slots.block_size, slots.known
    return _spelt([(depth * size, held) for depth, bitmap in depths.levels if (held := bitmap & known)], slots)


def apart(cached: Mapping[str, int], fleet: int) -> tuple[Mapping[str, int], int]:
    """Who holds more than all of the ``fleet`` do, and what those do."""
    if len(cached) < fleet or not cached:
        return cached, 0
    if type(cached) is Holders:
        return cached.above_least()
    least = min(cached.values())
    return {worker: tokens for worker, tokens in cached.items() if tokens > least}, least


def without(cached: Mapping[str, int], worker: str, common: int) -> Mapping[str, int]:
    """Of a request that waited when ``worker`` came: what it holds was not asked for, and it is not one of all."""
    return {**cached, worker: 0} if common or worker in cached else cached


def deepest(cached: Mapping[str, int]) -> str | None:
    """Who holds most; of several, whoever comes first."""
    if len(cached) < 2 or type(cached) is Holders:
        return next(iter(cached), None)
    return max(cached, key=cached.__getitem__, default=None)


def front(cached: Mapping[str, int], count: int) -> list[str]:
    """The holders; of many the ``count`` that hold most."""
    if type(cached) is Holders:  # isinstance is Python code for collections of the standard library's kind
        return list(islice(cached, count))
    return list(cached) if len(cached) <= count else sorted(cached, key=cached.__getitem__, reverse=True)[:count]

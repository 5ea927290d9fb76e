"""Paged KV blocks with reference counts and a prefix cache, after vLLM's block pool.

Full blocks are cached under their chained hash. A block that nobody uses stays cached until its room is needed; the
least recently used goes first, and within one sequence the tail before the head. At most one block carries a hash: a
sequence that computed a duplicate adopts the cached one (vLLM keeps both). Hence whoever uses a block uses its parent
too, and the cache is *prefix-closed* at all times: no cached block without its cached parent.

``content`` says what a block's memory holds: the hash of what was written there, so the right value for a cached block
is its own hash. A block filled from a KV transfer that read other data is *tainted*: content and hash differ. Whoever
reuses it computes on wrong KV, as a real engine would.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

_U64 = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Stored:
    """Blocks that entered the cache, a chain under ``parent`` (None = from block 0)."""

    hashes: Sequence[int]
    parent: int | None
    token_ids: Sequence[int] = ()  # empty where the caller models no tokens
    lora: str = ""
    cache_salt: str = ""


@dataclass(frozen=True, slots=True)
class Removed:
    hashes: Sequence[int]


@dataclass(frozen=True, slots=True)
class Cleared:
    pass


CacheEvent = Stored | Removed | Cleared


def mix_taint(taint: int, got: int, wanted: int) -> int:
    """``taint`` and one more block that holds ``got`` instead of ``wanted``."""
    return taint if got == wanted else ((taint * 0x9E3779B97F4A7C15) ^ got ^ wanted) & _U64 or 1


class BlockPool:
    """``num_blocks`` blocks, named by index."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.content = [0] * num_blocks
        self.events: list[CacheEvent] = []
        self._refs = [0] * num_blocks
        self._hash: list[int | None] = [None] * num_blocks
        self._cached: dict[int, int] = {}  # hash -> block
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # next to be reused first
        self._tainted: set[int] = set()

    @property
    def num_free(self) -> int:
        """Blocks that nobody uses, cached or not."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def refs(self, block: int) -> int:
        """How many use this block."""
        return self._refs[block]

    def cached_hashes(self) -> frozenset[int]:
        return frozenset(self._cached)

    def is_cached(self, block_hash: int) -> bool:
        return block_hash in self._cached

    def match(self, hashes: Sequence[int], limit: int) -> list[int]:
        """Blocks of the longest cached prefix of ``hashes``, at most ``limit``. Takes no reference."""
        found = []
        cached = self._cached
        for block_hash in hashes[:limit]:
            block = cached.get(block_hash)
            if block is None:
                break
            found.append(block)
        return found

    def num_idle(self, blocks: Iterable[int]) -> int:
        """How many of ``blocks`` count as free now, so that taking them uses up free room."""
        refs = self._refs
        return sum(not refs[block] for block in blocks)

    def take(self, blocks: Iterable[int]) -> None:
        """One more user for each of these cached blocks."""
        refs = self._refs
        for block in blocks:
            if not refs[block]:
                del self._free[block]
            refs[block] += 1

    def allocate(self, count: int) -> list[int]:
        """Blocks for new data, evicting cached ones. ValueError if fewer are free."""
        if count > len(self._free):
            raise ValueError(f"{count} blocks wanted, {len(self._free)} free")
        taken = []
        evicted = []
        for _ in range(count):
            block = self._free.popitem(last=False)[0]
            old = self._hash[block]
            if old is not None:
                del self._cached[old]
                self._hash[block] = None
                self._tainted.discard(block)
                evicted.append(old)
            self.content[block] = 0
            self._refs[block] = 1
            taken.append(block)
        if evicted:
            self.events.append(Removed(tuple(evicted)))
        return taken

    def would_evict(self, count: int) -> bool:
        """Whether any of the next ``count`` blocks to be reused is cached."""
        return any(self._hash[block] is not None for block in islice(self._free, count))

    def release(self, blocks: Sequence[int]) -> None:
        """One user less for each. The last of the sequence will be reused first."""
        refs = self._refs
        for block in reversed(blocks):
            if refs[block] <= 0:
                raise ValueError(f"block {block} is not in use")
            refs[block] -= 1
            if not refs[block]:
                self._free[block] = None

    def cache(self, block: int, block_hash: int, content: int) -> int:
        """Enter a full block under its hash; returns the block to use: another one, if the hash is cached already."""
        twin = self._cached.get(block_hash)
        if twin is not None:
            if twin != block:
                self.take((twin,))
                self.release((block,))
            return twin
        self._cached[block_hash] = block
        self._hash[block] = block_hash
        self.content[block] = content
        if content != block_hash:
            self._tainted.add(block)
        return block

    def taint(self, blocks: Iterable[int]) -> int:
        """0 if these cached blocks hold what their hashes say, else a value that depends on what they hold."""
        if not self._tainted:
            return 0
        mixed = 0
        for block in blocks:
            block_hash = self._hash[block]
            if block in self._tainted and block_hash is not None:
                mixed = mix_taint(mixed, self.content[block], block_hash)
        return mixed

    def clear_cache(self) -> None:
        """Forget all hashes; blocks in use stay with their users."""
        for block in self._cached.values():
            self._hash[block] = None
        self._cached.clear()
        self._tainted.clear()
        self.events.append(Cleared())

    def take_events(self) -> list[CacheEvent]:
        events, self.events = self.events, []
        return events

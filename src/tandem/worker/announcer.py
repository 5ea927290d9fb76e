"""Keeps the store's picture of this worker true: its registry entry, and its blocks in the prefix index.

The engine's KV events go through ``PublishedBlocks`` (pure: what comes out is prefix-closed) into one loop that sends
what has gathered. When the store was away, came back empty, or the slot went to another incarnation, the worker
registers again and announces everything. A stale entry costs a hit, never correctness.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Callable, Sequence

from tandem.adapters.store import PrefixIndex, Registry
from tandem.core.blocks import root_hash
from tandem.core.prefix_index import PublishedBlocks
from tandem.core.types import Role, WorkerSpec
from tandem.engine.protocol import AllBlocksCleared, BlocksRemoved, BlocksStored, EventsMissed, KvEvent
from tandem.errors import StoreUnavailable

log = logging.getLogger(__name__)

#: Events of this long are sent together: about two steps of an engine.
GATHER_S = 0.02
#: Blocks in one update of the index.
BATCH_BLOCKS = 2000
#: Prompts in a row of which less was cached than the index said.
OVER_REPORTS = 2
#: Between two announcements of everything for that reason: a cache under pressure evicts faster than an index can tell.
SUSPICION_S = 60.0


class Announcer:
    def __init__(
        self,
        registry: Registry,
        index: PrefixIndex,
        spec: WorkerSpec,
        *,
        ttl_s: float,
        now: Callable[[], float],
    ) -> None:
        self._registry = registry
        self._index = index
        self.spec = spec
        self._ttl_s = ttl_s
        self._blocks = PublishedBlocks(spec.block_size)
        self._events: list[KvEvent] = []
        self._add: dict[int, None] = {}
        self._remove: dict[int, None] = {}
        self._wake = asyncio.Event()
        self._all_again = False
        self._over_reports = 0
        self._now = now
        self._suspected_at = -SUSPICION_S
        self.complete = True
        #: Losses of events, and announcements of everything, so far.
        self.gaps = 0
        self.announcements = 0

    # -- from the engine -------------------------------------------------------------------------------------------

    def on_kv_events(self, events: Sequence[KvEvent]) -> None:
        """Dealt with when they have gathered."""
        self._events.extend(events)
        self._wake.set()

    def _take_in(self) -> None:
        events, self._events = self._events, []
        for event in events:
            match event:
                case BlocksStored():
                    root = root_hash(self.spec.model, event.lora, event.cache_salt)
                    self._gather(*self._blocks.stored(event.block_hashes, event.parent_hash, event.token_ids, root))
                case BlocksRemoved():
                    self._gather(*self._blocks.removed(event.block_hashes))
                case AllBlocksCleared():
                    self._gather(*self._blocks.cleared())
                    self.complete = True
                case EventsMissed():
                    self.gaps += 1
                    self._gather(*self._blocks.missed())
                    self.complete = False

    def cached(self, told: int, found: int) -> None:
        """A prompt of which the index said that we hold ``told`` tokens, and the engine had ``found``.

        The last block of a prompt may have to be computed although it is cached. Twice in a row less than that means
        that the index is wrong about us."""
        if told <= 0:
            return
        self._over_reports = self._over_reports + 1 if told - found > self.spec.block_size else 0
        now = self._now()
        if self._over_reports >= OVER_REPORTS and now - self._suspected_at >= SUSPICION_S:
            self._over_reports, self._suspected_at = 0, now
            log.warning("the prefix index says more than is here: announcing everything again")
            self.announce_all()

    def announce_all(self) -> None:
        self._all_again = True
        self._wake.set()

    def _gather(self, add: Sequence[int], remove: Sequence[int]) -> None:
        for block in remove:
            if block in self._add:
                del self._add[block]
            self._remove[block] = None
        for block in add:
            self._remove.pop(block, None)
            self._add[block] = None

    # -- to the store ----------------------------------------------------------------------------------------------

    async def register(self) -> None:
        """IncompatibleWorker if this worker may not join; StoreUnavailable when Redis is away."""
        self.spec = await self._registry.register(self.spec, ttl_s=self._ttl_s)

    async def change(self, *, role: Role | None = None, draining: bool | None = None) -> None:
        """Role or drain state changed: say so at once, not at the next refresh."""
        self.spec = dataclasses.replace(
            self.spec,
            role=self.spec.role if role is None else role,
            draining=self.spec.draining if draining is None else draining,
        )
        try:
            await self._registry.refresh(self.spec, ttl_s=self._ttl_s)
        except StoreUnavailable as error:
            log.warning("registry not told of the change: %s", error)

    async def refresh_forever(self) -> None:
        while True:
            await asyncio.sleep(self._ttl_s / 4)
            try:
                if not await self._registry.refresh(self.spec, ttl_s=self._ttl_s):
                    log.warning("registry entry is gone: registering again")
                    await self.register()
                    self.announce_all()
            except StoreUnavailable as error:
                log.warning("registry not refreshed: %s", error)

    async def publish_forever(self) -> None:
        while True:
            await self._wake.wait()
            await asyncio.sleep(GATHER_S)
            self._wake.clear()
            try:
                await self._publish()
            except StoreUnavailable as error:
                log.warning("prefix index not updated: %s", error)
                self._all_again = True
                await asyncio.sleep(1.0)
                self._wake.set()

    async def _publish(self) -> None:
        self._take_in()
        if self._all_again:
            self._all_again = False
            self.announcements += 1
            await self._index.drop(self.spec)
            self._remove = {}
            self._add = dict.fromkeys(self._blocks.snapshot())
        while self._add or self._remove:
            remove = list(self._remove)[:BATCH_BLOCKS]
            # Parents come before their children in both; what is left over goes with the next batch.
            add = list(self._add)[: BATCH_BLOCKS - len(remove)]
            for block in remove:
                del self._remove[block]
            for block in add:
                del self._add[block]
            if not await self._index.update(self.spec, add=add, remove=remove):
                log.warning("index slot is not ours any more: registering again")
                await self.register()
                self._all_again = True
                self._wake.set()
                return

    async def leave(self) -> None:
        try:
            await self._registry.deregister(self.spec)
        except StoreUnavailable as error:
            log.warning("not deregistered: %s", error)

"""What the store suites share: one object per kind of store that can be taken away, wiped and aged."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

from tandem.adapters.clock import new_name
from tandem.adapters.embedded import RedisServer
from tandem.adapters.memory_store import (
    MemoryCounters,
    MemoryLeases,
    MemoryPrefixIndex,
    MemoryRegistry,
    MemoryStore,
)
from tandem.adapters.redis_client import RedisClient, connect
from tandem.adapters.redis_store import RedisCounters, RedisLeases, RedisPrefixIndex, RedisRegistry
from tandem.adapters.store import Counters, Leases, PrefixIndex, Registry
from tandem.core.types import Role, WorkerAddress, WorkerSpec

MODEL = "org/model:1.5 b"


def spec(worker: str = "w1", incarnation: int = 1, **changes: Any) -> WorkerSpec:
    made = WorkerSpec(
        address=WorkerAddress(worker, incarnation, "127.0.0.1:5000"),
        model=MODEL,
        role=Role.DECODE,
        slot=0,
        block_size=16,
        dtype="float32",
        kv_layout="NHD",
        engine="sim",
        engine_version="1",
        max_model_len=8192,
        kv_blocks_total=1000,
        kv_bytes_per_token=46080,
        max_batched_tokens=512,
        max_num_seqs=32,
        perf_profile="cpu",
        kv_endpoint="127.0.0.1:6000",
        loras=frozenset({"a", "b"}),
        pool="p",
    )
    return dataclasses.replace(made, **changes)


class MemoryWorld:
    """Time stands still unless a test ages the store."""

    def __init__(self, max_slots: int) -> None:
        self._now = 100.0
        self.store = MemoryStore(now=lambda: self._now, max_slots=max_slots)
        self.registry: Registry = MemoryRegistry(self.store)
        self.leases: Leases = MemoryLeases(self.store)
        self.index: PrefixIndex = MemoryPrefixIndex(self.store)
        self.counters: Counters = MemoryCounters(self.store)

    async def pass_time(self, seconds: float) -> None:
        self._now += seconds

    async def go_away(self) -> None:
        self.store.available = False

    async def come_back_empty(self) -> None:
        self.store.wipe()
        self.store.available = True

    async def settle(self) -> None:
        pass

    async def close(self) -> None:
        pass


class RedisWorld:
    def __init__(self, max_slots: int, *, server: Any = None, shared: bool = True) -> None:
        """``server``: one to share, or, not ``shared``, one of another kind than the embedded. A world that goes away
        has its own."""
        self._server = server or RedisServer()
        self._shared = shared and server is not None
        self._max_slots = max_slots

    async def open(self) -> RedisWorld:
        if not self._shared:
            await self._server.start()
        self.client: RedisClient = await connect(self._server.url, timeout_s=20.0)
        cluster = new_name("test")
        self.registry: Registry = RedisRegistry(self.client, cluster, max_slots=self._max_slots)
        self.leases: Leases = RedisLeases(self.client, cluster)
        self.index: PrefixIndex = RedisPrefixIndex(self.client, cluster)
        self.counters: Counters = RedisCounters(self.client, cluster)
        return self

    async def pass_time(self, seconds: float) -> None:
        await asyncio.sleep(seconds * 1.1)

    async def go_away(self) -> None:
        self._server.kill()

    async def come_back_empty(self) -> None:
        await self._server.start()

    async def settle(self) -> None:
        """Everything that is to be swept is swept."""
        assert isinstance(self.index, RedisPrefixIndex)
        while await self.index.sweep(MODEL):
            pass

    async def close(self) -> None:
        await self.client.aclose()
        if not self._shared:
            await self._server.close()


World = MemoryWorld | RedisWorld


async def open_world(kind: str, *, max_slots: int = 512, server: Any = None, shared: bool = True) -> World:
    if kind == "memory":
        return MemoryWorld(max_slots)
    return await RedisWorld(max_slots, server=server, shared=shared).open()

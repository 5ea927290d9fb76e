"""The store's picture of a worker follows its engine's cache, through gaps, outages and lost slots."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from tandem.adapters.memory_store import MemoryPrefixIndex, MemoryRegistry, MemoryStore
from tandem.core.blocks import root_hash, sequence_hashes, token_bytes
from tandem.core.types import Role, WorkerAddress, WorkerSpec
from tandem.engine.protocol import AllBlocksCleared, BlocksRemoved, BlocksStored, EventsMissed
from tandem.worker.announcer import SUSPICION_S, Announcer

BLOCK = 4
TOKENS = list(range(40))
HASHES = sequence_hashes(token_bytes(TOKENS), BLOCK, root_hash("m", "", ""))


def spec(name: str = "w", incarnation: int = 1) -> WorkerSpec:
    return WorkerSpec(
        address=WorkerAddress(name, incarnation, "h:1"), model="m", role=Role.DECODE, slot=0, block_size=BLOCK,
        dtype="bf16", kv_layout="l", engine="sim", engine_version="1", max_model_len=64, kv_blocks_total=10,
        kv_bytes_per_token=1, max_batched_tokens=64, max_num_seqs=8, perf_profile="p",
    )  # fmt: skip


def stored(first: int, last: int) -> BlocksStored:
    """Blocks of ``TOKENS``; the engine calls block i by the number i."""
    return BlocksStored(list(range(first, last)), first - 1 if first else None, TOKENS[first * BLOCK : last * BLOCK])


class World:
    def __init__(self) -> None:
        self.now = 1000.0
        self.store = MemoryStore(now=lambda: self.now)
        self.index = MemoryPrefixIndex(self.store)
        self.registry = MemoryRegistry(self.store)
        self.worker = self.announcer()

    def announcer(self, **which: Any) -> Announcer:
        return Announcer(self.registry, self.index, spec(**which), ttl_s=0.2, now=lambda: self.now)

    async def depth(self) -> int:
        found = await self.index.lookup("m", HASHES.tobytes())
        return found.get(self.worker.spec.slot, 0)

    async def becomes(self, depth: int) -> None:
        async with asyncio.timeout(10.0):
            while not self.store.available or await self.depth() != depth:  # noqa: ASYNC110
                await asyncio.sleep(0.005)


@asynccontextmanager
async def loops(*works: Callable[[], Any]) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(work()) for work in works]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(outcome, asyncio.CancelledError), outcome


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World()
    await world.worker.register()
    async with loops(world.worker.publish_forever, world.worker.refresh_forever):
        yield world


async def test_blocks_come_and_go(world: World) -> None:
    world.worker.on_kv_events([stored(0, 5), stored(5, 8)])
    await world.becomes(8)
    world.worker.on_kv_events([BlocksRemoved([6])])
    await world.becomes(6)
    world.worker.on_kv_events([stored(6, 7)])
    await world.becomes(8)
    world.worker.on_kv_events([AllBlocksCleared()])
    await world.becomes(0)


async def test_what_came_and_went_between_two_updates_is_gone(world: World) -> None:
    world.worker.on_kv_events([stored(0, 5), BlocksRemoved([2]), stored(5, 8)])
    await world.becomes(2)


async def test_after_missed_events_nothing_is_claimed_until_it_is_told_again(world: World) -> None:
    world.worker.on_kv_events([stored(0, 5)])
    await world.becomes(5)
    world.worker.on_kv_events([EventsMissed()])
    await world.becomes(0)
    assert not world.worker.complete
    world.worker.on_kv_events([stored(5, 8)])  # its parents are not known
    world.worker.on_kv_events([stored(0, 2)])
    await world.becomes(2)


async def test_what_was_said_while_the_store_was_away_is_said_again(world: World) -> None:
    world.worker.on_kv_events([stored(0, 3)])
    await world.becomes(3)
    world.store.available = False
    world.worker.on_kv_events([stored(3, 6)])
    await asyncio.sleep(0.1)
    world.worker.on_kv_events([BlocksRemoved([5])])
    world.store.available = True
    await world.becomes(5)


async def test_a_store_that_came_back_empty_is_told_everything(world: World) -> None:
    world.worker.on_kv_events([stored(0, 6)])
    await world.becomes(6)
    world.store.wipe()
    assert await world.depth() == 0
    await world.becomes(6)
    assert [entry.spec.id for entry in world.store.living()] == ["w"]


async def test_a_lost_slot_is_leased_anew_and_filled(world: World) -> None:
    world.worker.on_kv_events([stored(0, 6)])
    await world.becomes(6)
    lost = world.worker.spec
    world.store.wipe()
    other = world.announcer(name="other", incarnation=9)
    await other.register()
    assert other.spec.slot == lost.slot
    world.worker.on_kv_events([stored(6, 7)])
    async with asyncio.timeout(10.0):
        while world.worker.spec.slot == lost.slot:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    await world.becomes(7)
    assert not world.store.index("m").blocks.get(lost.slot), "nothing was written into another's slot"


async def test_a_change_of_role_and_of_draining_is_told_at_once(world: World) -> None:
    await world.worker.change(role=Role.PREFILL)
    await world.worker.change(draining=True)
    (told,) = await world.registry.workers("m")
    assert (told.role, told.draining) == (Role.PREFILL, True)


async def test_who_leaves_is_gone_at_once(world: World) -> None:
    world.worker.on_kv_events([stored(0, 3)])
    await world.becomes(3)
    await world.worker.leave()
    assert await world.registry.workers("m") == []
    assert await world.index.lookup("m", HASHES.tobytes()) == {}


async def _spoil(world: World) -> None:
    """The index says more than is there."""
    world.worker.on_kv_events([stored(0, 2)])
    await world.becomes(2)
    await world.index.update(world.worker.spec, add=list(HASHES[2:8]), remove=[])
    assert await world.depth() == 8


@pytest.mark.parametrize(
    ("prompts", "again"),
    [
        ([(32, 8)], False),  # once may be an eviction under way
        ([(32, 8), (32, 8)], True),
        ([(32, 8), (8, 8), (32, 8)], False),
        ([(32, 28), (32, 28), (32, 28)], False),  # the last block has to be computed anyway
        ([(32, 8), (0, 0), (32, 8)], True),  # nothing was told, nothing is learnt
    ],
)
async def test_a_picture_that_is_wrong_twice_in_a_row_is_made_anew(
    world: World, prompts: Sequence[tuple[int, int]], again: bool
) -> None:
    await _spoil(world)
    for told, found in prompts:
        world.worker.cached(told, found)
    if again:
        await world.becomes(2)
    else:
        await asyncio.sleep(0.1)
        assert await world.depth() == 8


async def test_suspicion_has_its_pace(world: World) -> None:
    await _spoil(world)
    for _ in range(2):
        world.worker.cached(32, 8)
    await world.becomes(2)
    await _spoil(world)
    for _ in range(5):
        world.worker.cached(32, 8)
    await asyncio.sleep(0.1)
    assert await world.depth() == 8
    world.now += SUSPICION_S
    world.worker.cached(32, 8)
    await world.becomes(2)

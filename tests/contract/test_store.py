"""The registry, the leases and the counters: in-memory twin and real Redis run the same tests."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator

import pytest

from tandem.adapters.embedded import RedisServer
from tandem.adapters.redis_client import connect
from tandem.adapters.redis_store import RedisLeases, RedisPrefixIndex, RedisRegistry
from tandem.core.types import Role
from tandem.errors import ConfigError, IncompatibleWorker, StoreUnavailable

from .stores import MODEL, World, open_world, spec

TTL_S = 30.0
SHORT_S = 0.1


@pytest.fixture(params=["memory", "redis"])
async def world(request: pytest.FixtureRequest, redis_server: RedisServer) -> AsyncIterator[World]:
    made = await open_world(request.param, server=redis_server)
    yield made
    await made.close()


@pytest.fixture(params=["memory", "redis"])
async def own_world(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    """With a server of its own, that may go away."""
    made = await open_world(request.param)
    yield made
    await made.close()


# --- registry


async def test_register_and_read_back(world: World) -> None:
    a = await world.registry.register(spec("w1"), ttl_s=TTL_S)
    b = await world.registry.register(spec("w 2:x.y", role=Role.PREFILL), ttl_s=TTL_S)
    c = await world.registry.register(spec("w3", model="other"), ttl_s=TTL_S)
    assert (a.slot, b.slot, c.slot) == (0, 1, 0)
    assert sorted(await world.registry.workers(MODEL), key=lambda s: s.slot) == [a, b]
    assert await world.registry.workers("other") == [c]
    assert sorted(await world.registry.all_workers(), key=lambda s: s.id) == [b, a, c]
    assert await world.registry.workers("nobody's") == []


async def test_large_incarnations_are_kept_exactly(world: World) -> None:
    registered = await world.registry.register(spec(incarnation=2**63 - 1), ttl_s=TTL_S)
    assert (await world.registry.workers(MODEL))[0].address.incarnation == 2**63 - 1
    assert not await world.registry.refresh(dataclasses.replace(registered, address=spec().address), ttl_s=TTL_S)
    assert await world.registry.refresh(registered, ttl_s=TTL_S)


async def test_refresh_carries_role_and_draining(world: World) -> None:
    mine = await world.registry.register(spec(), ttl_s=TTL_S)
    changed = dataclasses.replace(mine, role=Role.PREFILL, draining=True)
    assert await world.registry.refresh(changed, ttl_s=TTL_S)
    assert await world.registry.workers(MODEL) == [changed]


async def test_entry_dies_without_refresh_and_lives_with_it(world: World) -> None:
    mine = await world.registry.register(spec(), ttl_s=SHORT_S)
    assert await world.registry.refresh(mine, ttl_s=TTL_S)
    await world.pass_time(SHORT_S)
    assert await world.registry.workers(MODEL) == [mine]
    assert await world.registry.refresh(mine, ttl_s=SHORT_S)
    await world.pass_time(SHORT_S)
    assert await world.registry.workers(MODEL) == []
    assert not await world.registry.refresh(mine, ttl_s=TTL_S)
    assert await world.registry.workers(MODEL) == []


async def test_same_incarnation_registers_again_and_keeps_its_slot(world: World) -> None:
    await world.registry.register(spec("w0"), ttl_s=TTL_S)
    mine = await world.registry.register(spec(), ttl_s=SHORT_S)
    await world.pass_time(SHORT_S)
    again = await world.registry.register(spec(), ttl_s=TTL_S)
    assert again.slot == mine.slot == 1


async def test_restarted_worker_replaces_its_entry_at_once(world: World) -> None:
    old = await world.registry.register(spec(incarnation=1), ttl_s=TTL_S)
    new = await world.registry.register(spec(incarnation=2), ttl_s=TTL_S)
    assert await world.registry.workers(MODEL) == [new]
    assert not await world.registry.refresh(old, ttl_s=TTL_S)
    await world.registry.deregister(old)  # its farewell, late
    assert await world.registry.workers(MODEL) == [new]
    await world.registry.deregister(new)
    assert await world.registry.workers(MODEL) == []
    await world.registry.deregister(new)


async def test_worker_that_moves_to_another_model_leaves_the_first(world: World) -> None:
    await world.registry.register(spec(incarnation=1), ttl_s=TTL_S)
    moved = await world.registry.register(spec(incarnation=2, model="other"), ttl_s=TTL_S)
    assert await world.registry.workers(MODEL) == []
    assert await world.registry.workers("other") == [moved]


@pytest.mark.parametrize(
    ("name", "theirs", "ours"),
    [
        ("block_size", 16, 32),
        ("dtype", "float32", "bfloat16"),
        ("kv_layout", "NHD", "HND"),
        ("engine", "sim", "vllm"),
        ("engine_version", "1", "2"),
        ("wire_version", 3, 5),
    ],
)
async def test_incompatible_worker_is_refused_with_both_values(
    world: World, name: str, theirs: object, ours: object
) -> None:
    first = await world.registry.register(spec("w1"), ttl_s=TTL_S)
    with pytest.raises(IncompatibleWorker, match=f"w2 has {name} {ours}.*w1.*{theirs}") as caught:
        await world.registry.register(spec("w2", **{name: ours}), ttl_s=TTL_S)
    assert caught.value.param == name
    assert await world.registry.workers(MODEL) == [first]
    # alone, or for another model, it may
    await world.registry.register(spec("w3", model="other", **{name: ours}), ttl_s=TTL_S)
    await world.registry.register(spec("w1", 2, **{name: ours}), ttl_s=TTL_S)


async def test_wire_versions_one_apart_work_together(world: World) -> None:
    await world.registry.register(spec("w1", wire_version=1), ttl_s=TTL_S)
    await world.registry.register(spec("w2", wire_version=2), ttl_s=TTL_S)


async def test_a_dead_worker_decides_nothing(world: World) -> None:
    await world.registry.register(spec("w1"), ttl_s=SHORT_S)
    await world.pass_time(SHORT_S)
    await world.registry.register(spec("w2", block_size=32), ttl_s=TTL_S)


@pytest.mark.parametrize("kind", ["memory", "redis"])
async def test_slots_run_out_and_come_back(kind: str, redis_server: RedisServer) -> None:
    world = await open_world(kind, max_slots=3, server=redis_server)
    specs = [await world.registry.register(spec(f"w{i}"), ttl_s=TTL_S) for i in range(3)]
    assert [s.slot for s in specs] == [0, 1, 2]
    with pytest.raises(StoreUnavailable, match="all 3 slots"):
        await world.registry.register(spec("w3"), ttl_s=TTL_S)
    await world.registry.deregister(specs[1])
    await world.settle()
    assert (await world.registry.register(spec("w3"), ttl_s=TTL_S)).slot == 1
    await world.close()


async def test_many_register_at_once(world: World) -> None:
    specs = await asyncio.gather(*(world.registry.register(spec(f"w{i}"), ttl_s=TTL_S) for i in range(40)))
    assert sorted(s.slot for s in specs) == list(range(40))


# --- leases


async def test_one_holder_at_a_time(world: World) -> None:
    lease = await world.leases.acquire(MODEL, "r1", ttl_s=TTL_S, epoch_at_least=5)
    assert lease is not None
    assert (lease.model, lease.holder, lease.epoch) == (MODEL, "r1", 5)
    assert await world.leases.acquire(MODEL, "r2", ttl_s=TTL_S, epoch_at_least=0) is None
    assert await world.leases.acquire("other", "r2", ttl_s=TTL_S, epoch_at_least=0) is not None
    assert await world.leases.renew(lease, ttl_s=TTL_S)
    await world.leases.release(lease)
    assert not await world.leases.renew(lease, ttl_s=TTL_S)
    other = await world.leases.acquire(MODEL, "r2", ttl_s=TTL_S, epoch_at_least=0)
    assert other is not None
    assert other.epoch == 6
    await world.leases.release(lease)  # late; not ours any more
    assert await world.leases.renew(other, ttl_s=TTL_S)


async def test_lease_expires_and_renewal_keeps_it(world: World) -> None:
    lease = await world.leases.acquire(MODEL, "r1", ttl_s=SHORT_S, epoch_at_least=0)
    assert lease is not None
    assert await world.leases.renew(lease, ttl_s=TTL_S)
    await world.pass_time(SHORT_S)
    assert await world.leases.acquire(MODEL, "r2", ttl_s=TTL_S, epoch_at_least=0) is None
    assert await world.leases.renew(lease, ttl_s=SHORT_S)
    await world.pass_time(SHORT_S)
    assert not await world.leases.renew(lease, ttl_s=TTL_S)
    assert await world.leases.acquire(MODEL, "r2", ttl_s=TTL_S, epoch_at_least=0) is not None


async def test_epochs_only_grow(world: World) -> None:
    now_ms = 1_763_000_000_000
    last = 0
    for holder, at_least in [("a", now_ms), ("b", 0), ("a", now_ms), ("a", now_ms + 50), ("b", now_ms)]:
        lease = await world.leases.acquire(MODEL, holder, ttl_s=TTL_S, epoch_at_least=at_least)
        assert lease is not None
        assert lease.epoch > last
        assert lease.epoch >= at_least
        last = lease.epoch
        await world.leases.release(lease)
    assert last == now_ms + 51


async def test_holder_that_acquires_again_gets_a_new_epoch_and_loses_the_old(world: World) -> None:
    first = await world.leases.acquire(MODEL, "r1", ttl_s=TTL_S, epoch_at_least=0)
    second = await world.leases.acquire(MODEL, "r1", ttl_s=TTL_S, epoch_at_least=0)
    assert first is not None
    assert second is not None
    assert second.epoch == first.epoch + 1
    assert not await world.leases.renew(first, ttl_s=TTL_S)
    assert await world.leases.renew(second, ttl_s=TTL_S)


async def test_a_race_for_the_lease_has_one_winner(world: World) -> None:
    leases = await asyncio.gather(
        *(world.leases.acquire(MODEL, f"r{i}", ttl_s=TTL_S, epoch_at_least=0) for i in range(20))
    )
    assert sum(lease is not None for lease in leases) == 1


# --- counters


async def test_counters(world: World) -> None:
    assert await world.counters.load("served") == {}
    await world.counters.save("served", {"tenant a": 1.5, "b": 1e-300, "c": 123456789.123456789})
    assert await world.counters.load("served") == {"tenant a": 1.5, "b": 1e-300, "c": 123456789.123456789}
    await world.counters.save("served", {"b": 2.0})
    assert await world.counters.load("served") == {"b": 2.0}
    await world.counters.save("served", {})
    assert await world.counters.load("served") == {}


# --- outages


async def test_away_is_one_error_and_back_is_at_once(own_world: World) -> None:
    world = own_world
    mine = await world.registry.register(spec(), ttl_s=TTL_S)
    lease = await world.leases.acquire(MODEL, "r1", ttl_s=TTL_S, epoch_at_least=7)
    assert lease is not None
    await world.go_away()
    for call in (
        lambda: world.registry.register(spec(), ttl_s=TTL_S),
        lambda: world.registry.refresh(mine, ttl_s=TTL_S),
        lambda: world.registry.workers(MODEL),
        lambda: world.registry.deregister(mine),
        lambda: world.leases.acquire(MODEL, "r1", ttl_s=TTL_S, epoch_at_least=0),
        lambda: world.leases.renew(lease, ttl_s=TTL_S),
        lambda: world.index.lookup(MODEL, b"\0" * 8),
        lambda: world.index.update(mine, add=[1], remove=[]),
        lambda: world.index.drop(mine),
        lambda: world.index.size(MODEL),
        lambda: world.counters.load("x"),
        lambda: world.counters.save("x", {"a": 1.0}),
    ):
        with pytest.raises(StoreUnavailable):
            await call()
    await world.come_back_empty()
    # the very next call works, and everything says that it is new here
    assert not await world.registry.refresh(mine, ttl_s=TTL_S)
    assert not await world.index.update(mine, add=[1], remove=[])
    assert not await world.leases.renew(lease, ttl_s=TTL_S)
    assert await world.index.lookup(MODEL, b"\1" + b"\0" * 7) == {}
    mine = await world.registry.register(spec(), ttl_s=TTL_S)
    assert await world.index.update(mine, add=[1], remove=[])
    assert await world.index.lookup(MODEL, b"\1" + b"\0" * 7) == {mine.slot: 1}
    again = await world.leases.acquire(MODEL, "r1", ttl_s=TTL_S, epoch_at_least=lease.epoch + 1)
    assert again is not None
    assert again.epoch == 8


async def test_paused_redis_costs_a_deadline_and_nothing_after_it() -> None:
    async with RedisServer() as server:
        client = await connect(server.url, timeout_s=0.5)
        leases = RedisLeases(client, "c")
        assert await leases.acquire(MODEL, "r1", ttl_s=TTL_S, epoch_at_least=1) is not None
        server.pause()
        answers = await asyncio.gather(
            *(leases.acquire(MODEL, "r1", ttl_s=TTL_S, epoch_at_least=1) for _ in range(20)), return_exceptions=True
        )
        assert [type(answer) for answer in answers] == [StoreUnavailable] * 20
        server.resume()
        async with asyncio.timeout(20):
            while True:
                try:
                    lease = await leases.acquire(MODEL, "r1", ttl_s=TTL_S, epoch_at_least=1)
                    break
                except StoreUnavailable:
                    continue
        assert lease is not None  # an answer to this call, not to one of the twenty
        assert await leases.renew(lease, ttl_s=TTL_S)
        await client.aclose()
        with pytest.raises(StoreUnavailable):
            await leases.renew(lease, ttl_s=TTL_S)


async def test_scripts_survive_a_flush_of_the_script_cache(redis_server: RedisServer, cluster: str) -> None:
    client = await connect(redis_server.url)
    registry, index = RedisRegistry(client, cluster), RedisPrefixIndex(client, cluster)
    await registry.register(spec(), ttl_s=TTL_S)
    await client.call("SCRIPT", "FLUSH")
    assert len(await registry.workers(MODEL)) == 1
    assert await index.size(MODEL) == 0
    await client.aclose()


async def test_bad_urls() -> None:
    with pytest.raises(ConfigError):
        await connect("http://127.0.0.1")
    with pytest.raises(StoreUnavailable):
        await connect("redis://127.0.0.1:1")

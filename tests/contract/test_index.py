"""The prefix index: in-memory twin and real Redis, against each other's contract and a brute-force model."""

from __future__ import annotations

import asyncio
import random
from array import array
from collections.abc import AsyncIterator, Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tandem.adapters.embedded import RedisServer
from tandem.adapters.redis_client import connect
from tandem.adapters.redis_store import RedisPrefixIndex, RedisRegistry, root_key
from tandem.adapters.store import MAX_SLOTS, Found, PrefixIndex
from tandem.core.blocks import root_hash, sequence_hashes, token_bytes
from tandem.core.types import WorkerSpec
from tandem.errors import StoreUnavailable
from tandem.wire.subjects import encode

from .stores import MODEL, World, open_world, spec

TTL_S = 60.0


def chain(*tokens: int) -> list[int]:
    """Sequence hashes of a prompt of one-token blocks."""
    return list(sequence_hashes(token_bytes(tokens), 1, root_hash(MODEL)))


def packed(hashes: Sequence[int]) -> bytes:
    return array("Q", hashes).tobytes()


@pytest.fixture(params=["memory", "redis"])
async def world(request: pytest.FixtureRequest, redis_server: RedisServer) -> AsyncIterator[World]:
    made = await open_world(request.param, server=redis_server)
    yield made
    await made.close()


async def join(world: World, worker: str = "w1", incarnation: int = 1) -> WorkerSpec:
    return await world.registry.register(spec(worker, incarnation), ttl_s=TTL_S)


async def told(index: PrefixIndex, prompts: list[bytes]) -> Found:
    """What ``ask`` tells about them."""
    answer: asyncio.Future[Found] = asyncio.get_running_loop().create_future()
    index.ask(MODEL, prompts, answer.set_result)
    assert not answer.done(), "told from within"
    async with asyncio.timeout(10.0):
        return await answer


async def test_depth_per_worker(world: World) -> None:
    w1, w2, w3 = [await join(world, f"w{i}") for i in range(3)]
    prompt = chain(*range(100))
    assert await world.index.lookup(MODEL, packed(prompt)) == {}
    assert await world.index.update(w1, add=prompt[:1], remove=[])
    assert await world.index.update(w2, add=prompt, remove=[])
    assert await world.index.update(w3, add=prompt[:37] + chain(0, 1, 2, 99, 98)[3:], remove=[])
    assert await world.index.lookup(MODEL, packed(prompt)) == {w1.slot: 1, w2.slot: 100, w3.slot: 37}
    assert await world.index.lookup(MODEL, packed(prompt[:36])) == {w1.slot: 1, w2.slot: 36, w3.slot: 36}
    assert await world.index.lookup(MODEL, packed(chain(0, 1, 2, 99, 98, 97))) == {w1.slot: 1, w2.slot: 3, w3.slot: 5}
    assert await world.index.lookup(MODEL, packed(chain(7, 8))) == {}
    assert await world.index.lookup(MODEL, b"") == {}
    assert await world.index.lookup("other", packed(prompt)) == {}
    prompts = [packed(prompt[:36]), b"", packed(chain(7, 8)), packed(prompt)]
    assert await told(world.index, prompts) == [await world.index.lookup(MODEL, p) for p in prompts]
    assert await told(world.index, []) == []
    assert await world.index.size(MODEL) == 102
    assert await world.index.size("other") == 0


async def test_update_removes_and_adds_and_repeats_do_nothing(world: World) -> None:
    w1, w2 = await join(world, "w1"), await join(world, "w2")
    prompt = chain(*range(10))
    for _ in range(2):
        assert await world.index.update(w1, add=prompt, remove=[])
        assert await world.index.update(w2, add=prompt, remove=[])
    assert await world.index.size(MODEL) == 10
    for _ in range(2):
        assert await world.index.update(w1, add=[], remove=prompt[:3:-1])
    assert await world.index.lookup(MODEL, packed(prompt)) == {w1.slot: 4, w2.slot: 10}
    assert await world.index.size(MODEL) == 10
    assert await world.index.update(w2, add=prompt[4:6], remove=prompt[:3:-1])
    assert await world.index.lookup(MODEL, packed(prompt)) == {w1.slot: 4, w2.slot: 6}
    assert await world.index.size(MODEL) == 6
    assert await world.index.update(w1, add=[], remove=[])


async def test_batches_of_any_length(world: World) -> None:
    w1 = await join(world)
    prompt = chain(*range(3000))
    assert await world.index.update(w1, add=prompt, remove=[])
    assert await world.index.lookup(MODEL, packed(prompt)) == {w1.slot: 3000}
    assert await world.index.update(w1, add=[], remove=prompt[:999:-1])
    assert await world.index.lookup(MODEL, packed(prompt)) == {w1.slot: 1000}


async def test_restarted_worker_starts_with_nothing_and_the_old_one_can_write_no_more(world: World) -> None:
    old = await join(world, incarnation=1)
    prompt = chain(1, 2, 3)
    await world.index.update(old, add=prompt, remove=[])
    new = await join(world, incarnation=2)
    assert await world.index.lookup(MODEL, packed(prompt)) == {}  # masked at once, swept or not
    assert not await world.index.update(old, add=prompt, remove=[])
    assert await world.index.update(new, add=prompt[:1], remove=[])
    assert await world.index.lookup(MODEL, packed(prompt)) == {new.slot: 1}
    await world.index.drop(old)  # says nothing, does nothing
    assert await world.index.lookup(MODEL, packed(prompt)) == {new.slot: 1}
    await world.settle()
    assert await world.index.lookup(MODEL, packed(prompt)) == {new.slot: 1}
    assert await world.index.size(MODEL) == 1


async def test_a_slot_comes_back_clean(world: World) -> None:
    """Slot 0 goes from worker to worker; none inherits a bit."""
    keeper = await world.registry.register(spec("keeper"), ttl_s=TTL_S)
    await world.index.update(keeper, add=chain(0, 1), remove=[])
    for i in range(5):
        worker = await join(world, f"w{i}")
        assert worker.slot == 1
        assert await world.index.lookup(MODEL, packed(chain(*range(20)))) == {keeper.slot: 2}
        await world.index.update(worker, add=chain(*range(10 + i)), remove=[])
        assert (await world.index.lookup(MODEL, packed(chain(*range(20)))))[worker.slot] == 10 + i
        await world.registry.deregister(worker)
        await world.settle()
    assert await world.index.size(MODEL) == 2


async def test_drop_empties_one_worker_and_it_goes_on(world: World) -> None:
    w1, w2 = await join(world, "w1"), await join(world, "w2")
    prompt = chain(*range(50))
    await world.index.update(w1, add=prompt, remove=[])
    await world.index.update(w2, add=prompt[:20], remove=[])
    await world.index.drop(w1)
    assert await world.index.lookup(MODEL, packed(prompt)) == {w2.slot: 20}
    assert await world.index.size(MODEL) == 20
    assert await world.index.update(w1, add=prompt[:5], remove=[])
    assert await world.index.lookup(MODEL, packed(prompt)) == {w1.slot: 5, w2.slot: 20}


@pytest.mark.parametrize("kind", ["memory", "redis"])
@given(data=st.data())
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_lookups_are_those_of_brute_force(kind: str, redis_server: RedisServer, data: st.DataObject) -> None:
    """Any prefix-closed sets on any slots: depth = number of leading blocks held."""
    slots = data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=8, unique=True))
    prompts = data.draw(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=6))
    held = {
        slot: {h for p in data.draw(st.lists(st.sampled_from(prompts), max_size=3)) for h in chain(*p)}
        for slot in slots
    }
    gone = {slot: data.draw(st.booleans()) for slot in slots}

    async def run() -> None:
        world = await open_world(kind, max_slots=41, server=redis_server)
        specs = [await join(world, f"w{i}") for i in range(41)]
        for slot, hashes in held.items():
            await world.index.update(specs[slot], add=sorted(hashes), remove=[])
            if gone[slot]:
                await world.registry.deregister(specs[slot])
        for prompt in prompts:
            hashes = chain(*prompt)
            expected = {
                slot: depth
                for slot in slots
                if not gone[slot]
                and (depth := next((i for i, h in enumerate(hashes) if h not in held[slot]), len(hashes)))
            }
            assert await world.index.lookup(MODEL, packed(hashes)) == expected
        await world.settle()
        living = {h for slot in slots if not gone[slot] for h in held[slot]}
        assert await world.index.size(MODEL) == len(living)
        await world.close()

    asyncio.run(run())


@pytest.mark.parametrize("kind", ["memory", "redis"])
async def test_a_thousand_workers_in_one_lookup(kind: str, redis_server: RedisServer) -> None:
    """The deepest come first; the highest slots come and go as others do."""
    world = await open_world(kind, max_slots=MAX_SLOTS, server=redis_server)
    specs = await asyncio.gather(*(join(world, f"w{i}") for i in range(1030)))
    assert {s.slot for s in specs} == set(range(1030))
    prompt = chain(*range(64))
    rng = random.Random(1)
    depths = {s.slot: rng.randrange(65) for s in specs}
    await asyncio.gather(*(world.index.update(s, add=prompt[: depths[s.slot]], remove=[]) for s in specs))
    found = await world.index.lookup(MODEL, packed(prompt))
    assert found == {slot: depth for slot, depth in depths.items() if depth}
    assert list(found.values()) == sorted(found.values(), reverse=True)
    last = max(specs, key=lambda s: s.slot)
    assert await world.index.update(last, add=prompt, remove=[])
    assert (await world.index.lookup(MODEL, packed(prompt)))[last.slot] == 64
    await world.registry.deregister(last)
    assert last.slot not in await world.index.lookup(MODEL, packed(prompt))
    await world.settle()
    assert (await join(world, "again")).slot == last.slot
    await world.close()


# --- Redis only


async def test_a_block_takes_the_room_of_its_highest_slot_and_stays_compact(
    redis_server: RedisServer, cluster: str
) -> None:
    client = await connect(redis_server.url)
    registry, index = RedisRegistry(client, cluster), RedisPrefixIndex(client, cluster)
    specs = [await registry.register(spec(f"w{i}"), ttl_s=TTL_S) for i in range(600)]
    (low,), (high,) = chain(1), chain(2)
    await index.update(specs[0], add=[low], remove=[])
    await index.update(specs[-1], add=[high], remove=[])
    for block, room in ((low, 1), (high, 599 // 8 + 1)):
        raw = block.to_bytes(8, "little")
        bucket = f"{root_key(cluster)}:index:{encode(MODEL)}:p".encode() + raw[:2]
        assert await client.call("HSTRLEN", bucket, raw[2:]) == room
        assert await client.call("OBJECT", "ENCODING", bucket) == b"listpack"
    await client.aclose()


async def test_a_sweep_is_shared_and_its_slots_wait_for_its_end(redis_server: RedisServer, cluster: str) -> None:
    client = await connect(redis_server.url)
    registry, index = RedisRegistry(client, cluster, max_slots=2), RedisPrefixIndex(client, cluster)
    other = RedisPrefixIndex(client, cluster)
    a = await registry.register(spec("a"), ttl_s=TTL_S)
    await index.update(a, add=chain(*range(2000)), remove=[])
    await registry.deregister(a)
    steps = 0
    while await (index, other)[steps % 2].sweep(MODEL):
        b = await registry.register(spec("b", 1), ttl_s=TTL_S)
        assert b.slot == 1  # never slot 0 before the round is over
        steps += 1
    assert steps > 10
    assert await index.size(MODEL) == 0
    assert (await registry.register(spec("c"), ttl_s=TTL_S)).slot == 0
    await client.aclose()


async def test_registration_starts_the_sweep_by_itself(redis_server: RedisServer, cluster: str) -> None:
    client = await connect(redis_server.url)
    registry, index = RedisRegistry(client, cluster), RedisPrefixIndex(client, cluster)
    first = await registry.register(spec(incarnation=1), ttl_s=TTL_S)
    await index.update(first, add=chain(1, 2, 3), remove=[])
    await registry.register(spec(incarnation=2), ttl_s=TTL_S)
    async with asyncio.timeout(30):
        while await index.size(MODEL):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    await client.aclose()


async def test_a_drop_cut_short_leaves_the_slot_masked_until_it_is_dropped_or_registered_again(
    redis_server: RedisServer, cluster: str
) -> None:
    client = await connect(redis_server.url)
    registry, index = RedisRegistry(client, cluster), RedisPrefixIndex(client, cluster)
    mine = await registry.register(spec(), ttl_s=TTL_S)
    prompt = chain(*range(2000))
    for again in ("drop", "register"):
        await index.update(mine, add=prompt, remove=[])
        dropping = asyncio.create_task(index.drop(mine))
        async with asyncio.timeout(30):
            while await index.lookup(MODEL, packed(prompt[:1])):  # noqa: ASYNC110
                await asyncio.sleep(0)
        dropping.cancel()
        await asyncio.wait([dropping])
        assert await index.lookup(MODEL, packed(prompt)) == {}
        assert not await index.update(mine, add=prompt, remove=[])
        if again == "drop":
            await index.drop(mine)
        else:
            mine = await registry.register(spec(), ttl_s=TTL_S)
        assert await index.update(mine, add=prompt[:7], remove=[])
        assert await index.lookup(MODEL, packed(prompt)) == {mine.slot: 7}
    await client.aclose()


async def test_a_server_that_is_paused_costs_lookups_a_deadline_and_one_that_was_replaced_nothing() -> None:
    async with RedisServer() as server:
        client = await connect(server.url, timeout_s=0.5)
        registry, index = RedisRegistry(client, "c"), RedisPrefixIndex(client, "c")
        worker = await registry.register(spec("w1", 1), ttl_s=TTL_S)
        await index.update(worker, add=chain(1, 2), remove=[])
        server.pause()
        asked = [index.lookup(MODEL, packed(chain(1, 2))) for _ in range(50)]
        asked.append(told(index, [packed(chain(1, 2))] * 3))  # type: ignore[arg-type]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert {type(answer) for answer in answers} == {StoreUnavailable}
        server.resume()
        async with asyncio.timeout(20):
            while await _looked_up(index) != {worker.slot: 2}:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        await server.restart()  # it knows no script now
        async with asyncio.timeout(20):
            while await _looked_up(index) != {}:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        answers = await asyncio.gather(*(index.lookup(MODEL, packed(chain(1))) for _ in range(200)))
        assert answers == [{}] * 200
        await client.call("SCRIPT", "FLUSH")
        assert await told(index, [packed(chain(1))] * 3) == [{}] * 3
        await client.aclose()
        assert isinstance(await told(index, [packed(chain(1))]), StoreUnavailable)
        with pytest.raises(StoreUnavailable):
            await index.lookup(MODEL, packed(chain(1)))


async def _looked_up(index: RedisPrefixIndex) -> object:
    try:
        return await index.lookup(MODEL, packed(chain(1, 2)))
    except StoreUnavailable:
        return None


async def test_lookups_with_a_password_and_another_database() -> None:
    async with RedisServer() as server:
        first = await connect(server.url)
        await first.call("CONFIG", "SET", "requirepass", "p@ss/word")
        client = await connect(f"redis://:p%40ss%2Fword@127.0.0.1:{server.port}/3")
        assert "db3" not in await client.call("INFO", "keyspace")
        registry, index = RedisRegistry(client, "c"), RedisPrefixIndex(client, "c")
        worker = await registry.register(spec("w1", 1), ttl_s=TTL_S)
        await index.update(worker, add=chain(1, 2), remove=[])
        assert await index.lookup(MODEL, packed(chain(1, 2, 3))) == {worker.slot: 2}
        assert "db3" in await client.call("INFO", "keyspace")
        await client.aclose()
        await first.aclose()

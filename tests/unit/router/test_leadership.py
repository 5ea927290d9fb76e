"""One leader at a time, in the end; an epoch that never goes back; and a store that is not always there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest

from services.router.leadership import Leadership
from tandem.adapters import clock
from tandem.adapters.bus import Message
from tandem.adapters.memory_bus import MemoryBus, MemoryHub
from tandem.adapters.memory_store import MemoryLeases, MemoryStore
from tandem.v1 import bus_pb2
from tandem.wire import subjects

TTL_S = 5.0


class Contender:
    def __init__(self, world: World, name: str) -> None:
        self.terms: list[int] = []
        self.deposed = 0
        self.workers_know = 0
        self.on_elected: Callable[[], None] = lambda: None
        self.bus = MemoryBus(world.hub)
        self.leadership = Leadership(
            bus=self.bus, leases=MemoryLeases(world.store), cluster="c", model="m", router=name,
            lease_ttl_s=TTL_S, announce_interval_s=0.01, elected=self._elected, deposed=self._deposed,
        )  # fmt: skip
        self.task = asyncio.create_task(self.leadership.run())

    async def _elected(self, epoch: int) -> int:
        self.on_elected()
        self.terms.append(epoch)
        return max(epoch, self.workers_know)

    def _deposed(self) -> None:
        self.deposed += 1

    @property
    def leads(self) -> bool:
        return self.leadership.epoch > 0

    async def leave(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)

    def freeze(self) -> None:
        """As a stopped process: it hears, renews and says nothing."""
        self.task.cancel()


class World:
    def __init__(self, stack: AsyncExitStack) -> None:
        self.now = 1000.0
        self.hub = MemoryHub()
        self.store = MemoryStore(now=lambda: self.now)
        self.bus = MemoryBus(self.hub)
        self.announced: list[tuple[str, int]] = []
        self._stack = stack

    async def open(self) -> None:
        await self.bus.subscribe(subjects.leader("c", "m"), self._on_announcement)

    def _on_announcement(self, message: Message) -> None:
        said = bus_pb2.LeaderAnnouncement.FromString(message.data)
        self.announced.append((said.router, said.epoch))

    def announce(self, router: str, epoch: int) -> None:
        said = bus_pb2.LeaderAnnouncement(model="m", router=router, epoch=epoch)
        self.bus.publish(subjects.leader("c", "m"), said.SerializeToString())

    def contender(self, name: str) -> Contender:
        contender = Contender(self, name)
        self._stack.push_async_callback(contender.leave)
        return contender

    async def rounds(self) -> None:
        """Time for every loop to have gone round several times."""
        await asyncio.sleep(0.1)


async def until(condition: Callable[[], Any], what: str) -> None:
    try:
        async with asyncio.timeout(10.0):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.002)
    except TimeoutError:
        raise AssertionError(what) from None


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        world = World(stack)
        await world.open()
        yield world


async def test_of_two_contenders_one_leads_and_the_other_knows_whom(world: World) -> None:
    a, b = world.contender("a"), world.contender("b")
    await until(lambda: a.leads or b.leads, "a leader")
    await world.rounds()
    assert a.leads != b.leads
    leader, other = (a, b) if a.leads else (b, a)
    assert other.leadership.leader == leader.leadership.leader != ""
    assert {epoch for _, epoch in world.announced} == {leader.leadership.epoch}
    assert leader.leadership.epoch >= clock.unix_milliseconds() - 60_000


async def test_who_leaves_gives_the_lease_back_and_the_next_epoch_is_higher(world: World) -> None:
    a = world.contender("a")
    await until(lambda: a.leads, "a leads")
    b = world.contender("b")
    await world.rounds()
    epoch = a.leadership.epoch
    await a.leave()
    await until(lambda: b.leads, "b leads, without waiting for the lease's end")
    assert b.leadership.epoch > epoch


async def test_a_silent_leader_is_followed_when_its_lease_is_over(world: World) -> None:
    a = world.contender("a")
    await until(lambda: a.leads, "a leads")
    b = world.contender("b")
    await world.rounds()
    world.store.available = False  # a cannot give it back
    await a.leave()
    world.store.available = True
    await world.rounds()
    assert not b.leads
    world.now += TTL_S
    await until(lambda: b.leads, "b leads")
    assert b.terms[-1] > a.terms[-1]


async def test_a_leader_goes_on_without_the_store(world: World) -> None:
    a, b = world.contender("a"), None
    await until(lambda: a.leads, "a leads")
    world.store.available = False
    b = world.contender("b")
    world.now += 10 * TTL_S
    world.announced.clear()
    await world.rounds()
    assert a.leads and not b.leads and not a.deposed
    assert world.announced


async def test_a_store_that_came_back_empty_ends_no_term_and_no_epoch_goes_back(world: World) -> None:
    a = world.contender("a")
    await until(lambda: a.leads, "a leads")
    first = a.leadership.epoch
    world.store.wipe()
    await until(lambda: a.leadership.epoch > first, "a leads on with a higher epoch")
    assert not a.deposed, "what waits here waits on"
    assert [epoch for _, epoch in world.announced] == sorted(epoch for _, epoch in world.announced)


async def test_an_empty_store_that_another_was_quicker_with_ends_the_term(world: World) -> None:
    a = world.contender("a")
    await until(lambda: a.leads, "a leads")
    world.store.wipe()
    await MemoryLeases(world.store).acquire("m", "b", ttl_s=TTL_S, epoch_at_least=a.leadership.epoch + 5)
    await until(lambda: a.deposed, "a is deposed")
    assert not a.leads


async def test_a_higher_epoch_ends_the_term_at_once(world: World) -> None:
    a = world.contender("a")
    await until(lambda: a.leads, "a leads")
    higher = a.leadership.epoch + 1_000_000
    world.announce("b", higher)
    await until(lambda: a.deposed, "a steps down")
    assert a.leadership.leader == "b"
    await until(lambda: a.leadership.epoch > higher, "the lease is its own still: it begins anew, above what it heard")


async def test_a_lower_epoch_is_nobody(world: World) -> None:
    a = world.contender("a")
    await until(lambda: a.leads, "a leads")
    world.announce("b", a.leadership.epoch - 1)
    await world.rounds()
    assert a.leads and not a.deposed
    assert a.leadership.leader == "a"


async def test_workers_that_know_a_later_epoch_are_believed(world: World) -> None:
    a = world.contender("a")
    a.workers_know = clock.unix_milliseconds() + 10_000_000
    await until(lambda: a.leads, "a leads")
    assert a.leadership.epoch > a.workers_know
    assert len(a.terms) == 2
    assert {epoch for _, epoch in world.announced} <= {a.leadership.epoch}, "the first was never announced"


async def test_an_epoch_heard_during_the_election_counts(world: World) -> None:
    a = world.contender("a")
    later = clock.unix_milliseconds() + 10_000_000
    a.on_elected = lambda: a.leadership.hear(later)
    await until(lambda: a.leads, "a leads")
    assert a.leadership.epoch > later


async def test_a_store_that_goes_away_during_the_election_breaks_nothing(world: World) -> None:
    a = world.contender("a")
    a.workers_know = clock.unix_milliseconds() + 10_000_000  # so that the lease has to be given back

    def away() -> None:
        world.store.available = False

    a.on_elected = away
    await until(lambda: a.terms, "an election")
    await world.rounds()
    assert not a.task.done() and not a.leads
    a.on_elected = lambda: None
    world.store.available = True
    world.now += TTL_S
    await until(lambda: a.leads, "a leads")

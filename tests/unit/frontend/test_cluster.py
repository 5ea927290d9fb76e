"""The frontend's end of the bus: what it makes of silence, its own included, and of workers that know nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest

from services.frontend.cluster import STOPPED_S, Cluster
from services.frontend.order import Consumer, Order
from tandem.adapters import clock
from tandem.adapters.bus import Message
from tandem.adapters.memory_bus import MemoryBus, MemoryHub
from tandem.core.blocks import token_bytes
from tandem.core.types import SamplingParams
from tandem.errors import UnknownRequest
from tandem.v1 import bus_pb2, types_pb2
from tandem.wire import codec, subjects


@dataclass
class World:
    hub: MemoryHub = field(default_factory=MemoryHub)
    ahead_s: float = 0.0
    submits: list[bus_pb2.Submit] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.bus = MemoryBus(self.hub)
        self.cluster = Cluster(MemoryBus(self.hub), cluster="c", instance="f", now=self.now)

    def now(self) -> float:
        return clock.monotonic() + self.ahead_s

    async def open(self) -> None:
        await self.cluster.open()
        await self.bus.subscribe(subjects.requests("c", "m", "r"), self._on_submit)
        await self.announce()

    def _on_submit(self, message: Message) -> None:
        self.submits.append(bus_pb2.Submit.FromString(message.data))

    async def announce(self) -> None:
        said = bus_pb2.LeaderAnnouncement(model="m", router="r", epoch=5)
        self.bus.publish(subjects.leader("c", "m"), said.SerializeToString())
        await self.bus.flush(timeout_s=1.0)

    async def say(self, worker: str, incarnation: int, frame: bus_pb2.TokenFrame) -> None:
        frame.worker.CopyFrom(types_pb2.WorkerRef(id=worker, incarnation=incarnation))
        self.bus.publish(subjects.tokens("c", "f"), frame.SerializeToString())
        await self.bus.flush(timeout_s=1.0)
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    async def begin(self) -> None:
        order = Order(
            id="q", model="m", prompt=token_bytes([1, 2, 3]), sampling=SamplingParams(max_tokens=5),
            arrival_s=self.now(), deadline_s=self.now() + 100.0,
        )  # fmt: skip
        self.cluster.begin(order, Consumer())
        await asyncio.sleep(0)
        assert len(self.submits) == 1


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World()
    await world.open()
    yield world
    await world.cluster.close()


async def test_a_leader_that_falls_silent_leads_no_more(world: World) -> None:
    assert world.cluster.has_leader("m")
    for _ in range(15):
        world.ahead_s += 0.1
        world.cluster.sweep()
    assert not world.cluster.has_leader("m")


async def test_a_process_that_was_stopped_has_not_listened(world: World) -> None:
    await world.begin()
    world.ahead_s += STOPPED_S + 10.0
    world.cluster.sweep()
    assert world.cluster.has_leader("m")
    assert world.cluster.in_flight == 1
    assert len(world.submits) == 1


@pytest.mark.parametrize(
    ("worker", "incarnation", "again"),
    [("w", 1, True), ("w", 2, True), ("another", 1, False)],
    ids=["the holder", "the holder's next incarnation", "one that was asked by mistake"],
)
async def test_a_holder_that_knows_the_request_no_more(
    world: World, worker: str, incarnation: int, again: bool
) -> None:
    await world.begin()
    rid = world.submits[0].rid
    await world.say("w", 1, bus_pb2.TokenFrame(placed=[bus_pb2.Placed(rid=rid, leg=bus_pb2.LEG_LOCAL)]))
    unknown = bus_pb2.Finish(
        rid=rid, reason=types_pb2.FINISH_REASON_ERROR, error=codec.error_to_wire(UnknownRequest("who?"))
    )
    await world.say(worker, incarnation, bus_pb2.TokenFrame(finishes=[unknown]))
    assert [submit.key.attempt for submit in world.submits] == ([0, 1] if again else [0])

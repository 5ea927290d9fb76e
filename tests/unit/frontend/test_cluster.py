"""The frontend's end of the bus: what it makes of silence, its own included, and of workers that know nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from types import NoneType
from typing import Any

import pytest

from services.frontend import cluster
from services.frontend.cluster import MOST_BYTES, STOPPED_S, Cluster
from services.frontend.journey import Journey
from services.frontend.order import Consumer, Order
from services.frontend.submission import submit_message
from tandem.adapters import clock
from tandem.adapters.bus import Message
from tandem.adapters.memory_bus import MemoryBus, MemoryHub
from tandem.core.blocks import token_bytes
from tandem.core.types import SamplingParams
from tandem.errors import BusUnavailable, InternalError, UnknownRequest
from tandem.v1 import bus_pb2, types_pb2
from tandem.wire import codec, subjects


@dataclass
class World:
    hub: MemoryHub = field(default_factory=MemoryHub)
    ahead_s: float = 0.0
    submits: list[bus_pb2.Submit] = field(default_factory=list)
    #: Ids of the requests that came together, of each message.
    messages: list[list[str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.bus = MemoryBus(self.hub)
        self.cluster = Cluster(MemoryBus(self.hub), cluster="c", instance="f", now=self.now)

    def now(self) -> float:
        return clock.monotonic() + self.ahead_s

    async def open(self) -> None:
        await self.cluster.open()
        await self.bus.subscribe(subjects.requests("c", "m", "r"), self._on_submits)
        await self.announce()

    def _on_submits(self, message: Message) -> None:
        came = [bus_pb2.Submit.FromString(data) for data in bus_pb2.Submits.FromString(message.data).submits]
        self.submits += came
        self.messages.append([submit.key.id for submit in came])

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

    def order(self, id: str = "q", prompt_tokens: int = 3) -> Order:
        return Order(
            id=id, model="m", prompt=token_bytes(range(prompt_tokens)), sampling=SamplingParams(max_tokens=5),
            arrival_s=self.now(), deadline_s=self.now() + 100.0,
        )  # fmt: skip

    async def begin(self) -> None:
        self.cluster.begin(self.order(), Consumer())
        await self.turns()
        assert len(self.submits) == 1

    async def turns(self) -> None:
        for _ in range(3):
            await asyncio.sleep(0)


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


async def test_what_a_turn_submits_leaves_in_one_message(world: World) -> None:
    for number in range(3):
        world.cluster.begin(world.order(f"q{number}"), Consumer())
    await world.turns()
    world.cluster.begin(world.order("later"), Consumer())
    await world.turns()
    assert world.messages == [["q0", "q1", "q2"], ["later"]]


async def test_a_message_has_room_for_so_much_and_any_request_fits_alone(world: World) -> None:
    third, whole = MOST_BYTES // 4 // 3, MOST_BYTES // 4
    for number, tokens in enumerate((third, third, third, whole, 3, 3)):
        world.cluster.begin(world.order(f"q{number}", tokens), Consumer())
    await world.turns()
    assert world.messages == [["q0", "q1"], ["q2"], ["q3"], ["q4", "q5"]]


async def test_what_is_cancelled_within_its_turn_is_not_submitted(world: World) -> None:
    world.cluster.cancel(world.cluster.begin(world.order("q0"), Consumer()))
    world.cluster.begin(world.order("q1"), Consumer())
    await world.turns()
    assert world.messages == [["q1"]]


async def test_each_of_a_message_that_the_bus_refuses_is_told(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(subject: str, data: bytes, reply: str = "") -> None:
        raise BusUnavailable("its buffer is full")

    monkeypatch.setattr(world.cluster._bus, "publish", refuse)
    journeys = [world.cluster.begin(world.order(f"q{number}"), Consumer()) for number in range(2)]
    await world.turns()
    assert [type(journey.outcome and journey.outcome.error) for journey in journeys] == [BusUnavailable] * 2
    assert not world.cluster.in_flight


async def test_one_that_cannot_be_written_down_is_told_and_hinders_no_other(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(journey: Journey, **rest: Any) -> bytes:
        if journey.order.id == "q1":
            raise ValueError("out of range")
        return submit_message(journey, **rest)

    monkeypatch.setattr(cluster, "submit_message", write)
    journeys = [world.cluster.begin(world.order(f"q{number}"), Consumer()) for number in range(3)]
    await world.turns()
    assert world.messages == [["q0", "q2"]]
    assert [type(journey.outcome and journey.outcome.error) for journey in journeys] == [
        NoneType,
        InternalError,
        NoneType,
    ]

"""What comes in one turn is dealt with together, and one request's defect is its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import pytest
from google.protobuf.message import DecodeError

from tandem.adapters.clock import monotonic
from tandem.adapters.memory_bus import MemoryBus, MemoryHub
from tandem.core.blocks import token_bytes, token_ids
from tandem.core.types import FinishReason, WorkerAddress
from tandem.engine.protocol import EngineOutput, EngineRequest, KvHandoff, Sink
from tandem.telemetry.tracing import OFF
from tandem.v1 import bus_pb2, types_pb2
from tandem.wire import subjects
from tandem.worker.execution import Execution
from tandem.worker.handoffs import OpenHandoffs, Peers
from tandem.worker.outbox import Outbox
from tandem.worker.request_table import RequestTable
from tandem.worker.tracing import WorkerTraces


class Engine:
    """Says what the test says. Refuses to hear of prompts that begin with 13."""

    def __init__(self) -> None:
        self.requests: list[EngineRequest] = []
        self.sinks: list[Sink] = []
        self.aborted: list[str] = []
        #: (handoff, pulled)
        self.released: list[tuple[str, bool]] = []

    def submit(self, request: EngineRequest, sink: Sink) -> None:
        if request.prompt[0] == 13:
            raise RuntimeError("unlucky")
        self.requests.append(request)
        self.sinks.append(sink)

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)

    def release_handoff(self, handoff_id: str, *, pulled: bool) -> None:
        self.released.append((handoff_id, pulled))


class World:
    def __init__(self) -> None:
        bus = MemoryBus(MemoryHub())
        self.hub, self.bus, self.engine = bus.hub, bus, Engine()
        self.frames: list[bus_pb2.TokenFrame] = []
        self.tasks: list[asyncio.Task[None]] = []
        self.table = RequestTable(retention_s=30.0)
        engine: Any = self.engine
        self.outbox = Outbox(bus, "c", "m", WorkerAddress("w", 7, "host:1"), asyncio.get_running_loop())
        self.execution = Execution(
            bus=bus,
            cluster="c",
            worker="w",
            engine=engine,
            outbox=self.outbox,
            table=self.table,
            handoffs=OpenHandoffs(engine, lease_s=1.0),
            peers=Peers(timeout_s=1.0, now=monotonic),
            traces=WorkerTraces(OFF, "w", monotonic),
            spawn=self.spawn,
            now=monotonic,
            hop_timeout_s=1.0,
            lease_s=1.0,
        )

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        self.tasks.append(asyncio.create_task(work))

    def assign(self, *prompts: list[int], first_rid: int = 1) -> None:
        messages = []
        for rid, prompt in enumerate(prompts, first_rid):
            submit = bus_pb2.Submit(
                key=types_pb2.RequestKey(id=f"r{rid}"), frontend="f", rid=rid, prompt=token_bytes(prompt),
                isl_tokens=len(prompt), sampling=types_pb2.SamplingParams(max_tokens=8),
            )  # fmt: skip
            messages.append(bus_pb2.Assignment(epoch=1, leg=bus_pb2.LEG_LOCAL, submit=submit.SerializeToString()))
        self.execution.assignments(messages)

    async def turns(self) -> None:
        for _ in range(5):
            await asyncio.sleep(0)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World()
    listener = MemoryBus(world.hub)

    def heard(message: Any) -> None:
        world.frames.append(bus_pb2.TokenFrame.FromString(message.data))

    await listener.subscribe(subjects.tokens("c", "f"), heard)
    yield world
    world.outbox.tell_now()
    await world.turns()


async def test_what_the_engine_says_in_a_turn_is_one_frame(world: World) -> None:
    world.assign([1, 2], [3], [4])
    assert [list(request.prompt) for request in world.engine.requests] == [[1, 2], [3], [4]]
    a, b, c = world.engine.sinks
    a(EngineOutput([10], cached_tokens=0))
    b(EngineOutput([20, 21], FinishReason.STOP, stop_token_id=21, cached_tokens=1))
    a(EngineOutput([11]))
    c(EngineOutput([30], cached_tokens=0))
    await world.turns()
    (frame,) = world.frames
    assert (list(frame.rids), list(frame.seqs), list(frame.counts)) == ([1, 2, 3], [0, 0, 0], [2, 2, 1])
    assert list(token_ids(frame.tokens)) == [10, 11, 20, 21, 30]
    assert [placed.rid for placed in frame.placed] == [1, 2, 3]
    (finish,) = frame.finishes
    assert (finish.rid, finish.reason, finish.stop_token_id) == (2, types_pb2.FINISH_REASON_STOP, 21)
    assert (finish.output_tokens, finish.cached_tokens, finish.timings.decode_worker) == (2, 1, "w")
    assert world.table.running == 2
    a(EngineOutput([12], FinishReason.LENGTH))
    await world.turns()
    assert (list(world.frames[1].rids), list(world.frames[1].seqs)) == ([1], [2])
    assert world.frames[1].finishes[0].output_tokens == 3


async def test_a_request_that_the_engine_cannot_be_given_fails_alone(world: World) -> None:
    world.assign([1], [13], [2])
    world.engine.sinks[1](EngineOutput([5], cached_tokens=0))
    await world.turns()
    (frame,) = world.frames
    assert list(frame.rids) == [3]
    assert [(finish.rid, finish.error.code) for finish in frame.finishes] == [(2, "internal_error")]
    assert world.table.running == 2


async def test_news_of_a_request_that_was_given_up_in_that_turn_are_dropped(world: World) -> None:
    world.assign([1], [2])
    running = world.table.unfinished()[0]
    running.leg, running.peer = bus_pb2.LEG_PREFILL, "p"
    sink, _ = world.engine.sinks
    sink(EngineOutput([5], cached_tokens=0))
    world.engine.reset_prefix_cache = lambda: asyncio.sleep(0)  # type: ignore[attr-defined]
    world.execution.taint(bus_pb2.Taint(prefill=types_pb2.WorkerRef(id="p")))
    await world.turns()
    (frame,) = world.frames
    assert not frame.rids and [finish.rid for finish in frame.finishes] == [1]
    assert world.engine.aborted == [running.engine_id]


async def test_a_defect_among_the_news_ends_the_worker(world: World) -> None:
    def defect(told: int, found: int) -> None:
        raise KeyError("defect")

    world.execution.on_cached = defect
    world.assign([1])
    world.engine.sinks[0](EngineOutput([5], cached_tokens=0))
    await world.turns()
    (task,) = world.tasks
    with pytest.raises(KeyError):
        await task
    assert world.outbox.dropped == 0


async def test_an_assignment_that_cannot_be_read_is_told_of_after_the_others_were_taken(world: World) -> None:
    submit = bus_pb2.Submit(
        key=types_pb2.RequestKey(id="r1"), frontend="f", rid=1, prompt=token_bytes([7]), isl_tokens=1,
        sampling=types_pb2.SamplingParams(max_tokens=8),
    )  # fmt: skip
    good = bus_pb2.Assignment(epoch=1, leg=bus_pb2.LEG_LOCAL, submit=submit.SerializeToString())
    with pytest.raises(DecodeError):
        world.execution.assignments([bus_pb2.Assignment(epoch=1, submit=b"\xff"), good])
    assert [list(request.prompt) for request in world.engine.requests] == [[7]]


async def test_a_request_ends_once_whatever_else_its_engine_says_in_that_turn(world: World) -> None:
    world.assign([1], [2])
    sink = world.engine.sinks[0]
    sink(EngineOutput([5], FinishReason.LENGTH, cached_tokens=0))
    sink(EngineOutput(finish=FinishReason.ABORT))
    await world.turns()
    (frame,) = world.frames
    assert [(finish.rid, finish.reason) for finish in frame.finishes] == [(1, types_pb2.FINISH_REASON_LENGTH)]
    assert world.table.running == 1


async def test_a_handoff_of_a_request_that_was_aborted_in_that_turn_is_let_go(world: World) -> None:
    world.assign([1])
    running = world.table.unfinished()[0]
    running.leg, running.produces = bus_pb2.LEG_PREFILL, bus_pb2.Assignment()
    world.engine.sinks[0](EngineOutput(handoff=KvHandoff("h1", "e", 16, b"{}"), cached_tokens=0))
    world.execution.abort("r1", 0, None)
    await world.turns()
    assert world.engine.released == [("h1", False)]
    assert [finish.reason for finish in world.frames[0].finishes] == [types_pb2.FINISH_REASON_ABORT]
    assert world.table.running == 0

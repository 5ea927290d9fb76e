"""One model's router over the memory twins, its workers played by the test: what is kept, told and given back."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack
from typing import Any

import pytest

from services.router import model_router
from services.router.config import RouterSettings
from services.router.metrics import RouterMetrics
from services.router.model_router import ModelRouter, Ports
from services.router.tracing import RouterTraces
from tandem.adapters import clock
from tandem.adapters.bus import Message
from tandem.adapters.deployment import Liveness
from tandem.adapters.grpc_server import GrpcServer
from tandem.adapters.memory_bus import MemoryBus, MemoryHub
from tandem.adapters.memory_store import MemoryCounters, MemoryLeases, MemoryPrefixIndex, MemoryRegistry, MemoryStore
from tandem.adapters.store import Found
from tandem.core.policy import Policy, RequestClass
from tandem.core.scheduler import Scheduler
from tandem.core.types import Leg, RequestKey, Role, SamplingParams, WorkerAddress, WorkerSpec
from tandem.telemetry import spans
from tandem.telemetry.instruments import Instruments
from tandem.telemetry.tracing import Tracing
from tandem.v1 import bus_pb2, types_pb2
from tandem.wire import codec, subjects
from tests.harness.kept_spans import KeptSpans


class SlowIndex(MemoryPrefixIndex):
    """Answers when it is told to."""

    def __init__(self, store: MemoryStore) -> None:
        super().__init__(store)
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.asked: list[asyncio.Task[None]] = []

    def ask(self, model: str, prompts: Sequence[bytes], tell: Callable[[Found], None]) -> None:
        async def when_told() -> None:
            await self.may_answer.wait()
            super(SlowIndex, self).ask(model, prompts, tell)

        self.asked.append(asyncio.create_task(when_told()))


class World:
    def __init__(self, stack: AsyncExitStack) -> None:
        self._stack = stack
        self.hub = MemoryHub()
        self.store = MemoryStore()
        self.index = SlowIndex(self.store)
        self.bus = MemoryBus(self.hub)
        self.rejects: dict[int, str] = {}
        self.work: dict[str, list[bus_pb2.Assignment]] = defaultdict(list)
        #: How many messages these came in.
        self.messages: dict[str, int] = defaultdict(int)
        self.lost: list[str] = []
        self.asked: list[str] = []
        self.spans = KeptSpans()
        ports = Ports(
            MemoryBus(self.hub),
            MemoryRegistry(self.store),
            MemoryLeases(self.store),
            self.index,
            MemoryCounters(self.store),
        )
        self.router = ModelRouter(
            settings=RouterSettings(
                deployment="", registry_interval_s=0.02, announce_interval_s=0.02, ask_after_s=0.05
            ),
            router="r",
            cluster="c",
            model="m",
            liveness=Liveness(),
            scheduler=Scheduler(Policy(), classes={"": RequestClass(name="")}, tenants={}, rng=random.Random(0)),
            ports=ports,
            metrics=RouterMetrics(Instruments("router", {"model": {"m"}, "tenant": {"t"}, "class": {""}}), "m", [""]),
            traces=RouterTraces(Tracing(self.spans), "r", clock.monotonic),
            now=clock.monotonic,
        )

    async def open(self) -> None:
        await self.bus.subscribe(subjects.tokens("c", "f"), self._on_frame)
        await self.bus.subscribe(subjects.lost("c", "m"), self._on_lost)
        task = asyncio.create_task(self.router.run())
        self._stack.push_async_callback(self._end, task)
        await self.until(lambda: self.router.leadership.epoch, "elected")

    async def _end(self, task: asyncio.Task[None]) -> None:
        task.cancel()
        (outcome,) = await asyncio.gather(task, return_exceptions=True)
        assert isinstance(outcome, asyncio.CancelledError), outcome

    def _on_frame(self, message: Message) -> None:
        for reject in bus_pb2.TokenFrame.FromString(message.data).rejects:
            self.rejects[reject.rid] = reject.error.code

    def _on_lost(self, message: Message) -> None:
        self.lost.append(bus_pb2.WorkerLost.FromString(message.data).worker)

    async def worker(self, name: str, *, listens: bool = True, draining: bool = False) -> WorkerSpec:
        server = GrpcServer("127.0.0.1")
        await server.start()
        self._stack.push_async_callback(server.stop, 0.0)
        spec = WorkerSpec(
            address=WorkerAddress(name, 1, f"127.0.0.1:{server.port}"), model="m", role=Role.DECODE, slot=0,
            block_size=16, dtype="bf16", kv_layout="l", engine="sim", engine_version="1", max_model_len=4096,
            kv_blocks_total=1000, kv_bytes_per_token=1, max_batched_tokens=512, max_num_seqs=64,
            perf_profile="sim-h100-llama-8b-tp1", draining=draining,
        )  # fmt: skip
        if listens:
            await self.bus.subscribe(subjects.work("c", name), lambda m: self._on_work(name, m))
        spec = await MemoryRegistry(self.store).register(spec, ttl_s=100.0)
        await self.until(lambda: name in self.router.fleet.members, "joined")
        return spec

    def _on_work(self, name: str, message: Message) -> None:
        work = bus_pb2.WorkerMessage.FromString(message.data)
        if work.assignments:
            self.work[name] += work.assignments
            self.messages[name] += 1
        else:
            self.asked.append(name)

    def submitted(
        self, rid: int, *, attempt: int = 0, isl: int = 64, id: str = "", traceparent: str = ""
    ) -> bus_pb2.Submit:
        return bus_pb2.Submit(
            key=codec.key_to_wire(RequestKey(id or f"q{rid}", attempt, 0)), model="m", frontend="f", rid=rid,
            timeout_ms=60_000, isl_tokens=isl, prompt=bytes(4 * isl), block_hashes=bytes(8 * (isl // 16)),
            sampling=codec.sampling_to_wire(SamplingParams(max_tokens=10)), traceparent=traceparent,
        )  # fmt: skip

    def submit(self, rid: int, **more: Any) -> RequestKey:
        submit = self.submitted(rid, **more)
        submits = bus_pb2.Submits(submits=[submit.SerializeToString()])
        self.bus.publish(subjects.requests("c", "m", "r"), submits.SerializeToString())
        return codec.key_from_wire(submit.key)

    def event(self, key: RequestKey, phase: bus_pb2.Phase, worker: str = "") -> None:
        event = bus_pb2.LifecycleEvent(key=codec.key_to_wire(key), phase=phase, output_tokens=10)
        batch = bus_pb2.LifecycleEvents(worker=types_pb2.WorkerRef(id=worker), events=[event])
        self.bus.publish(subjects.events("c", "m"), batch.SerializeToString())

    def abort(self, key: RequestKey) -> None:
        abort = bus_pb2.Abort(id=key.id, max_attempt=key.attempt, choice=key.choice)
        self.bus.publish(subjects.aborts("c", "m"), abort.SerializeToString())

    async def until(self, condition: Callable[[], Any], what: str) -> None:
        try:
            async with asyncio.timeout(10.0):
                while not condition():  # noqa: ASYNC110
                    await asyncio.sleep(0.002)
        except TimeoutError:
            raise AssertionError(what) from None

    async def nothing_kept(self) -> None:
        router = self.router
        await self.until(lambda: not router.kept and not router.scheduler.snapshot(0.0).in_flight, "nothing kept")
        assert all(w.kv_blocks_in_use == 0 for w in router.scheduler.snapshot(0.0).workers)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        world = World(stack)
        await world.open()
        yield world


async def test_a_request_is_placed_and_forgotten_at_its_end(world: World) -> None:
    await world.worker("w")
    key = world.submit(1)
    await world.until(lambda: world.work["w"], "an assignment")
    (assignment,) = world.work["w"]
    assert assignment.epoch == world.router.leadership.epoch
    assert bus_pb2.Submit.FromString(assignment.submit).rid == 1
    assert world.router.kept == 1
    for phase in (bus_pb2.PHASE_DECODING, bus_pb2.PHASE_FINISHED, bus_pb2.PHASE_FINISHED):
        world.event(key, phase)
    await world.nothing_kept()
    assert world.rejects == {}


async def test_a_request_delivered_twice_is_placed_once(world: World) -> None:
    await world.worker("w")
    world.submit(1)
    world.submit(1)
    key = world.submit(2)
    await world.until(lambda: len(world.work["w"]) == 2, "two assignments")
    world.event(key, bus_pb2.PHASE_FINISHED)
    await world.until(lambda: world.router.kept == 1, "one left")
    assert len(world.work["w"]) == 2


async def test_a_request_that_cannot_run_anywhere_is_refused(world: World) -> None:
    await world.worker("w")
    world.submit(1, isl=5000)
    await world.until(lambda: world.rejects, "an answer")
    assert world.rejects == {1: "context_length_exceeded"}
    await world.nothing_kept()


async def test_an_abort_while_the_index_is_asked(world: World) -> None:
    await world.worker("w")
    world.index.may_answer.clear()
    key = world.submit(1)
    await world.until(lambda: world.router.kept, "submitted")
    world.abort(key)
    await world.until(lambda: not world.router.kept, "forgotten")
    world.index.may_answer.set()
    world.submit(2)
    await world.until(lambda: world.work["w"], "an assignment")
    assert [bus_pb2.Submit.FromString(a.submit).rid for a in world.work["w"]] == [2]


async def test_who_waits_is_placed_when_an_event_gives_room_back(world: World) -> None:
    await world.worker("w")
    keys = [world.submit(rid, isl=4000) for rid in range(1, 6)]
    for placed in range(1, len(keys)):
        await world.until(lambda placed=placed: len(world.work["w"]) >= placed, "an assignment")  # type: ignore[misc]
        for key in keys[:placed]:
            world.event(key, bus_pb2.PHASE_FINISHED)
    await world.until(lambda: len(world.work["w"]) == len(keys), "all")


async def test_requests_of_one_turn_are_one_question_to_the_index(world: World) -> None:
    await world.worker("w")
    for rid in range(1, 4):
        world.submit(rid)
    await world.until(lambda: len(world.work["w"]) == 3, "assignments")
    assert len(world.index.asked) == 1
    assert world.messages["w"] == 1, "and one message to their worker"


async def test_a_submit_that_cannot_be_read_hinders_no_other(world: World) -> None:
    await world.worker("w")
    good = [world.submitted(rid).SerializeToString() for rid in (1, 2)]
    submits = bus_pb2.Submits(submits=[good[0], b"\xff", good[1]])
    world.bus.publish(subjects.requests("c", "m", "r"), submits.SerializeToString())
    await world.until(lambda: len(world.work["w"]) == 2, "assignments")
    assert [bus_pb2.Submit.FromString(a.submit).rid for a in world.work["w"]] == [1, 2]


async def test_a_placement_that_fails_hinders_no_other(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    await world.worker("w")
    leg_to_wire, left = codec.leg_to_wire, ["fails"]

    def once(leg: Leg) -> bus_pb2.Leg:
        if left:
            raise KeyError(left.pop())
        return leg_to_wire(leg)

    monkeypatch.setattr(codec, "leg_to_wire", once)
    keys = [world.submit(rid) for rid in (1, 2)]
    await world.until(lambda: world.rejects and world.work["w"], "one refused, one placed")
    (refused,), (placed,) = world.rejects, world.work["w"]
    assert world.rejects[refused] == "internal_error"
    assert bus_pb2.Submit.FromString(placed.submit).rid == 3 - refused
    world.event(keys[2 - refused], bus_pb2.PHASE_FINISHED)
    await world.nothing_kept()


async def test_a_message_has_room_for_so_many_prompts(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_router, "MOST_BYTES", 1500)  # each is of 300 bytes and some
    await world.worker("w")
    for rid in range(1, 10):
        world.submit(rid, isl=64)
    await world.until(lambda: len(world.work["w"]) == 9, "assignments")
    assert world.messages["w"] == 3
    assert [bus_pb2.Submit.FromString(a.submit).rid for a in world.work["w"]] == list(range(1, 10))


async def test_an_abort_that_overtakes_its_request(world: World) -> None:
    await world.worker("w")
    world.abort(RequestKey("q1", 0))
    await world.until(lambda: len(world.router._fences), "heard")
    world.submit(1)
    world.submit(2)
    await world.until(lambda: world.work["w"], "an assignment")
    assert [bus_pb2.Submit.FromString(a.submit).rid for a in world.work["w"]] == [2]
    assert world.router.kept == 1, "nothing is kept of a request that nobody waits for"


async def test_an_abort_in_the_queue_and_after_placement(world: World) -> None:
    await world.worker("draining", draining=True)
    queued = world.submit(1)
    await world.until(lambda: world.router.scheduler.queued(), "queued")
    world.abort(queued)
    await world.nothing_kept()
    await world.worker("w")
    placed = world.submit(2)
    await world.until(lambda: world.work["w"], "placed")
    world.abort(placed)
    await world.nothing_kept()


async def test_an_index_that_is_away_stops_nothing(world: World) -> None:
    await world.worker("w")
    world.store.available = False
    world.submit(1)
    await world.until(lambda: world.work["w"], "placed by load alone")


async def test_assignments_that_nobody_takes_go_back_to_their_frontend(world: World) -> None:
    await world.worker("deaf", listens=False)
    world.submit(1)
    world.submit(2)
    await world.until(lambda: len(world.rejects) == 2, "answers")
    assert world.rejects == {1: "worker_lost", 2: "worker_lost"}
    await world.nothing_kept()
    assert world.router.fleet.members["deaf"].suspect, "no more work for it"


async def test_a_lost_worker_is_told_to_all_and_its_requests_to_their_frontends(world: World) -> None:
    spec = await world.worker("w")
    world.submit(1)
    await world.until(lambda: world.work["w"], "placed")
    await MemoryRegistry(world.store).register(
        WorkerSpec(**{**_fields(spec), "address": WorkerAddress("w", 2, spec.address.grpc_address)}), ttl_s=100.0
    )
    await world.until(lambda: world.lost, "told")
    await world.until(lambda: world.rejects, "an answer")
    assert (world.lost, world.rejects) == (["w"], {1: "worker_lost"})
    await world.nothing_kept()


async def test_a_higher_epoch_sends_what_waits_to_the_next_leader(world: World) -> None:
    await world.worker("draining", draining=True)
    world.submit(1)
    await world.until(lambda: world.router.scheduler.queued(), "queued")
    world.index.may_answer.clear()
    world.submit(2)
    await world.until(lambda: world.router.kept == 2, "both")
    said = bus_pb2.LeaderAnnouncement(model="m", router="other", epoch=world.router.leadership.epoch + 10_000_000)
    world.bus.publish(subjects.leader("c", "m"), said.SerializeToString())
    await world.until(lambda: len(world.rejects) == 2, "answers")
    assert set(world.rejects.values()) == {"no_leader"}
    await world.nothing_kept()


async def test_a_load_report_tells_the_epoch(world: World) -> None:
    spec = await world.worker("w")
    epoch = world.router.leadership.epoch
    report = bus_pb2.LoadReport(
        worker=types_pb2.WorkerRef(id="w", incarnation=spec.address.incarnation), model="m", epoch=epoch + 10_000_000
    )
    world.bus.publish(subjects.load("c", "w"), report.SerializeToString())
    await world.until(lambda: world.router.leadership.epoch > epoch + 10_000_000, "a new term above it")


async def test_after_an_outage_of_the_bus_workers_are_asked_what_became_of_their_requests(world: World) -> None:
    await world.worker("w")
    world.hub.stop()
    world.hub.start()
    await world.until(lambda: world.asked == ["w"], "asked")


async def test_a_request_whose_every_event_was_lost_is_asked_about_and_given_up(world: World) -> None:
    """No load report could show it: a worker that is never idle, or a KV transfer that never came."""
    await world.worker("w")
    key = world.submit(1)
    await world.until(lambda: world.work["w"], "placed")
    await world.until(lambda: world.asked, "the worker is asked")
    assert world.router.kept == 1
    world.event(key, bus_pb2.PHASE_UNKNOWN, worker="w")
    await world.nothing_kept()
    await world.until(lambda: world.rejects == {1: "unknown_request"}, "its frontend may submit it again")


async def test_a_worker_that_knows_a_silent_request_keeps_it_booked(world: World) -> None:
    await world.worker("w")
    key = world.submit(1)
    await world.until(lambda: world.work["w"], "placed")
    world.event(key, bus_pb2.PHASE_UNKNOWN, worker="another")
    for phase in (bus_pb2.PHASE_ACCEPTED, bus_pb2.PHASE_DECODING):
        world.event(key, phase, worker="w")
    await world.until(lambda: len(world.asked) >= 2, "asked twice")
    assert (world.router.kept, world.rejects) == (1, {})
    world.event(key, bus_pb2.PHASE_FINISHED, worker="w")
    await world.nothing_kept()


async def test_what_the_scheduler_has_given_up_is_not_kept(world: World) -> None:
    await world.worker("w")
    key = world.submit(1)
    await world.until(lambda: world.work["w"], "placed")
    world.router.scheduler.failed(key, clock.monotonic())  # as its own repair from load reports does
    await world.nothing_kept()


def _fields(spec: WorkerSpec) -> dict[str, Any]:
    return {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}


# -- traces ------------------------------------------------------------------------------------------------------------

TRACED = "00-" + "5a" * 16 + "-" + "77" * 8 + "-01"


async def test_a_traced_request_says_how_it_was_placed(world: World) -> None:
    for name in ("u", "v"):
        await world.worker(name)
    world.submit(1, traceparent=TRACED)
    world.submit(2, traceparent=TRACED[:-1] + "0")
    await world.until(lambda: sum(map(len, world.work.values())) == 2, "both placed")
    (route,), (queue,) = world.spans.named("route"), world.spans.named("queue")
    assert {trace for trace, _ in world.spans.records} == {int("5a" * 16, 16)}
    assert route.parent_id == int("77" * 8, 16) and queue.parent_id == route.span_id
    about = route.attributes
    (placed,) = [n for n, w in world.work.items() if any(b"q1" in assignment.submit for assignment in w)]
    assert about[spans.DECODE_WORKER] == placed and about[spans.LEG] == "local" and about[spans.ROUTER] == "r"
    columns = [about[spans.CANDIDATE_DECODE], *(about[name] for name in spans.CANDIDATE_TERMS.values())]
    assert {len(column) for column in columns} == {2}, "both candidates, every term"
    assert queue.attributes[spans.QUEUE_AHEAD] == 0 and route.error is None
    waits = [a.queued_s for assignments in world.work.values() for a in assignments]
    assert all(0.0 <= wait < 10.0 for wait in waits) and any(waits), "the workers are told how long it was here"


async def test_a_traced_request_says_what_it_waited_for(world: World) -> None:
    await world.worker("w")
    world.router.scheduler.worker_suspect("w", True, clock.monotonic())
    world.submit(1, traceparent=TRACED)
    await world.until(lambda: world.router.scheduler.num_queued, "queued")
    await asyncio.sleep(0.01)
    assert world.spans.records == [], "not over"
    world.router.scheduler.worker_suspect("w", False, clock.monotonic())
    world.event(RequestKey("of nobody"), bus_pb2.PHASE_FINISHED)
    await world.until(lambda: world.work["w"], "placed")
    (queue,) = world.spans.named("queue")
    assert queue.attributes[spans.QUEUE_REASON] in ("turn", "worker") and queue.end_s - queue.start_s > 0.01

    prompts = [world.submit(rid, isl=4000, traceparent=TRACED) for rid in range(2, 12)]
    await world.until(lambda: world.router.scheduler.num_queued, "more than it has credit for")

    def placed() -> bool:
        done = {span.attributes[spans.REQUEST_ID] for span in world.spans.named("queue")}
        for key in prompts:
            if key.id in done:
                world.event(key, bus_pb2.PHASE_FINISHED)
        return len(done) == 11

    await world.until(placed, "all placed")
    assert {str(q.attributes[spans.QUEUE_REASON]) for q in world.spans.named("queue")[1:]} & {"credit", "turn", "room"}


async def test_a_traced_request_that_is_refused_or_not_wanted_says_so(world: World) -> None:
    await world.worker("w")
    world.submit(1, isl=5000, traceparent=TRACED)
    await world.until(lambda: world.rejects, "refused")
    (route,) = world.spans.named("route")
    assert route.error is not None and route.attributes[spans.ERROR_TYPE] == world.rejects[1]

    world.router.scheduler.worker_suspect("w", True, clock.monotonic())
    key = world.submit(2, traceparent=TRACED)
    await world.until(lambda: world.router.scheduler.num_queued, "queued")
    world.abort(key)
    await world.until(lambda: len(world.spans.named("route")) == 2, "ended")
    route = world.spans.named("route")[1]
    assert route.error is None and route.attributes[spans.ERROR_TYPE] == "cancelled"

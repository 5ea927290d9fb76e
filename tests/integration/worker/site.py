"""Whole workers in one process: simulated engines, a bus and stores in memory, real gRPC between them.

``Site.frontend`` is what a frontend hears, ``Site.assign`` what a router sends. What a request must say is known from
its prompt alone (``words``): the simulated engine's tokens are a function of the tokens before them.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

from tandem.adapters.deployment import Model, Pool, PoolRole
from tandem.adapters.memory_bus import MemoryBus, MemoryHub
from tandem.adapters.memory_store import MemoryPrefixIndex, MemoryRegistry, MemoryStore
from tandem.core.blocks import token_bytes, token_ids
from tandem.core.types import RequestKey, Role, SamplingParams, WorkerAddress
from tandem.engine.protocol import EngineConfig
from tandem.engine.sim import SimEngine
from tandem.enginemodel.content import TokenContent, Vocabulary
from tandem.v1 import bus_pb2, types_pb2
from tandem.wire import codec, subjects
from tandem.worker.settings import WorkerSettings
from tandem.worker.shell import Stores, Worker, joined_worker

MODEL, CLUSTER, FRONTEND = "org/model-1.0", "test", "frontend.1"
BLOCK = 16
VOCABULARY = range(1000, 2000)
LONG_S = 20.0


def words(prompt: Sequence[int], count: int) -> list[int]:
    """The ``count`` tokens that follow ``prompt``."""
    content = TokenContent(prompt, SamplingParams(max_tokens=count), Vocabulary(VOCABULARY), BLOCK)
    return content.draw(0, count).tokens


async def until(condition: Callable[[], Any], what: str, timeout_s: float = LONG_S) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            while not condition():  # noqa: ASYNC110 - any condition
                await asyncio.sleep(0.005)
    except TimeoutError:
        raise AssertionError(f"{what}: not within {timeout_s:.0f} s") from None


@dataclass
class Heard:
    """What one rid's frames have brought so far."""

    placed: list[tuple[str, int]] = field(default_factory=list)  # (worker, leg)
    tokens: dict[int, int] = field(default_factory=dict)  # seq -> token
    repeats: int = 0
    finishes: list[bus_pb2.Finish] = field(default_factory=list)
    rejects: list[types_pb2.ErrorDetail] = field(default_factory=list)

    @property
    def output(self) -> list[int]:
        return [self.tokens[seq] for seq in sorted(self.tokens)]

    @property
    def finish(self) -> bus_pb2.Finish:
        assert len(self.finishes) == 1, self.finishes
        return self.finishes[0]

    @property
    def ended(self) -> bool:
        return bool(self.finishes or self.rejects)


class Frontend:
    """Hears frames, and lets them fall where a test says so."""

    def __init__(self, bus: MemoryBus) -> None:
        self.bus = bus
        self.heard: dict[int, Heard] = defaultdict(Heard)
        self.deaf = False
        self.frames: list[bus_pb2.TokenFrame] = []

    def on_frame(self, message: Any) -> None:
        if self.deaf:
            return
        frame = bus_pb2.TokenFrame.FromString(message.data)
        self.frames.append(frame)
        for placed in frame.placed:
            self.heard[placed.rid].placed.append((frame.worker.id, placed.leg))
        tokens, start = token_ids(frame.tokens), 0
        for rid, seq, count in zip(frame.rids, frame.seqs, frame.counts, strict=True):
            for offset in range(count):
                known = self.heard[rid].tokens
                self.heard[rid].repeats += seq + offset in known
                known[seq + offset] = tokens[start + offset]
            start += count
        for finish in frame.finishes:
            self.heard[finish.rid].finishes.append(finish)
        for reject in frame.rejects:
            self.heard[reject.rid].rejects.append(reject.error)

    async def end(self, rid: int, timeout_s: float = LONG_S) -> Heard:
        await until(lambda: self.heard[rid].ended, f"end of {rid}", timeout_s)
        return self.heard[rid]

    async def tokens_of(self, rid: int, count: int) -> None:
        await until(lambda: len(self.heard[rid].tokens) >= count, f"{count} tokens of {rid}")


class Site:
    def __init__(self, stack: AsyncExitStack) -> None:
        self._stack = stack
        self.hub = MemoryHub()
        self.store = MemoryStore()
        self.bus = MemoryBus(self.hub)
        self.frontend = Frontend(MemoryBus(self.hub))
        self.events: list[bus_pb2.LifecycleEvent] = []
        self.serving: dict[str, asyncio.Task[None]] = {}

    async def open(self) -> None:
        await self.frontend.bus.subscribe(subjects.tokens(CLUSTER, FRONTEND), self.frontend.on_frame)
        await self.bus.subscribe(subjects.events(CLUSTER, MODEL), self._on_events)

    def _on_events(self, message: Any) -> None:
        self.events += bus_pb2.LifecycleEvents.FromString(message.data).events

    def phases(self, request_id: str) -> list[str]:
        return [bus_pb2.Phase.Name(e.phase)[6:].lower() for e in self.events if e.key.id == request_id]

    async def told(self, request_id: str, phases: list[str]) -> None:
        """Routers hear this of it, in this order and no more; of what follows closely on each other, the last."""
        await self.told_last(phases[-1], request_id)
        expected = iter(phases)
        assert all(phase in expected for phase in self.phases(request_id)), (self.phases(request_id), phases)

    async def told_last(self, phase: str, *request_ids: str) -> None:
        for request_id in request_ids:
            await until(lambda r=request_id: self.phases(r)[-1:] == [phase], f"{phase} of {request_id}")  # type: ignore[misc]

    async def worker(self, name: str, role: Role = Role.DECODE, *, lease_s: float = 30.0, **engine: Any) -> Worker:
        """``engine``: arguments of the simulated engine; a step takes 2 ms if they say nothing else."""
        pool = Pool(role=PoolRole(role.value), engine="sim")
        model = Model(name=MODEL, path="", max_model_len=2048, block_size=BLOCK, kv_lease_s=lease_s, pools=(
            pool, Pool(role=PoolRole.AGGREGATED, engine="sim", name="any")))  # fmt: skip
        args = {"step_s": 0.002, "token_range": [VOCABULARY.start, VOCABULARY.stop], **engine}
        sim = SimEngine(
            EngineConfig(
                engine="sim", model_path="", served_model=MODEL, worker_id=name, run_dir="", disaggregated=True,
                max_model_len=2048, block_size=BLOCK, dtype="bfloat16", kv_lease_s=lease_s, kv_host="127.0.0.1",
                kv_port=0, args=args,
            )
        )  # fmt: skip
        deliver: list[Callable[..., None]] = []
        await sim.start(lambda events: deliver[0](events))
        self._stack.push_async_callback(sim.stop)
        settings = WorkerSettings(deployment="", model=MODEL)
        stores = Stores(MemoryRegistry(self.store), MemoryPrefixIndex(self.store))
        bus = MemoryBus(self.hub)
        joined = joined_worker(settings, CLUSTER, model, pool, role, name, sim, bus, stores)
        worker = await self._stack.enter_async_context(joined)
        deliver.append(worker.announcer.on_kv_events)
        task = self.serving[name] = asyncio.create_task(worker.serve())
        self._stack.push_async_callback(self._stop, task)
        await until(lambda: self.store.entry(name) or task.done(), f"{name} registered")
        return worker

    async def _stop(self, task: asyncio.Task[None]) -> None:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    # -- what a router and a frontend send -------------------------------------------------------------------------

    def submit(self, rid: int, prompt: Sequence[int], max_tokens: int, *, id: str = "", attempt: int = 0) -> bytes:
        return bus_pb2.Submit(
            key=codec.key_to_wire(RequestKey(id or f"r{rid}", attempt, 0)),
            model=MODEL,
            frontend=FRONTEND,
            rid=rid,
            isl_tokens=len(prompt),
            prompt=token_bytes(prompt),
            sampling=codec.sampling_to_wire(SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)),
        ).SerializeToString()

    def assign(
        self,
        first: str,
        rid: int,
        prompt: Sequence[int],
        max_tokens: int,
        *,
        decode: Worker | WorkerAddress | None = None,
        epoch: int = 1,
        predicted: int = 0,
        **key: Any,
    ) -> bus_pb2.Assignment:
        """Local on ``first``, or prefilled there for ``decode``."""
        assignment = bus_pb2.Assignment(
            epoch=epoch,
            router="router",
            leg=bus_pb2.LEG_LOCAL if decode is None else bus_pb2.LEG_PREFILL,
            submit=self.submit(rid, prompt, max_tokens, **key),
            predicted_cached_tokens=predicted,
        )
        if decode is not None:
            address = decode if isinstance(decode, WorkerAddress) else decode.address
            assignment.decode.CopyFrom(codec.address_to_wire(address))
        self.send(first, bus_pb2.WorkerMessage(assignments=[assignment]))
        return assignment

    def send(self, worker: str, message: bus_pb2.WorkerMessage) -> None:
        self.bus.publish(subjects.work(CLUSTER, worker), message.SerializeToString())

    def abort(self, request_id: str, max_attempt: int = 0) -> None:
        abort = bus_pb2.Abort(id=request_id, max_attempt=max_attempt)
        self.bus.publish(subjects.aborts(CLUSTER, MODEL), abort.SerializeToString())

    def repair(self, worker: str, rid: int, from_seq: int, *, id: str = "", attempt: int = 0) -> None:
        key = codec.key_to_wire(RequestKey(id or f"r{rid}", attempt, 0))
        repair = bus_pb2.Repair(key=key, frontend=FRONTEND, rid=rid, from_seq=from_seq)
        self.send(worker, bus_pb2.WorkerMessage(repair=repair))

    async def nothing_left(self, *workers: Worker, timeout_s: float = 5.0) -> None:
        """Neither requests nor handoffs nor blocks."""

        def left() -> list[str]:
            found = []
            for worker in workers:
                stats = worker.engine.stats()
                numbers = (worker.table.running, len(worker.handoffs), stats.open_handoffs, stats.kv_blocks_used,
                           stats.running_requests, stats.waiting_requests)  # fmt: skip
                if any(numbers):
                    found.append(f"{worker.address.id}: {numbers}")
            return found

        await until(lambda: not left(), "nothing left", timeout_s)

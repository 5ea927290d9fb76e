"""The worker process: one engine, and what makes it part of a cluster.

Prefill and decode workers differ in the role that they start with, nothing else.

Order of start matters: the engine first, while this process has no other threads (it forks), then gRPC, the bus, the
store; registration last, when work can be taken. Order of leaving: say that we drain, wait for running requests and
for KV that others still have to pull, deregister, close in reverse.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import math
import os
import signal
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from tandem.adapters import clock, timing
from tandem.adapters.addresses import is_wildcard, own_address
from tandem.adapters.bus import Bus, Message, Subscription
from tandem.adapters.deployment import Liveness, Model, Pool, PoolRole, read
from tandem.adapters.grpc_server import GrpcServer
from tandem.adapters.nats_bus import NatsBus
from tandem.adapters.process_metrics import instruments_of, metrics_endpoint, watch_tracing
from tandem.adapters.redis_store import RedisPrefixIndex, RedisRegistry, connect
from tandem.adapters.store import PrefixIndex, Registry
from tandem.adapters.traces import open_tracing
from tandem.core.types import Role, WorkerAddress, WorkerSpec
from tandem.engine.factory import make_engine
from tandem.engine.protocol import Engine, EngineConfig, EngineInfo, KvEvent
from tandem.errors import BusUnavailable, ConfigError, EngineFailed
from tandem.telemetry.tracing import OFF, Tracing
from tandem.v1 import bus_pb2, worker_pb2, worker_pb2_grpc
from tandem.wire import codec, subjects
from tandem.worker.announcer import Announcer
from tandem.worker.control import WorkerControl
from tandem.worker.execution import Execution
from tandem.worker.handoffs import OpenHandoffs, Peers
from tandem.worker.metrics import WorkerMetrics
from tandem.worker.outbox import Outbox
from tandem.worker.reporter import Reporter
from tandem.worker.request_table import RequestTable
from tandem.worker.settings import WorkerSettings
from tandem.worker.tracing import WorkerTraces

log = logging.getLogger(__name__)

#: For so long after a reconnect of ours the server may say "no responders" of peers that live.
BUS_GRACE_S = 3.0


async def run(settings: WorkerSettings, role: Role) -> None:
    """Runs until SIGTERM and the drain that follows it (a short one after SIGINT), or until the engine dies
    (EngineFailed)."""
    settings = _placed(settings)
    deployment = read(settings.deployment)
    model = deployment.model(settings.model)
    pool = _pool(model, settings.pool or role.value)
    worker_id = settings.instance or clock.new_name(f"{pool.pool_name}-{model.name}")
    async with contextlib.AsyncExitStack() as stack:
        run_dir = settings.run_dir or stack.enter_context(tempfile.TemporaryDirectory(prefix="tandem-"))
        os.makedirs(run_dir, exist_ok=True)
        engine = make_engine(_engine_config(settings, model, pool, worker_id, run_dir))
        # KV events before the announcer exists are kept for it.
        early: list[KvEvent] = []
        deliver: list[Callable[[Sequence[KvEvent]], None]] = [early.extend]
        await engine.start(lambda events: deliver[0](events))
        stack.push_async_callback(engine.stop)
        bus = await NatsBus.connect(settings.nats_url, name=worker_id)
        stack.push_async_callback(bus.close)
        redis = await connect(settings.redis_url)
        stack.push_async_callback(redis.aclose)
        cluster = deployment.cluster
        stores = Stores(RedisRegistry(redis, cluster), RedisPrefixIndex(redis, cluster))
        tracing = open_tracing(
            settings, role.value, cluster=cluster, instance=worker_id, model=model.name, pool=pool.pool_name
        )
        stack.push_async_callback(tracing.close)
        if pool.engine == "vllm":
            tracing.adopt()
        suspect_s = deployment.liveness.suspect_s
        joined = joined_worker(settings, cluster, model, pool, role, worker_id, engine, bus, stores, suspect_s, tracing)
        worker = await stack.enter_async_context(joined)
        deliver[0] = worker.announcer.on_kv_events
        worker.announcer.on_kv_events(early)
        instruments = instruments_of(role.value, deployment, bus)
        watch_tracing(instruments, tracing)
        WorkerMetrics(instruments, worker, [c.name for c in deployment.classes], clock.monotonic)
        await stack.enter_async_context(metrics_endpoint(settings, instruments, engine.expose(instruments)))
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, worker.leave)
        loop.add_signal_handler(signal.SIGINT, worker.leave, settings.interrupt_timeout_s)
        await worker.serve()


@dataclass(frozen=True, slots=True)
class Stores:
    registry: Registry
    index: PrefixIndex


class Worker:
    """Everything of one worker, connected. ``serve`` runs it."""

    def __init__(
        self,
        *,
        settings: WorkerSettings,
        cluster: str,
        engine: Engine,
        bus: Bus,
        announcer: Announcer,
        lease_s: float,
        address: WorkerAddress,
        suspect_s: float = Liveness().suspect_s,
        tracing: Tracing = OFF,
    ) -> None:
        loop = asyncio.get_running_loop()
        now = clock.monotonic
        self.settings = settings
        self.cluster = cluster
        self.engine = engine
        self.bus = bus
        self.announcer = announcer
        self.address = address
        self.table = RequestTable(retention_s=settings.retention_s)
        self.handoffs = OpenHandoffs(engine, lease_s=lease_s)
        self.peers = Peers(timeout_s=settings.hop_timeout_s, now=now)
        self.outbox = Outbox(bus, cluster, announcer.spec.model, address, loop)
        self._tasks: asyncio.TaskGroup | None = None
        self._leaving = asyncio.Event()
        self._leave_by = math.inf
        self.execution = Execution(
            bus=bus,
            cluster=cluster,
            worker=address.id,
            engine=engine,
            outbox=self.outbox,
            table=self.table,
            handoffs=self.handoffs,
            peers=self.peers,
            traces=WorkerTraces(tracing, address.id, now),
            spawn=self._spawn,
            now=now,
            hop_timeout_s=settings.hop_timeout_s,
            lease_s=lease_s,
        )
        self.execution.on_cached = announcer.cached
        self.reporter = Reporter(
            bus=bus,
            cluster=cluster,
            engine=engine,
            announcer=announcer,
            execution=self.execution,
            handoffs=self.handoffs,
            table=self.table,
            outbox=self.outbox,
            suspect_s=suspect_s,
            now=now,
        )
        self.control = WorkerControl(
            engine=engine,
            announcer=announcer,
            execution=self.execution,
            handoffs=self.handoffs,
            reporter=self.reporter,
            drain=self.leave,
        )

    def leave(self, within_s: float = math.inf) -> None:
        """Begins to drain; ``serve`` returns when nothing is left to do, or after ``within_s``, which is at most the
        drain's time limit. Told again, the sooner counts."""
        until = clock.monotonic() + min(within_s, self.settings.drain_timeout_s)
        self._leave_by = min(until, self._leave_by)
        self._leaving.set()

    async def serve(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            work = await self._subscribe()
            await self.announcer.register()
            spec = self.announcer.spec
            log.info("%s is ready (%s, slot %d)", self.address.id, spec.role.value, spec.slot)
            loops = [
                tasks.create_task(self.reporter.report_forever(self.settings.load_interval_s)),
                tasks.create_task(self.announcer.refresh_forever()),
                tasks.create_task(self.announcer.publish_forever()),
                tasks.create_task(self._watch_engine()),
            ]
            await self._leaving.wait()
            await self._drain(work)
            for task in loops:
                task.cancel()
        await self.announcer.leave()
        await self.peers.close()

    async def _subscribe(self) -> Subscription:
        """Returns the subscription for work."""
        me, model = self.address.id, self.announcer.spec.model
        await self.bus.subscribe(subjects.aborts(self.cluster, model), self._on_abort)
        await self.bus.subscribe(subjects.lost(self.cluster, model), self._on_lost)
        await self.bus.subscribe(subjects.bounces(self.cluster, me), self._on_bounce)
        return await self.bus.subscribe(subjects.work(self.cluster, me), self._on_work)

    def _on_work(self, message: Message) -> None:
        work = bus_pb2.WorkerMessage.FromString(message.data)
        if work.assignments:
            self.execution.assignments(work.assignments)
            return
        match work.WhichOneof("kind"):
            case "handoff":
                self.execution.handoff(work.handoff)
            case "repair":
                self.execution.repair(work.repair)
            case "taint":
                self.execution.taint(work.taint)
            case "tell_again":
                keys = [codec.key_from_wire(key) for key in work.tell_again.keys]
                if keys:
                    self.execution.tell_of(keys)
                else:
                    self.execution.tell_again()
            case kind:
                log.error("message of unknown kind %r dropped", kind)

    def _on_abort(self, message: Message) -> None:
        abort = bus_pb2.Abort.FromString(message.data)
        choice = abort.choice if abort.HasField("choice") else None
        self.execution.abort(abort.id, abort.max_attempt, choice)

    def _on_lost(self, message: Message) -> None:
        lost = bus_pb2.WorkerLost.FromString(message.data)
        self.handoffs.peer_lost(lost.worker, lost.incarnation, gone=lost.gone)

    def _on_bounce(self, message: Message) -> None:
        if not message.no_responders:
            return
        if self.bus.stats.reconnects and clock.monotonic() - self.bus.reconnected_at < BUS_GRACE_S:
            log.warning("no responders on %s so soon after a reconnect: not believed", message.subject)
            return
        self.execution.bounced(subjects.last_token(message.subject))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        assert self._tasks is not None
        self._tasks.create_task(work)

    async def _watch_engine(self) -> None:
        """A dead or hung engine ends the process: the supervisor starts it anew."""
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.engine.dead.wait(), 1.0)
                raise EngineFailed("the engine died")
            if self.reporter.hung_for() > self.settings.engine_hang_s:
                raise EngineFailed(f"the engine made no step for {self.settings.engine_hang_s:.0f} s with work pending")

    async def _drain(self, work: Subscription) -> None:
        log.info("draining: %d requests, %d handoffs", self.table.running, len(self.handoffs))
        self.execution.draining = True
        await self.announcer.change(draining=True)
        await self._idle()
        # Nobody listens from now on, so that the bus tells whoever still has something for us. Then once more: it may
        # have come just before.
        await work.unsubscribe()
        await self._flush()
        await self._idle()
        self.outbox.tell_now()
        await self._flush()

    async def _idle(self) -> None:
        while self.table.running or len(self.handoffs):
            if clock.monotonic() > self._leave_by:
                log.error("leaving with %d requests and %d handoffs", self.table.running, len(self.handoffs))
                return
            await asyncio.sleep(0.02)

    async def _flush(self) -> None:
        with contextlib.suppress(BusUnavailable):
            await self.bus.flush(timeout_s=1.0)


@contextlib.asynccontextmanager
async def joined_worker(
    settings: WorkerSettings,
    cluster: str,
    model: Model,
    pool: Pool,
    role: Role,
    worker_id: str,
    engine: Engine,
    bus: Bus,
    stores: Stores,
    suspect_s: float = Liveness().suspect_s,
    tracing: Tracing = OFF,
) -> AsyncIterator[Worker]:
    """A worker around a started engine, its gRPC server up. ``serve`` makes it part of the cluster."""
    grpc_server = GrpcServer(settings.grpc_host, settings.grpc_port)
    host = settings.advertise_host or settings.grpc_host
    address = WorkerAddress(worker_id, clock.new_incarnation(), f"{host}:{grpc_server.port}")
    worker = Worker(
        settings=settings,
        cluster=cluster,
        engine=engine,
        bus=bus,
        announcer=Announcer(
            stores.registry,
            stores.index,
            _spec(address, model, pool, role, engine.info),
            ttl_s=settings.registry_ttl_s,
            now=clock.monotonic,
        ),
        lease_s=model.kv_lease_s,
        address=address,
        suspect_s=suspect_s,
        tracing=tracing,
    )
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(worker.control, grpc_server.server)
    await grpc_server.start(worker_pb2.DESCRIPTOR.services_by_name["WorkerService"].full_name)
    try:
        yield worker
    finally:
        await grpc_server.stop()


def _placed(settings: WorkerSettings) -> WorkerSettings:
    """With names of interfaces resolved. ConfigError where other processes could not reach this one."""
    host = own_address(settings.grpc_host)
    if is_wildcard(host) and not settings.advertise_host:
        raise ConfigError(f"others cannot be told to reach {host}: set TANDEM_ADVERTISE_HOST, or name an interface")
    return dataclasses.replace(settings, grpc_host=host, kv_host=own_address(settings.kv_host))


def _pool(model: Model, name: str) -> Pool:
    for pool in model.pools:
        if pool.pool_name == name:
            return pool
    names = ", ".join(pool.pool_name for pool in model.pools)
    raise ConfigError(f"model {model.name!r} has no pool {name!r}; it has: {names}", param="TANDEM_POOL")


def _engine_config(settings: WorkerSettings, model: Model, pool: Pool, worker_id: str, run_dir: str) -> EngineConfig:
    return EngineConfig(
        engine=pool.engine,
        model_path=str(model.folder),
        served_model=model.name,
        worker_id=worker_id,
        run_dir=run_dir,
        disaggregated=pool.role is not PoolRole.AGGREGATED,
        max_model_len=model.max_model_len,
        block_size=model.block_size,
        dtype=model.dtype,
        kv_lease_s=model.kv_lease_s,
        kv_host=settings.kv_host,
        kv_port=settings.kv_port,
        embeds=model.task == "embed",
        args=_engine_args(pool),
    )


def _engine_args(pool: Pool) -> dict[str, object]:
    """The simulated engine runs by the pool's timing profile, unless its own options say otherwise."""
    profile = timing.of_pool(pool) if pool.engine == "sim" else None
    if profile is None:
        return dict(pool.engine_args)
    terms = {name: getattr(profile, name) for name in ("p0", "p1", "p2", "p3", "d0", "d1", "d2")}
    return {"profile": "generic", "terms": terms, **pool.engine_args}


def _spec(address: WorkerAddress, model: Model, pool: Pool, role: Role, info: EngineInfo) -> WorkerSpec:
    profile = timing.of_pool(pool)
    return WorkerSpec(
        address=address,
        model=model.name,
        role=role,
        slot=0,
        block_size=info.block_size,
        dtype=info.dtype,
        kv_layout=info.kv_layout,
        engine=info.engine,
        engine_version=info.engine_version,
        max_model_len=info.max_model_len,
        kv_blocks_total=info.kv_blocks_total,
        kv_bytes_per_token=info.kv_bytes_per_token,
        max_batched_tokens=info.max_batched_tokens,
        max_num_seqs=info.max_num_seqs,
        perf_profile=profile.name if profile is not None else info.perf_profile,
        kv_endpoint=info.kv_endpoint,
        link_bytes_per_s=info.link_bytes_per_s,
        pool=pool.pool_name,
    )

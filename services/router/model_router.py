"""One model's router: feeds the decision core with what is heard and does what it decides.

All decisions are ``tandem.core.scheduler.Scheduler``'s; here are only messages. A standby hears loads and events too,
so its picture is warm when it is elected. Whatever goes wrong with a placement reaches the frontend, who owns the
request, as a Reject with a retryable code: it submits again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import grpc
from msgspec import Struct

from services.router.config import RouterSettings
from services.router.doubts import Doubts
from services.router.fences import Fences
from services.router.fleet import Fleet, FleetListener, Loss
from services.router.leadership import Leadership
from services.router.metrics import RouterMetrics
from services.router.tracing import RouterTraces, Stay
from tandem.adapters.bus import Bus, Message
from tandem.adapters.deployment import Liveness
from tandem.adapters.grpc_server import open_channel
from tandem.adapters.store import Counters, Found, Leases, PrefixIndex, Registry
from tandem.core.effects import Effect, Place, Recall, Refuse
from tandem.core.holders import cached_by_worker
from tandem.core.policy import Policy, RequestClass, Tenant
from tandem.core.scheduler import Scheduler
from tandem.core.types import Explanation, Leg, Request, RequestKey, WorkerSpec
from tandem.errors import (
    BusUnavailable,
    Cancelled,
    InternalError,
    NoLeader,
    PayloadTooLarge,
    Refused,
    StoreUnavailable,
    TandemError,
    UnknownRequest,
    WorkerLostError,
)
from tandem.v1 import bus_pb2, types_pb2, worker_pb2, worker_pb2_grpc
from tandem.wire import codec, subjects

log = logging.getLogger(__name__)

FENCE_TIMEOUT_S = 0.5
#: While we may not place, the scheduler's wishes to be called wait this long.
NOT_NOW_S = 0.25
#: Between two looks for requests whose end nobody told us of.
REPAIR_S = 1.0
#: Of several assignments in one message; one alone may have as many as the bus carries.
MOST_BYTES = 128 << 10
#: Messages with assignments of which it is remembered what they held: until the server could have said that nobody took
#: them.
MOST_SENT = 1024


class _Submitted(Struct):
    """What is needed to deliver a request, or to tell its frontend that it was not."""

    raw: bytes  # until it is placed: prompts are large
    frontend: str
    rid: int
    received_s: float
    #: While it waits here, if it is traced.
    stay: Stay | None


class _Letter:
    """What one worker is to be told of one look of the scheduler."""

    __slots__ = ("keys", "message", "size")

    def __init__(self) -> None:
        self.message = bus_pb2.WorkerMessage()
        self.keys: list[RequestKey] = []
        self.size = 0


@dataclass(frozen=True, slots=True)
class Ports:
    bus: Bus
    registry: Registry
    leases: Leases
    index: PrefixIndex
    counters: Counters


class ModelRouter:
    def __init__(
        self,
        *,
        settings: RouterSettings,
        router: str,
        cluster: str,
        model: str,
        liveness: Liveness,
        scheduler: Scheduler,
        ports: Ports,
        metrics: RouterMetrics,
        traces: RouterTraces,
        now: Callable[[], float],
    ) -> None:
        self._settings = settings
        self._router = router
        self._cluster = cluster
        self._bounce_name = f"{router}/{model}"
        self.model = model
        self.scheduler = scheduler
        self._bus = ports.bus
        self._index = ports.index
        self._counters = ports.counters
        self._metrics = metrics
        self._traces = traces
        self._now = now
        self._submitted: dict[RequestKey, _Submitted] = {}
        #: Of these, those about which the index is being asked: the scheduler does not know them yet.
        self._looking: set[RequestKey] = set()
        #: By the number of its message, whom it told and what was placed with it; of the latest.
        self._sent: dict[int, tuple[str, list[RequestKey]]] = {}
        self._letters = 0
        #: Of these, those about which it is going to be asked, with their block hashes.
        self._arrived: list[tuple[Request, bytes]] = []
        self._fences = Fences()
        self._doubts = Doubts(settings.ask_after_s)
        self._loop = asyncio.get_running_loop()
        self._wakeup: asyncio.TimerHandle | None = None
        self._wakes_at = 0.0
        self._poll_due: asyncio.Handle | None = None
        #: The index does not answer: load alone decides.
        self.index_away = False
        self.fleet = Fleet(
            bus=ports.bus,
            registry=ports.registry,
            model=model,
            liveness=liveness,
            hop_timeout_s=settings.hop_timeout_s,
            listener=FleetListener(self._worker_up, self._worker_suspect, self._worker_lost, self._worker_hung),
            now=now,
        )
        self.leadership = Leadership(
            bus=ports.bus,
            leases=ports.leases,
            cluster=cluster,
            model=model,
            router=router,
            lease_ttl_s=settings.lease_ttl_s,
            announce_interval_s=settings.announce_interval_s,
            elected=self._elected,
            deposed=self._deposed,
        )
        metrics.watch(self, now)

    async def run(self) -> None:
        """Until cancelled."""
        bus = self._bus
        try:
            async with asyncio.TaskGroup() as tasks:
                await bus.subscribe(subjects.requests(self._cluster, self.model, self._router), self._on_submits)
                await bus.subscribe(subjects.aborts(self._cluster, self.model), self._on_abort)
                await bus.subscribe(subjects.events(self._cluster, self.model), self._on_events)
                await bus.subscribe(subjects.all_loads(self._cluster), self._on_load)
                await bus.subscribe(subjects.bounces(self._cluster, self._bounce_name), self._on_bounce)
                tasks.create_task(self.fleet.watch_registry(self._settings.registry_interval_s))
                tasks.create_task(self.fleet.watch_silence())
                tasks.create_task(self.leadership.run())
                tasks.create_task(self._save_counters())
                tasks.create_task(self._repair_accounting())
        finally:
            for handle in (self._wakeup, self._poll_due):
                if handle is not None:
                    handle.cancel()
            await self.fleet.close()

    async def explain(self, request: Request, hashes: bytes) -> Explanation:
        found: Found
        try:
            found = [await self._index.lookup(self.model, hashes)]
        except StoreUnavailable as error:
            found = error
        return self.scheduler.explain(request, self._cached(found, 1)[0], self._now())

    def reconfigure(self, policy: Policy, classes: Mapping[str, RequestClass], tenants: Mapping[str, Tenant]) -> None:
        """For what is decided from now on."""
        self.scheduler.reconfigure(policy, classes=classes, tenants=tenants, now=self._now())
        self._poll()

    @property
    def kept(self) -> int:
        """Requests of which anything is kept here."""
        return len(self._submitted)

    # -- from frontends --------------------------------------------------------------------------------------------

    def _on_submits(self, message: Message) -> None:
        failure: Exception | None = None
        for data in bus_pb2.Submits.FromString(message.data).submits:
            try:
                self._on_submit(data)
            except Exception as error:  # of that one: the others are not to suffer for it
                failure = error
        if failure is not None:
            raise failure  # the bus counts it

    def _on_submit(self, data: bytes) -> None:
        submit = bus_pb2.Submit.FromString(data)
        if not self.leadership.epoch:
            return self._reject(submit.frontend, submit.rid, NoLeader(f"{self._router} does not lead {self.model}"))
        now = self._now()
        request = codec.request_from_wire(submit, now=now)
        key = request.key
        if key in self._submitted or self._fences.holds(key):
            return None  # delivered twice: the first answer stands; or nobody waits for one
        stay = self._traces.arrived(submit.traceparent, request)
        self._submitted[key] = _Submitted(data, submit.frontend, submit.rid, now, stay)
        self._looking.add(key)
        if not self._arrived:
            self._loop.call_soon(self._look_up)
        self._arrived.append((request, submit.block_hashes))
        return None

    def _look_up(self) -> None:
        """One question to the index for all that has arrived in this turn of the event loop."""
        arrived, self._arrived = self._arrived, []
        requests = [request for request, _ in arrived]
        prompts = [hashes for _, hashes in arrived]
        if any(prompts):
            self._index.ask(self.model, prompts, partial(self._looked_up, requests, self._now()))
        else:
            self._take(requests, [{}] * len(requests))

    def _looked_up(self, requests: Sequence[Request], asked_at: float, found: Found) -> None:
        self._metrics.lookups.observe(self._now() - asked_at)
        self._take(requests, self._cached(found, len(requests)))

    def _take(self, requests: Sequence[Request], cached: Sequence[Mapping[str, int]]) -> None:
        try:
            for request, found in zip(requests, cached, strict=True):
                if request.key in self._looking:  # else cancelled while we looked
                    self._looking.remove(request.key)
                    self._queue(request, found)
        finally:
            self._poll()  # at once: what else this turn brings may wait, they have

    def _queue(self, request: Request, cached: Mapping[str, int]) -> None:
        stay = self._submitted[request.key].stay
        if stay is not None:
            self._traces.queued(stay, cached, self.scheduler.num_queued)
        try:
            self.scheduler.submit(request, cached, self._now())
        except TandemError as error:
            self._refuse(request.key, error)

    def _cached(self, found: Found, num_prompts: int) -> Sequence[Mapping[str, int]]:
        """worker -> cached prompt tokens, of each. Empty when the index could not be asked: routing goes on by load
        alone."""
        if isinstance(found, TandemError):
            if not self.index_away:
                log.warning("routing by load alone: %s", found)
            self.index_away = True
            return [{}] * num_prompts
        self.index_away = False
        slots = self.fleet.slots
        return [cached_by_worker(depths, slots) for depths in found]

    def _on_abort(self, message: Message) -> None:
        abort = bus_pb2.Abort.FromString(message.data)
        choice = abort.choice if abort.HasField("choice") else None
        now = self._now()
        self._fences.add(abort.id, abort.max_attempt, choice, now)
        ended = self.scheduler.abort(abort.id, abort.max_attempt, now, choice=choice)
        looking = [k for k in self._looking if k.id == abort.id and k.attempt <= abort.max_attempt]
        ended += [k for k in looking if choice in (None, k.choice)]
        self._looking.difference_update(ended)
        for key in ended:
            submitted = self._submitted.pop(key, None)
            if submitted is not None and submitted.stay is not None:
                self._traces.ended(submitted.stay, Cancelled("not wanted any more"))
        self._poll_if_anyone_waits()

    # -- from workers ----------------------------------------------------------------------------------------------

    def _on_load(self, message: Message) -> None:
        report = bus_pb2.LoadReport.FromString(message.data)
        if report.model != self.model:
            return
        self.leadership.hear(report.epoch)
        if self.fleet.heard(report):
            self.scheduler.worker_load(codec.load_from_wire(report), self._now())
            self._poll_if_anyone_waits()

    def _on_events(self, message: Message) -> None:
        batch = bus_pb2.LifecycleEvents.FromString(message.data)
        now, scheduler = self._now(), self.scheduler
        for event in batch.events:
            key, phase = codec.key_from_wire(event.key), event.phase
            if phase != bus_pb2.PHASE_UNKNOWN:
                self._doubts.heard(key, now)
            match phase:
                case bus_pb2.PHASE_DECODING:
                    scheduler.decode_started(key, now)
                case bus_pb2.PHASE_PREFILL_DONE:
                    scheduler.prefill_done(key, now)
                case bus_pb2.PHASE_FINISHED:
                    scheduler.finished(key, event.output_tokens, event.cached_tokens, now)
                    self._submitted.pop(key, None)
                case bus_pb2.PHASE_FAILED | bus_pb2.PHASE_ABORTED:
                    scheduler.failed(key, now)
                    self._submitted.pop(key, None)
                case bus_pb2.PHASE_UNKNOWN:
                    if self._doubts.denied(key, batch.worker.id):
                        log.warning("request %s is known to none of its workers any more", key.id)
                        self._fail(key, UnknownRequest("none of its workers knows this request"))
        self._poll_if_anyone_waits()

    def _on_bounce(self, message: Message) -> None:
        """Nobody took what was placed there."""
        if not message.no_responders:
            return
        worker, _, number = subjects.last_token(message.subject).rpartition(" ")
        self.fleet.no_responders(worker)
        told, keys = self._sent.pop(int(number), ("", []))
        if told == worker:  # else it is of a router before us
            for key in keys:
                self._fail(key, WorkerLostError(f"worker {worker} does not answer"))
        self._poll_soon()

    # -- from the fleet --------------------------------------------------------------------------------------------

    def _worker_up(self, spec: WorkerSpec) -> None:
        for key in self.scheduler.worker_up(spec, self._now()):
            self._refuse(key, WorkerLostError(f"worker {spec.id} restarted"))
        self._poll()

    def _worker_suspect(self, worker: str, suspect: bool) -> None:
        log.info("worker %s is %s", worker, "suspect" if suspect else "heard again")
        self.scheduler.worker_suspect(worker, suspect, self._now())
        self._poll()

    def _worker_lost(self, loss: Loss) -> None:
        if loss.why != "left":
            self._metrics.worker_lost()
        for key in self.scheduler.worker_down(loss.worker, loss.incarnation, self._now()):
            self._refuse(key, WorkerLostError(f"worker {loss.worker} is gone: {loss.why}"))
        if self.leadership.epoch:
            lost = bus_pb2.WorkerLost(
                model=self.model, worker=loss.worker, incarnation=loss.incarnation, gone=loss.gone
            )
            self._publish(subjects.lost(self._cluster, self.model), lost.SerializeToString(), "")
        self._poll()

    def _worker_hung(self, worker: str) -> None:
        """Its prefills go elsewhere; its streams wait for it to come back or to be declared dead."""
        for key in self.scheduler.prefilling_on(worker):
            self._fail(key, WorkerLostError(f"prefill worker {worker} is silent"))
        self._poll()

    # -- leadership ------------------------------------------------------------------------------------------------

    async def _elected(self, epoch: int) -> int:
        """Before the first placement: every worker learns the epoch; the tenants' counters are read."""
        await self.fleet.look()
        answers = await asyncio.gather(*(self._fence(m.spec, epoch) for m in list(self.fleet.members.values())))
        try:
            self.scheduler.restore_counters(await self._counters.load(f"service:{self.model}"))
        except StoreUnavailable as error:
            log.warning("tenants' counters not read: %s", error)
        return max(answers, default=epoch)

    async def _fence(self, spec: WorkerSpec, epoch: int) -> int:
        request = worker_pb2.FenceRequest(router=self._router, epoch=epoch)
        async with open_channel(spec.address.grpc_address) as channel:
            try:
                answer = await worker_pb2_grpc.WorkerServiceStub(channel).Fence(request, timeout=FENCE_TIMEOUT_S)
            except grpc.aio.AioRpcError as error:
                log.warning("worker %s not told of epoch %d: %s", spec.id, epoch, error.code().name)
                return epoch
        return int(answer.highest_epoch)

    def _deposed(self) -> None:
        """What waits here goes to the next leader; what runs goes on."""
        for key in [*self._looking]:
            self._looking.remove(key)
            self._refuse(key, NoLeader(f"{self._router} does not lead {self.model} any more"))
        for key in self.scheduler.queued():
            self._fail(key, NoLeader(f"{self._router} does not lead {self.model} any more"))

    async def _repair_accounting(self) -> None:
        """Some ends are never told. After an outage of our own bus connection workers are asked for them; of the rest
        the scheduler finds out by itself, and what is kept here goes with it."""
        asked = self._bus.stats.reconnects
        while True:
            await asyncio.sleep(REPAIR_S)
            if asked != self._bus.stats.reconnects and not self.fleet.bus_in_doubt():
                asked = self._bus.stats.reconnects
                self._ask_workers()
            for key in self._submitted.keys() - self._looking:
                if self.scheduler.state_of(key) is None:
                    del self._submitted[key]
            self._ask_about_the_silent()

    def _ask_about_the_silent(self) -> None:
        self._doubts.keep(lambda key: self.scheduler.state_of(key) is not None)
        if self.fleet.bus_in_doubt():
            return
        for worker, keys in self._doubts.questions(self._now()).items():
            question = bus_pb2.TellAgain(keys=[codec.key_to_wire(key) for key in keys])
            message = bus_pb2.WorkerMessage(tell_again=question).SerializeToString()
            self._publish(subjects.work(self._cluster, worker), message, "")

    def _ask_workers(self) -> None:
        question = bus_pb2.WorkerMessage(tell_again=bus_pb2.TellAgain()).SerializeToString()
        for worker in self.fleet.members:
            self._publish(subjects.work(self._cluster, worker), question, "")

    async def _save_counters(self) -> None:
        saved: Mapping[str, float] = {}
        while True:
            await asyncio.sleep(self._settings.counters_interval_s)
            current = self.scheduler.service_counters()
            if self.leadership.epoch and current != saved:
                try:
                    await self._counters.save(f"service:{self.model}", current)
                    saved = current
                except StoreUnavailable as error:
                    log.warning("tenants' counters not saved: %s", error)

    # -- doing what was decided ------------------------------------------------------------------------------------

    def _poll_soon(self) -> None:
        """Once for all that this turn of the event loop brings."""
        if self._poll_due is None:
            self._poll_due = self._loop.call_soon(self._poll)

    def _poll_if_anyone_waits(self) -> None:
        """Who is placed may have given room back: that decides nothing while the queue is empty, and what time alone
        brings (``next_wakeup``) is armed already."""
        if self.scheduler.num_queued:
            self._poll_soon()

    def _poll(self) -> None:
        if self._poll_due is not None:
            self._poll_due.cancel()
            self._poll_due = None
        now = self._now()
        may_place = self.leadership.epoch > 0 and not self.fleet.bus_in_doubt()
        if may_place:
            effects = self.scheduler.poll(now)
            if effects:
                self._metrics.decisions.observe(self._now() - now)
            letters: dict[str, _Letter] = {}
            for effect in effects:
                try:
                    self._carry_out(effect, letters)
                except Exception as error:  # of that one: the others are not to suffer for it
                    self._loop.call_exception_handler({"message": "an effect failed", "exception": error})
                    self._give_up(effect.request.key, error)
            for worker, letter in letters.items():
                self._send(worker, letter)
        at = self.scheduler.next_wakeup(now)
        if at is not None:
            self._wake_at(max(at, now + (0.001 if may_place else NOT_NOW_S)), now)

    def _carry_out(self, effect: Effect, letters: dict[str, _Letter]) -> None:
        match effect:
            case Place():
                self._place(effect, letters)
            case Refuse():
                self._refuse(effect.request.key, effect.error)
            case Recall():
                self._recall(effect.request.key)

    def _give_up(self, key: RequestKey, error: Exception) -> None:
        """Of a placement that failed on our side, unless it is in a letter already."""
        submitted = self._submitted.get(key)
        if submitted is not None and submitted.raw:
            self._fail(key, InternalError(f"placing it failed: {error!r}"))

    def _wake_at(self, at: float, now: float) -> None:
        """One that is early does no harm: it is not moved to where it would be due."""
        if self._wakeup is not None:
            if self._wakes_at <= at:
                return
            self._wakeup.cancel()
        self._wakes_at = at
        self._wakeup = self._loop.call_later(at - now, self._woken)

    def _woken(self) -> None:
        self._wakeup = None
        self._poll()

    def _place(self, effect: Place, letters: dict[str, _Letter]) -> None:
        """``letters``: to each worker, what this look has placed there so far."""
        key, plan, now = effect.request.key, effect.plan, self._now()
        submitted = self._submitted[key]
        first, leg, wire_leg = plan.first_worker, plan.leg, codec.leg_to_wire(plan.leg)
        decode = self.fleet.members[plan.decode_worker].spec.address if leg is Leg.PREFILL else None
        letter = letters.get(first)
        if letter is not None and letter.size + len(submitted.raw) > MOST_BYTES:
            self._send(first, letter)
            letter = None
        if letter is None:
            letter = letters[first] = _Letter()
        letter.keys.append(key)
        letter.size += len(submitted.raw)
        assignment = letter.message.assignments.add()  # in its place: a message given to another is copied
        assignment.epoch = self.leadership.epoch
        assignment.router = self._router
        assignment.leg = wire_leg
        assignment.submit = submitted.raw
        assignment.predicted_cached_tokens = effect.cached_tokens
        assignment.priority = effect.priority
        assignment.queued_s = now - submitted.received_s
        assignment.others_wait = self.scheduler.num_queued > 0
        if decode is not None:
            assignment.decode.CopyFrom(codec.address_to_wire(decode))
        submitted.raw = b""
        self._doubts.placed(key, (first, plan.decode_worker), now)
        if submitted.stay is not None:
            self._traces.placed(submitted.stay, effect)
            submitted.stay = None
        self._metrics.placed(effect, leg, now)

    def _send(self, worker: str, letter: _Letter) -> None:
        self._letters += 1
        self._sent[self._letters] = worker, letter.keys
        if len(self._sent) > MOST_SENT:
            del self._sent[next(iter(self._sent))]
        reply = subjects.and_number(subjects.bounce_of(self._cluster, self._bounce_name, worker), self._letters)
        if not self._publish(subjects.work(self._cluster, worker), letter.message.SerializeToString(), reply):
            for key in letter.keys:
                self._fail(key, WorkerLostError(f"assignment to {worker} could not be sent"))

    def _recall(self, key: RequestKey) -> None:
        """Background work makes way: its workers stop it, its frontend submits it again."""
        abort = bus_pb2.Abort(id=key.id, max_attempt=key.attempt, choice=key.choice)
        self._publish(subjects.aborts(self._cluster, self.model), abort.SerializeToString(), "")
        self._refuse(key, Refused("background work made way for a request that could not wait"))

    def _refuse(self, key: RequestKey, error: TandemError) -> None:
        submitted = self._submitted.pop(key, None)
        if submitted is not None:
            self._reject(submitted.frontend, submitted.rid, error)
            if submitted.stay is not None:
                self._traces.ended(submitted.stay, error)
                submitted.stay = None

    def _fail(self, key: RequestKey, error: TandemError) -> None:
        """A request that was ours to run is not any more: its frontend submits again."""
        self.scheduler.failed(key, self._now())
        self._refuse(key, error)

    def _reject(self, frontend: str, rid: int, error: TandemError) -> None:
        self._metrics.refused(error)
        frame = bus_pb2.TokenFrame(
            worker=types_pb2.WorkerRef(id=self._router),
            rejects=[bus_pb2.Reject(rid=rid, error=codec.error_to_wire(error))],
        )
        self._publish(subjects.tokens(self._cluster, frontend), frame.SerializeToString(), "")

    def _publish(self, subject: str, data: bytes, reply: str) -> bool:
        try:
            self._bus.publish(subject, data, reply)
        except (BusUnavailable, PayloadTooLarge) as error:
            log.warning("not sent to %s: %s", subject, error)
            return False
        return True

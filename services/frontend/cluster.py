"""The frontend's end of the bus: carries messages into the request table and does what the table wants done.

One task in all, the sweep; everything else happens in the bus's callbacks. Requests are begun, stopped and cancelled
here; what becomes of them their ``Consumer`` hears.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from services.frontend.effects import Abandon, AskAgain, Deliver, Effect, Ended, Opened, Restarted, Submit
from services.frontend.journey import Journey, State
from services.frontend.leaders import Leaders
from services.frontend.order import Consumer, Order, Patience
from services.frontend.request_table import RequestTable
from services.frontend.submission import submit_message
from tandem.adapters.bus import Bus, Message, Subscription
from tandem.adapters.clock import monotonic
from tandem.errors import BusUnavailable, InternalError, TandemError
from tandem.v1 import bus_pb2
from tandem.wire import codec, subjects

log = logging.getLogger(__name__)

SWEEP_S = 0.1
#: For this long after a reconnect of the bus, peers that live may not be back yet (seen: 1.5 s).
SETTLING_S = 3.0
#: Of several Submits in one message; one alone may have as many as the bus carries.
MOST_BYTES = 128 << 10
#: No sweep for so long: this process was stopped, or its machine was.
STOPPED_S = 1.0


class _Batch:
    """What leaves for one router in one message."""

    __slots__ = ("journeys", "messages", "size")

    def __init__(self) -> None:
        self.journeys: list[Journey] = []
        self.messages: list[bytes] = []
        self.size = 0

    def add(self, journey: Journey, message: bytes) -> None:
        self.journeys.append(journey)
        self.messages.append(message)
        self.size += len(message)


class Cluster:
    def __init__(
        self,
        bus: Bus,
        *,
        cluster: str,
        instance: str,
        patience: Patience | None = None,
        now: Callable[[], float] = monotonic,
    ) -> None:
        self._bus = bus
        self._cluster = cluster
        self._instance = instance
        self._patience = patience or Patience()
        self._now = now
        self._table = RequestTable(Leaders(), self._patience)
        self._subscriptions: list[Subscription] = []
        self._performing = False
        self._to_submit: dict[Journey, None] = {}
        self._connected_at = self._first_connected_at = 0.0
        self._gone_since: float | None = None
        self._swept_at = now()
        #: Called at each sweep with the time: whoever else has clocks to watch.
        self.on_sweep: Callable[[float], None] = lambda now: None

    async def open(self) -> None:
        name = self._cluster
        subscribe = self._bus.subscribe
        self._subscriptions = [
            await subscribe(subjects.tokens(name, self._instance), self._on_frame),
            await subscribe(subjects.bounces(name, self._instance), self._on_bounce),
            await subscribe(subjects.all_leaders(name), self._on_announcement),
            await subscribe(subjects.all_lost(name), self._on_lost),
        ]
        self._connected_at = self._first_connected_at = self._bus.reconnected_at

    async def close(self) -> None:
        """Cancels what is left."""
        for journey in self._table:
            journey.cancel()
        self._perform()
        for subscription in self._subscriptions:
            await subscription.unsubscribe()
        self._subscriptions = []

    async def run(self) -> None:
        """Watches deadlines and silences; never returns."""
        while True:
            self.sweep()
            await asyncio.sleep(SWEEP_S)

    @property
    def connected(self) -> bool:
        return self._bus.connected

    def has_leader(self, model: str) -> bool:
        return self._table.leaders.current(model, self._now()) is not None

    @property
    def in_flight(self) -> int:
        return len(self._table)

    # -- requests --------------------------------------------------------------------------------------------------

    def begin(self, order: Order, consumer: Consumer) -> Journey:
        """``consumer`` hears of it from now on."""
        journey = self._table.begin(order, consumer, self._now())
        self._perform()
        return journey

    def stop(self, journey: Journey) -> None:
        """The consumer has what it wants; the end comes within half a second, with its figures."""
        journey.stop(self._now())
        self._perform()

    def cancel(self, journey: Journey) -> None:
        journey.cancel()
        self._perform()

    def give_up(self, error: TandemError) -> None:
        """Everything under way ends with ``error``, which its clients get to read."""
        for journey in self._table:
            journey.give_up(error)
        self._perform()

    # -- what the bus brings ---------------------------------------------------------------------------------------

    def _on_frame(self, message: Message) -> None:
        try:
            self._table.on_frame(bus_pb2.TokenFrame.FromString(message.data), self._now())
        finally:
            self._perform()  # what the frame has brought about so far

    def _on_bounce(self, message: Message) -> None:
        if not message.no_responders:
            return
        kind, _, who = subjects.last_token(message.subject).partition(":")
        now = self._now()
        if kind == "router":
            self._table.on_router_bounced(who, now)
        elif not self._settling(now):
            log.info("worker %s is gone", who)
            self._table.on_worker_bounced(who, now)
        self._perform()

    def _on_announcement(self, message: Message) -> None:
        self._table.on_announcement(bus_pb2.LeaderAnnouncement.FromString(message.data), self._now())
        self._perform()

    def _on_lost(self, message: Message) -> None:
        self._table.on_worker_lost(bus_pb2.WorkerLost.FromString(message.data), self._now())
        self._perform()

    def _settling(self, now: float) -> bool:
        connected_at = self._bus.reconnected_at
        return connected_at != self._first_connected_at and now - connected_at < SETTLING_S

    def sweep(self) -> None:
        now = self._now()
        since, self._swept_at = now - self._swept_at, now
        if since > STOPPED_S:
            # What others said meanwhile has yet to be read: no silence counts that we did not listen to.
            self._table.leaders.not_listened(since, now)
            return
        connected = self._bus.connected
        if not connected:
            if self._gone_since is None:
                self._gone_since = now
            if now - self._gone_since >= self._patience.bus_grace_s:
                self._table.on_bus_gone()
        else:
            self._gone_since = None
            if self._bus.reconnected_at != self._connected_at:
                self._connected_at = self._bus.reconnected_at
                self._table.on_bus_back(now)
        self._table.on_tick(now, bus=connected)
        self._perform()
        self.on_sweep(now)

    # -- doing what the table wants --------------------------------------------------------------------------------

    def _perform(self) -> None:
        if self._performing:
            return  # a consumer called back from within: the loop below goes on with what that led to
        self._performing = True
        try:
            while effects := self._table.take_effects():
                for effect in effects:
                    self._do(effect)
        finally:
            self._performing = False

    def _do(self, effect: Effect) -> None:
        journey = effect.journey
        match effect:
            case Deliver():
                journey.consumer.tokens(effect.tokens, effect.positions, effect.prompt_positions)
            case Submit():
                self._submit_soon(journey)
            case Opened():
                journey.consumer.opened()
            case Ended():
                journey.consumer.ended(effect.outcome)
            case Abandon():
                abort = bus_pb2.Abort(id=journey.order.id, max_attempt=effect.max_attempt, choice=journey.order.choice)
                self._publish(subjects.aborts(self._cluster, journey.order.model), abort.SerializeToString())
            case AskAgain():
                self._ask(effect)
            case Restarted():
                journey.consumer.restarted()

    def _submit_soon(self, journey: Journey) -> None:
        """With what else this turn brings: a message less is one less to send, to carry and to be woken by."""
        if not self._to_submit:
            asyncio.get_running_loop().call_soon(self._submit_all)
        self._to_submit[journey] = None

    def _submit_all(self) -> None:
        journeys, self._to_submit = self._to_submit, {}
        now = self._now()
        batches: dict[tuple[str, str], _Batch] = {}
        for journey in journeys:
            leader = journey.leader
            if journey.state is not State.SUBMITTED or leader is None:
                continue  # it has ended since, or will be submitted again
            to = journey.order.model, leader.router
            batch = batches.get(to)
            try:
                message = submit_message(journey, frontend=self._instance, now=now)
            except Exception as error:  # a defect of that one: the others are not to suffer for it
                log.exception("request %s cannot be submitted", journey.order.id)
                journey.refuse(InternalError(f"the request cannot be submitted: {error}"))
                continue
            if batch is not None and batch.size + len(message) > MOST_BYTES:
                self._publish_batch(*to, batches.pop(to))
                batch = None
            if batch is None:
                batch = batches[to] = _Batch()
            batch.add(journey, message)
        for to, batch in batches.items():
            self._publish_batch(*to, batch)
        self._perform()  # what was refused

    def _publish_batch(self, model: str, router: str, batch: _Batch) -> None:
        try:
            self._bus.publish(
                subjects.requests(self._cluster, model, router),
                bus_pb2.Submits(submits=batch.messages).SerializeToString(),
                subjects.bounce_of(self._cluster, self._instance, "router:" + router),
            )
        except TandemError as error:  # too large for the bus, or its buffer is full
            for journey in batch.journeys:
                journey.refuse(error)

    def _ask(self, question: AskAgain) -> None:
        order, journey = question.journey.order, question.journey
        repair = bus_pb2.Repair(
            key=codec.key_to_wire(journey.key),
            frontend=self._instance,
            rid=journey.rid,
            from_seq=question.from_seq,
        )
        log.debug("asking %s for %s from %d on", question.worker.id, order.id, question.from_seq)
        self._publish(
            subjects.work(self._cluster, question.worker.id),
            bus_pb2.WorkerMessage(repair=repair).SerializeToString(),
            subjects.bounce(self._cluster, self._instance, "worker:" + question.worker.id),
        )

    def _publish(self, subject: str, data: bytes, reply: str = "") -> None:
        """Best effort: the sweep asks again, and workers notice by themselves what is over."""
        try:
            self._bus.publish(subject, data, reply)
        except BusUnavailable as error:
            log.warning("not sent to %s: %s", subject, error)

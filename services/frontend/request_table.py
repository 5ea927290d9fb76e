"""Every request in flight in this frontend, and who it is when the cluster speaks of a number.

Pure, like the journeys that it holds: messages of the bus (decoded) and the time go in, effects come out of
``take_effects``. A rid that is not in the table belongs to an attempt that is over: what is said about it is dropped.
"""

from __future__ import annotations

from collections.abc import Iterator

from services.frontend.effects import Effect, Ended
from services.frontend.journey import Journey
from services.frontend.leaders import Leaders
from services.frontend.order import Consumer, Order, Patience, Positions
from tandem.core.blocks import token_ids
from tandem.core.types import WorkerAddress
from tandem.v1 import bus_pb2
from tandem.wire import codec


class RequestTable:
    def __init__(self, leaders: Leaders, patience: Patience) -> None:
        self.leaders = leaders
        self._patience = patience
        self._by_rid: dict[int, Journey] = {}
        self._live: dict[Journey, None] = {}  # in order of arrival
        self._last_rid = 0
        self._effects: list[Effect] = []
        self._addresses: dict[tuple[str, int], WorkerAddress] = {}

    def __len__(self) -> int:
        return len(self._live)

    def __iter__(self) -> Iterator[Journey]:
        return iter(list(self._live))

    def take_effects(self) -> list[Effect]:
        """What is to be done, in order; the caller does it."""
        effects, self._effects = self._effects, []
        return effects

    def begin(self, order: Order, consumer: Consumer, now: float) -> Journey:
        journey = Journey(
            order,
            consumer,
            leaders=self.leaders,
            patience=self._patience,
            new_rid=self._new_rid,
            emit=self._emit,
        )
        self._live[journey] = None
        journey.start(now)
        return journey

    # -- what the bus brings ---------------------------------------------------------------------------------------

    def on_frame(self, frame: bus_pb2.TokenFrame, now: float) -> None:
        """ValueError if its columns do not fit together."""
        worker = self._address(frame)
        journeys = self._by_rid.get
        for placed in frame.placed:
            if journey := journeys(placed.rid):
                journey.on_placed(worker, now)
        if frame.rids:
            self._on_columns(frame, worker, now)
        for finish in frame.finishes:
            if journey := journeys(finish.rid):
                journey.on_finish(worker, finish, now)
        for reject in frame.rejects:
            if journey := journeys(reject.rid):
                journey.on_error(worker, codec.error_from_wire(reject.error), now)

    def on_announcement(self, announcement: bus_pb2.LeaderAnnouncement, now: float) -> None:
        model = announcement.model
        if self.leaders.heard(model, announcement.router, announcement.epoch, now):
            for journey in self._of_model(model):
                journey.on_leader(now)

    def on_worker_lost(self, lost: bus_pb2.WorkerLost, now: float) -> None:
        for journey in self:
            journey.on_worker_lost(lost.worker, lost.incarnation, now)

    def on_worker_bounced(self, worker: str, now: float) -> None:
        """Nobody listens for ``worker``: its process is gone."""
        for journey in self:
            journey.on_worker_lost(worker, None, now)

    def on_router_bounced(self, router: str, now: float) -> None:
        for model in {journey.order.model for journey in self._live}:
            self.leaders.gone(model, router)
        for journey in self:
            journey.on_bounced(router, now)

    def on_bus_back(self, now: float) -> None:
        self.leaders.bus_is_back(now)
        for journey in self:
            journey.on_bus_back(now)

    def on_bus_gone(self) -> None:
        for journey in self:
            journey.on_bus_gone()

    def on_tick(self, now: float, *, bus: bool = True) -> None:
        for journey in self:
            if journey.look_s <= now:  # most have just been heard of
                journey.on_tick(now, bus=bus)

    # -- inside ----------------------------------------------------------------------------------------------------

    def _on_columns(self, frame: bus_pb2.TokenFrame, worker: WorkerAddress, now: float) -> None:
        # Lists: their slices and items are cheaper than an array's, or a message's.
        rids, seqs, counts, tokens = frame.rids[:], frame.seqs[:], frame.counts[:], token_ids(frame.tokens).tolist()
        if not len(rids) == len(seqs) == len(counts) or sum(counts) != len(tokens):
            raise ValueError("token frame whose columns differ in length")
        logprobs = {(update.rid, update.seq): update for update in frame.logprobs} if frame.logprobs else {}
        journeys = self._by_rid.get
        positions: Positions | None = None
        prompt: Positions | None = None
        start = 0
        for rid, seq, count in zip(rids, seqs, counts, strict=True):
            end = start + count
            journey = journeys(rid)
            if journey is not None:
                if logprobs:
                    update = logprobs.get((rid, seq))
                    positions, prompt = (update.positions, update.prompt_positions or None) if update else (None, None)
                journey.on_tokens(worker, seq, tokens[start:end], positions, prompt, now)
            start = end

    def _address(self, frame: bus_pb2.TokenFrame) -> WorkerAddress:
        ref = frame.worker
        key = (ref.id, ref.incarnation)
        address = self._addresses.get(key)
        if address is None:
            if len(self._addresses) >= 4096:  # of workers long gone
                self._addresses.clear()
            address = self._addresses[key] = codec.address_from_wire(ref)
        return address

    def _of_model(self, model: str) -> list[Journey]:
        return [journey for journey in self._live if journey.order.model == model]

    def _new_rid(self, journey: Journey) -> int:
        self._by_rid.pop(journey.rid, None)
        self._last_rid += 1
        self._by_rid[self._last_rid] = journey
        return self._last_rid

    def _emit(self, effect: Effect) -> None:
        if type(effect) is Ended:
            self._live.pop(effect.journey, None)
            self._by_rid.pop(effect.journey.rid, None)
        self._effects.append(effect)

"""What a worker has to say, batched per turn of the event loop.

All outputs of one engine step arrive in one turn, so one turn's flush is one message per frontend (a columnar token
frame) and one message of lifecycle events. What is not urgent (that a request was taken) goes along with the next of
these, at the latest after ``LINGER_S``: each message wakes three processes. Publishing never blocks and never raises: a
frame that the bus cannot take is dropped and counted, and the frontend repairs the gap by sequence number.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable, Sequence
from typing import Protocol

from tandem.adapters.bus import Bus
from tandem.core.types import WorkerAddress
from tandem.errors import BusUnavailable, PayloadTooLarge
from tandem.v1 import bus_pb2, types_pb2
from tandem.wire import subjects

log = logging.getLogger(__name__)

#: About two steps of an engine: most requests say their first token within it.
LINGER_S = 0.02


class Cancellable(Protocol):
    def cancel(self) -> object: ...


class Loop(Protocol):
    """Of an event loop, what is needed here."""

    def call_soon(self, callback: Callable[[], object], /) -> object: ...

    def call_later(self, delay: float, callback: Callable[[], object], /) -> Cancellable: ...


class _Run:
    """Tokens of one request that follow each other: a row of a frame, however many steps they are of."""

    __slots__ = ("rid", "seq", "tokens")

    def __init__(self, rid: int, seq: int, tokens: Sequence[int]) -> None:
        self.rid = rid
        self.seq = seq
        self.tokens = array("I", tokens)


class _Frame:
    __slots__ = ("finishes", "logprobs", "placed", "rejects", "runs", "unfinished")

    def __init__(self) -> None:
        self.runs: list[_Run] = []
        #: The last run of each request.
        self.unfinished: dict[int, _Run] = {}
        self.placed: list[bus_pb2.Placed] = []
        self.finishes: list[bus_pb2.Finish] = []
        self.rejects: list[bus_pb2.Reject] = []
        self.logprobs: list[bus_pb2.LogprobsUpdate] = []


class Outbox:
    """One per worker."""

    def __init__(
        self,
        bus: Bus,
        cluster: str,
        model: str,
        address: WorkerAddress,
        loop: Loop,
    ) -> None:
        self._bus = bus
        self._cluster = cluster
        self.ref = types_pb2.WorkerRef(
            id=address.id, incarnation=address.incarnation, grpc_address=address.grpc_address
        )
        self._worker = address.id
        self._events_subject = subjects.events(cluster, model)
        self._loop = loop
        self._frames: dict[str, _Frame] = {}
        self._events: list[bus_pb2.LifecycleEvent] = []
        self._scheduled = False
        self._lingering: Cancellable | None = None
        self.dropped = 0

    def tokens(self, frontend: str, rid: int, seq: int, token_ids: Sequence[int]) -> None:
        frame = self._urgent(frontend)
        run = frame.unfinished.get(rid)
        if run is not None and run.seq + len(run.tokens) == seq:
            run.tokens.extend(token_ids)
        else:
            run = frame.unfinished[rid] = _Run(rid, seq, token_ids)
            frame.runs.append(run)

    def placed(self, frontend: str, rid: int, leg: bus_pb2.Leg) -> None:
        """Not urgent."""
        self._frame(frontend).placed.append(bus_pb2.Placed(rid=rid, leg=leg))
        self._soon_enough()

    def finish(self, frontend: str, finish: bus_pb2.Finish) -> None:
        self._urgent(frontend).finishes.append(finish)

    def reject(self, frontend: str, rid: int, error: types_pb2.ErrorDetail) -> None:
        self._urgent(frontend).rejects.append(bus_pb2.Reject(rid=rid, error=error))

    def logprobs(self, frontend: str, update: bus_pb2.LogprobsUpdate) -> None:
        frame = self._urgent(frontend)
        frame.logprobs.append(update)
        frame.unfinished.pop(update.rid, None)  # the tokens that these belong to are a run of their own

    def event(self, event: bus_pb2.LifecycleEvent) -> None:
        """Not urgent if it says no more than that the request was taken: no decision waits for that."""
        self._events.append(event)
        if event.phase == bus_pb2.PHASE_ACCEPTED:
            self._soon_enough()
        else:
            self._soon()

    def flush(self) -> None:
        self._scheduled = False
        if self._lingering is not None:
            self._lingering.cancel()
            self._lingering = None
        frames, self._frames = self._frames, {}
        events, self._events = self._events, []
        for frontend, frame in frames.items():
            message = bus_pb2.TokenFrame(
                worker=self.ref,
                rids=[run.rid for run in frame.runs],
                seqs=[run.seq for run in frame.runs],
                counts=[len(run.tokens) for run in frame.runs],
                tokens=b"".join([run.tokens.tobytes() for run in frame.runs]),
                placed=frame.placed,
                finishes=frame.finishes,
                rejects=frame.rejects,
                logprobs=frame.logprobs,
            )
            self._publish(
                subjects.tokens(self._cluster, frontend),
                message.SerializeToString(),
                subjects.bounce_of(self._cluster, self._worker, "f:" + frontend),
            )
        if events:
            batch = bus_pb2.LifecycleEvents(worker=self.ref, events=events)
            self._publish(self._events_subject, batch.SerializeToString(), "")

    def _publish(self, subject: str, data: bytes, reply: str) -> None:
        try:
            self._bus.publish(subject, data, reply)
        except (BusUnavailable, PayloadTooLarge) as error:
            self.dropped += 1
            log.warning("frame dropped: %s", error)

    def _frame(self, frontend: str) -> _Frame:
        frame = self._frames.get(frontend)
        if frame is None:
            frame = self._frames[frontend] = _Frame()
        return frame

    def _urgent(self, frontend: str) -> _Frame:
        self._soon()
        return self._frame(frontend)

    def _soon(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self.flush)

    def _soon_enough(self) -> None:
        if not self._scheduled and self._lingering is None:
            self._lingering = self._loop.call_later(LINGER_S, self.flush)

"""What a worker has to say, batched per turn of the event loop.

All outputs of one engine step arrive in one turn, so one turn's flush is one message per frontend (a columnar token
frame) and one message of lifecycle events. Publishing never blocks and never raises: a frame that the bus cannot take
is dropped and counted, and the frontend repairs the gap by sequence number.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable, Sequence

from tandem.adapters.bus import Bus
from tandem.core.types import WorkerAddress
from tandem.errors import BusUnavailable, PayloadTooLarge
from tandem.v1 import bus_pb2, types_pb2
from tandem.wire import subjects

log = logging.getLogger(__name__)


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
    """One per worker. ``schedule`` runs a callable soon on the loop (``loop.call_soon``)."""

    def __init__(
        self,
        bus: Bus,
        cluster: str,
        model: str,
        address: WorkerAddress,
        schedule: Callable[[Callable[[], None]], object],
    ) -> None:
        self._bus = bus
        self._cluster = cluster
        self.ref = types_pb2.WorkerRef(
            id=address.id, incarnation=address.incarnation, grpc_address=address.grpc_address
        )
        self._worker = address.id
        self._events_subject = subjects.events(cluster, model)
        self._schedule = schedule
        self._frames: dict[str, _Frame] = {}
        self._events: list[bus_pb2.LifecycleEvent] = []
        self._scheduled = False
        self.dropped = 0

    def tokens(self, frontend: str, rid: int, seq: int, token_ids: Sequence[int]) -> None:
        frame = self._frame(frontend)
        run = frame.unfinished.get(rid)
        if run is not None and run.seq + len(run.tokens) == seq:
            run.tokens.extend(token_ids)
        else:
            run = frame.unfinished[rid] = _Run(rid, seq, token_ids)
            frame.runs.append(run)

    def placed(self, frontend: str, rid: int, leg: bus_pb2.Leg) -> None:
        self._frame(frontend).placed.append(bus_pb2.Placed(rid=rid, leg=leg))

    def finish(self, frontend: str, finish: bus_pb2.Finish) -> None:
        self._frame(frontend).finishes.append(finish)

    def reject(self, frontend: str, rid: int, error: types_pb2.ErrorDetail) -> None:
        self._frame(frontend).rejects.append(bus_pb2.Reject(rid=rid, error=error))

    def logprobs(self, frontend: str, update: bus_pb2.LogprobsUpdate) -> None:
        frame = self._frame(frontend)
        frame.logprobs.append(update)
        frame.unfinished.pop(update.rid, None)  # the tokens that these belong to are a run of their own

    def event(self, event: bus_pb2.LifecycleEvent) -> None:
        self._events.append(event)
        self._soon()

    def flush(self) -> None:
        self._scheduled = False
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
                subjects.bounce(self._cluster, self._worker, "f:" + frontend),
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
            self._soon()
        return frame

    def _soon(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._schedule(self.flush)

"""What a worker has to say, batched per turn of the event loop.

All outputs of one engine step arrive in one turn, so one turn's flush is one message per frontend (a columnar token
frame), and one message of lifecycle events. What is not urgent leaves at the latest after ``LINGER_S``, since each
message wakes three processes: that a request was taken goes along with the frontend's next frame, and what no router
waits for with the frame that comes when it is half as old (docs/decisions/events-gather.md). Publishing never blocks
and never raises: a frame that the bus cannot take is dropped and counted, and the frontend repairs the gap by sequence
number.
"""

from __future__ import annotations

import logging
import math
from array import array
from collections.abc import Callable, Sequence
from typing import Protocol

from tandem.adapters.bus import Bus
from tandem.core.types import RequestKey, WorkerAddress
from tandem.errors import BusUnavailable, PayloadTooLarge
from tandem.v1 import bus_pb2, types_pb2
from tandem.wire import subjects

log = logging.getLogger(__name__)

#: About two steps of an engine: most requests say their first token within it.
LINGER_S = 0.02
#: Told at once if a router has requests waiting, as it may place one by it.
_TELLING = frozenset({bus_pb2.PHASE_DECODING, bus_pb2.PHASE_FINISHED})
#: Told at once in any case: all but these.
_UNHURRIED = _TELLING | {bus_pb2.PHASE_ACCEPTED}
_ENDS = frozenset({bus_pb2.PHASE_FINISHED, bus_pb2.PHASE_FAILED, bus_pb2.PHASE_ABORTED})


class Cancellable(Protocol):
    def cancel(self) -> object: ...


class Loop(Protocol):
    """Of an event loop, what is needed here."""

    def call_soon(self, callback: Callable[[], object], /) -> object: ...

    def call_later(self, delay: float, callback: Callable[[], object], /) -> Cancellable: ...

    def time(self) -> float: ...


class _Frame:
    """Of each request one row, however many steps its tokens are of: they follow each other."""

    __slots__ = ("finishes", "logprobs", "placed", "rejects", "rids", "rows", "seqs", "tokens")

    def __init__(self) -> None:
        self.rids: list[int] = []
        self.seqs: list[int] = []
        self.tokens: list[array[int]] = []
        #: The last row of each request.
        self.rows: dict[int, int] = {}
        self.placed: list[tuple[int, bus_pb2.Leg]] = []
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
        #: Of each request the latest, which says all that those before it said: phase, output tokens, cached tokens,
        #: error code.
        self._events: dict[RequestKey, tuple[bus_pb2.Phase, int, int, str]] = {}
        #: The first of these may wait for a frame that comes then; -inf: they may not wait.
        self._events_due = 0.0
        self._others_wait = False
        self._scheduled = False
        self._lingering: Cancellable | None = None
        self.dropped = 0
        #: Has more to say, of what has come in this turn.
        self.before_flush: Callable[[], None] = lambda: None

    def tokens(self, frontend: str, rid: int, seq: int, token_ids: Sequence[int]) -> None:
        frame = self._urgent(frontend)
        row = frame.rows.get(rid)
        if row is not None and frame.seqs[row] + len(frame.tokens[row]) == seq:
            frame.tokens[row] += array("I", token_ids)
        else:
            frame.rows[rid] = len(frame.rids)
            frame.rids.append(rid)
            frame.seqs.append(seq)
            frame.tokens.append(array("I", token_ids))

    def placed(self, frontend: str, rid: int, leg: bus_pb2.Leg) -> None:
        """Not urgent."""
        self._frame(frontend).placed.append((rid, leg))
        if not self._scheduled and self._lingering is None:
            self._lingering = self._loop.call_later(LINGER_S, self._lingered)

    def finish(self, frontend: str, finish: bus_pb2.Finish) -> None:
        self._urgent(frontend).finishes.append(finish)

    def reject(self, frontend: str, rid: int, error: types_pb2.ErrorDetail) -> None:
        self._urgent(frontend).rejects.append(bus_pb2.Reject(rid=rid, error=error))

    def logprobs(self, frontend: str, update: bus_pb2.LogprobsUpdate) -> None:
        frame = self._urgent(frontend)
        frame.logprobs.append(update)
        frame.rows.pop(update.rid, None)  # the tokens that these belong to are a row of their own

    def event(
        self,
        key: RequestKey,
        phase: bus_pb2.Phase,
        *,
        output_tokens: int = 0,
        cached_tokens: int = 0,
        error_code: str = "",
    ) -> None:
        if not self._events:
            self._events_due = self._loop.time() + LINGER_S / 2
        known = self._events.get(key)
        if known is None or known[0] not in _ENDS or phase in _ENDS:
            self._events[key] = (phase, output_tokens, cached_tokens, error_code)
        if phase not in _UNHURRIED or (self._others_wait and phase in _TELLING):
            self._events_due = -math.inf
            self.soon()
        elif self._lingering is None:
            self._lingering = self._loop.call_later(LINGER_S, self._lingered)

    def hurry(self, others_wait: bool) -> None:
        """Whether requests wait in a router for what it is told, as far as we know."""
        self._others_wait = others_wait
        if others_wait and self._events:
            self._events_due = -math.inf
            self.soon()

    def tell_now(self) -> None:
        """All of it. For who says something that the router would understand otherwise without it: a load report shows
        as gone what has ended, and has to come after its end."""
        self.flush(all_events=True)

    def flush(self, *, all_events: bool = False) -> None:
        """All that is due."""
        self._scheduled = True  # what is said now goes along
        try:
            self.before_flush()
        finally:
            self._scheduled = False
        frames, self._frames = self._frames, {}
        for frontend, frame in frames.items():
            message = bus_pb2.TokenFrame(
                worker=self.ref,
                rids=frame.rids,
                seqs=frame.seqs,
                counts=map(len, frame.tokens),
                tokens=b"".join(frame.tokens),
                finishes=frame.finishes,
                rejects=frame.rejects,
                logprobs=frame.logprobs,
            )
            for rid, leg in frame.placed:
                message.placed.add(rid=rid, leg=leg)  # in place: a message given to another is copied
            self._publish(
                subjects.tokens(self._cluster, frontend),
                message.SerializeToString(),
                subjects.bounce_of(self._cluster, self._worker, "f:" + frontend),
            )
        if self._events and (all_events or self._events_due <= self._loop.time()):
            self._tell()
        if self._lingering is not None and not self._events:
            self._lingering.cancel()
            self._lingering = None

    def _tell(self) -> None:
        events, self._events = self._events, {}
        batch = bus_pb2.LifecycleEvents(worker=self.ref)
        for key, (phase, output_tokens, cached_tokens, error_code) in events.items():
            event = batch.events.add(phase=phase, output_tokens=output_tokens, cached_tokens=cached_tokens)
            if error_code:
                event.error_code = error_code
            name = event.key  # in place, too
            name.id, name.attempt, name.choice = key
        self._publish(self._events_subject, batch.SerializeToString(), "")

    def _lingered(self) -> None:
        self._lingering = None
        self.tell_now()

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
        self.soon()
        return self._frame(frontend)

    def soon(self) -> None:
        """All that is due leaves at the end of this turn."""
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self.flush)

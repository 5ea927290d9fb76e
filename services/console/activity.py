"""What the workers do, live: rows, spans and requests of the space-time map, from load reports and lifecycle events.

Times are milliseconds of the console's own clock since it started; a message counts as of its arrival, so no two
processes' clocks are compared. Everything is bounded: spans by age and number, open requests by the workers' reports.
Pure: the caller gives the time.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Any

from tandem.spacetime.model import DECODE, PREFILL, TRANSFER, Span, Step, spans_of_steps
from tandem.v1 import bus_pb2, types_pb2

#: Silent for so long: nothing is known of the worker. After the longer time its row goes.
SILENT_MS, GONE_MS = 1500.0, 60_000.0
#: With more workers than this each report gives at most one span of a kind, so that the page keeps up.
MANY_WORKERS = 64
RUNS_OF_FEW, RUNS_OF_MANY = 8, 3
#: Spans that are kept for pages that open, over all rows.
_ALL_SPANS = 240_000
_MOST_SPANS, _LEAST_SPANS = 8000, 200
_MOST_SEGMENTS = 400
#: Where more requests are open than the worker reports throughout such a time, we have missed the end of the others.
_FORGOTTEN_MS = 2000.0

STATES = ("idle", "busy", "draining", "silent", "gone")
IDLE, BUSY, DRAINING, SILENT, GONE = range(5)
#: How a request's part on a worker ended.
OUTCOMES = ("done", "failed", "aborted", "unknown")
_DONE, _FAILED, _ABORTED, _UNKNOWN = range(4)

_ENDS = {
    bus_pb2.PHASE_PREFILL_DONE: _DONE,
    bus_pb2.PHASE_FINISHED: _DONE,
    bus_pb2.PHASE_FAILED: _FAILED,
    bus_pb2.PHASE_ABORTED: _ABORTED,
}


@dataclass(slots=True)
class Segment:
    """One request in one phase on one worker. ``lane``: place in the row, the same as long as it stays there."""

    row: int
    lane: int
    kind: int
    begin: float
    request: str
    end: float | None = None
    outcome: int = _DONE


@dataclass(slots=True)
class Row:
    index: int
    id: str
    model: str
    role: str
    incarnation: int
    heard_at: float
    state: int = IDLE
    running: int = 0
    waiting: int = 0
    pending_tokens: int = 0
    kv_share: float = 0.0
    handoffs: int = 0
    span_end: float = 0.0
    #: More are open here than reported since then, and how many more at least.
    surplus_since: float | None = None
    surplus: int = 0
    spans: deque[Span] = field(default_factory=deque)
    segments: deque[Segment] = field(default_factory=lambda: deque(maxlen=_MOST_SEGMENTS))
    open: dict[str, Segment] = field(default_factory=dict)
    free_lanes: list[int] = field(default_factory=list)
    lanes: int = 0

    def meta(self) -> dict[str, Any]:
        return {"row": self.index, "id": self.id, "model": self.model, "role": self.role}

    def load(self) -> list[float]:
        return [
            self.index, self.state, self.running, self.waiting, self.pending_tokens, round(self.kv_share, 3),
            self.handoffs,
        ]  # fmt: skip


@dataclass(slots=True)
class Delta:
    """What is new since the last one. Field names are the wire's."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    spans: list[float] = field(default_factory=list)  # row, kind, begin, end, level, row, ...
    opened: list[list[Any]] = field(default_factory=list)  # [row, lane, kind, begin, request]
    closed: list[list[Any]] = field(default_factory=list)  # [row, lane, end, outcome]
    loads: dict[int, list[float]] = field(default_factory=dict)


class Activity:
    def __init__(self, history_ms: float) -> None:
        self._history_ms = history_ms
        self.rows: dict[str, Row] = {}
        self._next_row = 0
        self._delta = Delta()
        #: Somebody wants what ``drain`` gives; else it is not put together.
        self.telling = True
        #: request id -> worker on which its prompt was computed for another one.
        self._handed_over: dict[str, str] = {}

    @property
    def most_runs(self) -> int:
        return RUNS_OF_FEW if len(self.rows) <= MANY_WORKERS else RUNS_OF_MANY

    @property
    def in_flight(self) -> list[Segment]:
        return [segment for row in self.rows.values() for segment in row.open.values()]

    # -- what is heard ---------------------------------------------------------------------------------------------

    def load(self, report: bus_pb2.LoadReport, at: float) -> None:
        row = self._row(report, at)
        row.heard_at = at
        steps = [Step(s.duration_s * 1e3, s.prefill_tokens, s.decode_sequences) for s in report.step_timings]
        if steps:
            end = max(row.span_end, at - min(report.last_step_age_s * 1e3, 250.0))
            for span in spans_of_steps(steps, end, row.span_end, self.most_runs):
                self._add_span(row, span)
        row.running, row.waiting = report.running_requests, report.waiting_requests
        row.pending_tokens, row.handoffs = report.pending_prefill_tokens, report.open_handoffs
        row.kv_share = report.kv_blocks_used / report.kv_blocks_total if report.kv_blocks_total else 0.0
        busy = bool(row.running or row.waiting)
        row.state = DRAINING if report.draining else BUSY if busy or steps else IDLE
        role = _role_of(report.role)
        if role != row.role:
            row.role = role
            self._delta.rows.append(row.meta())
        self._delta.loads[row.index] = row.load()
        self._forget_what_ended_unheard(row, at)
        self._trim(row, at)

    def events(self, batch: bus_pb2.LifecycleEvents, at: float) -> None:
        row = self.rows.get(batch.worker.id)
        if row is None or row.incarnation != batch.worker.incarnation:
            return
        for event in batch.events:
            key = event.key
            name = key.id if not key.choice else f"{key.id}#{key.choice}"
            self._event(row, name, event.phase, at)

    def tick(self, at: float) -> None:
        """Call some times a second: notices who has fallen silent."""
        for row in list(self.rows.values()):
            silent = at - row.heard_at
            if silent > GONE_MS:
                row.state = GONE
                self._close_all(row, at)
                self._delta.loads[row.index] = row.load()
                del self.rows[row.id]
            elif silent > SILENT_MS and row.state != SILENT:
                row.state = SILENT
                self._delta.loads[row.index] = row.load()

    # -- what is told ----------------------------------------------------------------------------------------------

    def drain(self) -> Delta:
        delta, self._delta = self._delta, Delta()
        return delta

    def snapshot(self) -> Delta:
        """All of it, for a page that has just opened; ``drain`` then goes on from here."""
        whole = Delta()
        for row in self.rows.values():
            whole.rows.append(row.meta())
            whole.loads[row.index] = row.load()
            for span in row.spans:
                whole.spans += (row.index, *_rounded(span))
            for segment in row.segments:
                whole.opened.append(_opened(segment))
                whole.closed.append(_closed(segment))
            whole.opened += [_opened(segment) for segment in row.open.values()]
        return whole

    # -- inside ----------------------------------------------------------------------------------------------------

    def _row(self, report: bus_pb2.LoadReport, at: float) -> Row:
        row = self.rows.get(report.worker.id)
        if row is not None and row.incarnation == report.worker.incarnation:
            return row
        if row is not None:  # the same name, another process: the row stays, what ran on it does not
            self._close_all(row, at)
            row.incarnation = report.worker.incarnation
            return row
        row = Row(
            self._next_row, report.worker.id, report.model, _role_of(report.role), report.worker.incarnation, at,
            span_end=at - 1000.0,
        )  # fmt: skip
        self._next_row += 1
        self.rows[row.id] = row
        self._delta.rows.append(row.meta())
        return row

    def _event(self, row: Row, name: str, phase: bus_pb2.Phase, at: float) -> None:
        running = row.open.get(name)
        if phase == bus_pb2.PHASE_ACCEPTED and running is None:
            prefilled = self._handed_over.get(name)
            self._open(row, name, TRANSFER if prefilled not in (None, row.id) else PREFILL, at)
        elif phase == bus_pb2.PHASE_DECODING and (running is None or running.kind != DECODE):
            if running is not None and running.kind == TRANSFER:
                self._add_span(row, Span(TRANSFER, running.begin, at))
            lane = running.lane if running is not None else None
            self._close(row, name, _DONE, at, keep_lane=True)
            self._open(row, name, DECODE, at, lane)
            self._handed_over.pop(name, None)
        elif phase in _ENDS:
            if phase == bus_pb2.PHASE_PREFILL_DONE:
                self._handed_over[name] = row.id
                while len(self._handed_over) > 20_000:
                    del self._handed_over[next(iter(self._handed_over))]
            else:
                self._handed_over.pop(name, None)
            self._close(row, name, _ENDS[phase], at)

    def _open(self, row: Row, name: str, kind: int, at: float, lane: int | None = None) -> None:
        if lane is None:
            if row.free_lanes:
                lane = heappop(row.free_lanes)
            else:
                lane, row.lanes = row.lanes, row.lanes + 1
        segment = row.open[name] = Segment(row.index, lane, kind, at, name)
        if self.telling:
            self._delta.opened.append(_opened(segment))

    def _close(self, row: Row, name: str, outcome: int, at: float, *, keep_lane: bool = False) -> None:
        segment = row.open.pop(name, None)
        if segment is None:
            return
        segment.end, segment.outcome = at, outcome
        if not keep_lane:
            heappush(row.free_lanes, segment.lane)
        row.segments.append(segment)
        if self.telling:
            self._delta.closed.append(_closed(segment))

    def _close_all(self, row: Row, at: float) -> None:
        for name in list(row.open):
            self._close(row, name, _UNKNOWN, at)

    def _forget_what_ended_unheard(self, row: Row, at: float) -> None:
        surplus = len(row.open) - row.running - row.waiting - row.handoffs
        if surplus <= 0:
            row.surplus_since = None
        elif row.surplus_since is None:
            row.surplus_since, row.surplus = at, surplus
        else:
            row.surplus = min(row.surplus, surplus)
            if at - row.surplus_since > _FORGOTTEN_MS:
                for name in list(row.open)[: row.surplus]:  # the oldest
                    self._close(row, name, _UNKNOWN, at)
                row.surplus_since = None

    def _add_span(self, row: Row, span: Span) -> None:
        if span.kind != TRANSFER:
            row.span_end = max(row.span_end, span.end)
        row.spans.append(span)
        if self.telling:
            self._delta.spans += (row.index, *_rounded(span))

    def _trim(self, row: Row, at: float) -> None:
        most = min(_MOST_SPANS, max(_LEAST_SPANS, _ALL_SPANS // max(1, len(self.rows))))
        while row.spans and (len(row.spans) > most or row.spans[0].end < at - self._history_ms):
            row.spans.popleft()
        while row.segments and (row.segments[0].end or at) < at - self._history_ms:
            row.segments.popleft()


def _role_of(role: types_pb2.Role) -> str:
    return types_pb2.Role.Name(role).removeprefix("ROLE_").lower()


def _rounded(span: Span) -> tuple[float, float, float, float]:
    return span.kind, round(span.begin, 1), round(span.end, 1), round(span.level, 1)


def _opened(segment: Segment) -> list[Any]:
    return [segment.row, segment.lane, segment.kind, round(segment.begin, 1), segment.request]


def _closed(segment: Segment) -> list[Any]:
    return [segment.row, segment.lane, round(segment.end or 0.0, 1), segment.outcome]

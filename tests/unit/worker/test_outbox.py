"""One frame for each frontend and turn of the loop, its columns in step; what the bus cannot take is counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hypothesis import given
from hypothesis import strategies as st

from tandem.adapters.bus import BusStats, Handler, Subscription
from tandem.core.blocks import token_ids
from tandem.core.types import RequestKey, WorkerAddress
from tandem.errors import BusUnavailable, PayloadTooLarge
from tandem.v1 import bus_pb2, types_pb2
from tandem.wire import codec, subjects
from tandem.worker.outbox import LINGER_S, Outbox


class FullBus:
    """A bus whose buffer takes ``room`` messages."""

    stats = BusStats()
    connected = True
    reconnected_at = 0.0
    max_payload = 1 << 20

    def __init__(self, room: int = 1000) -> None:
        self.room = room
        self.sent: list[tuple[str, bytes, str]] = []

    def publish(self, subject: str, data: bytes, reply: str = "") -> None:
        if len(data) > self.max_payload:
            raise PayloadTooLarge("too large")
        if len(self.sent) == self.room:
            raise BusUnavailable("full")
        self.sent.append((subject, data, reply))

    async def subscribe(self, subject: str, handler: Handler, *, queue: str = "") -> Subscription:
        raise NotImplementedError

    async def request(self, subject: str, data: bytes, *, timeout_s: float) -> bytes:
        raise NotImplementedError

    async def flush(self, *, timeout_s: float) -> None: ...

    async def close(self) -> None: ...


class Timer:
    def __init__(self, delay: float, call: Callable[[], object]) -> None:
        self.delay, self.call, self.cancelled = delay, call, False

    def cancel(self) -> None:
        self.cancelled = True


class Turn:
    """An event loop, by hand."""

    def __init__(self) -> None:
        self.due: list[Callable[[], object]] = []
        self.timers: list[Timer] = []
        self.now = 100.0

    def time(self) -> float:
        return self.now

    def call_soon(self, callback: Callable[[], object], /) -> None:
        self.due.append(callback)

    def call_later(self, delay: float, callback: Callable[[], object], /) -> Timer:
        self.timers.append(Timer(delay, callback))
        return self.timers[-1]

    def end(self) -> None:
        due, self.due = self.due, []
        for call in due:
            call()


def outbox(bus: FullBus, turn: Turn) -> Outbox:
    return Outbox(bus, "c", "m", WorkerAddress("w", 7, "host:1"), turn)


def key(number: int) -> RequestKey:
    return RequestKey(f"r{number}", 1, 2)


def events(bus: FullBus) -> list[list[tuple[RequestKey, bus_pb2.Phase]]]:
    """By message."""
    sent = [bus_pb2.LifecycleEvents.FromString(data) for at, data, _ in bus.sent if at == subjects.events("c", "m")]
    return [[(codec.key_from_wire(event.key), event.phase) for event in batch.events] for batch in sent]


def frames(bus: FullBus, frontend: str) -> list[bus_pb2.TokenFrame]:
    wanted = subjects.tokens("c", frontend)
    return [bus_pb2.TokenFrame.FromString(data) for subject, data, _ in bus.sent if subject == wanted]


def test_a_turn_is_one_frame_for_each_frontend_and_one_batch_of_events() -> None:
    bus, turn = FullBus(), Turn()
    box = outbox(bus, turn)
    box.placed("a", 1, bus_pb2.LEG_LOCAL)
    box.tokens("a", 1, 0, [10, 11])
    box.tokens("b", 1, 4, [20])
    box.tokens("a", 2, 9, [12])
    box.finish("a", bus_pb2.Finish(rid=2))
    box.reject("b", 3, types_pb2.ErrorDetail(code="refused"))
    box.event(key(1), bus_pb2.PHASE_ACCEPTED)
    box.event(key(2), bus_pb2.PHASE_FAILED, error_code="refused")
    assert len(turn.due) == 1 and not bus.sent
    turn.end()
    assert len(bus.sent) == 3
    (a,), (b,) = frames(bus, "a"), frames(bus, "b")
    assert (list(a.rids), list(a.seqs), list(a.counts)) == ([1, 2], [0, 9], [2, 1])
    assert list(token_ids(a.tokens)) == [10, 11, 12]
    assert [p.rid for p in a.placed] == [1]
    assert [f.rid for f in a.finishes] == [2]
    assert a.worker == types_pb2.WorkerRef(id="w", incarnation=7, grpc_address="host:1")
    assert (list(b.rids), list(token_ids(b.tokens)), b.rejects[0].error.code) == ([1], [20], "refused")
    assert events(bus) == [[(key(1), bus_pb2.PHASE_ACCEPTED), (key(2), bus_pb2.PHASE_FAILED)]]


def test_that_a_request_was_taken_goes_along_with_its_first_token() -> None:
    bus, turn = FullBus(), Turn()
    box = outbox(bus, turn)
    for rid in (1, 2):
        box.placed("a", rid, bus_pb2.LEG_LOCAL)
    (timer,) = turn.timers
    assert not turn.due and timer.delay == LINGER_S
    box.tokens("a", 1, 0, [10])
    turn.end()
    assert timer.cancelled and len(bus.sent) == 1
    (frame,) = frames(bus, "a")
    assert [p.rid for p in frame.placed] == [1, 2]


def test_events_that_nobody_waits_for_gather_and_only_the_latest_of_a_request_is_told() -> None:
    bus, turn = FullBus(), Turn()
    box = outbox(bus, turn)
    box.event(key(1), bus_pb2.PHASE_ACCEPTED)
    (timer,) = turn.timers
    box.tokens("a", 9, 0, [10])
    turn.now += 0.3 * LINGER_S
    turn.end()
    assert not events(bus) and not timer.cancelled  # too young to go along
    box.event(key(2), bus_pb2.PHASE_ACCEPTED)
    box.event(key(1), bus_pb2.PHASE_DECODING)
    box.event(key(2), bus_pb2.PHASE_FINISHED, output_tokens=3, cached_tokens=5)
    assert not turn.due and len(turn.timers) == 1
    turn.now += 0.3 * LINGER_S
    box.tokens("a", 9, 1, [11])
    turn.end()
    assert events(bus) == [[(key(1), bus_pb2.PHASE_DECODING), (key(2), bus_pb2.PHASE_FINISHED)]]
    assert timer.cancelled
    (batch,) = [bus_pb2.LifecycleEvents.FromString(d) for at, d, _ in bus.sent if at == subjects.events("c", "m")]
    assert (batch.events[1].output_tokens, batch.events[1].cached_tokens) == (3, 5)


def test_events_leave_by_themselves_where_no_frame_comes() -> None:
    bus, turn = FullBus(), Turn()
    box = outbox(bus, turn)
    for number in (1, 2):
        box.event(key(number), bus_pb2.PHASE_FINISHED)
        timer = turn.timers[-1]
        assert timer.delay == LINGER_S
        timer.call()
        assert events(bus)[-1] == [(key(number), bus_pb2.PHASE_FINISHED)]
    assert len(events(bus)) == 2


def test_what_is_held_back_leaves_when_others_begin_to_wait_and_before_what_needs_it() -> None:
    bus, turn = FullBus(), Turn()
    box = outbox(bus, turn)
    box.event(key(1), bus_pb2.PHASE_FINISHED)
    box.hurry(False)
    turn.end()
    assert not events(bus)
    box.hurry(True)
    turn.end()
    box.hurry(False)
    box.event(key(2), bus_pb2.PHASE_FINISHED)
    box.tell_now()
    assert events(bus) == [[(key(number), bus_pb2.PHASE_FINISHED)] for number in (1, 2)]
    assert turn.timers[-1].cancelled


def test_what_had_yet_to_be_worked_off_is_told_with_all_else() -> None:
    bus, turn = FullBus(), Turn()
    box = outbox(bus, turn)
    box.before_flush = lambda: box.event(key(1), bus_pb2.PHASE_FINISHED)
    box.tell_now()
    assert events(bus) == [[(key(1), bus_pb2.PHASE_FINISHED)]]


def test_an_end_stays_the_latest() -> None:
    for end in (bus_pb2.PHASE_FINISHED, bus_pb2.PHASE_FAILED, bus_pb2.PHASE_ABORTED):
        bus, turn = FullBus(), Turn()
        box = outbox(bus, turn)
        box.event(key(1), end)
        box.event(key(1), bus_pb2.PHASE_PREFILL_DONE)  # told again meanwhile
        box.tell_now()
        assert events(bus) == [[(key(1), end)]]


def test_an_event_that_lets_the_router_act_is_told_at_once() -> None:
    always = (bus_pb2.PHASE_PREFILL_DONE, bus_pb2.PHASE_FAILED, bus_pb2.PHASE_ABORTED, bus_pb2.PHASE_UNKNOWN)
    where_others_wait = (bus_pb2.PHASE_DECODING, bus_pb2.PHASE_FINISHED)
    for others_wait in (False, True):
        for phase in bus_pb2.Phase.values()[1:]:
            bus, turn = FullBus(), Turn()
            box = outbox(bus, turn)
            box.hurry(others_wait)
            box.event(key(1), bus_pb2.PHASE_ACCEPTED)
            box.event(key(2), phase)
            turn.end()
            told = phase in always or (others_wait and phase in where_others_wait)
            assert len(events(bus)) == told, bus_pb2.Phase.Name(phase)


def test_that_a_request_was_taken_is_said_soon_in_any_case() -> None:
    bus, turn = FullBus(), Turn()
    box = outbox(bus, turn)
    for rid in (1, 2):
        box.placed("a", rid, bus_pb2.LEG_LOCAL)
        timer = turn.timers[-1]
        timer.call()
        assert [p.rid for p in frames(bus, "a")[-1].placed] == [rid]
    assert len(bus.sent) == 2 and not turn.due


def test_a_frame_that_nobody_takes_comes_back_by_the_frontend_s_name() -> None:
    bus, turn = FullBus(), Turn()
    outbox(bus, turn).tokens("front.end/1", 1, 0, [1])
    turn.end()
    assert subjects.last_token(bus.sent[0][2]) == "f:front.end/1"


def test_nothing_said_is_nothing_sent() -> None:
    bus, turn = FullBus(), Turn()
    box = outbox(bus, turn)
    box.flush()
    box.tokens("a", 1, 0, [1])
    turn.end()
    box.flush()
    assert len(bus.sent) == 1 and not turn.due


def test_what_the_bus_does_not_take_is_dropped_and_counted_and_hinders_no_other() -> None:
    bus, turn = FullBus(), Turn()
    bus.max_payload = 500
    box = outbox(bus, turn)
    box.tokens("large", 1, 0, list(range(1000)))
    box.tokens("small", 1, 0, [1])
    turn.end()
    assert box.dropped == 1
    assert len(frames(bus, "small")) == 1
    bus.room = len(bus.sent)
    box.tokens("small", 1, 1, [2])
    turn.end()
    assert box.dropped == 2


SAID = st.tuples(st.sampled_from("abc"), st.integers(1, 5), st.lists(st.integers(0, 2**32 - 1), max_size=4))


@given(st.lists(SAID))
def test_columns_say_every_token_at_its_place_and_runs_are_one_row(said: Sequence[tuple[str, int, list[int]]]) -> None:
    bus, turn = FullBus(), Turn()
    box = outbox(bus, turn)
    wanted: dict[tuple[str, int], list[int]] = {}
    for frontend, rid, tokens in said:
        known = wanted.setdefault((frontend, rid), [])
        box.tokens(frontend, rid, len(known), tokens)
        known += tokens
    turn.end()
    heard = {}
    for frontend in "abc":
        for frame in frames(bus, frontend):
            tokens, start = list(token_ids(frame.tokens)), 0
            for rid, seq, count in zip(frame.rids, frame.seqs, frame.counts, strict=True):
                assert seq == 0 and (frontend, rid) not in heard
                heard[frontend, rid] = tokens[start : start + count]
                start += count
            assert start == len(tokens)
    assert heard == wanted


def test_what_does_not_follow_is_a_row_of_its_own() -> None:
    """Tokens said again, and those that log-probabilities belong to."""
    bus, turn = FullBus(), Turn()
    box = outbox(bus, turn)
    box.tokens("a", 1, 3, [13])
    box.tokens("a", 1, 0, [10, 11, 12, 13])
    box.tokens("a", 1, 4, [14])
    for seq in (5, 6):
        box.logprobs("a", bus_pb2.LogprobsUpdate(rid=1, seq=seq))
        box.tokens("a", 1, seq, [10 + seq])
    turn.end()
    (frame,) = frames(bus, "a")
    assert list(zip(frame.seqs, frame.counts, strict=True)) == [(3, 1), (0, 5), (5, 1), (6, 1)]
    assert list(token_ids(frame.tokens)) == [13, 10, 11, 12, 13, 14, 15, 16]

"""Own load by event, foreign load by report: nothing twice, nothing below zero, nothing erased by an old report."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.core.accounting import Booking, WorkerView
from tandem.core.perf_model import PerfModel
from tandem.core.profiles import PROFILES
from tandem.core.types import RequestKey, Role, WorkerLoad
from tests.unit.core.virtual_fleet import PROFILE, spec

LAG = 0.6


def view() -> WorkerView:
    return WorkerView(spec("d0", Role.DECODE), PerfModel(PROFILES[PROFILE]), LAG)


def booking(name: str, tokens: int = 1000, *, transfer: float = 0.0) -> Booking:
    return Booking(RequestKey(name), tokens, tokens**2 / 2, 0.1, 70, True, tokens, transfer, extra_s=0.1)


def report(**changes: int) -> WorkerLoad:
    return WorkerLoad("d0", 1, **changes)  # type: ignore[arg-type]


def test_what_reports_show_beyond_our_own_is_foreign() -> None:
    worker = view()
    worker.report(report(running_requests=3, pending_prefill_tokens=500, kv_blocks_used=40, kv_tokens=600), 0.0)
    assert (worker.foreign_tokens, worker.foreign_blocks, worker.foreign_sequences) == (500, 40, 3)
    worker.book(booking("r"), 0.0, 1.0)
    assert (worker.blocks_in_use, worker.sequences) == (110, 4)
    # The same report again, now with our own in it.
    worker.report(report(running_requests=4, pending_prefill_tokens=1500, kv_blocks_used=103, kv_tokens=1600), 0.5)
    assert worker.foreign_tokens == 500
    assert worker.foreign_sequences == 3
    assert 0 < worker.foreign_blocks <= 40  # of our 70 only 63 are in use yet: never counted twice, maybe a little low


def test_our_own_requests_are_never_foreign_even_if_the_report_is_older_than_their_end() -> None:
    worker = view()
    worker.book(booking("r"), 1.0, 1.0)
    worker.release(RequestKey("r"), 2.0)
    worker.report(report(running_requests=1, pending_prefill_tokens=1000, kv_blocks_used=63, kv_tokens=1000), 2.3)
    assert worker.foreign == (0, 0)
    assert worker.reading(2.3).tokens == 0
    # Long after, the same report does mean somebody else's request.
    worker.report(report(running_requests=1, pending_prefill_tokens=1000, kv_blocks_used=63), 9.0)
    assert worker.foreign == (63, 1)


def test_a_report_older_than_a_dispatch_does_not_erase_it() -> None:
    worker = view()
    worker.report(report(), 0.9)
    worker.book(booking("r"), 1.0, 1.0)
    worker.report(report(), 1.1)
    assert worker.reading(1.1).tokens > 0
    # Reports that still show nothing long after: the worker has computed it, only the event is missing.
    worker.report(report(), 3.0)
    assert worker.reading(3.0).tokens == 0


def test_a_report_tells_how_far_a_long_prefill_has_got() -> None:
    worker = view()
    long = booking("r", 8000)
    long.prefill_s = 100.0
    worker.book(long, 0.0, 1.0)
    worker.report(report(running_requests=1, pending_prefill_tokens=2000), 5.0)
    assert worker.reading(5.0).tokens <= 2000


def test_time_alone_lets_the_oldest_prefill_progress_but_not_end() -> None:
    worker = view()
    worker.book(booking("a"), 0.0, 1.0)
    worker.book(booking("b"), 0.0, 1.0)
    assert worker.reading(0.05).tokens == pytest.approx(1500)
    assert worker.reading(50.0).tokens >= 1000
    worker.prefill_done(RequestKey("a"), 50.0)
    assert worker.reading(50.0).tokens == 1000
    assert worker.reading(50.05).tokens == pytest.approx(500)


def test_an_idle_report_contradicts_old_bookings_only() -> None:
    worker = view()
    worker.book(booking("old"), 0.0, 1.0)
    decode_of_remote = booking("pulling", 0, transfer=1e6)
    worker.book(decode_of_remote, 0.0, 1.0)
    worker.book(booking("new"), 4.9, 1.0)
    worker.report(report(running_requests=1), 5.0)
    assert worker.finished_by_report(5.0) == []
    worker.report(report(), 5.0)
    assert worker.finished_by_report(5.0) == [RequestKey("old")]


events = st.lists(
    st.tuples(
        st.sampled_from(["book", "prefill_done", "transfer_done", "release", "report"]),
        st.integers(0, 7),
        st.floats(0, 0.5),
        st.integers(0, 5000),
    ),
    max_size=60,
)


@settings(deadline=None)
@given(events)
def test_numbers_never_fall_below_zero_and_return_to_zero(drawn: list[tuple[str, int, float, int]]) -> None:
    worker = view()
    now = 0.0
    for kind, number, wait, size in drawn:
        now += wait
        key = RequestKey(f"r{number}")
        if kind == "book" and key not in worker.bookings:
            worker.book(booking(key.id, size, transfer=float(size)), now, 1.0)
        elif kind == "prefill_done":
            worker.prefill_done(key, now)
        elif kind == "transfer_done":
            worker.transfer_done(key)
        elif kind == "release":
            worker.release(key, now)
        elif kind == "report":
            worker.report(
                report(running_requests=number, pending_prefill_tokens=size, kv_blocks_used=size // 16, kv_tokens=size),
                now,
            )
        held = worker.bookings.values()
        assert worker.own_tokens == sum(b.prefill_tokens for b in held)
        assert worker.own_blocks == sum(b.kv_blocks for b in held)
        assert worker.own_sequences == sum(b.decodes for b in held)
        assert min(worker.foreign_tokens, worker.foreign_blocks, worker.foreign_sequences) >= 0
        reading = worker.reading(now)
        assert 0 <= reading.tokens <= worker.own_tokens + worker.foreign_tokens
        assert reading.context >= 0
        assert reading.pending_s >= 0
    for key in list(worker.bookings):
        worker.release(key, now)
    assert (worker.own_tokens, worker.own_blocks, worker.own_sequences, worker.transfer_bytes) == (0, 0, 0, 0.0)


def test_prefill_beside_decodes_fades() -> None:
    worker = view()
    worker.book(booking("r"), 0.0, 2.0)
    assert worker.prefill_share_s(0.0, 2.0) == 0.1
    assert 0.036 < worker.prefill_share_s(2.0, 2.0) < 0.037


def test_blocks_that_requests_share_need_no_room() -> None:
    """Ten prompts of 62 full blocks; the worker reports 150 in use where 620 would be without a common prefix."""
    worker = view()
    for i in range(10):
        worker.book(booking(f"r{i}"), 0.0, 1.0)
        worker.prefill_done(RequestKey(f"r{i}"), 0.1)
    assert worker.blocks_in_use == 700
    worker.report(report(running_requests=10, kv_blocks_used=150), 0.2)
    assert worker.blocks_in_use == 700, "the report may be older than the requests"
    for now in (1.0, 1.7, 2.4):
        worker.report(report(running_requests=10, kv_blocks_used=150), now)
    assert worker.blocks_in_use == 700 - int((1 - 150 / 620) * 620)
    for i in range(10):
        worker.release(RequestKey(f"r{i}"), 2.5)
    assert worker.blocks_in_use == 0

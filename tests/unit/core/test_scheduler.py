"""The scheduler as a whole: what must hold whatever comes, driven by a small fleet in virtual time."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tandem.core.policy import Policy, RequestClass
from tandem.core.scheduler import Place, Refuse, Scheduler
from tandem.core.types import RequestKey, Role, WorkerAddress, WorkerLoad, WorkerSpec
from tandem.errors import ContextLengthExceeded, InvalidRequest, NoWorkers, Overloaded, QueueTimeout
from tests.unit.core.virtual_fleet import VirtualFleet, request, spec

SLOW = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def disaggregated(prefill: int = 2, decode: int = 2, **changes: object) -> list[WorkerSpec]:
    return [spec(f"p{i}", Role.PREFILL, **changes) for i in range(prefill)] + [
        spec(f"d{i}", Role.DECODE, **changes) for i in range(decode)
    ]


def assert_nothing_held(scheduler: Scheduler, now: float) -> None:
    for view in scheduler.workers():
        assert not view.bookings
        assert (view.own_tokens, view.own_blocks, view.own_sequences, view.own_kv_tokens) == (0, 0, 0, 0)
        assert view.own_context == pytest.approx(0.0, abs=1e-6)
        assert view.transfer_bytes == pytest.approx(0.0, abs=1e-3)
    snapshot = scheduler.snapshot(now)
    assert snapshot.in_flight == 0
    assert not snapshot.queue_by_tenant
    assert all(depth.requests == depth.tokens == 0 for depth in snapshot.queue_by_class.values())


def assert_within_limits(fleet: VirtualFleet) -> None:
    for view in fleet.scheduler.workers():
        assert min(view.own_tokens, view.own_blocks, view.own_sequences, view.own_kv_tokens) >= 0
        assert min(view.foreign_tokens, view.foreign_blocks, view.foreign_sequences, view.foreign_kv_tokens) >= 0
        assert view.own_context > -1e-6
        assert view.transfer_bytes > -1e-3
        if len(view.bookings) > 1:
            assert view.own_blocks <= fleet.scheduler.policy.kv_share * view.spec.kv_blocks_total


requests_drawn = st.lists(
    st.tuples(
        st.floats(0, 3),  # arrival
        st.sampled_from([1, 17, 300, 2000, 9000, 30000]),  # isl
        st.sampled_from([1, 8, 200]),  # osl
        st.sampled_from(["a", "b", "c"]),  # tenant
        st.sampled_from(["fast", "slow", "background"]),
        st.sampled_from(["", "", "", "abort", "local"]),
    ),
    min_size=1,
    max_size=40,
)
CLASSES = {
    "fast": RequestClass(name="fast", rank=0, ttft_slo_s=1.0, tpot_slo_s=0.05),
    "slow": RequestClass(name="slow", rank=1, min_share=0.1),
    "background": RequestClass(name="background", rank=2, background=True, min_share=0.05),
}


@SLOW
@given(requests_drawn, st.integers(0, 2), st.integers(1, 3), st.sampled_from([900, 4000, 20000]), st.integers(0, 9))
def test_every_request_ends_exactly_once_and_everything_returns(
    drawn: list[tuple[float, int, int, str, str, str]], prefill: int, decode: int, blocks: int, seed: int
) -> None:
    fleet = VirtualFleet(disaggregated(prefill, decode, kv_blocks_total=blocks), classes=CLASSES, seed=seed)
    fleet.after_poll = assert_within_limits
    keys = []
    for i, (at, isl, osl, tenant, name, fate) in enumerate(drawn):
        req = request(f"r{i}", isl=isl, osl=osl, at=at, tenant=tenant, request_class=name, local_only=fate == "local")
        keys.append(req.key)
        fleet.arrive(req)
        if fate == "abort":
            fleet.at(at + 0.3, lambda key=req.key: fleet.abort(key))  # type: ignore[misc]
    fleet.drain()
    for key in keys:
        ends = [key in fleet.finished, key in fleet.refused, key in fleet.aborted]
        assert sum(ends) == 1 or (ends == [True, False, True]), (key, ends)
        if key in fleet.refused:
            assert key not in fleet.placed
    assert_nothing_held(fleet.scheduler, fleet.now)
    for counter in fleet.scheduler.service_counters().values():
        assert counter >= 0.0


@SLOW
@given(st.integers(0, 1000), st.floats(0.05, 0.5))
def test_lost_lifecycle_events_are_repaired_by_reports_or_by_time(seed: int, lose: float) -> None:
    fleet = VirtualFleet(disaggregated(), lose=lose, seed=seed)
    fleet.after_poll = assert_within_limits
    for i in range(12):
        fleet.arrive(request(f"r{i}", at=0.05 * i, osl=20, timeout_s=30.0))
    fleet.run(until=100.0)
    assert len(fleet.finished) == 12
    assert_nothing_held(fleet.scheduler, fleet.now)


@SLOW
@given(st.integers(0, 10_000))
def test_the_same_inputs_give_the_same_decisions_whatever_the_order_of_registration(seed: int) -> None:
    def decisions(shuffle: Callable[[list[WorkerSpec]], None]) -> list[tuple[RequestKey, str, str | None, float]]:
        specs = disaggregated(2, 3)
        shuffle(specs)
        fleet = VirtualFleet(specs, seed=seed)
        workload = random.Random(seed)
        for i in range(30):
            held = {f"d{i % 3}": 512, "p1": 256}
            cached = dict(sorted(held.items(), key=lambda item: item[0], reverse=workload.random() < 0.5))
            fleet.arrive(request(f"r{i}", isl=workload.randrange(600, 9000), at=workload.random() * 2), cached)
        fleet.drain()
        return [(k, p.plan.decode_worker, p.plan.prefill_worker, at) for k, (at, p) in fleet.placed.items()]

    assert decisions(lambda specs: None) == decisions(lambda specs: specs.reverse())


@SLOW
@given(st.integers(0, 10_000), st.integers(0, 2))
def test_no_worker_idles_while_a_request_waits_that_it_could_run(seed: int, prefill: int) -> None:
    """Beyond ``hold_s``: so long a request may wait for a worker that holds its prefix."""
    fleet = VirtualFleet(disaggregated(prefill, 2, kv_blocks_total=3000), seed=seed)

    def check(fleet: VirtualFleet) -> None:
        oldest = fleet.scheduler.snapshot(fleet.now).oldest_wait_s
        if oldest > fleet.scheduler.policy.hold_s + 0.01:
            assert not [v.id for v in fleet.scheduler.workers() if v.role is Role.DECODE and v.idle]

    fleet.after_poll = check
    workload = random.Random(seed)
    for i in range(60):
        fleet.arrive(
            request(f"r{i}", isl=workload.randrange(1000, 20000), osl=50, at=workload.random()), {"d0": 900, "p0": 900}
        )
    fleet.drain()
    assert len(fleet.finished) == 60


def test_late_binding_keeps_engine_queues_shallow() -> None:
    fleet = VirtualFleet(disaggregated(2, 2))
    deepest = 0.0

    def look(fleet: VirtualFleet) -> None:
        nonlocal deepest
        deepest = max(deepest, *(w.pending_prefill_s for w in fleet.scheduler.snapshot(fleet.now).workers))

    fleet.after_poll = look
    for i in range(300):
        fleet.submit(request(f"r{i}", isl=2000))
    one_prompt = 1.15 * fleet.servers["p0"].prefill_s(2000, 2000 * 1999 / 2)
    fleet.run(until=120.0)
    assert len(fleet.finished) == 300
    # Below credit when a request was given, so at most credit and one prompt (beside decodes it is a little slower).
    assert deepest < 0.2 + 1.6 * one_prompt


def test_a_slow_worker_runs_one_giant_at_a_time() -> None:
    """On a CPU a prompt takes far longer than any credit: one runs, the rest waits here, and nothing locks up."""
    cpu = spec("d0", Role.DECODE, perf_profile="cpu-smollm2", kv_endpoint="", max_batched_tokens=512)
    fleet = VirtualFleet([cpu], tpot_s=0.05)
    for i in range(4):
        fleet.submit(request(f"r{i}", isl=4000, osl=5))
    fleet.poll()
    assert len(fleet.placed) == 1
    fleet.run(until=200.0)
    assert len(fleet.finished) == 4


def test_what_never_fits_is_refused_at_once_and_names_both_numbers() -> None:
    scheduler = VirtualFleet([spec("d0", Role.DECODE, kv_blocks_total=100)]).scheduler
    with pytest.raises(ContextLengthExceeded, match=r"1600 tokens.*1600 tokens"):
        scheduler.submit(request("r", isl=1600), {}, 0.0)
    scheduler.submit(request("fits", isl=1599), {}, 0.0)
    assert isinstance(scheduler.poll(0.0)[0], Place)


def test_without_decode_workers_nothing_is_taken() -> None:
    fleet = VirtualFleet([spec("p0", Role.PREFILL)])
    with pytest.raises(NoWorkers):
        fleet.scheduler.submit(request("r"), {}, 0.0)


def test_queued_requests_outlive_their_workers_for_a_grace() -> None:
    fleet = VirtualFleet(disaggregated(1, 1), report_every_s=0)
    for i in range(20):
        fleet.submit(request(f"r{i}", isl=8000))
    fleet.poll()
    running = set(fleet.placed)
    assert set(fleet.kill("d0")) == running
    fleet.run(until=5.0)
    assert not fleet.refused
    fleet.run(until=31.0)
    assert len(fleet.refused) == 20 - len(running)
    assert {type(error) for error in fleet.refused.values()} == {NoWorkers}


def test_whoever_asks_just_after_the_last_worker_went_waits_for_its_successor() -> None:
    fleet = VirtualFleet(disaggregated(1, 1), report_every_s=0)
    fleet.poll()
    fleet.kill("d0")
    fleet.poll()
    fleet.submit(request("in time"))
    fleet.run(until=5.0)
    assert not fleet.refused
    fleet.run(until=31.0)
    assert isinstance(fleet.refused[RequestKey("in time")], NoWorkers)
    fleet.submit(request("too late"))
    fleet.poll()
    assert isinstance(fleet.refused[RequestKey("too late")], NoWorkers)


def test_a_request_is_refused_when_it_has_waited_its_whole_time() -> None:
    fleet = VirtualFleet([spec("d0", Role.DECODE)], report_every_s=0)
    fleet.submit(request("long", isl=30000, osl=1000))
    fleet.submit(request("short", isl=30000, osl=10, timeout_s=0.5))
    fleet.run(until=0.6)
    assert isinstance(fleet.refused[RequestKey("short")], QueueTimeout)


def test_repeats_are_answered_like_the_first() -> None:
    fleet = VirtualFleet([spec("d0", Role.DECODE, kv_blocks_total=100)])
    scheduler = fleet.scheduler
    for _ in range(2):
        scheduler.submit(request("r", isl=100), {}, 0.0)
    assert len(scheduler.poll(0.0)) == 1
    scheduler.submit(request("r", isl=100), {}, 0.0)
    scheduler.finished(RequestKey("r"), 5, 0, 1.0)
    scheduler.submit(request("r", isl=100), {}, 1.0)
    assert scheduler.poll(1.0) == []
    for _ in range(2):
        with pytest.raises(ContextLengthExceeded):
            scheduler.submit(request("huge", isl=5000), {}, 0.0)


def test_a_request_that_failed_may_come_again_under_its_key() -> None:
    """A deposed leader gives up what it queued; elected again, it must not take the same key for answered."""
    scheduler = VirtualFleet(disaggregated()).scheduler
    scheduler.submit(request("r"), {}, 0.0)
    scheduler.failed(RequestKey("r"), 0.0)
    scheduler.submit(request("r"), {}, 0.0)
    assert [type(effect) for effect in scheduler.poll(0.0)] == [Place]


def test_an_abort_ends_older_attempts_of_one_choice_or_all() -> None:
    scheduler = VirtualFleet(disaggregated()).scheduler
    for attempt in range(3):
        for choice in range(2):
            scheduler.submit(request("r", key=RequestKey("r", attempt, choice)), {}, 0.0)
    assert scheduler.abort("r", 1, 0.0, choice=0) == [RequestKey("r", 0, 0), RequestKey("r", 1, 0)]
    assert scheduler.abort("r", 1, 0.0) == [RequestKey("r", 0, 1), RequestKey("r", 1, 1)]
    assert scheduler.queued() == [RequestKey("r", 2, 0), RequestKey("r", 2, 1)]


@pytest.mark.parametrize("dies", ["p0", "d0"])
def test_a_dead_worker_gives_back_what_its_requests_held_elsewhere(dies: str) -> None:
    fleet = VirtualFleet(disaggregated(1, 1), report_every_s=0)
    fleet.submit(request("r", isl=4000))
    fleet.poll()
    assert fleet.placed[RequestKey("r")][1].plan.prefill_worker == "p0"
    assert fleet.kill(dies) == [RequestKey("r")]
    assert_nothing_held(fleet.scheduler, 0.0)


def test_a_new_incarnation_replaces_the_old_one() -> None:
    scheduler = VirtualFleet(disaggregated(0, 1), report_every_s=0).scheduler
    scheduler.submit(request("r"), {}, 0.0)
    scheduler.poll(0.0)
    again = spec("d0", Role.DECODE, address=WorkerAddress("d0", 2))
    assert scheduler.worker_up(again, 1.0) == [RequestKey("r")]
    assert scheduler.worker_down("d0", 1, 1.0) == []
    assert_nothing_held(scheduler, 1.0)
    scheduler.worker_load(WorkerLoad("d0", 1, running_requests=5, kv_blocks_used=50), 1.0)
    assert next(iter(scheduler.workers())).foreign_blocks == 0


def test_suspect_and_draining_workers_get_nothing_new() -> None:
    fleet = VirtualFleet(disaggregated(0, 2), report_every_s=0)
    fleet.scheduler.worker_suspect("d0", True, 0.0)
    fleet.scheduler.worker_up(spec("d1", Role.DECODE, draining=True), 0.0)
    fleet.submit(request("r"))
    fleet.poll()
    assert not fleet.placed
    fleet.scheduler.worker_suspect("d0", False, 0.0)
    fleet.poll()
    assert fleet.placed[RequestKey("r")][1].plan.decode_worker == "d0"


def test_a_role_change_takes_effect_at_the_next_placement() -> None:
    fleet = VirtualFleet(disaggregated(0, 2), report_every_s=0)
    fleet.scheduler.worker_load(WorkerLoad("d0", 1, role=Role.PREFILL), 0.0)
    fleet.submit(request("r", isl=9000))
    fleet.poll()
    assert fleet.placed[RequestKey("r")][1].plan.decode_worker == "d1"


def test_prefill_workers_decode_beside_decode_workers_and_only_if_the_policy_is_flexible() -> None:
    for flexible in (True, False):
        fleet = VirtualFleet(
            disaggregated(1, 1, kv_blocks_total=2000), report_every_s=0, policy=Policy(flexible=flexible)
        )
        for i in range(60):
            fleet.submit(request(f"r{i}", isl=900, osl=2000))
        fleet.run(until=8.0)
        decoding = {place.plan.decode_worker for _, place in fleet.placed.values()}
        assert decoding == ({"p0", "d0"} if flexible else {"d0"})


def test_avoided_workers_are_used_when_no_other_is_left() -> None:
    fleet = VirtualFleet(disaggregated(0, 2), report_every_s=0)
    for i in range(4):
        fleet.submit(request(f"r{i}", isl=100, avoid_workers=frozenset({"d0"})))
    fleet.poll()
    assert {place.plan.decode_worker for _, place in fleet.placed.values()} == {"d1"}
    fleet.kill("d1")
    fleet.submit(request("last", avoid_workers=frozenset({"d0"})))
    fleet.poll()
    assert fleet.placed[RequestKey("last")][1].plan.decode_worker == "d0"


def test_a_request_for_a_lora_that_nobody_has_waits_aside() -> None:
    fleet = VirtualFleet(disaggregated(0, 1), report_every_s=0)
    for i in range(30):
        fleet.submit(request(f"x{i}", lora="tuned"))
    fleet.submit(request("plain"))
    fleet.run(until=10.0)
    assert list(fleet.finished) == [RequestKey("plain")]
    fleet.scheduler.worker_up(spec("d1", Role.DECODE, loras=frozenset({"tuned"})), fleet.now)
    fleet.servers["d1"] = type(fleet.servers["d0"])(spec("d1", Role.DECODE))
    fleet.run(until=60.0)
    assert len(fleet.finished) == 31


def test_the_head_that_does_not_fit_gets_room_reserved_in_time() -> None:
    """Small requests keep a worker's KV three quarters full; a big one needs nearly all of it."""
    policy = Policy(default_osl_tokens=16)
    fleet = VirtualFleet([spec("d0", Role.DECODE, kv_blocks_total=1000)], policy=policy, report_every_s=0)
    for i in range(400):
        fleet.arrive(request(f"s{i}", isl=3000, osl=16, at=0.1 * i))
    big = request("big", isl=13000, osl=16, at=1.0)
    fleet.arrive(big)
    fleet.run(until=200.0)
    waited = fleet.placed[big.key][0] - big.arrival_s
    assert waited < 5.0 + 3.0  # ageing, then as long as what runs takes to leave
    assert len(fleet.finished) == 401


def test_the_queue_limit_is_in_tokens_and_says_when_to_come_back() -> None:
    fleet = VirtualFleet([spec("d0", Role.DECODE)], policy=Policy(queue_limit_tokens=50_000))
    for i in range(40):
        fleet.submit(request(f"r{i}", isl=2000, osl=100))
    errors = list(fleet.refused.values())
    assert 10 < len(errors) < 25
    assert all(isinstance(error, Overloaded) and error.retry_after_s > 0 for error in errors)


def test_an_unknown_class_is_the_clients_mistake() -> None:
    scheduler = VirtualFleet(disaggregated()).scheduler
    with pytest.raises(InvalidRequest, match="nope"):
        scheduler.submit(request("r", request_class="nope"), {}, 0.0)


def test_explain_places_nothing_and_shows_every_term() -> None:
    fleet = VirtualFleet(disaggregated(1, 2))
    fleet.scheduler.worker_suspect("d1", True, 0.0)
    before = fleet.scheduler.snapshot(0.0)
    explanation = fleet.scheduler.explain(request("r", isl=4000), {"d0": 2000}, 0.0)
    assert fleet.scheduler.snapshot(0.0) == before
    assert explanation.chosen is not None
    scored = [c for c in explanation.candidates if not c.excluded]
    assert {c.plan.prefill_worker for c in scored} >= {None, "p0"}
    assert all(c.terms["ttft_ms"] > 0 and c.terms["itl_ms"] > 0 for c in scored)
    assert [(c.plan.decode_worker, c.excluded) for c in explanation.candidates if c.excluded] == [("d1", "silent")]
    assert explanation.chosen == min(scored, key=lambda c: c.score).plan
    assert "ms" in explanation.summary


def test_refusals_and_placements_are_all_that_poll_returns_by_default() -> None:
    fleet = VirtualFleet(disaggregated(0, 1), classes=CLASSES, report_every_s=0)
    fleet.submit(request("b", isl=30000, request_class="background"))
    assert all(isinstance(effect, Place | Refuse) for effect in fleet.scheduler.poll(0.0))

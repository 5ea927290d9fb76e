"""The plan of least predicted harm: the formulas, what they prefer, and what the filters take out."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from tandem.core.accounting import Booking, WorkerView
from tandem.core.fleet import Fleet
from tandem.core.perf_model import PerfModel
from tandem.core.placement import Candidate, Decision, Inquiry, Standings, decide, disturbance_window_s, suffix_context
from tandem.core.policy import Policy
from tandem.core.profiles import PROFILES
from tandem.core.slo import Targets
from tandem.core.standing import Standing, backlog_s, next_step_s
from tandem.core.types import RequestKey, Role
from tests.unit.core.virtual_fleet import PROFILE, request, spec

POLICY = Policy()
GOAL = Targets(1.5, 0.05, binding=True)


def view(name: str, role: Role = Role.DECODE, **changes: object) -> WorkerView:
    profile = str(changes.get("perf_profile", PROFILE))
    return WorkerView(spec(name, role, **changes), PerfModel(PROFILES[profile]), 0.6)


def busy(worker: WorkerView, *, streams: int = 0, kv_each: int = 2000, prefill: int = 0) -> WorkerView:
    for i in range(streams):
        blocks = kv_each // worker.spec.block_size
        worker.book(Booking(RequestKey(f"{worker.id}-s{i}"), 0, 0.0, 0.0, blocks, True, kv_each), 0.0, 1.0)
    if prefill:
        context = prefill * prefill / 2
        seconds = worker.perf.prefill_s(prefill, context, worker.spec.max_batched_tokens)
        worker.book(
            Booking(RequestKey(f"{worker.id}-p"), prefill, context, seconds, 10, False, 0, extra_s=seconds), 0.0, 1.0
        )
    return worker


def inquiry(isl: int = 4000, cached: dict[str, int] | None = None, **changes: object) -> Inquiry:
    wanted = {k: changes.pop(k) for k in list(changes) if k in {"local_only", "max_osl_tokens", "lora"}}
    usual = {
        "request": structs.replace(request("r", isl=isl), **wanted),  # type: ignore[arg-type]
        "cached": cached or {},
        "targets": GOAL,
        "waited_s": 0.0,
        "expected_osl": 200.0,
        "stream_osl": 200.0,
        "reserve_tokens": isl + 200,
    }
    return Inquiry(**usual | changes)  # type: ignore[arg-type]


def decided(asked: Inquiry, decoders: list[WorkerView], prefillers: list[WorkerView] | None = None) -> Decision:
    return decide(asked, decoders, prefillers or [], POLICY, 0.0)


def best(asked: Inquiry, decoders: list[WorkerView], prefillers: list[WorkerView] | None = None) -> Candidate:
    found = decided(asked, decoders, prefillers).best
    assert found is not None
    return found


def test_the_terms_are_those_of_the_design() -> None:
    """Recomputed here by hand from the formulas, with work pending on both sides."""
    p = busy(view("p0", Role.PREFILL), prefill=3000)
    d = busy(view("d0"), streams=20, prefill=500)
    d.own_sequences, d.own_kv_tokens = 20, 40000
    asked = inquiry(4000, {"d0": 1600, "p0": 800}, waited_s=0.1)
    plans = {c.plan.prefill_worker: c for c in decided(asked, [d], [p]).candidates}
    m, g = PROFILES[PROFILE], 1.15

    pending_p, pending_d = 3000, 500
    n_p, n_d = 4000 - 800, 4000 - 1600
    prefill_p = g * (
        m.p1 * (pending_p + n_p)
        + m.p2 * (pending_p**2 / 2 + suffix_context(4000, 800))
        + math.ceil((pending_p + n_p) / 8192) * m.p0
    )
    per_step = m.p0 + 20 * m.p1 + 40000 * m.p3
    prefill_d = g * (
        m.p1 * (pending_d + n_d)
        + m.p2 * (pending_d**2 / 2 + suffix_context(4000, 1600))
        + math.ceil((pending_d + n_d) / 1024) * per_step
    )
    own_d = g * (m.p1 * n_d + m.p2 * suffix_context(4000, 1600) + math.ceil(n_d / 1024) * per_step)
    before = m.d0 + 20 * m.d1 + 40000 * m.d2  # a step goes on beside the prompt
    work_d = g * (m.p1 * n_d + m.p2 * suffix_context(4000, 1600))
    extra_d = max(work_d, own_d - g * math.ceil(n_d / 1024) * before)
    seat = g * 200 * (m.d1 + m.d2 * (4000 + 0.5 * 200))
    step = g * (m.d0 + m.d1 * 21 + m.d2 * (40000 + 4000 + 0.5 * 200 * 21))
    tau = min(6.0, max(0.3, 0.6 * 200 * 0.05))
    rho = d.prefill_share_s(0.0, tau)
    transfer = (4000 - 1600) * 327680 / 50e9

    remote, local = plans["p0"], plans[None]
    assert remote.terms["prefill_ms"] == pytest.approx(1e3 * prefill_p)
    assert remote.terms["transfer_ms"] == pytest.approx(1e3 * transfer)
    assert remote.terms["ttft_ms"] == pytest.approx(1e3 * (0.1 + prefill_p + transfer + step))
    assert remote.terms["itl_ms"] == pytest.approx(1e3 * step / (1 - rho / tau))
    assert local.terms["ttft_ms"] == pytest.approx(1e3 * (0.1 + prefill_d))
    assert local.terms["itl_ms"] == pytest.approx(1e3 * step / (1 - min(0.95, (rho + extra_d) / tau)))
    own_p = g * (m.p1 * n_p + m.p2 * suffix_context(4000, 800) + m.p0)
    for plan, effort in ((remote, own_p + seat), (local, extra_d + seat)):
        r1, r2, kv = plan.terms["ttft_of_target"], plan.terms["itl_of_target"], plan.terms["kv_share"]
        harm = 200 * max(0, r1 - 0.8) + 200 * max(0, r2 - 0.85) + 50 * max(0, kv - 0.95)
        assert plan.terms["effort_ms"] == pytest.approx(1e3 * effort)
        assert plan.score == pytest.approx(r1**2 + r2**2 + harm + 0.03 * r1 + effort / 1.5)
        assert r1 == pytest.approx(plan.terms["ttft_ms"] / 1500)
        assert r2 == pytest.approx(plan.terms["itl_ms"] / 50)


def test_long_prompts_go_to_prefill_workers_when_streams_would_suffer() -> None:
    crowded = busy(view("d0"), streams=60)
    assert best(inquiry(8000), [crowded], [view("p0", Role.PREFILL)]).prefill is not None


def test_a_conversation_continues_where_its_kv_is() -> None:
    """Multi-turn: D holds all but the last words, so nothing is worth moving."""
    chosen = best(inquiry(8000, {"d1": 7900}), [view("d0"), view("d1")], [view("p0", Role.PREFILL)])
    assert (chosen.decode.id, chosen.prefill) == ("d1", None)


def test_a_prefix_on_the_prefill_worker_counts_too() -> None:
    chosen = best(
        inquiry(8000, {"p1": 7000}),
        [busy(view("d0"), streams=30)],
        [view("p0", Role.PREFILL), view("p1", Role.PREFILL)],
    )
    assert chosen.prefill is not None
    assert chosen.prefill.id == "p1"


def test_a_busy_prefill_worker_is_avoided_and_then_all_are() -> None:
    long = busy(view("p0", Role.PREFILL), prefill=30000)
    free = view("p1", Role.PREFILL)
    quiet = view("d0")
    assert best(inquiry(6000), [quiet], [long, free]).first.id == "p1"
    assert best(inquiry(6000), [quiet], [long]).prefill is None


def test_a_slow_link_is_part_of_the_price() -> None:
    slow = view("d0", link_bytes_per_s=1e8)
    fast = view("d1")
    p = view("p0", Role.PREFILL)
    assert best(inquiry(), [slow, fast], [p]).decode.id == "d1"
    remote = next(c for c in decided(inquiry(), [slow], [p]).candidates if c.prefill)
    assert remote.terms["transfer_ms"] == pytest.approx(1e3 * 4000 * 327680 / 1e8)


def test_in_a_mixed_fleet_milliseconds_decide() -> None:
    slow = view("a", perf_profile="generic")
    fast = view("b")
    assert best(inquiry(), [slow, fast]).decode.id == "b"
    assert best(inquiry(), [slow, busy(fast, prefill=20000)]).decode.id == "a"


def test_the_tpot_guard_keeps_prefill_away_from_streams() -> None:
    """A local prefill would break the pace of the streams; waiting a little longer for p0 does not. Without the guard
    the request would take what is best for itself."""
    d = busy(view("d0"), streams=40, kv_each=1000)
    p = busy(view("p0", Role.PREFILL), prefill=12000)
    asked = inquiry(3000, targets=Targets(1.5, 0.028, binding=True), stream_osl=60.0)
    assert best(asked, [d], [p]).prefill is p
    unguarded = decide(asked, [d], [p], replace(POLICY, tpot_guard=1e9), 0.0).best
    assert unguarded is not None
    assert unguarded.prefill is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model": "other"}, "serves another model"),
        ({"max_model_len": 4000}, "too small for the prompt"),
        ({"kv_blocks_total": 250}, "too small for the prompt"),
    ],
)
def test_hard_filters_name_their_reason(changes: dict[str, object], reason: str) -> None:
    decision = decided(inquiry(), [view("d0", **changes)])
    assert decision.candidates == ()
    assert decision.excluded == (("d0", reason),)
    explained = decision.explanation(None)
    assert explained.chosen is None
    assert explained.candidates[0].excluded == reason


def test_room_is_a_hard_filter() -> None:
    full = busy(view("d0", kv_blocks_total=1000), streams=6, kv_each=2000)
    assert decided(inquiry(), [full]).excluded == (("d0", "no KV room"),)
    seats = busy(view("d1", max_num_seqs=5), streams=5)
    assert decided(inquiry(), [seats]).excluded == (("d1", "batch full"),)
    assert decided(inquiry(lora="x"), [view("d2")]).excluded == (("d2", "lacks the LoRA"),)
    assert decided(inquiry(avoid=frozenset({"d3"})), [view("d3")]).excluded == (("d3", "failed this request before"),)
    held = inquiry(reserved={"d4": RequestKey("other")})
    assert "reserved" in decided(held, [view("d4")]).excluded[0][1]
    assert decided(inquiry(reserved={"d4": RequestKey("r")}), [view("d4")]).best is not None


def test_an_idle_worker_takes_what_fits_at_all() -> None:
    small = view("d0", kv_blocks_total=255)
    assert best(inquiry(reserve_tokens=9000), [small]).decode is small


@pytest.mark.parametrize("odd", [{"kv_endpoint": ""}, {"dtype": "float32"}, {"kv_layout": "other"}, {"block_size": 32}])
def test_kv_moves_only_between_workers_that_match(odd: dict[str, object]) -> None:
    p = view("p0", Role.PREFILL)
    crowd = busy(view("d0", **odd), streams=60)
    assert all(c.prefill is None for c in decided(inquiry(8000), [crowd], [p]).candidates)


@pytest.mark.parametrize("changes", [{"local_only": True}, {"max_osl_tokens": 1}])
def test_some_requests_are_always_local(changes: dict[str, object]) -> None:
    decision = decided(inquiry(8000, None, **changes), [busy(view("d0"), streams=60)], [view("p0", Role.PREFILL)])
    assert [c.prefill for c in decision.candidates] == [None]


def test_background_stays_under_guard() -> None:
    d = busy(view("d0"), streams=100, kv_each=400)
    guarded = decided(inquiry(1000, guard_share=0.3), [d])
    assert guarded.candidates == ()
    assert guarded.guarded
    assert decided(inquiry(1000), [d]).best is not None


def test_idle_twins_are_chosen_at_random_and_reproducibly() -> None:
    twins = [view(f"d{i}") for i in range(4)]
    picks = [
        decide(inquiry(), twins, [], POLICY, 0.0, random.Random(seed)).candidates[0].decode.id for seed in range(40)
    ]
    assert set(picks) == {"d0", "d1", "d2", "d3"}
    again = [
        decide(inquiry(), twins, [], POLICY, 0.0, random.Random(seed)).candidates[0].decode.id for seed in range(40)
    ]
    assert picks == again


def test_the_disturbance_window_is_clamped() -> None:
    assert disturbance_window_s(1, 0.01) == 0.3
    assert disturbance_window_s(200, 0.05) == pytest.approx(6.0)
    assert disturbance_window_s(50, 0.02) == pytest.approx(0.6)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6))
def test_the_cheap_filter_of_a_large_fleet_loses_little(seed: int) -> None:
    """Over 48 + 48 workers the pruned choice scores within a few per cent of looking at all."""
    rng = random.Random(seed)
    decoders = [busy(view(f"d{i:02}"), streams=rng.randrange(60), kv_each=rng.randrange(200, 4000)) for i in range(48)]
    prefillers = [busy(view(f"p{i:02}", Role.PREFILL), prefill=rng.randrange(1, 20000)) for i in range(48)]
    holders = rng.sample(decoders + prefillers, 10)
    isl = rng.randrange(500, 16000)
    asked = inquiry(isl, {w.id: rng.randrange(0, isl) // 16 * 16 for w in holders})
    pruned = decide(asked, decoders, prefillers, POLICY, 0.0).best
    every = decide(asked, decoders, prefillers, replace(POLICY, exact_candidates=1000), 0.0).best
    assert pruned is not None
    assert every is not None
    assert every.score <= pruned.score <= 1.1 * every.score + 0.02


@settings(deadline=None)
@given(st.permutations(["d0", "d1", "p0", "zz"]))
def test_the_order_of_the_cache_report_does_not_matter(order: list[str]) -> None:
    depths = {"d0": 512, "d1": 512, "p0": 1024, "zz": 4000}
    asked = inquiry(4000, {worker: depths[worker] for worker in order})
    decision = decided(asked, [view("d0"), view("d1")], [view("p0", Role.PREFILL)])
    assert (
        decision.candidates[0].plan
        == decided(inquiry(4000, depths), [view("d0"), view("d1")], [view("p0", Role.PREFILL)]).candidates[0].plan
    )


def test_a_worker_without_streams_lends_itself_to_one_that_has_some() -> None:
    """Streams gather: the prompt is computed where it disturbs nobody, and decodes beside the others."""
    gathering, free = busy(view("d0"), streams=120), view("d1")
    chosen = best(inquiry(8000), [gathering, free], [gathering, free])
    assert (chosen.decode.id, chosen.prefill and chosen.prefill.id) == ("d0", "d1")
    short = best(inquiry(100), [gathering, free], [gathering, free])
    assert (short.decode.id, short.prefill) == ("d0", None), "a short prompt costs least in steps that are made anyway"


def test_a_prefill_worker_decodes_once_the_decode_workers_are_near_their_guard() -> None:
    p, asked = view("p0", Role.PREFILL), inquiry(2000)
    roomy, crowded = busy(view("d0"), streams=20), busy(view("d0"), streams=230, kv_each=4000)
    for decoder, expected in ((roomy, "d0"), (crowded, "p0")):
        found = decide(asked, [decoder], [p, decoder], POLICY, 0.0, reluctant=[p]).best
        assert found is not None and found.decode.id == expected


loads = st.lists(st.tuples(st.integers(0, 220), st.integers(0, 20_000)), min_size=1, max_size=4)


@settings(max_examples=150, deadline=None)
@given(loads, loads, st.integers(1, 90_000), st.floats(0.0, 2.0))
def test_looking_at_reluctant_workers_only_when_they_may_win_loses_no_plan(
    prefills: list[tuple[int, int]], decodes: list[tuple[int, int]], isl: int, waited_s: float
) -> None:
    p = [
        busy(view(f"p{i}", Role.PREFILL), streams=streams, prefill=tokens)
        for i, (streams, tokens) in enumerate(prefills)
    ]
    d = [busy(view(f"d{i}"), streams=streams, prefill=tokens) for i, (streams, tokens) in enumerate(decodes)]
    asked = inquiry(isl, waited_s=waited_s)
    all_of_them = decide(asked, d + p, d + p, POLICY, 0.0).best
    found = decide(asked, d, d + p, POLICY, 0.0, reluctant=p).best
    assert (found and found.score) == (all_of_them and all_of_them.score)


def test_a_prompt_alone_on_a_worker_delays_no_streams_however_long() -> None:
    found = best(inquiry(20_000, stream_osl=20.0), [view("d0")])
    assert found.prefill is None and found.itl_of_target < 0.5
    beside_one = best(inquiry(20_000, stream_osl=20.0), [busy(view("d0"), streams=1)])
    assert beside_one.itl_of_target > 1.0


def test_what_a_prompt_does_to_the_streams_of_its_prefill_worker_counts() -> None:
    crowded, target = busy(view("d1"), streams=60), busy(view("d0"), streams=5)
    plans = decided(inquiry(16000), [target], [crowded, view("p0", Role.PREFILL)]).candidates
    remote = next(plan for plan in plans if plan.prefill is not None)
    assert remote.prefill is not None and remote.prefill.id == "p0"


def test_who_has_nobody_to_borrow_from_prefills_by_itself_whatever_the_policy() -> None:
    alone = view("d0")
    asked = replace(POLICY, local_prefill=False)
    assert decide(inquiry(4000), [alone], [alone], asked, 0.0).best is not None


def test_the_soonest_lenders_do_not_hide_one_whose_kv_fits() -> None:
    others = [view(f"p{i}", Role.PREFILL, dtype="float8") for i in range(3)]
    fits = busy(view("p9", Role.PREFILL), prefill=2000)
    plans = decided(inquiry(4000), [view("d0")], [*others, fits]).candidates
    assert [plan.prefill.id for plan in plans if plan.prefill] == ["p9"]


@pytest.mark.parametrize("size", [12, 60])
def test_many_lenders_do_not_crowd_out_prefill_workers(size: int) -> None:
    """In the order of ids all decode workers come first, and none of them has a prompt pending."""
    decoders = [busy(view(f"d{i:02}"), streams=25) for i in range(size)]
    prefillers = [view(f"p{i}", Role.PREFILL) for i in range(4)]
    standings = Standings(Standing(next_step_s), Standing(backlog_s), Standing(backlog_s))
    standings.decoders.reset(decoders)
    standings.prefillers.reset(prefillers)
    standings.lenders.reset(decoders)
    lending = decide(inquiry(), decoders, decoders + prefillers, POLICY, 0.0, standings=standings).best
    dedicated = decided(inquiry(), decoders, prefillers).best
    assert lending is not None and dedicated is not None
    assert lending.score <= dedicated.score
    assert lending.prefill is not None and lending.prefill.role is Role.PREFILL


def test_a_plan_whose_lender_has_streams_disturbs_somebody() -> None:
    idle, lending = view("d1"), busy(view("d0"), streams=30)
    plans = decided(inquiry(), [idle], [lending]).candidates
    assert [(c.prefill is not None, c.disturbs_nobody) for c in plans if c.decode is idle and c.prefill] == [
        (True, False)
    ]
    assert all(c.disturbs_nobody for c in plans if c.prefill is None)


def test_a_worker_that_may_take_either_part_is_left_out_once() -> None:
    full = busy(view("d0"), streams=view("d0").spec.max_num_seqs)
    decision = decided(inquiry(), [full, view("d1")], [full, view("d1")])
    assert len([worker for worker, _ in decision.excluded if worker == "d0"]) == 1


# --- what is aimed at without an SLO --------------------------------------------------------------------------------

AIMS = Targets(0.5, 0.1, binding=False, near=True)


def test_without_an_slo_streams_spread_while_there_is_room() -> None:
    """An idle worker beside one with streams: whole steps of effort are paid for a pace that is twice as good."""
    workers = [busy(view("d0", kv_blocks_total=60_000), streams=110, kv_each=5000), view("d1")]
    far = Targets(AIMS.ttft_s, AIMS.tpot_s, AIMS.binding, near=False)
    assert decided(inquiry(500, targets=AIMS), workers).best.decode.id == "d1"  # type: ignore[union-attr]
    assert decided(inquiry(500, targets=far), workers).best.decode.id == "d0"  # type: ignore[union-attr]


def test_a_busy_fleet_is_not_asked_for_an_idle_ones_pace() -> None:
    """All workers alike: the aim is a multiple of what they give, so nobody is over the guard."""
    workers = [busy(view(f"d{i}"), streams=60, kv_each=2000) for i in range(4)]
    best = decided(inquiry(100, targets=AIMS), workers).best
    assert best is not None
    assert best.itl_of_target < POLICY.tpot_guard
    assert best.itl_s < AIMS.tpot_s


def test_a_short_answer_is_placed_as_a_long_one_beside_the_same_streams() -> None:
    """What a prompt does to the streams beside it counts over their life, not over that of its own answer."""

    def pace(osl: float) -> float:
        found = decided(inquiry(2000, expected_osl=osl), [busy(view("d0"), streams=8)]).best
        assert found is not None
        return found.itl_s

    assert pace(10.0) == pytest.approx(pace(400.0), rel=0.02)


# --- GPUs of several kinds ------------------------------------------------------------------------------------------


def test_each_kind_does_what_it_is_best_at_beside_the_other() -> None:
    """The fast kind is faster at both, and most so at prefill."""
    fleet = Fleet(POLICY, PROFILES)
    for name, kind in (("a", "sim-a100-llama-70b-tp4"), ("h", "sim-h100-llama-70b-tp4")):
        fleet.up(spec(name, Role.DECODE, perf_profile=kind))
    slow, fast = fleet.decoders
    assert slow.worth < 1.0 < fast.worth
    assert slow.worth + fast.worth == pytest.approx(2.0)
    asked = inquiry(2000, targets=Targets(5.0, 0.2, binding=True), expected_osl=400.0)
    best = decided(asked, fleet.decoders, fleet.prefillers).best
    assert best is not None
    assert (best.first.id, best.decode.id) == ("h", "a")


def test_workers_of_one_kind_are_worth_the_same() -> None:
    fleet = Fleet(POLICY, PROFILES)
    for i in range(3):
        fleet.up(spec(f"d{i}", Role.DECODE))
    assert [worker.worth for worker in fleet.decoders] == [1.0] * 3

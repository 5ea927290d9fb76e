"""Replicas from demand."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from tandem.core.elasticity import Demand, Elasticity, Goals, ReplicaKind, Wish
from tandem.core.perf_model import PerfModel
from tandem.core.profiles import PROFILES
from tests.unit.core.virtual_fleet import PROFILE

KIND = ReplicaKind(perf=PerfModel(PROFILES[PROFILE]), chunk_tokens=8192, kv_tokens=400_000, max_num_seqs=256)
CALM = Demand(
    requests_per_s=5.0,
    isl_tokens=4000,
    cached_tokens=1000,
    osl_tokens=300,
    p95_isl_tokens=9000,
    queued_tokens=0,
    oldest_wait_s=0.0,
)


def wish(demand: Demand, goals: Goals | None = None, *, disaggregated: bool = True, now: float = 0.0) -> Wish:
    return Elasticity(goals or Goals(), disaggregated=disaggregated).observe(demand, KIND, KIND, now)


def test_demand_sets_both_roles() -> None:
    calm, double = wish(CALM), wish(replace(CALM, requests_per_s=10.0))
    assert calm.prefill >= 1
    assert calm.decode >= 1
    assert calm.infeasible == ""
    assert double.prefill >= 2 * calm.prefill - 1
    assert double.decode >= calm.decode


def test_what_waits_and_for_how_long_counts() -> None:
    waiting = replace(CALM, queued_tokens=60_000)
    assert wish(waiting).prefill > wish(CALM).prefill
    assert wish(replace(waiting, oldest_wait_s=1.5)).prefill > wish(waiting).prefill


def test_cached_tokens_need_no_workers() -> None:
    assert wish(replace(CALM, cached_tokens=3900)).prefill < wish(replace(CALM, cached_tokens=0)).prefill


def test_an_aggregated_fleet_is_sized_for_the_sum() -> None:
    split, one = wish(CALM), wish(CALM, disaggregated=False)
    assert one.prefill == 0
    assert split.prefill + split.decode - 1 <= one.decode <= split.prefill + split.decode


def test_up_at_once_down_only_when_it_lasts() -> None:
    loop = Elasticity(Goals(settle_s=60.0), disaggregated=True)
    peak = loop.observe(replace(CALM, requests_per_s=40.0), KIND, KIND, 0.0)
    assert loop.observe(CALM, KIND, KIND, 30.0).prefill == peak.prefill
    settled = loop.observe(CALM, KIND, KIND, 61.0)
    assert settled.prefill < peak.prefill
    assert loop.observe(replace(CALM, requests_per_s=40.0), KIND, KIND, 62.0).prefill == peak.prefill


def test_what_no_number_of_replicas_can_meet_is_said_and_not_scaled_for() -> None:
    giants = replace(CALM, p95_isl_tokens=30000)
    assert "TTFT of 2.00 s" in wish(giants).infeasible
    assert wish(giants).prefill == wish(CALM).prefill
    assert "TPOT of 5 ms" in wish(CALM, Goals(tpot_s=0.005)).infeasible


def test_limits_hold() -> None:
    flood = replace(CALM, requests_per_s=10_000.0)
    assert wish(flood, Goals(max_replicas=7)).prefill == 7
    quiet = replace(CALM, requests_per_s=0.0)
    assert (wish(quiet).prefill, wish(quiet).decode) == (0, 1)


@given(st.floats(0, 100), st.floats(0, 1e6), st.floats(0, 600))
def test_more_of_anything_never_asks_for_fewer(rate: float, queued: float, wait: float) -> None:
    base = replace(CALM, requests_per_s=rate, queued_tokens=queued, oldest_wait_s=wait)
    less = wish(base, Goals(max_replicas=10**9))
    for more in (
        replace(base, requests_per_s=rate * 1.5 + 0.1),
        replace(base, queued_tokens=queued + 1000),
        replace(base, oldest_wait_s=wait + 1),
    ):
        bigger = wish(more, Goals(max_replicas=10**9))
        assert bigger.prefill >= less.prefill
        assert bigger.decode >= less.decode

"""The bound that no scheduler can pass, against closed forms and against what ours holds."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.fluid_bound import budget, fluid_bound, prefill_s, work_of
from tandem.sim.fleet import hardware_named
from tandem.sim.study import Setup, simulate, slo_named, tw_goodput
from tandem.sim.synthetic import generate
from tandem.sim.workload import Offered, Workload

HARDWARE = hardware_named("h100-70b-tp4")
MEDIUM = slo_named("medium")


def prompts(count: int, isl: int, hashes: tuple[int, ...] = ()) -> Workload:
    """One a second, answered by one token."""
    return Workload("prompts", 16, tuple(Offered(float(i), isl, 1, hashes) for i in range(count)))


@pytest.mark.parametrize("workers", [1, 4])
def test_it_is_the_capacity_where_only_that_counts(workers: int) -> None:
    workload = prompts(200, 4000)
    each_s = prefill_s(workload.requests[0], 0, HARDWARE)
    # 0.9 of them in the seconds until the last one's first token is due.
    seconds = 0.9 * 200 * each_s / workers - MEDIUM.ttft_for(4000)
    assert fluid_bound(workload, HARDWARE, workers, MEDIUM, 1.0) == pytest.approx(199 / seconds, rel=0.04)


def test_what_takes_too_long_by_itself_is_nobodys() -> None:
    assert fluid_bound(prompts(20, 300_000), HARDWARE, 8, slo_named("tight"), 0.01) == 0.0


def test_a_prefix_is_computed_once() -> None:
    first, *others = work_of(prompts(5, 1700, tuple(range(100))), HARDWARE, MEDIUM)
    assert all(one.prefill_s < 0.1 * first.prefill_s for one in others)


@pytest.mark.parametrize("name", ["multi-turn", "bursty-code"])
def test_ours_stays_below_it(name: str) -> None:
    setup = Setup(generate(name, 0, 300), "h100-70b-tp4", "2P2D", "tandem", MEDIUM)
    rate = tw_goodput(setup, 16.0, precision=0.1)
    limit = fluid_bound(setup.workload, HARDWARE, 4, MEDIUM, rate)
    assert 0.0 < rate < limit


def test_a_budget_is_all_of_the_time() -> None:
    setup = Setup(generate("multi-turn", 0, 300, 10.0), "h100-70b-tp4", "2P2D", "tandem", MEDIUM)
    spent = budget(simulate(setup), HARDWARE, MEDIUM)
    parts = (spent.prompts, spent.recomputed, spent.decodes, spent.rest_of_steps, spent.idle)
    assert sum(parts) == pytest.approx(1.0)
    assert min(parts) >= 0.0
    again = budget(simulate(replace(setup, workload=setup.workload.at_rate(5.0))), HARDWARE, MEDIUM)
    assert again.idle > spent.idle

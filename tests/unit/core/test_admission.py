"""Refusals: for capacity, for a deadline that cannot be met, and when to come back."""

from __future__ import annotations

import pytest

from tandem.core.admission import RefusalCap
from tandem.core.policy import Policy, RequestClass, Tenant
from tandem.core.types import Role, WorkerSpec
from tandem.errors import DeadlineInfeasible, Overloaded
from tests.unit.core.virtual_fleet import VirtualFleet, request, spec

SLO = {"chat": RequestClass(name="chat", ttft_slo_s=1.0, tpot_slo_s=0.05)}


def fleet(decode: int = 2, **changes: object) -> VirtualFleet:
    workers: list[WorkerSpec] = [spec(f"d{i}", Role.DECODE) for i in range(decode)]
    return VirtualFleet(workers, report_every_s=0, **changes)  # type: ignore[arg-type]


def test_without_an_slo_nothing_is_refused_for_lateness() -> None:
    f = fleet()
    for i in range(200):
        f.submit(request(f"r{i}", isl=8000, osl=5))
    f.run(until=500.0)
    assert not f.refused
    assert len(f.finished) == 200


def test_a_prompt_that_no_idle_worker_computes_in_time_is_refused_at_once() -> None:
    f = fleet(classes=SLO)
    f.submit(request("r", isl=30000))
    error = next(iter(f.refused.values()))
    assert isinstance(error, DeadlineInfeasible)
    assert error.retry_after_s == 0.0  # no wait helps
    assert "idle worker" in error.message


def test_a_full_queue_refuses_at_once_who_would_be_late_and_the_retry_after_holds() -> None:
    f = fleet(classes=SLO, policy=Policy(refusal_cap=1.0))
    for i in range(60):
        f.submit(request(f"r{i}", isl=4000, osl=5))
    refused = dict(f.refused)
    assert 20 < len(refused) < 60
    assert all(isinstance(error, DeadlineInfeasible) for error in refused.values())
    last_key, last = list(refused.items())[-1]
    f.run(until=last.retry_after_s)
    again = request(last_key.id + "-again", isl=4000, osl=5, at=f.now)
    f.submit(again)
    f.run(until=f.now + 5.0)
    assert again.key in f.finished
    assert f.first_token[again.key] - again.arrival_s <= 1.0


def test_nobody_is_refused_on_arrival_who_would_have_made_it() -> None:
    """The bound is a lower one: with the same requests in a class that never refuses, those were all late."""
    patient = {"chat": RequestClass(name="chat", ttft_slo_s=1.0, tpot_slo_s=0.05, best_effort=True)}
    strict, lenient = fleet(classes=SLO, policy=Policy(refusal_cap=1.0)), fleet(classes=patient)
    for f in (strict, lenient):
        for i in range(60):
            f.submit(request(f"r{i}", isl=4000, osl=5))
    refused = set(strict.refused)
    lenient.run(until=100.0)
    assert refused
    assert not lenient.refused
    on_time = {key for key, at in lenient.first_token.items() if at <= 1.0}
    assert not on_time & refused


def test_a_waiting_request_is_refused_when_its_deadline_is_lost() -> None:
    """Not earlier: it might still have been placed."""
    f = fleet(decode=1, classes={**SLO, "slow": RequestClass(name="slow")})
    f.submit(request("giant", isl=30000, request_class="slow"))
    f.poll()
    f.submit(request("r", isl=1000, request_class="chat"))
    f.run(until=5.0)
    assert isinstance(f.refused[request("r").key], DeadlineInfeasible)


@pytest.mark.parametrize("late_share", [1.1, 100.0])
def test_when_its_turn_comes_a_request_that_would_be_late_is_given_up(late_share: float) -> None:
    """An idle fleet could still make it, but this one is busy: computing it would only delay others."""
    f = fleet(decode=1, classes=SLO, policy=Policy(late_share=late_share, credit_s=10.0))
    f.submit(request("first", isl=10000))
    f.poll()
    f.submit(request("second", isl=6000))
    f.run(until=5.0)
    assert (request("second").key in f.refused) == (late_share < 2.0)


def test_a_late_request_of_a_best_effort_class_starts_without_another_event() -> None:
    classes = {"chat": RequestClass(name="chat", ttft_slo_s=0.5, best_effort=True)}
    f = fleet(decode=1, classes=classes)
    f.scheduler.worker_suspect("d0", True, 0.0)
    f.submit(request("r", isl=4000, osl=5))
    f.run(until=1.0)
    f.scheduler.worker_suspect("d0", False, f.now)
    f.drain()
    assert f.placed[request("r").key][0] < 1.1


def test_best_effort_runs_behind_the_rest_instead() -> None:
    classes = {
        "chat": RequestClass(name="chat", ttft_slo_s=1.0, best_effort=True),
        "other": RequestClass(name="other", rank=1),
    }
    f = fleet(decode=1, classes=classes)
    f.submit(request("hopeless", isl=30000, request_class="chat"))
    for i in range(6):
        f.submit(request(f"r{i}", isl=4000, osl=5, request_class="other"))
    f.run(until=60.0)
    assert not f.refused
    assert max(f.placed, key=lambda key: f.placed[key][0]).id == "hopeless"


def test_one_tenants_flood_closes_no_door_to_another() -> None:
    f = fleet(policy=Policy(queue_limit_tokens=40_000), tenants={"a": Tenant(name="a"), "b": Tenant(name="b")})
    for i in range(100):
        f.submit(request(f"a{i}", isl=2000, osl=100, tenant="a"))
    assert all(isinstance(error, Overloaded) for error in f.refused.values())
    flooded = len(f.refused)
    assert flooded > 50
    for i in range(5):
        f.submit(request(f"b{i}", isl=2000, osl=100, tenant="b"))
    assert len(f.refused) == flooded


def test_a_flood_of_a_lower_class_closes_no_door_to_a_higher() -> None:
    classes = {"top": RequestClass(name="top"), "batch": RequestClass(name="batch", rank=5, background=True)}
    f = fleet(policy=Policy(queue_limit_tokens=40_000), classes=classes)
    for i in range(100):
        f.submit(request(f"b{i}", request_class="batch"))
    refused = len(f.refused)
    for i in range(10):
        f.submit(request(f"t{i}", request_class="top"))
    assert refused > 50
    assert len(f.refused) == refused


@pytest.mark.parametrize("cap", [0.0, 0.3, 1.0])
def test_the_refusal_cap_protects_each_length(cap: float) -> None:
    limited = RefusalCap(cap)
    refused = {100: 0, 20000: 0}
    for _ in range(200):
        for isl in (100, 20000):
            limited.offer(isl)
            if isl == 20000 and limited.may_refuse(isl):
                limited.refused(isl)
                refused[isl] += 1
    assert refused[20000] <= 200 * cap + 8
    assert refused[20000] >= 200 * cap * 0.8
    assert limited.may_refuse(100)

"""A new policy, classes and tenants while requests wait: nobody is lost, nobody's service is forgotten."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.core.policy import Policy, RequestClass, Tenant
from tandem.core.types import Role
from tests.unit.core.virtual_fleet import VirtualFleet, request, spec

FLEET = [spec("d0", Role.DECODE)]
OLD = {"top": RequestClass(name="top"), "low": RequestClass(name="low", rank=1)}


def waiting_fleet(tenants: dict[str, Tenant] | None = None) -> VirtualFleet:
    """One request runs, twenty of each class wait."""
    fleet = VirtualFleet(FLEET, classes=OLD, tenants=tenants, report_every_s=0)
    for i in range(20):
        for name, tenant in (("top", "a"), ("low", "b")):
            fleet.submit(request(f"{name}{i}", isl=6000, osl=10, tenant=tenant, request_class=name))
    fleet.poll()
    return fleet


def placed(fleet: VirtualFleet) -> list[str]:
    return [key.id for key, _ in sorted(fleet.placed.items(), key=lambda item: item[1][0])]


def test_what_waits_takes_its_class_s_new_rank() -> None:
    fleet = waiting_fleet()
    begun = len(fleet.placed)
    new = {"top": RequestClass(name="top", rank=5), "low": RequestClass(name="low", rank=1)}
    fleet.scheduler.reconfigure(Policy(), classes=new, tenants={}, now=fleet.now)
    fleet.run(300.0)
    order = placed(fleet)[begun:]
    assert len(fleet.finished) == 40
    assert all(name.startswith("low") for name in order[:20])


def test_a_class_that_is_gone_becomes_the_first() -> None:
    fleet = waiting_fleet()
    fleet.scheduler.reconfigure(Policy(), classes={"new": RequestClass(name="new")}, tenants={}, now=fleet.now)
    depths = fleet.scheduler.snapshot(fleet.now).queue_by_class
    assert set(depths) == {"new"} and depths["new"].requests == len(fleet.scheduler.queued())
    fleet.submit(request("late", request_class="top"))
    assert next(iter(fleet.refused)).id == "late", "nobody can ask for it any more"
    fleet.run(300.0)
    assert len(fleet.finished) == 40


def test_knobs_of_admission_count_from_then_on() -> None:
    fleet = waiting_fleet()
    fleet.scheduler.reconfigure(Policy(queue_limit_tokens=1), classes=OLD, tenants={}, now=fleet.now)
    fleet.submit(request("one-more", tenant="a", request_class="top"))
    assert [error.code for error in fleet.refused.values()] == ["overloaded"]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0.0, 20.0), min_size=1, max_size=4), st.floats(0.5, 4.0))
def test_nothing_is_lost_and_nobody_s_service_forgotten(times: list[float], weight: float) -> None:
    fleet = waiting_fleet({"a": Tenant(name="a"), "b": Tenant(name="b")})

    def change() -> None:
        before = fleet.scheduler.service_counters()
        waiting = fleet.scheduler.queued()
        tenants = {"a": Tenant(name="a", weight=weight)}
        fleet.scheduler.reconfigure(Policy(credit_s=0.2), classes=OLD, tenants=tenants, now=fleet.now)
        assert fleet.scheduler.service_counters() == before
        assert fleet.scheduler.queued() == waiting
        depth = fleet.scheduler.snapshot(fleet.now)
        assert sum(d.requests for d in depth.queue_by_class.values()) == len(waiting)
        assert sum(d.requests for d in depth.queue_by_tenant.values()) == len(waiting)

    for at in times:
        fleet.at(at, change)
    fleet.run(400.0)
    assert len(fleet.finished) == 40
    snapshot = fleet.scheduler.snapshot(fleet.now)
    assert snapshot.in_flight == 0 and not any(depth.tokens for depth in snapshot.queue_by_class.values())

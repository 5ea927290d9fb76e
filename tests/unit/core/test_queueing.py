"""The order of what waits: class, fair share, deadline."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.core.policy import RequestClass, Tenant
from tandem.core.queueing import Entry, FairCounters, FairQueue
from tests.unit.core.virtual_fleet import request

TOP = RequestClass(name="top", rank=0)
LOW = RequestClass(name="low", rank=1, min_share=0.2)
IDLE = RequestClass(name="idle", rank=2, background=True, min_share=0.1)


def queue(**weights: float) -> tuple[FairQueue, FairCounters]:
    counters = FairCounters({name: Tenant(name=name, weight=weight) for name, weight in weights.items()})
    return FairQueue([TOP, LOW, IDLE], counters, share_window_s=10.0), counters


def entry(name: str, *, tenant: str = "a", klass: RequestClass = TOP, deadline: float = 1.0, order: int = 0) -> Entry:
    return Entry(request(name, tenant=tenant), {}, klass, deadline, tokens=100, prefill_s=0.1, order=order)


def drain(q: FairQueue, charge: float = 100.0) -> list[str]:
    """Pops and serves everything."""
    served = []
    while (e := q.pop(0.0)) is not None:
        q.remove(e)
        q.charge(e.request.tenant, charge)
        served.append(e.request.key.id)
    return served


def test_rank_then_deadline_then_arrival() -> None:
    q, _ = queue()
    for i, (name, klass, deadline) in enumerate(
        [("low", LOW, 0.0), ("late", TOP, 9.0), ("second", TOP, 1.0), ("first", TOP, 0.5), ("third", TOP, 1.0)]
    ):
        q.add(entry(name, klass=klass, deadline=deadline, order=i))
    assert drain(q) == ["first", "second", "third", "late", "low"]
    assert len(q) == 0


def test_background_waits_for_everyone_else() -> None:
    q, _ = queue()
    q.add(entry("b", klass=IDLE))
    q.add(entry("t"))
    first = q.pop(0.0)
    assert first is not None
    assert first.request.key.id == "t"
    assert q.pop(0.0) is None  # somebody who is not background still waits, if only for a moment
    q.restore([first])
    assert drain(q) == ["t", "b"]


def test_a_class_that_is_owed_its_share_goes_first() -> None:
    q, _ = queue()
    q.count_share("top", 1000.0, 0.0)
    for name, klass in (("t", TOP), ("l", LOW), ("i", IDLE)):
        q.add(entry(name, klass=klass))
    order = []
    for _ in range(3):
        e = q.pop(0.0)
        assert e is not None
        q.remove(e)
        q.count_share(e.request_class.name, 300.0, 0.0)
        order.append(e.request.key.id)
    assert order == ["l", "i", "t"]


def test_late_entries_run_behind_the_rest_but_before_background() -> None:
    q, _ = queue()
    late = entry("late")
    late.late = True
    q.add(late)
    q.add(entry("i", klass=IDLE))
    q.add(entry("l", klass=LOW))
    assert drain(q) == ["l", "late", "i"]
    q.add(entry("x"))
    popped = q.pop(0.0)
    assert popped is not None
    q.demote(popped)
    q.restore([popped])
    q.add(entry("l2", klass=LOW))
    assert drain(q) == ["l2", "x"]


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 500)), min_size=20, max_size=200),
    st.sampled_from([(1.0, 1.0, 1.0), (1.0, 2.0, 4.0)]),
)
def test_backlogged_tenants_stay_within_the_fairness_bound(
    drawn: list[tuple[str, int]], weights: tuple[float, float, float]
) -> None:
    """While two tenants wait, their weighted service since both began to differs by at most the largest request."""
    q, counters = queue(**dict(zip("abc", weights, strict=True)))
    sizes = {}
    for i, (tenant, size) in enumerate(drawn):
        q.add(entry(f"r{i}", tenant=tenant, order=i))
        sizes[f"r{i}"] = float(size)
    served = dict.fromkeys("abc", 0.0)
    while (e := q.pop(0.0)) is not None:
        waiting = {*q.waiting_tenants()}
        shares = [served[t] / counters.weight(t) for t in waiting]
        bound = max(sizes.values()) / min(weights)
        assert max(shares) - min(shares) <= bound + 1e-6
        q.remove(e)
        served[e.request.tenant] += sizes[e.request.key.id]
        q.charge(e.request.tenant, sizes[e.request.key.id])


def test_idleness_saves_up_nothing() -> None:
    q, counters = queue()
    for i in range(50):
        q.add(entry(f"a{i}", order=i))
    for _ in range(25):
        e = q.pop(0.0)
        assert e is not None
        q.remove(e)
        q.charge("a", 100.0)
    for i in range(50):
        q.add(entry(f"b{i}", tenant="b", order=100 + i))
    assert counters.value("b") == 2500.0
    assert abs(sum(name.startswith("a") for name in drain(q)[:20]) - 10) <= 1


def test_a_refund_moves_a_tenant_forward() -> None:
    q, _ = queue()
    for i in range(3):
        q.add(entry(f"a{i}", order=i))
        q.add(entry(f"b{i}", tenant="b", order=i))
    q.charge("a", 500.0)
    q.charge("b", 300.0)
    q.charge("a", -450.0)
    assert drain(q)[:3] == ["a0", "a1", "a2"]


def test_what_is_passed_over_keeps_its_place() -> None:
    q, _ = queue()
    for i in range(6):
        q.add(entry(f"a{i}", deadline=float(i), order=i))
    passed = [q.pop(0.0), q.pop(0.0)]
    q.restore([e for e in passed if e])
    assert drain(q) == [f"a{i}" for i in range(6)]


def test_setting_a_tenant_aside_lets_others_be_looked_at() -> None:
    q, _ = queue()
    for i in range(5):
        q.add(entry(f"a{i}", order=i))
    q.add(entry("b0", tenant="b"))
    first = q.pop(0.0)
    assert first is not None
    q.set_aside(first)
    second = q.pop(0.0)
    assert second is not None
    assert second.request.key.id == "b0"
    assert q.pop(0.0) is None
    q.restore([first, second])
    assert sorted(drain(q)) == ["a0", "a1", "a2", "a3", "a4", "b0"]


operations = st.lists(st.tuples(st.integers(0, 6), st.sampled_from("abcd"), st.integers(0, 2)), max_size=120)


@settings(deadline=None)
@given(operations)
def test_nothing_is_lost_or_given_twice_whatever_is_done_to_it(drawn: list[tuple[int, str, int]]) -> None:
    q, _ = queue()
    waiting: dict[str, Entry] = {}
    for i, (what, tenant, rank) in enumerate(drawn):
        if what <= 2:
            e = entry(f"r{i}", tenant=tenant, klass=(TOP, LOW, IDLE)[rank], deadline=float(i % 5), order=i)
            waiting[e.request.key.id] = e
            q.add(e)
        elif what == 3 and waiting:
            e = waiting.pop(sorted(waiting)[i % len(waiting)])
            q.remove(e)
        elif what == 4:
            popped = q.pop(0.0)
            if popped is not None and rank == 0:
                q.park(popped)
                q.restore([])
            elif popped is not None:
                q.set_aside(popped)
                q.restore([popped])
        elif what == 5:
            q.unpark()
        else:
            q.charge(tenant, (rank - 1) * 50.0)
        assert len(q) == len(waiting)
        assert sum(d.requests for d in q.depth_by_tenant().values()) == len(waiting)
        assert sum(d.tokens for d in q.depth_by_class().values()) == 100 * len(waiting)
    q.unpark()
    assert sorted(drain(q)) == sorted(waiting)
    assert not q.depth_by_tenant()


def test_counters_survive_a_change_of_leader() -> None:
    old = FairCounters({"a": Tenant(name="a", weight=2.0)})
    old.charge("a", 100.0)
    old.charge("b", 70.0)
    new = FairCounters({"a": Tenant(name="a", weight=2.0)})
    new.charge("b", 200.0)
    new.load(old.dump())
    assert (new.value("a"), new.value("b")) == (50.0, 200.0)

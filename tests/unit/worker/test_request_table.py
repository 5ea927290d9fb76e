"""Delivery is effectively once: repeats, old attempts and cancelled requests do not run."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tandem.core.types import RequestKey
from tandem.v1 import bus_pb2
from tandem.worker.request_table import RequestTable, Running


def running(request_id: str, attempt: int = 0, choice: int = 0, frontend: str = "f") -> Running:
    submit = bus_pb2.Submit(frontend=frontend, rid=attempt + 1)
    key = RequestKey(request_id, attempt, choice)
    return Running(key, submit.frontend, submit.rid, submit, bus_pb2.LEG_LOCAL, 0.0, "engine-1")


def table() -> RequestTable:
    return RequestTable(retention_s=30.0, fence_s=60.0)


def test_a_repeated_request_runs_once() -> None:
    t = table()
    assert t.admit(running("a"))
    assert not t.admit(running("a"))
    assert t.running == 1


def test_an_older_attempt_is_dropped_but_other_choices_are_not() -> None:
    t = table()
    assert t.admit(running("a", attempt=2))
    assert not t.admit(running("a", attempt=1))
    assert t.admit(running("a", attempt=1, choice=1))


def test_an_abort_that_overtakes_its_request_holds() -> None:
    t = table()
    assert t.fence("a", 1, None, now=0.0) == []
    assert not t.admit(running("a", attempt=0))
    assert not t.admit(running("a", attempt=1, choice=3))
    assert t.admit(running("a", attempt=2))


def test_an_abort_of_one_choice_leaves_the_others() -> None:
    t = table()
    first, second = running("a", choice=0), running("a", choice=1)
    assert t.admit(first)
    assert t.admit(second)
    assert t.fence("a", 0, 1, now=0.0) == [second]


def test_finished_requests_are_kept_for_repair_then_forgotten() -> None:
    t = table()
    r = running("a")
    t.admit(r)
    t.finished(r, bus_pb2.Finish(rid=1), now=10.0)
    t.sweep(39.9)
    assert t.get(r.key) is r
    assert t.fence("a", 0, None, now=39.9) == []
    t.sweep(40.0)
    assert t.get(r.key) is None
    assert len(t) == 0


def test_fences_are_forgotten() -> None:
    t = table()
    t.fence("a", 0, None, now=0.0)
    t.fence("a", 3, None, now=30.0)
    t.sweep(60.0)
    assert t.is_fenced(RequestKey("a", 3))
    t.sweep(90.0)
    assert not t.is_fenced(RequestKey("a", 0))


def test_requests_of_a_frontend_that_is_gone() -> None:
    t = table()
    mine, other, done = running("a"), running("b", frontend="g"), running("c")
    for r in (mine, other, done):
        t.admit(r)
    t.finished(done, bus_pb2.Finish(), now=0.0)
    assert t.of_frontend("f") == [mine]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["admit", "fence", "finish"]),
            st.sampled_from("ab"),
            st.integers(0, 3),
            st.sampled_from([0, 1]),
        ),
        max_size=40,
    )
)
def test_whatever_happens_the_newest_admitted_attempt_was_never_fenced(steps: list[tuple[str, str, int, int]]) -> None:
    t = table()
    fenced: dict[str, int] = {}
    live: dict[RequestKey, Running] = {}
    for kind, name, attempt, choice in steps:
        r = running(name, attempt, choice)
        if kind == "admit":
            newer = any(k.id == name and k.choice == choice and k.attempt >= attempt for k in live)
            expected = attempt > fenced.get(name, -1) and not newer
            assert t.admit(r) == expected
            if expected:
                live[r.key] = r
        elif kind == "fence":
            fenced[name] = max(fenced.get(name, -1), attempt)
            hit = t.fence(name, attempt, None, now=0.0)
            unfinished = [x for k, x in live.items() if k.id == name and k.attempt <= fenced[name] and x.finish is None]
            assert {x.key for x in hit} == {x.key for x in unfinished}
        elif r.key in live and live[r.key].finish is None:
            t.finished(live[r.key], bus_pb2.Finish(), now=0.0)
    assert t.running == sum(1 for x in live.values() if x.finish is None)

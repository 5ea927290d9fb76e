"""The producer's book of handoffs: who may claim, who frees what, and what time takes care of."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import pytest

from tandem.core.types import RequestKey, StepTiming
from tandem.engine.protocol import EngineInfo, EngineRequest, EngineStats, KvEvent, Sink
from tandem.v1 import bus_pb2, types_pb2
from tandem.worker.handoffs import OpenHandoff, OpenHandoffs

LEASE_S = 10.0


class Leases:
    """An engine of which only the handoffs are there."""

    dead = asyncio.Event()

    def __init__(self) -> None:
        self.left_s: dict[str, float] = {}
        self.released: list[tuple[str, bool]] = []

    @property
    def info(self) -> EngineInfo:
        raise NotImplementedError

    def claim_handoff(self, handoff_id: str, engine_id: str) -> float | None:
        return self.left_s.get(handoff_id) if engine_id == "e" else None

    def release_handoff(self, handoff_id: str, *, pulled: bool) -> None:
        self.released.append((handoff_id, pulled))

    async def start(self, on_kv_events: Callable[[Sequence[KvEvent]], None]) -> None: ...

    def submit(self, request: EngineRequest, sink: Sink) -> None:
        raise NotImplementedError

    def abort(self, request_id: str) -> None: ...

    def stats(self) -> EngineStats:
        return EngineStats()

    def take_step_timings(self) -> list[StepTiming]:
        return []

    async def reset_prefix_cache(self) -> None: ...

    async def stop(self) -> None: ...


class Book:
    def __init__(self) -> None:
        self.engine = Leases()
        self.open = OpenHandoffs(self.engine, lease_s=LEASE_S)

    def add(
        self, handoff: str, *, id: str = "r", attempt: int = 0, choice: int = 0, decode: str = "d", at: float = 0.0
    ) -> None:
        self.engine.left_s[handoff] = LEASE_S
        assignment = bus_pb2.Assignment(decode=types_pb2.WorkerRef(id=decode, incarnation=1))
        message = bus_pb2.Handoff(assignment=assignment, kv=bus_pb2.KvHandoff(handoff_id=handoff, engine_id="e"))
        self.open.opened(OpenHandoff(RequestKey(id, attempt, choice), message, at))


@pytest.fixture
def book() -> Book:
    return Book()


def test_only_the_worker_it_was_made_for_may_claim_it(book: Book) -> None:
    book.add("h")
    assert book.open.claim("h", "e", "other") is None
    assert book.open.claim("h", "an older engine", "d") is None
    assert book.open.claim("unknown", "e", "d") is None
    assert [handoff for handoff, _ in book.open.unclaimed()] == ["h"]
    assert book.open.claim("h", "e", "d") == LEASE_S
    assert book.open.claim("h", "e", "d") == LEASE_S, "it may ask again whether we live"
    assert book.open.unclaimed() == []


def test_a_release_frees_once(book: Book) -> None:
    book.add("h")
    book.open.release("h", pulled=True)
    book.open.release("h", pulled=False)
    assert book.engine.released == [("h", True)]
    assert len(book.open) == 0
    assert book.open.claim("h", "e", "d") is None


def test_a_cancel_frees_what_nobody_has_claimed(book: Book) -> None:
    book.add("claimed")
    book.add("older")
    book.add("newer", attempt=2)
    book.add("another choice", choice=1)
    book.add("another request", id="s")
    book.open.claim("claimed", "e", "d")
    book.open.cancel("r", 1, 0)
    assert book.engine.released == [("older", False)]
    book.open.cancel("r", 1, None)
    assert book.engine.released[1:] == [("another choice", False)]


@pytest.mark.parametrize(("gone", "freed"), [(True, ["claimed", "free"]), (False, ["free"])])
def test_who_is_dead_reads_no_more_who_is_silent_may(book: Book, gone: bool, freed: list[str]) -> None:
    book.add("claimed")
    book.add("free")
    book.add("another's", decode="d2")
    book.open.claim("claimed", "e", "d")
    book.open.peer_lost("d", 99, gone=gone)
    assert book.engine.released == [], "that was another incarnation"
    book.open.peer_lost("d", 1, gone=gone)
    assert [handoff for handoff, _ in book.engine.released] == freed


def test_time_ends_what_nobody_ended(book: Book) -> None:
    book.add("old", at=0.0)
    book.add("new", at=15.0, decode="d2")
    book.open.sweep(19.0)
    assert book.engine.released == []
    assert book.open.recent_peers() == ["d", "d2"]
    book.open.sweep(2 * LEASE_S + 0.1)
    assert book.engine.released == [("old", False)]
    assert book.open.recent_peers() == ["d2"], "whom a late read may concern"

"""KV handoffs that go wrong: the tokens are right all the same, and nothing is left behind."""

from __future__ import annotations

import asyncio
import time

import pytest

from tandem.adapters.bus import Message
from tandem.core.types import Role, WorkerAddress
from tandem.v1 import bus_pb2, types_pb2
from tandem.wire import subjects
from tests.integration.worker.hung import HungProducer
from tests.integration.worker.site import BLOCK, CLUSTER, MODEL, Site, until, words

PROMPT = tuple(range(100, 175))
BLOCKS = -(-len(PROMPT) // BLOCK)
#: Transfer of this prompt takes about 2 s.
SLOW_LINK = BLOCKS * BLOCK * 131072 / 2.0


@pytest.mark.parametrize(("grants", "what"), [(0, "its claim is not answered"), (1, "its pull never comes")])
async def test_a_hung_producer_costs_the_hop_timeout_not_the_request(site: Site, grants: int, what: str) -> None:
    d = await site.worker("d")
    async with HungProducer(grants).serving() as hung:
        assignment = site.assign("nobody", 1, PROMPT, 8, decode=d)
        began = time.monotonic()
        site.send("d", hung.handoff(assignment, BLOCKS))
        heard = await site.frontend.end(1)
        took = time.monotonic() - began
    assert heard.output == words(PROMPT, 8), what
    assert hung.pulls == grants
    assert 1.5 < took < 6.0
    await site.nothing_left(d)


@pytest.mark.parametrize("waited_s", [2.3, 3.2], ids=["in the lease's last third", "after its end"])
async def test_a_handoff_past_its_lease_is_recomputed_not_read(site: Site, waited_s: float) -> None:
    p = await site.worker("p", Role.PREFILL, lease_s=3.0)
    late: list[Message] = []
    void = await site.bus.subscribe(subjects.work(CLUSTER, "d"), late.append)
    site.assign("p", 1, PROMPT, 8, decode=WorkerAddress("d", 1))
    await until(lambda: late, "a handoff")
    await asyncio.sleep(waited_s)
    await void.unsubscribe()
    d = await site.worker("d", lease_s=3.0)
    site.bus.publish(late[0].subject, late[0].data)
    heard = await site.frontend.end(1)
    assert heard.output == words(PROMPT, 8)
    assert heard.finish.timings.kv_transfer_bytes == 0
    assert p.engine.stats().reads_after_expiry == 0
    await site.nothing_left(p, d)


async def test_a_pull_that_outlives_the_lease_counts_as_failed(site: Site) -> None:
    p = await site.worker("p", Role.PREFILL, lease_s=3.0)
    d = await site.worker("d", lease_s=3.0, link_bytes_per_s=SLOW_LINK / 3)  # about 6 s
    site.assign("p", 1, PROMPT, 8, decode=d)
    assert (await site.frontend.end(1)).output == words(PROMPT, 8)
    assert p.engine.stats().reads_after_expiry == 0
    await site.nothing_left(p, d)


async def test_a_slow_pull_from_a_live_producer_is_waited_for(site: Site) -> None:
    p = await site.worker("p", Role.PREFILL)
    d = await site.worker("d", link_bytes_per_s=SLOW_LINK / 2)  # about 4 s: longer than the hop timeout
    site.assign("p", 1, PROMPT, 8, decode=d)
    heard = await site.frontend.end(1)
    assert heard.output == words(PROMPT, 8)
    assert heard.finish.timings.kv_transfer_bytes > 0
    await site.nothing_left(p, d)


async def test_a_pull_that_came_is_kept_by_a_busy_engine(site: Site) -> None:
    """The first token may be long in coming: that is no reason to compute the prompt again."""
    p = await site.worker("p", Role.PREFILL)
    d = await site.worker("d", step_s=3.0)
    site.assign("p", 1, PROMPT, 2, decode=d)
    heard = await site.frontend.end(1)
    assert heard.output == words(PROMPT, 2)
    assert heard.finish.timings.kv_transfer_bytes > 0
    await site.nothing_left(p, d)


async def test_a_claim_by_the_wrong_worker_is_refused(site: Site) -> None:
    p, other = await site.worker("p", Role.PREFILL), await site.worker("other")
    sent: list[Message] = []
    await site.bus.subscribe(subjects.work(CLUSTER, "d"), sent.append)
    site.assign("p", 1, PROMPT, 8, decode=WorkerAddress("d", 1))
    await until(lambda: sent, "a handoff")
    site.bus.publish(subjects.work(CLUSTER, "other"), sent[0].data)
    heard = await site.frontend.end(1)
    assert heard.output == words(PROMPT, 8)
    assert heard.finish.timings.kv_transfer_bytes == 0, "computed, not read"
    site.abort("r1")
    await site.nothing_left(p, other)


async def test_a_dead_producer_is_not_waited_for(site: Site) -> None:
    p = await site.worker("p", Role.PREFILL)
    d = await site.worker("d", link_bytes_per_s=SLOW_LINK)
    site.assign("p", 1, PROMPT, 8, decode=d)
    await until(lambda: d.engine.stats().waiting_requests, "pulling")
    await p.engine.stop()
    assert (await site.frontend.end(1)).output == words(PROMPT, 8)
    await site.nothing_left(d)


async def test_tainted_kv_fails_its_streams_and_spares_the_others(site: Site) -> None:
    p, d = await site.worker("p", Role.PREFILL), await site.worker("d", step_s=0.02)
    site.assign("p", 1, PROMPT, 100, decode=d)
    site.assign("d", 2, PROMPT[::-1], 30)
    await site.frontend.tokens_of(1, 1)
    await site.frontend.tokens_of(2, 1)
    taint = bus_pb2.Taint(prefill=types_pb2.WorkerRef(id="p"))
    site.send("d", bus_pb2.WorkerMessage(taint=taint))
    assert (await site.frontend.end(1)).finish.error.code == "handoff_failed"
    assert (await site.frontend.end(2)).output == words(PROMPT[::-1], 30)
    await site.nothing_left(p, d)
    site.assign("d", 3, PROMPT, 3)
    assert (await site.frontend.end(3)).finish.cached_tokens == 0, "the cache was dropped"


async def test_taint_before_the_claim_is_answered(site: Site) -> None:
    d = await site.worker("d")
    async with HungProducer(0).serving() as hung:
        site.send("d", hung.handoff(site.assign("nobody", 1, PROMPT, 8, decode=d), BLOCKS))
        await until(lambda: site.frontend.heard[1].placed, "placed")
        site.send("d", bus_pb2.WorkerMessage(taint=bus_pb2.Taint(prefill=types_pb2.WorkerRef(id="hung"))))
        assert (await site.frontend.end(1)).finish.error.code == "handoff_failed"
        await asyncio.sleep(2.5)  # past the hop timeout
    assert len(site.frontend.heard[1].finishes) == 1
    assert not site.frontend.heard[1].tokens
    await site.nothing_left(d)


@pytest.mark.parametrize("gone", [True, False])
async def test_a_lost_decode_worker_s_handoffs(site: Site, gone: bool) -> None:
    """What it has not claimed is freed; what it has claimed only when its process is surely dead."""
    p = await site.worker("p", Role.PREFILL)
    await site.bus.subscribe(subjects.work(CLUSTER, "d"), lambda message: None)
    for rid in (1, 2):
        site.assign("p", rid, PROMPT[:-rid], 8, decode=WorkerAddress("d", 5))
    await until(lambda: len(p.handoffs) == 2, "handoffs")
    (claimed, entry), _ = p.handoffs.unclaimed()
    assert p.handoffs.claim(claimed, entry.message.kv.engine_id, "d")
    for incarnation in (4, 5):
        lost = bus_pb2.WorkerLost(model=MODEL, worker="d", incarnation=incarnation, gone=gone)
        site.bus.publish(subjects.lost(CLUSTER, MODEL), lost.SerializeToString())
        await site.bus.flush(timeout_s=1.0)
        assert len(p.handoffs) == (2 if incarnation == 4 else 0 if gone else 1)

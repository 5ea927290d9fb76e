"""A request that is cancelled stops wherever it is, within a second, and leaves nothing behind."""

from __future__ import annotations

from tandem.adapters.bus import Message
from tandem.core.types import Role, WorkerAddress
from tandem.v1 import bus_pb2
from tandem.wire import subjects
from tests.integration.worker.hung import HungProducer
from tests.integration.worker.site import BLOCK, CLUSTER, Site, until, words

PROMPT = tuple(range(100, 175))
LONG_PROMPT = tuple(range(100, 1800))
#: The bound asked for; a busy machine gets some more.
SECOND = 3.0


async def test_in_the_engine_s_queue(site: Site) -> None:
    d = await site.worker("d", step_s=0.05, max_num_seqs=1, max_batched_tokens=64)
    site.assign("d", 1, PROMPT, 500)
    site.assign("d", 2, PROMPT, 500)
    await until(lambda: d.engine.stats().waiting_requests == 1, "one waits")
    site.abort("r2")
    assert (await site.frontend.end(2)).finish.reason == 3
    assert d.table.running == 1
    site.abort("r1")
    await site.nothing_left(d, timeout_s=SECOND)


async def test_in_a_local_prefill(site: Site) -> None:
    d = await site.worker("d", step_s=0.05, max_batched_tokens=256)
    site.assign("d", 1, LONG_PROMPT, 5)
    await until(lambda: 0 < d.engine.stats().pending_prefill_tokens < len(LONG_PROMPT), "prefilling")
    site.abort("r1")
    await site.nothing_left(d, timeout_s=SECOND)
    await site.told("r1", ["accepted", "aborted"])


async def test_in_a_remote_prefill(site: Site) -> None:
    p = await site.worker("p", Role.PREFILL, step_s=0.05, max_batched_tokens=256)
    d = await site.worker("d")
    site.assign("p", 1, LONG_PROMPT, 5, decode=d)
    await until(lambda: 0 < p.engine.stats().pending_prefill_tokens < len(LONG_PROMPT), "prefilling")
    site.abort("r1")
    await site.nothing_left(p, d, timeout_s=SECOND)
    await site.told("r1", ["accepted", "aborted"])


async def test_while_the_handoff_is_under_way(site: Site) -> None:
    p = await site.worker("p", Role.PREFILL)
    under_way: list[Message] = []
    road = await site.bus.subscribe(subjects.work(CLUSTER, "d"), under_way.append)
    site.assign("p", 1, PROMPT, 5, decode=WorkerAddress("d", 1))
    await until(lambda: under_way, "a handoff")
    await road.unsubscribe()
    d = await site.worker("d")
    site.abort("r1")
    await site.bus.flush(timeout_s=1.0)
    site.bus.publish(under_way[0].subject, under_way[0].data)  # the abort has overtaken it
    await site.nothing_left(p, d, timeout_s=SECOND)
    assert not site.frontend.heard[1].tokens
    assert ("d", bus_pb2.LEG_PREFILL) not in site.frontend.heard[1].placed


async def test_while_the_claim_is_not_answered(site: Site) -> None:
    d = await site.worker("d")
    async with HungProducer(0).serving() as hung:
        site.send("d", hung.handoff(site.assign("nobody", 1, PROMPT, 8, decode=d), -(-len(PROMPT) // BLOCK)))
        await until(lambda: site.frontend.heard[1].placed, "placed")
        site.abort("r1")
        await site.nothing_left(d, timeout_s=1.5)  # the claim itself waits for 2 s
        assert site.frontend.heard[1].finish.reason == 3


async def test_while_it_is_pulled(site: Site) -> None:
    p = await site.worker("p", Role.PREFILL)
    d = await site.worker("d", link_bytes_per_s=1e6)  # for minutes
    site.assign("p", 1, PROMPT, 5, decode=d)
    await until(lambda: d.engine.stats().waiting_requests, "pulling")
    site.abort("r1")
    await site.nothing_left(p, d, timeout_s=SECOND)
    await site.told_last("aborted", "r1")


async def test_while_it_decodes(site: Site) -> None:
    p, d = await site.worker("p", Role.PREFILL), await site.worker("d", step_s=0.01)
    site.assign("p", 1, PROMPT, 1500, decode=d)
    site.assign("d", 2, PROMPT, 30)
    await site.frontend.tokens_of(1, 3)
    site.abort("r1")
    assert (await site.frontend.end(2)).output == words(PROMPT, 30)
    await site.nothing_left(p, d, timeout_s=SECOND)
    assert len(site.frontend.heard[1].tokens) < 1500


async def test_an_abort_that_overtakes_its_request(site: Site) -> None:
    d = await site.worker("d")
    site.abort("r1", 0)
    site.assign("d", 1, PROMPT, 5)
    site.assign("d", 2, PROMPT, 5, id="r1", attempt=1)
    assert (await site.frontend.end(2)).output == words(PROMPT, 5)
    assert not site.frontend.heard[1].placed
    await site.nothing_left(d)


async def test_a_frontend_that_is_gone(site: Site) -> None:
    """Frames that nobody takes come back, and end what they were of."""
    p, d = await site.worker("p", Role.PREFILL), await site.worker("d", step_s=0.01)
    site.assign("p", 1, PROMPT, 1500, decode=d)
    site.assign("d", 2, PROMPT, 1500)
    await site.frontend.tokens_of(1, 3)
    await site.frontend.bus.close()
    await site.nothing_left(p, d, timeout_s=SECOND)
    await site.told_last("aborted", "r1", "r2")


async def test_ten_cancelled_long_prompts_delay_nobody(site: Site) -> None:
    d = await site.worker("d", step_s=0.05, max_batched_tokens=256)
    for rid in range(1, 11):
        site.assign("d", rid, LONG_PROMPT[rid:], 5)
    await until(lambda: d.table.running == 10, "all there")
    for rid in range(1, 11):
        site.abort(f"r{rid}")
    site.assign("d", 11, PROMPT, 3)
    heard = await site.frontend.end(11, timeout_s=SECOND)
    assert heard.output == words(PROMPT, 3)
    await site.nothing_left(d, timeout_s=SECOND)

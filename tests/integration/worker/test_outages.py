"""The bus and the store go away under a worker and come back."""

from __future__ import annotations

import asyncio

from tandem.core.types import Role, WorkerAddress
from tandem.v1 import bus_pb2, types_pb2
from tandem.wire import subjects
from tandem.worker.reporter import OTHERS_BACK_S
from tests.integration.worker.site import CLUSTER, MODEL, Site, until, words

PROMPT = tuple(range(100, 175))


async def test_after_an_outage_of_the_bus_what_was_said_is_said_again(site: Site) -> None:
    """Whoever was back later than we were has missed it."""
    p, d = await site.worker("p", Role.PREFILL), await site.worker("d", step_s=0.05)
    site.assign("d", 1, PROMPT, 3)
    site.assign("d", 2, PROMPT, 1500)
    await site.bus.subscribe(subjects.work(CLUSTER, "deaf"), lambda message: None)
    site.assign("p", 3, PROMPT, 5, decode=WorkerAddress("deaf", 1))
    await site.frontend.end(1)
    await until(lambda: len(p.handoffs) == 1, "a handoff that nobody claims")
    handed: list[bus_pb2.WorkerMessage] = []
    await site.bus.subscribe(
        subjects.work(CLUSTER, "deaf"), lambda message: handed.append(bus_pb2.WorkerMessage.FromString(message.data))
    )
    site.hub.stop()
    await asyncio.sleep(0.2)
    site.hub.start()
    await asyncio.sleep(0.2)
    site.events.clear()
    wanted = {("r1", "finished"), ("r2", "decoding"), ("r3", "prefill_done")}

    def told() -> set[tuple[str, str]]:
        return {(e.key.id, bus_pb2.Phase.Name(e.phase)[6:].lower()) for e in site.events}

    await until(lambda: told() >= wanted and handed, "told again", OTHERS_BACK_S + 10.0)
    assert handed[0].handoff.assignment.decode.id == "deaf"
    heard = site.frontend.heard[2]
    assert heard.output == words(PROMPT, len(heard.output)), "the stream went on through it"
    assert heard.repeats == 0
    site.abort("r2")
    site.abort("r3")
    await site.nothing_left(p, d)


async def test_a_router_that_has_heard_nothing_for_long_is_told_what_is_known(site: Site) -> None:
    d = await site.worker("d", step_s=0.05)
    site.assign("d", 1, PROMPT, 3)
    site.assign("d", 2, PROMPT, 1500)
    await site.frontend.end(1)
    await site.frontend.tokens_of(2, 1)
    site.events.clear()
    keys = [types_pb2.RequestKey(id=f"r{n}") for n in (1, 2, 3)]
    site.send("d", bus_pb2.WorkerMessage(tell_again=bus_pb2.TellAgain(keys=keys)))
    wanted = [("r1", "finished"), ("r2", "decoding"), ("r3", "unknown")]
    await until(lambda: len(site.events) >= 3, "answered")
    assert [(e.key.id, bus_pb2.Phase.Name(e.phase)[6:].lower()) for e in site.events] == wanted
    site.abort("r2")
    await site.nothing_left(d)


async def test_frames_of_an_outage_are_kept_or_can_be_asked_for(site: Site) -> None:
    d = await site.worker("d", step_s=0.01)
    site.assign("d", 1, PROMPT, 60)
    await site.frontend.tokens_of(1, 5)
    site.hub.stop()
    await asyncio.sleep(0.3)
    site.hub.start()
    heard = await site.frontend.end(1)
    assert heard.output == words(PROMPT, 60)
    await site.nothing_left(d)


async def test_a_store_that_is_away_or_empty_stops_no_stream(site: Site) -> None:
    d = await site.worker("d", step_s=0.01)
    site.assign("d", 1, PROMPT, 100)
    await site.frontend.tokens_of(1, 5)
    site.store.available = False
    await asyncio.sleep(0.2)
    site.store.wipe()
    site.store.available = True
    assert (await site.frontend.end(1)).output == words(PROMPT, 100)
    await until(lambda: site.store.entry("d"), "registered again", 15.0)
    await until(lambda: site.store.index(MODEL).blocks.get(d.announcer.spec.slot), "announced again", 15.0)
    await site.nothing_left(d)

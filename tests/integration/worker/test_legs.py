"""Requests that nothing goes wrong with, and messages that come twice, late, or from the wrong sender."""

from __future__ import annotations

import asyncio

from tandem.adapters.bus import Message
from tandem.core.types import Role, WorkerAddress
from tandem.v1 import bus_pb2
from tandem.wire import subjects
from tests.integration.worker.site import CLUSTER, Site, until, words

PROMPT = tuple(range(100, 175))  # four full blocks and a bit
OTHER = tuple(range(300, 420))


async def test_a_local_leg_says_what_the_prompt_calls_for(site: Site) -> None:
    d = await site.worker("d")
    site.assign("d", 1, PROMPT, 12)
    heard = await site.frontend.end(1)
    assert heard.output == words(PROMPT, 12)
    assert heard.repeats == 0
    assert heard.placed == [("d", bus_pb2.LEG_LOCAL)]
    assert heard.finish.output_tokens == 12
    await site.nothing_left(d)
    await site.told("r1", ["accepted", "decoding", "finished"])


async def test_no_load_report_overtakes_an_end(site: Site) -> None:
    """One that shows nothing at work, while the end of a request has yet to be told, has the router write it off."""
    d = await site.worker("d")
    overtaken: list[set[str]] = []

    def on_load(message: Message) -> None:
        report = bus_pb2.LoadReport.FromString(message.data)
        known = {event.key.id for event in site.events}
        running = {name for name in known if site.phases(name)[-1] != "finished"}
        if running and not report.running_requests + report.waiting_requests:
            overtaken.append(running)

    await site.bus.subscribe(subjects.all_loads(CLUSTER), on_load)
    for rid in range(1, 31):
        site.assign("d", rid, PROMPT, 15)
        await site.frontend.end(rid)
    await site.told_last("finished", "r30")
    assert not overtaken
    await site.nothing_left(d)


async def test_a_remote_leg_is_token_identical_and_frees_everything(site: Site) -> None:
    p, d = await site.worker("p", Role.PREFILL), await site.worker("d")
    for rid in (1, 2, 3):
        site.assign("p", rid, OTHER[: 50 + 20 * rid], 10, decode=d)
    for rid in (1, 2, 3):
        heard = await site.frontend.end(rid)
        assert heard.output == words(OTHER[: 50 + 20 * rid], 10)
        assert heard.placed == [("p", bus_pb2.LEG_PREFILL), ("d", bus_pb2.LEG_PREFILL)]
        assert heard.finish.timings.prefill_worker == "p"
        assert heard.finish.timings.decode_worker == "d"
        assert heard.finish.timings.kv_transfer_bytes > 0
    await site.nothing_left(p, d)
    await site.told("r1", ["accepted", "prefill_done", "accepted", "decoding", "finished"])


async def test_a_repeated_assignment_runs_once(site: Site) -> None:
    d = await site.worker("d")
    site.assign("d", 1, PROMPT, 5)
    site.assign("d", 1, PROMPT, 5)
    await site.frontend.end(1)
    site.assign("d", 1, PROMPT, 5)
    site.assign("d", 2, PROMPT, 5)
    await site.frontend.end(2)
    heard = site.frontend.heard[1]
    assert (heard.repeats, len(heard.finishes), len(heard.placed)) == (0, 1, 1)
    await site.nothing_left(d)


async def test_a_cancelled_assignment_that_comes_late_is_told_as_aborted(site: Site) -> None:
    d = await site.worker("d")
    d.execution.abort("r1", 0)
    site.assign("d", 1, PROMPT, 5)
    await site.told_last("aborted", "r1")
    await site.nothing_left(d)


async def test_a_repeated_handoff_runs_once(site: Site) -> None:
    p, d = await site.worker("p", Role.PREFILL), await site.worker("d", step_s=0.02)
    site.assign("p", 1, PROMPT, 8, decode=d)
    await until(lambda: "prefill_done" in site.phases("r1"), "prefill done")
    for handoff in [entry.message for _, entry in p.handoffs.unclaimed()] * 2:
        site.send("d", bus_pb2.WorkerMessage(handoff=handoff))
    heard = await site.frontend.end(1)
    assert heard.output == words(PROMPT, 8)
    assert (heard.repeats, len(heard.finishes)) == (0, 1)
    await site.nothing_left(p, d)


async def test_an_older_epoch_is_refused(site: Site) -> None:
    d = await site.worker("d")
    site.assign("d", 1, PROMPT, 3, epoch=7)
    site.assign("d", 2, PROMPT, 3, epoch=6)
    await site.frontend.end(1)
    heard = await site.frontend.end(2)
    assert [error.code for error in heard.rejects] == ["stale_epoch"]
    assert d.reporter.report().epoch == 7
    await site.told_last("failed", "r2")


async def test_a_draining_worker_refuses_new_work_ends_its_own_and_leaves(site: Site) -> None:
    d = await site.worker("d", step_s=0.01)
    site.assign("d", 1, PROMPT, 40)
    await site.frontend.tokens_of(1, 1)
    d.leave()
    await until(lambda: d.announcer.spec.draining, "draining")
    site.assign("d", 2, PROMPT, 3)
    assert [error.code for error in (await site.frontend.end(2)).rejects] == ["refused"]
    assert d.reporter.report().draining
    assert (await site.frontend.end(1)).output == words(PROMPT, 40)
    await until(site.serving["d"].done, "left")
    site.serving["d"].result()
    assert site.store.entry("d") is None


async def test_a_draining_prefill_worker_waits_for_kv_that_is_still_to_be_pulled(site: Site) -> None:
    p, d = await site.worker("p", Role.PREFILL), await site.worker("d", link_bytes_per_s=50e6)  # ~0.2 s for this prompt
    site.assign("p", 1, PROMPT, 5, decode=d)
    await until(lambda: "prefill_done" in site.phases("r1"), "prefill done")
    p.leave()
    heard = await site.frontend.end(1)
    assert heard.output == words(PROMPT, 5)
    assert heard.finish.timings.kv_transfer_bytes > 0, "it was pulled, not computed again"
    await until(site.serving["p"].done, "left")


async def test_a_gap_is_repaired_while_it_runs_and_after_its_end(site: Site) -> None:
    d = await site.worker("d", step_s=0.01)
    heard = site.frontend.heard[1]
    site.assign("d", 1, PROMPT, 60)
    await site.frontend.tokens_of(1, 3)
    site.frontend.deaf = True
    await asyncio.sleep(0.1)
    site.frontend.deaf = False
    gap = len(heard.tokens)
    await site.frontend.tokens_of(1, gap + 1)
    assert gap not in heard.tokens, "frames were lost"
    site.repair("d", 1, gap)
    await until(lambda: sorted(heard.tokens) == list(range(len(heard.tokens))), "the gap is closed")
    assert not heard.ended
    site.frontend.deaf = True
    await site.nothing_left(d)
    await asyncio.sleep(0.1)  # its last frames have been let fall
    site.frontend.deaf = False
    assert not heard.ended
    site.repair("d", 1, 10)
    await site.frontend.end(1)
    assert heard.output == words(PROMPT, 60)
    assert heard.finish.output_tokens == 60


async def test_a_request_that_has_nothing_to_say_yet_answers_all_the_same(site: Site) -> None:
    d = await site.worker("d", step_s=1.0)
    site.assign("d", 1, PROMPT, 2)
    await until(lambda: site.frontend.heard[1].placed, "placed")
    site.repair("d", 1, 0)
    await until(lambda: len(site.frontend.heard[1].placed) == 2, "an answer")
    assert not site.frontend.heard[1].tokens
    assert d.table.running == 1


async def test_an_unknown_request_is_said_to_be_unknown(site: Site) -> None:
    await site.worker("d")
    site.repair("d", 9, 0)
    assert (await site.frontend.end(9)).finish.error.code == "unknown_request"


async def test_a_repair_asked_of_the_prefill_worker_is_answered_by_the_holder(site: Site) -> None:
    p, d = await site.worker("p", Role.PREFILL), await site.worker("d")
    site.assign("p", 1, PROMPT, 6, decode=d)
    await site.frontend.end(1)
    site.frontend.heard.pop(1)
    site.repair("p", 1, 2)
    heard = await site.frontend.end(1)
    assert heard.output == words(PROMPT, 6)[2:]
    await site.nothing_left(p, d)


async def test_a_lost_handoff_goes_out_again_when_it_is_asked_for(site: Site) -> None:
    p = await site.worker("p", Role.PREFILL)
    lost: list[Message] = []
    void = await site.bus.subscribe(subjects.work(CLUSTER, "d"), lost.append)
    site.assign("p", 1, PROMPT, 6, decode=WorkerAddress("d", 1))
    await until(lambda: lost, "a handoff")
    await void.unsubscribe()
    d = await site.worker("d")
    site.repair("p", 1, 0)
    heard = await site.frontend.end(1)
    assert heard.output == words(PROMPT, 6)
    assert heard.finish.timings.kv_transfer_bytes > 0
    await site.nothing_left(p, d)


async def test_a_handoff_that_nobody_takes_is_an_error_at_once(site: Site) -> None:
    p = await site.worker("p", Role.PREFILL)
    site.assign("p", 1, PROMPT, 6, decode=WorkerAddress("d", 1))
    assert (await site.frontend.end(1)).finish.error.code == "handoff_failed"
    await site.nothing_left(p)
    await site.told_last("failed", "r1")


async def test_one_frame_a_step_carries_all_requests_of_a_frontend(site: Site) -> None:
    await site.worker("d", step_s=0.01)
    for rid in range(1, 9):
        site.assign("d", rid, PROMPT, 20)
    for rid in range(1, 9):
        assert (await site.frontend.end(rid)).output == words(PROMPT, 20)
    assert max(len(frame.rids) for frame in site.frontend.frames) == 8
    assert len(site.frontend.frames) < 8 * 20 / 2, "not a frame for each token"

"""A stream whose client can be written to without waiting: what is pushed is given on once a turn, without a task."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from services.frontend.cluster import Cluster
from services.frontend.generation import Delta, Generation, GenerationRequest, Generations
from services.frontend.order import Outcome
from tandem.adapters.memory_bus import MemoryBus, MemoryHub
from tandem.core.types import FinishReason, SamplingParams


def generation() -> Generation:
    generations = Generations(Cluster(MemoryBus(MemoryHub()), cluster="c", instance="f"))
    request = GenerationRequest(
        id="q", model=cast(Any, None), prompts=[[1]], sampling=SamplingParams(max_tokens=9), arrival_s=0, timeout_s=9
    )  # fmt: skip
    return Generation(
        request, generations._cluster, lambda ended: None, generations._relay_soon, generations.departures
    )


async def turns(count: int = 3) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_a_turn_is_one_call_and_nobody_is_woken() -> None:
    one, taken = generation(), []
    one.relay(lambda deltas: taken.append(deltas) or True)  # type: ignore[func-returns-value]
    reader = asyncio.create_task(one.next_batch())
    await turns()
    for turn in ("ab", "c"):
        for text in turn:
            one.push(Delta(0, text))
        await turns()
    assert [[delta.text for delta in deltas] for deltas in taken] == [["a", "b"], ["c"]]
    assert not reader.done()
    reader.cancel()


async def test_lines_are_opened_where_the_client_has_all_so_far() -> None:
    class Choice:
        journey = None

        def open_line(self, new_line: object) -> None:
            opened.append(new_line)

    one, opened = generation(), []
    one._choices.append(cast(Any, Choice()))
    one.push(Delta(0, "said before"))
    one.relay(lambda deltas: True)
    assert not opened
    await one.next_batch()
    one.relay(lambda deltas: True)
    assert len(opened) == 1


async def test_a_client_that_is_full_leaves_the_rest_to_its_reader() -> None:
    one, taken = generation(), []
    one.relay(lambda deltas: bool(taken.append(deltas)))  # type: ignore[func-returns-value]
    reader = asyncio.create_task(one.next_batch())
    await turns()
    one.push(Delta(0, "taken"))
    await turns()
    assert len(taken) == 1 and not reader.done()
    one.push(Delta(0, "read"))
    assert [delta.text for delta in await asyncio.wait_for(reader, 1.0)] == ["read"]
    assert len(taken) == 1


async def test_the_end_is_the_readers() -> None:
    one, taken = generation(), []
    one.relay(lambda deltas: taken.append(deltas) or True)  # type: ignore[func-returns-value]
    reader = asyncio.create_task(one.next_batch())
    await turns()
    one.push(Delta(0, "last"))
    one.push(Delta(0, finish=FinishReason.LENGTH))
    one.choice_ended(0, Outcome(FinishReason.LENGTH, 1, 0), 1)
    batch = await asyncio.wait_for(reader, 1.0)
    await turns()
    assert [delta.finish for delta in batch] == [None, FinishReason.LENGTH]
    assert one.over and not taken


async def test_what_goes_wrong_while_giving_on_is_raised_where_the_stream_is_read() -> None:
    one = generation()

    def broken(deltas: list[Delta]) -> bool:
        raise RuntimeError("cannot be said")

    one.relay(broken)
    reader = asyncio.create_task(one.next_batch())
    await turns()
    one.push(Delta(0, "a"))
    with pytest.raises(RuntimeError, match="cannot be said"):
        await asyncio.wait_for(reader, 1.0)


async def test_a_quiet_while_wakes_the_reader_all_the_same() -> None:
    one = generation()
    one.relay(lambda deltas: True)
    reader = asyncio.create_task(one.next_batch())
    await turns()
    one.on_sweep(100.0, idle_s=10.0)
    assert await asyncio.wait_for(reader, 1.0) == []


async def test_who_is_done_holds_on_to_nobody() -> None:
    one = generation()
    one.choice_ended(0, Outcome(FinishReason.LENGTH, 1, 0), 1)
    one.relay(lambda deltas: True)
    assert one._relay is None

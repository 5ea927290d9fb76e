"""Requests of the same turns go through their stages together."""

from __future__ import annotations

import asyncio
from functools import partial

from services.frontend.lockstep import MOST_TURNS, Convoy, Lockstep


async def way(lockstep: Lockstep, name: str, log: list[str]) -> None:
    try:
        for stage in "123":
            log.append(name + stage)
            if stage != "3":
                await lockstep.next_stage()
    finally:
        lockstep.leave()


def begin(lockstep: Lockstep, name: str, log: list[str], tasks: list[asyncio.Task[None]]) -> None:
    lockstep.enter()
    tasks.append(asyncio.create_task(way(lockstep, name, log)))


async def test_all_go_through_a_stage_before_any_goes_through_the_next() -> None:
    lockstep, log, tasks = Lockstep(), list[str](), list[asyncio.Task[None]]()
    for name in "abc":
        begin(lockstep, name, log, tasks)
    await asyncio.gather(*tasks)
    assert log == ["a1", "b1", "c1", "a2", "b2", "c2", "a3", "b3", "c3"]


async def test_one_that_is_alone_never_waits() -> None:
    lockstep, log = Convoy(), list[str]()
    lockstep.enter()
    try:
        way(lockstep, "a", log).send(None)
    except StopIteration:
        pass
    else:
        raise AssertionError("it gave its turn away")
    assert log == ["a1", "a2", "a3"]


async def test_one_whose_companions_have_left_goes_on_at_once() -> None:
    lockstep, log, tasks = Lockstep(), list[str](), list[asyncio.Task[None]]()
    begin(lockstep, "a", log, tasks)
    begin(lockstep, "b", log, tasks)
    tasks[1].cancel()  # before its first step, so that nobody says that it leaves
    lockstep.leave()
    await asyncio.sleep(0)
    assert log == ["a1", "a2", "a3"]


async def test_who_comes_while_others_are_on_the_way_goes_with_the_next() -> None:
    convoy, log, tasks = Convoy(), list[str](), list[asyncio.Task[None]]()
    for name in "ab":
        convoy.join(partial(begin, convoy, name, log, tasks))
    await asyncio.sleep(0)
    for name in "cd":
        convoy.join(partial(begin, convoy, name, log, tasks))
    assert len(tasks) == 2
    for _ in range(20):
        await asyncio.sleep(0)
    assert log == ["a1", "b1", "a2", "b2", "a3", "b3", "c1", "d1", "c2", "d2", "c3", "d3"]


async def test_nobody_waits_for_one_that_waits_for_something_else() -> None:
    convoy, log, tasks = Convoy(), list[str](), list[asyncio.Task[None]]()
    hold = asyncio.Event()

    async def slow() -> None:
        await convoy.next_stage()
        await hold.wait()
        convoy.leave()

    convoy.enter()
    waiting = asyncio.create_task(slow())
    convoy.join(partial(begin, convoy, "a", log, tasks))
    await asyncio.sleep(0)
    convoy.join(partial(begin, convoy, "b", log, tasks))
    for _ in range(MOST_TURNS + 5):
        await asyncio.sleep(0)
    assert log[-1] == "b3"
    hold.set()
    await waiting

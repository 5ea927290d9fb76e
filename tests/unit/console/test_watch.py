"""What is heard is worked through together."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from services.console import watch
from services.console.watch import LINGER_S, MAX_KEPT, Inbox, Watch


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_what_was_kept_is_taken_in_order_and_by_its_time_of_arrival() -> None:
    clock, taken = Clock(), list[tuple[Any, float]]()
    inbox = Inbox(clock)
    inbox.put(lambda message, at: taken.append((message, at)), "a")
    clock.now = 101.0
    inbox.put(lambda message, at: taken.append((message, at)), "b")
    assert not taken
    inbox.work_through()
    inbox.work_through()
    assert taken == [("a", 100.0), ("b", 101.0)]


def test_it_is_bounded_and_one_defect_does_not_cost_the_others() -> None:
    taken = list[int]()
    inbox = Inbox(Clock())

    def take(message: int, at: float) -> None:
        if message == 7:
            raise ValueError("a defect")
        taken.append(message)

    for number in range(MAX_KEPT + 5):
        inbox.put(take, number)
    assert len(inbox) == 5
    assert taken == [number for number in range(MAX_KEPT) if number != 7]


def test_who_has_asked_lately_looks_and_so_does_an_open_page() -> None:
    clock, pages = Clock(), 0
    looking = Watch(lambda: pages, clock)
    assert not looking.on
    looking.looked()
    clock.now += LINGER_S - 1
    assert looking.on
    clock.now += 2
    assert not looking.on
    pages = 1
    assert looking.on


async def test_pauses_are_long_while_nobody_looks_and_end_when_somebody_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "ASK_S", 0.01)
    monkeypatch.setattr(watch, "SELDOM_S", 30.0)
    looking = Watch(lambda: 0, asyncio.get_running_loop().time)
    pause = asyncio.create_task(looking.pause())
    await asyncio.sleep(0.1)
    assert not pause.done()
    looking.looked()
    async with asyncio.timeout(10.0):
        await pause
        await looking.pause()

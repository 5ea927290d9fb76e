"""Requests that the same turns of the event loop deal with, taken through a piece of work together, stage by stage.

One request's way through the frontend is more code than a core's cache holds. When each goes all of it by itself, all
of it is loaded again for the next. When all go through one stage before any goes through the next, a stage is loaded
once for all of them (docs/decisions/stages.md).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Generator
from types import coroutine

log = logging.getLogger(__name__)

#: Of the event loop, after which those that wait set out, whoever is still on the way: one may wait for a thread.
MOST_TURNS = 8


class Lockstep:
    __slots__ = ("_inside",)

    def __init__(self) -> None:
        self._inside = 0

    def enter(self) -> None:
        """Before the first stage. Each that enters leaves once."""
        self._inside += 1

    def leave(self) -> None:
        self._inside -= 1

    @coroutine
    def next_stage(self) -> Generator[None, None, None]:
        """A stage is done: lets the others come so far. One that is alone goes on at once."""
        if self._inside > 1:
            self._set_out()
            yield  # as asyncio.sleep(0) does, without its two frames

    def _set_out(self) -> None:
        """One of several has done its first stage, or another."""


class Convoy(Lockstep):
    """Who comes while others are on the way waits for the next: the busier, the more go together."""

    __slots__ = ("_turns", "_waiting")

    def __init__(self) -> None:
        super().__init__()
        self._turns = 0  # since those inside set out; 0 = they have not
        self._waiting: list[Callable[[], object]] = []

    def join(self, enter: Callable[[], object]) -> None:
        """``enter`` is called with the next that set out: at once, unless others are on the way."""
        if self._turns:
            self._waiting.append(enter)
        else:
            enter()

    def _set_out(self) -> None:
        if not self._turns:
            self._next_turn()

    def _next_turn(self) -> None:
        if self._inside and self._turns < MOST_TURNS:
            self._turns += 1
            asyncio.get_running_loop().call_soon(self._next_turn)
            return
        self._turns = 0
        waiting, self._waiting = self._waiting, []
        for enter in waiting:
            try:
                enter()
            except Exception:  # a defect of that one: the others are not to wait for ever
                log.exception("a request could not begin")

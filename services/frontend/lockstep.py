"""Requests that the same turns of the event loop deal with, taken through a piece of work together, stage by stage.

One request's way through the frontend is more code than a core's cache holds. When each goes all of it by itself, all
of it is loaded again for the next. When all go through one stage before any goes through the next, a stage is loaded
once for all of them (docs/decisions/stages.md).
"""

from __future__ import annotations

from collections.abc import Generator
from types import coroutine


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
            yield  # as asyncio.sleep(0) does, without its two frames

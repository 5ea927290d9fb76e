"""Whether anybody looks at the console, and what it saves while nobody does.

Most of the time nobody looks, and nobody ever waits for it, yet a busy cluster says hundreds of things a second. So
what is heard is kept as it came, with its time, and worked through together.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

log = logging.getLogger(__name__)

#: So long after the API was asked somebody still counts as looking: `tandem top` and scripts ask again and again.
LINGER_S = 10.0
#: Between two questions to a router or a frontend; and while nobody looks: each costs those who serve milliseconds.
ASK_S, SELDOM_S = 1.0, 5.0
#: Messages that wait to be worked through.
MAX_KEPT = 4096


class Watch:
    """Looking: a page is open (``pages``), or ``looked`` was called within ``LINGER_S``."""

    def __init__(self, pages: Callable[[], int], now: Callable[[], float]) -> None:
        self._pages = pages
        self._now = now
        self._looked_at = -LINGER_S

    @property
    def on(self) -> bool:
        return self._pages() > 0 or self._now() - self._looked_at < LINGER_S

    def looked(self) -> None:
        self._looked_at = self._now()

    async def pause(self) -> None:
        """From one question to the next; somebody who begins to look ends a long pause within ``ASK_S``."""
        for _ in range(round(SELDOM_S / ASK_S)):
            await asyncio.sleep(ASK_S)
            if self.on:
                break


class Inbox:
    """What was heard and not worked through yet, at most ``MAX_KEPT`` messages; beyond that it is, at once."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._kept: list[tuple[Callable[[Any, float], None], Any, float]] = []

    def __len__(self) -> int:
        return len(self._kept)

    def put(self, take: Callable[[Any, float], None], message: Any) -> None:
        """``take(message, time of arrival)`` is called later, in order."""
        self._kept.append((take, message, self._now()))
        if len(self._kept) >= MAX_KEPT:
            self.work_through()

    def work_through(self) -> None:
        kept, self._kept = self._kept, []
        for take, message, at in kept:
            try:
                take(message, at)
            except Exception as error:  # one message's defect must not take the console down
                log.error("a message was dropped: %r", error)

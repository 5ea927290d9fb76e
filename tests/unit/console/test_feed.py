"""The live feed: bounded for each page, and nobody waits for a slow one."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from services.console.feed import MAX_BEHIND, Feed, encoded


class Page:
    """A browser's end of the connection. ``reads`` False: its buffers are full."""

    def __init__(self, feed: Feed) -> None:
        self.sent: list[dict[str, Any]] = []
        self.reading = asyncio.Event()
        self.reading.set()
        self._gone = asyncio.Event()
        self.task = asyncio.create_task(feed({"type": "http"}, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        await self.reading.wait()
        self.sent.append(message)

    def leave(self) -> None:
        self._gone.set()

    @property
    def events(self) -> list[Any]:
        bodies = [m["body"].decode() for m in self.sent if m.get("body")]
        return [json.loads(line[6:]) for body in bodies for line in body.splitlines() if line.startswith("data: ")]


async def turns() -> None:
    for _ in range(200):
        await asyncio.sleep(0)


async def test_a_page_begins_with_a_snapshot_and_hears_the_rest_in_order() -> None:
    feed = Feed(lambda: encoded("snapshot", "whole"))
    page = Page(feed)
    await turns()
    for n in range(5):
        feed.publish(encoded("batch", n))
    await turns()
    assert page.events == ["whole", 0, 1, 2, 3, 4]
    feed.close()
    await page.task
    assert not len(feed)


async def test_a_page_that_does_not_read_is_dropped_and_the_others_do_not_notice() -> None:
    feed = Feed(lambda: encoded("snapshot", "whole"))
    slow, quick = Page(feed), Page(feed)
    await turns()
    slow.reading.clear()
    for n in range(3 * MAX_BEHIND):
        feed.publish(encoded("batch", n))
        await turns()
    assert feed.dropped == 1 and len(feed) == 1
    assert quick.events == ["whole", *range(3 * MAX_BEHIND)]
    slow.reading.set()
    await slow.task
    assert slow.sent[-1].get("more_body") is False
    feed.close()
    await quick.task


async def test_a_closed_feed_takes_no_page() -> None:
    feed = Feed(lambda: b"")
    feed.close()
    page = Page(feed)
    await page.task
    assert page.sent[0]["status"] == 503

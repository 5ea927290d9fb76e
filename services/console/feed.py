"""The live feed to pages: server-sent events, each encoded once for all of them.

Bounded: a page that cannot keep up loses its connection, opens a new one by itself and begins with a snapshot.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import msgspec
from starlette.types import Receive, Scope, Send

log = logging.getLogger(__name__)

#: Ten a second: three seconds behind is too far.
MAX_BEHIND = 40
SEND_TIMEOUT_S = 5.0
#: Something is sent at least this often, so that both ends notice a dead connection.
QUIET_S = 10.0
MAX_PAGES = 64


def encoded(kind: str, data: Any) -> bytes:
    return b"event: " + kind.encode() + b"\ndata: " + msgspec.json.encode(data) + b"\n\n"


class Feed:
    def __init__(self, snapshot: Callable[[], bytes]) -> None:
        """``snapshot`` gives what a new page is told first; from then on it hears what is published."""
        self._snapshot = snapshot
        self._pages: set[asyncio.Queue[bytes | None]] = set()
        self.dropped = 0
        self._closed = False

    def __len__(self) -> int:
        return len(self._pages)

    def publish(self, event: bytes) -> None:
        for page in list(self._pages):
            try:
                page.put_nowait(event)
            except asyncio.QueueFull:
                self._drop(page)

    def close(self) -> None:
        self._closed = True
        for page in list(self._pages):
            self._drop(page)

    def _drop(self, page: asyncio.Queue[bytes | None]) -> None:
        self.dropped += 1
        self._pages.discard(page)
        while not page.empty():
            page.get_nowait()
        page.put_nowait(None)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI answer to one page: until either side ends it."""
        if self._closed or len(self._pages) >= MAX_PAGES:
            await send({"type": "http.response.start", "status": 503, "headers": [(b"retry-after", b"5")]})
            await send({"type": "http.response.body", "body": b"too many pages are open"})
            return
        headers = [
            (b"content-type", b"text/event-stream"),
            (b"cache-control", b"no-store"),
            (b"x-accel-buffering", b"no"),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        page: asyncio.Queue[bytes | None] = asyncio.Queue(MAX_BEHIND)
        page.put_nowait(self._snapshot())
        self._pages.add(page)
        gone = asyncio.create_task(_until_gone(receive))
        try:
            await self._serve(page, send, gone)
        finally:
            self._pages.discard(page)
            gone.cancel()
            with suppress(asyncio.CancelledError):
                await gone

    async def _serve(self, page: asyncio.Queue[bytes | None], send: Send, gone: asyncio.Task[None]) -> None:
        while not gone.done():
            try:
                async with asyncio.timeout(QUIET_S):
                    event = await page.get()
            except TimeoutError:
                event = b": quiet\n\n"
            try:
                async with asyncio.timeout(SEND_TIMEOUT_S):
                    await send({"type": "http.response.body", "body": event or b"", "more_body": event is not None})
            except TimeoutError:
                self.dropped += 1
                log.info("a page that does not read is dropped")
                return
            if event is None:
                return


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass

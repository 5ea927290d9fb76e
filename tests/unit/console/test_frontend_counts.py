"""Looking at frontends that answer nonsense."""

from __future__ import annotations

import asyncio

from services.console.frontend_counts import Counts, FrontendCounts
from tandem.telemetry import metric_table


async def test_what_is_no_http_is_looked_past() -> None:
    heard: asyncio.Queue[Counts] = asyncio.Queue()
    asked = 0

    def hear(counts: Counts, over_s: float) -> None:
        assert over_s > 0
        heard.put_nowait(counts)

    async def soon() -> None:
        await asyncio.sleep(0.01)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        asked += 1
        await reader.readuntil(b"\r\n\r\n")
        name = metric_table.OFFERED_REQUESTS.name
        good = f"HTTP/1.0 200 OK\r\n\r\n# TYPE {name} counter\n{name} {asked}\n".encode()
        writer.write(b"nonsense\r\n\r\n" if asked == 1 else good)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/metrics"
    looking = asyncio.create_task(FrontendCounts([url], hear, asyncio.get_running_loop().time, soon).run())
    try:
        async with asyncio.timeout(20.0):
            assert (await heard.get()).offered == 1.0
    finally:
        looking.cancel()
        server.close()

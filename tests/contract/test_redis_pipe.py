"""The pipe against servers that accept and then misbehave; with a real one: test_index.py, test_store.py."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tandem.adapters.redis_pipe import RedisPipe
from tandem.adapters.redis_script import Script
from tandem.errors import StoreUnavailable

SCRIPT = Script("index_lookup")


class Server:
    """Gives ``answer`` to whatever comes, or nothing."""

    def __init__(self, answer: bytes) -> None:
        self._answer = answer
        self.accepted = self.open = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        self.open += 1
        try:
            while await reader.read(1000):
                writer.write(self._answer)
        except ConnectionError:
            pass
        finally:
            self.open -= 1
            writer.close()


@asynccontextmanager
async def serving(answer: bytes, *, timeout_s: float) -> AsyncIterator[tuple[Server, RedisPipe]]:
    server = Server(answer)
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]
    pipe = RedisPipe(f"redis://:password@127.0.0.1:{port}", timeout_s=timeout_s)
    try:
        yield server, pipe
    finally:
        pipe.close()
        listening.close()


async def test_all_who_wait_share_one_attempt_and_its_deadline() -> None:
    async with serving(b"", timeout_s=1.0) as (server, pipe):
        began = time.monotonic()
        calls = [pipe.run(SCRIPT, [], [()]) for _ in range(20)]
        failures = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(failure, StoreUnavailable) for failure in failures), failures
        assert time.monotonic() - began < 10.0, "one deadline, not one for each"
        assert server.accepted == 1


async def test_a_refused_login_leaves_no_connection_and_is_not_tried_again_at_once() -> None:
    async with serving(b"-WRONGPASS invalid\r\n", timeout_s=10.0) as (server, pipe):
        for _ in range(5):
            with pytest.raises(StoreUnavailable, match="WRONGPASS"):
                await pipe.run(SCRIPT, [], [()])
        assert server.accepted < 5
        async with asyncio.timeout(10.0):
            while server.open:  # noqa: ASYNC110
                await asyncio.sleep(0.01)


async def test_an_asker_s_defect_is_told_of_and_harms_no_other() -> None:
    complaints: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(str(context["exception"])))
    async with serving(b":1\r\n", timeout_s=10.0) as (server, pipe):

        def defective(_: object) -> None:
            raise RuntimeError("a defect")

        assert await pipe.run(SCRIPT, [], [()]) == [1]
        pipe.ask(SCRIPT, [], [()], defective)
        async with asyncio.timeout(10.0):
            while not complaints:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert await pipe.run(SCRIPT, [], [()]) == [1]
        assert complaints == ["a defect"] and server.accepted == 1


async def test_asking_a_closed_pipe_is_answered_later() -> None:
    async with serving(b"", timeout_s=10.0) as (_, pipe):
        pipe.close()
        answer: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        pipe.ask(SCRIPT, [], [()], answer.set_result)
        assert not answer.done()
        assert isinstance(await answer, StoreUnavailable)

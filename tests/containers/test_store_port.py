"""The suites of the registry, leases, counters and prefix index against Redis in a container."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest

from tests.containers import servers
from tests.contract import test_index, test_store
from tests.contract.stores import World, open_world

globals().update(servers.suite_of(test_store, "world", "own_world"))
globals().update(servers.suite_of(test_index, "world"))


@pytest.fixture(scope="module")
def server() -> Iterator[servers.Server]:
    made = servers.redis()
    asyncio.run(made.start())
    yield made
    made.kill()


@pytest.fixture
async def world(server: servers.Server) -> AsyncIterator[World]:
    made = await open_world("redis", server=server)
    yield made
    await made.close()


@pytest.fixture
async def own_world() -> AsyncIterator[World]:
    """With a server of its own, that may go away."""
    made = await open_world("redis", server=servers.redis(), shared=False)
    yield made
    await made.close()

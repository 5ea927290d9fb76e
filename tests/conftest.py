"""Real servers for whoever needs one: a session's nats-server and Redis on free ports of the loopback interface."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from tandem.adapters.clock import new_name
from tandem.adapters.embedded import EmbeddedServer, NatsServer, RedisServer


def _running(server: EmbeddedServer) -> Iterator[EmbeddedServer]:
    asyncio.run(server.start())
    yield server
    asyncio.run(server.close())


@pytest.fixture(scope="session")
def nats_server() -> Iterator[EmbeddedServer]:
    """Shared: a test that stops or pauses a server starts its own."""
    yield from _running(NatsServer())


@pytest.fixture(scope="session")
def redis_server() -> Iterator[EmbeddedServer]:
    """Shared: a test that stops, pauses or empties a server starts its own."""
    yield from _running(RedisServer())


@pytest.fixture
def cluster() -> str:
    """A cluster name of this test's own, so that tests share servers and nothing else."""
    return new_name("test")

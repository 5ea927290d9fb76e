"""The suite of the bus against NATS in a container."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.containers import servers
from tests.contract import test_bus

globals().update(servers.suite_of(test_bus, "world"))


@pytest.fixture
async def world() -> AsyncIterator[test_bus.NatsWorld]:
    made = test_bus.NatsWorld(servers.nats(test_bus.MAX_PAYLOAD))
    await made.server.start()
    yield made
    await made.close()

"""The bus goes away and comes back, or does not: streams go on whole, or end with a typed error in time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import openai
import pytest

from tandem.adapters.embedded import NatsServer
from tests.integration.frontend.conftest import MODEL, Site, StartSite

HELLO = [{"role": "user", "content": "hello"}]
TEXT = "the quick brown fox jumps over the lazy dog, again and again; " * 4


@pytest.fixture
async def nats() -> AsyncIterator[NatsServer]:
    async with NatsServer() as server:
        yield server


async def read(site: Site, **more: object) -> str:
    stream = await site.client.chat.completions.create(model=MODEL, messages=HELLO, stream=True, **more)
    return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])


async def test_streams_survive_a_restart_of_the_bus(start_site: StartSite, nats: NatsServer) -> None:
    async with start_site(nats_url=nats.url) as site:
        site.answer(TEXT)
        site.cluster.step_s = 0.01
        reads = [asyncio.create_task(read(site, seed=i)) for i in range(8)]  # seeded: they could not be migrated
        await site.until(lambda: len(site.cluster.running) == 8)
        await asyncio.sleep(0.3)
        await nats.restart()
        assert await asyncio.gather(*reads) == [TEXT] * 8
        assert await read(site) == TEXT


async def test_requests_during_an_outage_are_served_after_it(start_site: StartSite, nats: NatsServer) -> None:
    async with start_site(nats_url=nats.url) as site:
        site.answer("fine")
        nats.kill()
        call = asyncio.create_task(read(site))
        await asyncio.sleep(0.5)
        assert not site.frontend.readiness()["ready"]
        await nats.start()
        assert await call == "fine"


async def test_an_outage_without_end_is_a_typed_error_in_time(start_site: StartSite, nats: NatsServer) -> None:
    async with start_site(nats_url=nats.url, bus_grace_s=1.0) as site:
        site.answer(TEXT)
        site.cluster.step_s = 0.02
        running = asyncio.create_task(read(site))
        await site.until(lambda: site.cluster.running)
        nats.kill()
        began = time.monotonic()
        with pytest.raises(openai.APIError, match="bus"):
            await running
        with pytest.raises(openai.APIStatusError) as caught:
            await site.client.chat.completions.create(model=MODEL, messages=HELLO)
        assert caught.value.status_code == 503
        assert time.monotonic() - began < 20
        await nats.start()
        await site.until(lambda: site.frontend.readiness()["ready"])


async def test_a_router_that_leaves_and_returns(start_site: StartSite) -> None:
    async with start_site(leader_grace_s=1.0) as site:
        site.answer("fine")
        for subscription in site.cluster.subscriptions[:1]:
            await subscription.unsubscribe()  # nobody listens, though it is still announced
        with pytest.raises(openai.APIStatusError) as caught:
            async with asyncio.timeout(30):
                site.cluster.announcing = False
                await site.client.chat.completions.create(model=MODEL, messages=HELLO)
        assert (caught.value.status_code, caught.value.code) == (503, "no_leader")
        call = asyncio.create_task(read(site))
        await site.cluster.return_as_leader()
        assert await call == "fine"

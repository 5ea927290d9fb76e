"""Two routers: whatever becomes of the leader, the standby leads within about two seconds, and no request is lost."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator

import pytest

from tests.harness.cluster import wait_for
from tests.integration.cluster.load import Load
from tests.integration.cluster.site import Site

pytestmark = pytest.mark.timeout(180)
STREAMS = 16


@pytest.fixture
async def site(cluster_of_two_routers: Site) -> AsyncIterator[Site]:
    site = cluster_of_two_routers
    yield site
    await asyncio.to_thread(site.resume_all)
    await asyncio.to_thread(site.settled)
    async with Load(site.grpc, seed=98) as load:
        load.start(4, 10)
        await load.all_complete(20.0)
    await asyncio.to_thread(site.settled)


@pytest.fixture
async def load(site: Site) -> AsyncIterator[Load]:
    async with Load(site.grpc, seed=1) as load:
        yield load


async def leader_of(site: Site, *, other_than: str = "") -> str:
    def leader() -> str:
        found = site.name_of_leader()
        return found if found != other_than else ""

    return str(await asyncio.to_thread(wait_for, leader, 20.0, "a leader"))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "told to leave"])
async def test_the_leader_goes(site: Site, load: Load, number: signal.Signals) -> None:
    await load.flowing(load.start(STREAMS, 100))
    leader = await leader_of(site)
    load.start(STREAMS, 20)
    pid = site.signal(leader, number)
    load.start(STREAMS, 20)
    await load.all_complete()
    assert await leader_of(site)  # the standby, or the same one again, if it was back before its lease was over
    await asyncio.to_thread(site.wait_restarted, leader, pid, 30.0)


async def test_the_leader_stops_and_comes_back_to_find_another(site: Site, load: Load) -> None:
    await load.flowing(load.start(STREAMS, 150))
    leader = await leader_of(site)
    site.signal(leader, signal.SIGSTOP)
    load.start(STREAMS, 20)
    await asyncio.sleep(4.0)
    site.signal(leader, signal.SIGCONT)
    load.start(STREAMS, 20)
    await load.all_complete()
    await asyncio.sleep(1.0)
    assert await leader_of(site) != leader, "who was deposed stays so"


async def test_the_standby_dies(site: Site, load: Load) -> None:
    leader = await leader_of(site)
    standby = next(r["name"] for r in site.processes("router") if r["name"] != leader)
    load.start(STREAMS, 60)
    pid = site.signal(standby, signal.SIGKILL)
    load.start(STREAMS, 20)
    await load.all_complete()
    assert await leader_of(site) == leader
    await asyncio.to_thread(site.wait_restarted, standby, pid, 30.0)


async def test_the_leader_and_the_store_die_together(site: Site, load: Load) -> None:
    """The new leader's epoch is higher than what the workers know, though the store has forgotten it."""
    await load.flowing(load.start(STREAMS, 150))
    leader = await leader_of(site)
    pids = {name: site.signal(name, signal.SIGKILL) for name in ("redis", leader)}
    load.start(STREAMS, 20)
    await load.complete_or_retryable()
    for name, pid in pids.items():
        await asyncio.to_thread(site.wait_restarted, name, pid, 30.0)
    load.start(STREAMS, 10)
    await load.complete_or_retryable()
    assert "stale_epoch" not in site.log()

"""Processes of a whole cluster are killed, stopped and restarted under load.

Asserted for every case, on the requests' own record: none hangs, no token is wrong, missing or repeated, each ends
complete or with a retryable error; and the cluster then serves again, with nothing left behind.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator

import pytest

from tests.integration.cluster.load import Load
from tests.integration.cluster.site import Site

pytestmark = pytest.mark.timeout(180)
STREAMS = 16


@pytest.fixture
async def site(cluster_of_one_router: Site) -> AsyncIterator[Site]:
    """Settled before and after, and it serves."""
    site = cluster_of_one_router
    yield site
    await asyncio.to_thread(site.resume_all)
    await asyncio.to_thread(site.settled)
    async with Load(site.grpc, seed=99) as load:
        load.start(4, 10)
        await load.all_complete(20.0)
    await asyncio.to_thread(site.settled)


@pytest.fixture
async def load(site: Site) -> AsyncIterator[Load]:
    async with Load(site.grpc) as load:
        yield load


async def test_without_faults_everything_completes(load: Load) -> None:
    load.start(2 * STREAMS, 40)
    await load.all_complete()


async def test_streams_survive_the_death_of_their_decode_worker(site: Site, load: Load) -> None:
    streams = load.start(STREAMS, 150)
    await load.flowing(streams)
    pid = site.signal("decode-1", signal.SIGKILL)
    load.start(STREAMS, 40)
    await load.all_complete()
    await asyncio.to_thread(site.wait_restarted, "decode-1", pid, 30.0)


async def test_streams_survive_the_death_of_all_decode_workers(site: Site, load: Load) -> None:
    flowing = load.start(STREAMS, 150)
    await load.flowing(flowing)
    pids = {name: site.signal(name, signal.SIGKILL) for name in ("decode-1", "decode-2")}
    load.start(4, 20)
    await load.complete_or_retryable()
    assert all(stream.complete for stream in flowing), "who was served before may wait for their return"
    for name, pid in pids.items():
        await asyncio.to_thread(site.wait_restarted, name, pid, 30.0)


async def test_a_decode_worker_that_stops_for_a_while(site: Site, load: Load) -> None:
    await load.flowing(load.start(STREAMS, 150))
    site.signal("decode-1", signal.SIGSTOP)
    load.start(STREAMS, 20)
    await asyncio.sleep(3.0)
    site.signal("decode-1", signal.SIGCONT)
    await load.all_complete()


async def test_a_decode_worker_that_hangs_is_declared_dead_and_may_come_back(site: Site, load: Load) -> None:
    await load.flowing(load.start(STREAMS, 150))
    site.signal("decode-2", signal.SIGSTOP)
    await load.all_complete()
    site.signal("decode-2", signal.SIGCONT)


async def test_a_prefill_worker_dies(site: Site, load: Load) -> None:
    await load.flowing(load.start(STREAMS, 100))
    pid = site.signal("prefill-1", signal.SIGKILL)
    load.start(STREAMS, 40)
    await load.all_complete()
    await asyncio.to_thread(site.wait_restarted, "prefill-1", pid, 30.0)


async def test_a_hung_prefill_worker_costs_its_hop_timeout_not_the_request(site: Site, load: Load) -> None:
    await load.flowing(load.start(STREAMS, 60))
    site.signal("prefill-1", signal.SIGSTOP)
    began = time.monotonic()
    late = load.start(STREAMS, 10)
    await load.all_complete()
    assert max(stream.first_s for stream in late) - began < 10.0
    site.signal("prefill-1", signal.SIGCONT)


async def test_the_only_router_dies(site: Site, load: Load) -> None:
    flowing = load.start(STREAMS, 100)
    await load.flowing(flowing)
    pid = site.signal("router", signal.SIGKILL)
    load.start(STREAMS, 20)
    await load.complete_or_retryable()
    assert all(stream.complete for stream in flowing), "running streams do not notice"
    await asyncio.to_thread(site.wait_restarted, "router", pid, 30.0)


async def test_the_only_router_stops_for_a_while(site: Site, load: Load) -> None:
    flowing = load.start(STREAMS, 100)
    await load.flowing(flowing)
    site.signal("router", signal.SIGSTOP)
    load.start(STREAMS, 20)
    await asyncio.sleep(3.0)
    site.signal("router", signal.SIGCONT)
    await load.complete_or_retryable()
    assert all(stream.complete for stream in flowing), "running streams do not notice"


async def test_the_frontend_dies(site: Site, load: Load) -> None:
    await load.flowing(load.start(STREAMS, 1500))
    pid = site.signal("frontend", signal.SIGKILL)
    assert await load.complete_or_retryable() == 0
    await asyncio.to_thread(site.wait_restarted, "frontend", pid, 30.0)


async def test_the_frontend_stops_for_a_while(site: Site, load: Load) -> None:
    await load.flowing(load.start(STREAMS, 100))
    site.signal("frontend", signal.SIGSTOP)
    await asyncio.sleep(5.0)
    site.signal("frontend", signal.SIGCONT)
    load.start(4, 10)
    await load.all_complete()


async def test_the_bus_stops_for_a_while(site: Site, load: Load) -> None:
    log = len(site.log())
    flowing = load.start(STREAMS, 150)
    await load.flowing(flowing)
    site.signal("nats-server", signal.SIGSTOP)
    load.start(STREAMS, 20)
    await asyncio.sleep(3.0)
    site.signal("nats-server", signal.SIGCONT)
    await load.complete_or_retryable()
    assert all(stream.complete for stream in flowing)
    assert not site.declared_dead(log), "nobody is, because of the bus"


async def test_the_bus_dies_and_comes_back(site: Site, load: Load) -> None:
    log = len(site.log())
    flowing = load.start(STREAMS, 150)
    await load.flowing(flowing)
    pid = site.signal("nats-server", signal.SIGKILL)
    load.start(STREAMS, 20)
    await load.complete_or_retryable()
    assert all(stream.complete for stream in flowing)
    await asyncio.to_thread(site.wait_restarted, "nats-server", pid, 30.0)
    assert not site.declared_dead(log), "nobody is, because of the bus"


async def test_the_store_dies_and_comes_back_empty(site: Site, load: Load) -> None:
    log = len(site.log())
    await load.flowing(load.start(STREAMS, 150))
    pid = site.signal("redis", signal.SIGKILL)
    load.start(STREAMS, 40)
    await load.all_complete()
    await asyncio.to_thread(site.wait_restarted, "redis", pid, 30.0)
    load.start(STREAMS, 10)
    await load.all_complete()
    assert not site.declared_dead(log)
    assert "stepping down" not in site.log()[log:], "no leader is refused for its epoch"


async def test_clients_that_leave(load: Load) -> None:
    """Mid-stream, and while their requests wait: more than the workers take at a time."""
    streams = load.start(STREAMS, 1500)
    await load.flowing(streams)
    streams += load.start(40, 1500, isl=(1500, 2000))
    await asyncio.sleep(0.2)
    for stream in streams:
        assert stream.task is not None
        stream.task.cancel()
    await asyncio.gather(*(s.task for s in streams if s.task is not None), return_exceptions=True)


@pytest.mark.parametrize("worker", ["decode-1", "prefill-1"])
async def test_a_worker_that_is_told_to_leave_loses_nothing(site: Site, load: Load, worker: str) -> None:
    await load.flowing(load.start(STREAMS, 100))
    pid = site.signal(worker, signal.SIGTERM)
    for _ in range(5):
        load.start(3, 20)
        await asyncio.sleep(0.1)
    await load.all_complete()
    await asyncio.to_thread(site.wait_restarted, worker, pid, 30.0)


async def test_a_router_that_is_told_to_leave_loses_nothing(site: Site, load: Load) -> None:
    flowing = load.start(STREAMS, 100)
    await load.flowing(flowing)
    pid = site.signal("router", signal.SIGTERM)
    load.start(STREAMS, 20)
    await load.complete_or_retryable()
    assert all(stream.complete for stream in flowing)
    await asyncio.to_thread(site.wait_restarted, "router", pid, 30.0)

"""What the matrix has not: several workers at once, one that does not come back in time, clients that leave, chaos."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections.abc import AsyncIterator

import psutil
import pytest

from tests.chaos.conftest import Ground
from tests.faults import chaos, rolling
from tests.harness.answers import SimAnswers
from tests.harness.cluster import wait_for
from tests.harness.load import Load
from tests.harness.site import Site

pytestmark = pytest.mark.timeout(240)
STREAMS = 16


@pytest.fixture
async def site(two_routers: Ground) -> AsyncIterator[Site]:
    """Settled afterwards, and it serves."""
    site = two_routers.site
    yield site
    await asyncio.to_thread(site.resume_all)
    await asyncio.to_thread(site.settled)
    async with Load(site.addresses, SimAnswers(), seed=99) as load:
        load.start(4, 10)
        await load.all_complete(20.0)
    await asyncio.to_thread(site.settled)


@pytest.fixture
async def load(site: Site) -> AsyncIterator[Load]:
    async with Load(site.addresses, SimAnswers(), http_every=4) as load:
        yield load


async def test_streams_survive_the_death_of_all_decode_workers(site: Site, load: Load) -> None:
    flowing = load.start(STREAMS, 150)
    await load.flowing(flowing)
    pids = {name: site.signal(name, signal.SIGKILL) for name in ("decode-1", "decode-2")}
    load.start(4, 20)
    await load.complete_or_retryable()
    for name, pid in pids.items():
        await asyncio.to_thread(site.wait_restarted, name, pid, 60.0)


async def test_a_decode_worker_that_hangs_is_declared_dead_and_may_come_back(site: Site, load: Load) -> None:
    await load.flowing(load.start(STREAMS, 150))
    site.signal("decode-2", signal.SIGSTOP)
    await load.all_complete()
    site.signal("decode-2", signal.SIGCONT)


async def test_a_hung_prefill_worker_costs_its_hop_timeout_not_the_request(site: Site, load: Load) -> None:
    await load.flowing(load.start(STREAMS, 60))
    site.signal("prefill-1", signal.SIGSTOP)
    began = time.monotonic()
    late = load.start(STREAMS, 10)
    await load.all_complete()
    assert max(stream.first_s for stream in late) - began < 10.0
    site.signal("prefill-1", signal.SIGCONT)


async def test_the_standby_dies(site: Site, load: Load) -> None:
    leader = await asyncio.to_thread(site.name_of_leader)
    standby = next(r["name"] for r in site.processes("router") if r["name"] != leader)
    load.start(STREAMS, 60)
    pid = site.signal(standby, signal.SIGKILL)
    load.start(STREAMS, 20)
    await load.all_complete()
    assert await asyncio.to_thread(site.name_of_leader) == leader
    await asyncio.to_thread(site.wait_restarted, standby, pid, 60.0)


async def test_clients_that_leave(load: Load) -> None:
    """Mid-stream, and while their requests wait: more than the workers take at a time."""
    streams = load.start(STREAMS, 1500)
    await load.flowing(streams)
    streams += load.start(40, 1500, isl=(1500, 2000))
    await asyncio.sleep(0.2)
    await load.cancel(streams)


async def test_a_worker_that_is_told_to_leave_does_so_after_its_last_stream(site: Site, load: Load) -> None:
    mark = len(site.log())
    streams = load.start(4, 350)  # ten seconds
    await load.flowing(streams)
    loads = await asyncio.to_thread(site.loads)
    busiest = max(("decode-1", "decode-2"), key=lambda name: loads[name].load.running_requests)
    assert loads[busiest].load.running_requests
    pid = site.signal(busiest, signal.SIGTERM)
    await load.all_complete()
    await asyncio.to_thread(site.wait_restarted, busiest, pid, 60.0)
    log = site.log()[mark:]
    assert f"{busiest}: ended with status 0" in log
    assert "leaving with" not in log and "is gone: aborting" not in log


async def test_calls_that_come_when_a_frontend_leaves_are_not_called_cancelled(site: Site, load: Load) -> None:
    """Each of many clients asks again at once, up to its end; gRPC's own way to stop would end what it has not begun as
    CANCELLED, which is not to be sent again."""
    gone = asyncio.Event()

    async def ask() -> None:
        while not gone.is_set():
            [stream] = load.start(1, 2, isl=(40, 40))
            assert stream.task is not None
            await stream.task

    asking = [asyncio.create_task(ask()) for _ in range(20)]
    await asyncio.sleep(1.0)
    pid = site.signal("frontend", signal.SIGTERM)
    try:
        await asyncio.to_thread(wait_for, lambda: not psutil.pid_exists(pid), 60.0, "it leaves")
    finally:
        gone.set()
    await asyncio.gather(*asking)
    await load.complete_or_retryable()
    await asyncio.to_thread(site.wait_restarted, "frontend", pid, 60.0)


async def test_streams_of_a_frontend_that_leaves_end_beside_its_successors(site: Site, load: Load) -> None:
    mark = len(site.log())
    streams = load.start(4, 1000)  # twenty seconds at least
    await load.flowing(streams)
    pid = site.signal("frontend", signal.SIGTERM)
    await asyncio.to_thread(site.wait_restarted, "frontend", pid, 60.0)
    assert psutil.pid_exists(pid), "it left before there was a successor"
    async with Load(site.addresses, SimAnswers(), http_every=2) as new:
        new.start(8, 4)
        await new.all_complete()
    assert not any(stream.ended_s for stream in streams), "they ended too soon for this to say anything"
    await load.all_complete(90.0)
    left = "frontend: ended with status 0"
    await asyncio.to_thread(wait_for, lambda: left in site.log()[mark:], 60.0, "it leaves")


async def test_chaos(two_routers: Ground) -> None:
    """As `make chaos`, for two rounds."""
    tally = await chaos.chaos(two_routers.site, SimAnswers(), chaos.SCALES["sim"], seed=1, minutes=0.0, rounds=2)
    assert tally.completed > 0


async def test_a_rolling_restart_loses_no_request(tmp_path_factory: pytest.TempPathFactory) -> None:
    """As `make rolling`, one process of each kind."""
    names = "^(router|prefill|decode|frontend)-1$"
    outcome = await rolling.rolling("sim", tmp_path_factory.mktemp("rolling"), names)
    print(outcome.text())
    assert outcome.good, outcome.text()


def test_the_same_seed_does_the_same_harm() -> None:
    names = ["a", "b", "nats-server"]
    assert chaos.plan(names, random.Random(5)) == chaos.plan(names, random.Random(5))

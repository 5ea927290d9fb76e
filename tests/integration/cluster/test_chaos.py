"""Any mix of faults, by seed: what must hold holds for every request, whatever happens at once.

``TANDEM_CHAOS_ROUNDS`` and ``TANDEM_CHAOS_SEED`` make it longer, or another one. A failure prints what was done.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
from contextlib import suppress

import pytest

from tests.integration.cluster.load import Load
from tests.integration.cluster.site import Site

ROUNDS = int(os.environ.get("TANDEM_CHAOS_ROUNDS", "3"))
SEED = int(os.environ.get("TANDEM_CHAOS_SEED", "1"))
FAULTS = (signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM)
#: What cannot be told to leave without being missed, and comes back by itself.
SERVERS = ("nats-server", "redis")


async def harm(site: Site, rng: random.Random, done: list[str]) -> None:
    names = [process["name"] for process in site.state()["processes"]]
    for name in rng.sample(names, k=rng.choice((1, 1, 2, 3))):
        fault = rng.choice(FAULTS[:2] if name in SERVERS else FAULTS)
        done.append(f"{fault.name} {name}")
        with suppress(ProcessLookupError):  # just restarting
            site.signal(name, fault)
        await asyncio.sleep(rng.choice((0.0, 0.0, 0.3, 1.0)))


@pytest.mark.timeout(60 + 90 * ROUNDS)
async def test_chaos(cluster_of_two_routers: Site) -> None:
    site, rng = cluster_of_two_routers, random.Random(SEED)
    done: list[str] = []
    completed = total = 0
    try:
        for number in range(ROUNDS):
            done.append(f"round {number}:")
            async with Load(site.grpc, seed=1000 * SEED + number) as load:
                await load.flowing(load.start(16, 120))
                harming = asyncio.create_task(harm(site, rng, done))
                for _ in range(8):
                    load.start(2, 30)
                    await asyncio.sleep(0.2)
                await harming
                await asyncio.sleep(rng.choice((0.5, 3.0, 5.0)))
                await asyncio.to_thread(site.resume_all)
                completed += await load.complete_or_retryable(within_s=45.0)
                total += len(load.streams)
            await asyncio.to_thread(site.settled, 45.0)
    except BaseException:
        print(f"seed {SEED}:", *done)
        print(site.log()[-20_000:])
        raise
    print(f"{completed} of {total} requests completed; {', '.join(done)}")

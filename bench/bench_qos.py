"""What tenants and classes get from a live router under overload: every claim measured on real processes.

    python -m bench.bench_qos [--seconds 15]

`tandem up` with two simulated engines, on which a prompt takes 0.2 s, so that ten requests a second are all that the
cluster can do; two routers; everything through the frontend. Status 1 if a claim does not hold:

1. The top class's wait does not move as background work goes from nothing to ten times the capacity, beyond two
   prompts: one that has begun is finished first, and one that is owed its share may be in the way of another.
2. Background work gets its guaranteed share in every window while the top class alone would fill the cluster twice.
3. Two tenants that both wait are served by weight at every moment, within the bound of the scheduler.
4. The order holds over the death (kill -9) of the leading router: who waited first in order is served first, and the
   tenants' service goes on from where it was.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from itertools import pairwise
from pathlib import Path
from statistics import median

from tandem.core.policy import Policy
from tandem.core.types import RequestKey
from tandem.sim.metrics import percentile
from tandem.wire import record
from tests.harness.cluster import wait_for
from tests.harness.site import Site
from tests.harness.tenants import OUTPUT, PREFILL_S, PROMPT, Asked, Clients, accounting, deployment, digest

WORKERS, RECORDED = 2, "recorded"
CAPACITY = WORKERS / PREFILL_S
#: Over which a minimum share holds: policy.share_window_s.
WINDOW_S = Policy().share_window_s
MIN_SHARE, WEIGHTS = 0.1, {"ann": 3.0, "bob": 1.0}
#: Of one request, as charged at its placement: input, and output twice.
LARGEST = PROMPT + 2.0 * OUTPUT


def ttfts(asked: list[Asked]) -> list[float]:
    return sorted(each.first_s - each.began_s for each in asked if each.first_s)


def leader(site: Site) -> tuple[str, str]:
    """(name, gRPC address)"""
    name = str(wait_for(site.name_of_leader, 20.0, "a leader"))
    return name, next(str(r["grpc"]) for r in site.processes("router") if r["name"] == name)


async def settled(site: Site) -> None:
    await asyncio.to_thread(site.settled, 60.0)


class Queue:
    """How long requests waited in the router, by its own record and clock."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: set[RequestKey] = set()
        #: Seconds from each placement to the end of its prompt, of all classes: sorted.
        self.took: list[float] = []

    def waits(self, request_class: str) -> list[tuple[float, float]]:
        """(time of arrival, wait) of the requests of a class that were placed since the last call, by arrival."""
        placed: dict[RequestKey, float] = {}
        took: dict[RequestKey, float] = {}
        submitted: dict[RequestKey, tuple[str, float]] = {}
        found: list[tuple[float, float]] = []
        for path in self._folder.glob("*.jsonl"):
            for line in record.read(path):
                if isinstance(line, record.Submitted):
                    submitted[line.request.key] = (line.request.request_class, line.at)
                elif isinstance(line, record.Polled):
                    for decision in line.decisions:
                        placed[decision.key] = line.at
                        if decision.kind == "place" and decision.key not in self._known:
                            self._known.add(decision.key)
                            name, at = submitted[decision.key]
                            found += [(at, line.at - at)] if name == request_class else []
                elif isinstance(line, record.DecodeStarted) and line.key in placed:
                    took.setdefault(line.key, line.at - placed[line.key])
        self.took = sorted(took.values())
        return sorted(found)


def alone(arrivals: list[float], prompt_s: float) -> list[float]:
    """How long each would wait for a free worker if there were no other class."""
    free, waits = [0.0] * WORKERS, []
    for at in arrivals:
        begin = max(at, min(free))
        free[free.index(min(free))] = begin + prompt_s
        waits.append(begin - at)
    return waits


async def top_class_is_steady(site: Site, seconds: float) -> bool:
    print("1. top class at 0.4 of the capacity, beside background work")
    print(f"   {'background':>12} {'requests':>9} {'wait p50':>9} {'p99 ms':>7} {'added p99':>10} {'TTFT p50 ms':>12}")
    queue, worst = Queue(site.folder / RECORDED), dict[float, float]()
    for factor in (0.0, 1.0, 3.0, 10.0):
        async with Clients(site.grpc, seed=int(factor)) as clients:
            load = [clients.arrive(0.4 * CAPACITY, seconds, "ann", "top")]
            if factor:
                load.append(clients.arrive(factor * CAPACITY, seconds, "bob", "batch"))
            await asyncio.gather(*load)
            await asyncio.sleep(2.0)  # the record is written every second
            found = ttfts([each for each in clients.asked if each.request_class == "top"])
            seen = queue.waits("top")
            waits = sorted(wait for _, wait in seen)
            without = alone([at for at, _ in seen], median(queue.took))
            added = sorted(wait - least for (_, wait), least in zip(seen, without, strict=True))
            worst[factor] = max(0.0, percentile(added, 0.99))
        times = [median(waits), percentile(waits, 0.99), worst[factor], median(found)]
        cells = " ".join(f"{1e3 * t:{width}.0f}" for t, width in zip(times, (9, 7, 10, 12), strict=True))
        print(f"   {factor:11.0f}x {len(waits):9} {cells}", flush=True)
        await settled(site)
    moved = max(worst.values()) - worst[0.0]
    print("   added: to what the same arrivals would wait if there were no other class")
    slack = 2.0 * percentile(queue.took, 0.9)
    print(
        f"   its p99 moved by {1e3 * moved:.0f} ms at most; allowed {1e3 * slack:.0f} ms: two prompts, at what nine of"
    )
    print(f"   ten took at most (in the middle {1e3 * median(queue.took):.0f} ms)")
    return moved <= slack


async def background_gets_its_share(site: Site, seconds: float) -> bool:
    print(f"2. top class at twice the capacity; background work is promised {MIN_SHARE:.0%}")
    async with Clients(site.grpc, seed=2) as clients:
        load = asyncio.create_task(clients.arrive(2.0 * CAPACITY, 2.0 * seconds + 4.0 * WINDOW_S, "ann", "top"))
        await asyncio.sleep(3.5 * WINDOW_S)  # what background work had before is forgotten
        for _ in range(int(MIN_SHARE * 2.0 * CAPACITY * 3.0 * seconds)):
            clients.ask("bob", "batch")
        await asyncio.sleep(0.5 * WINDOW_S)
        began = time.monotonic()
        await load
        shares = []
        for i in range(int(2.0 * seconds // WINDOW_S)):
            low, high = began + i * WINDOW_S, began + (i + 1) * WINDOW_S
            served = [each for each in clients.asked if low <= each.first_s < high]
            shares.append(sum(each.request_class == "batch" for each in served) / max(1, len(served)))
    await settled(site)
    print(f"   its share of what was served, per {WINDOW_S:.0f} s: {', '.join(f'{share:.1%}' for share in shares)}")
    return min(shares) >= MIN_SHARE - 2.0 / (CAPACITY * WINDOW_S)  # requests are not divided: one at either end


async def tenants_share_by_weight(site: Site, seconds: float) -> bool:
    print(f"3. two tenants that both wait, weights {WEIGHTS['ann']:.0f} and {WEIGHTS['bob']:.0f}")
    _, router = leader(site)
    async with Clients(site.grpc, seed=3) as clients:
        await settled_lengths(clients)
        backlog = {
            tenant: [clients.ask(tenant) for _ in range(int(1.5 * CAPACITY * seconds * weight / sum(WEIGHTS.values())))]
            for tenant, weight in WEIGHTS.items()
        }
        await asyncio.sleep(1.0)
        gaps = []
        until = time.monotonic() + seconds - 2.0
        while time.monotonic() < until:
            found = await asyncio.to_thread(accounting, router)
            if {depth.name for depth in found.queue_by_tenant if depth.requests} >= WEIGHTS.keys():
                gaps.append(abs(found.service["ann"] - found.service["bob"]))
            await asyncio.sleep(0.05)
        served = {tenant: sum(each.first_s > 0 for each in asked) for tenant, asked in backlog.items()}
    await settled(site)
    ratio = served["ann"] / max(1, served["bob"])
    bound = 2.0 * LARGEST
    print(
        f"   served {served['ann']} and {served['bob']} requests ({ratio:.2f} to 1); service per weight was apart by "
        f"at most {max(gaps):.0f} tokens, seen {len(gaps)} times; bound {bound:.0f}: two of the largest requests"
    )
    return max(gaps) <= bound and len(gaps) > 20


async def settled_lengths(clients: Clients) -> None:
    """Until the router knows how short the outputs are: what it charges at first is the default length."""
    for _ in range(10):
        for tenant in WEIGHTS:
            clients.ask(tenant)
        await clients.done(60.0)


async def order_outlives_the_leader(site: Site, seconds: float) -> bool:
    print("4. the leader is killed while 40 background and 60 top requests of two tenants wait")
    name, router = leader(site)
    async with Clients(site.grpc, seed=4) as clients:
        await settled_lengths(clients)
        batch = [clients.ask("bob", "batch") for _ in range(40)]
        top = [clients.ask(tenant, "top") for _ in range(30) for tenant in WEIGHTS]
        await asyncio.sleep(1.5)
        before = dict((await asyncio.to_thread(accounting, router)).service)
        await asyncio.sleep(1.2)  # counters are saved every second
        killed = time.monotonic()
        pid = site.signal(name, signal.SIGKILL)
        await clients.done(120.0)
        complete = all(each.complete for each in clients.asked)
        _, after_router = leader(site)
        after = dict((await asyncio.to_thread(accounting, after_router)).service)
        await asyncio.to_thread(site.wait_restarted, name, pid, 30.0)
    await settled(site)
    answers = sorted(each.first_s for each in clients.asked if each.first_s > killed)
    gap = max(b - a for a, b in pairwise([killed, *answers]))
    last_top = max(each.first_s for each in top)
    later = [each for each in (*batch, *top) if killed < each.first_s <= last_top]
    early = sum(each.request_class == "batch" for each in later) / max(1, len(later))
    kept = all(after[tenant] >= before[tenant] for tenant in before)
    print(
        f"   all complete: {complete}; longest time without a first token {gap:.1f} s; of what was served while "
        f"top requests waited, background had {early:.1%} (promised {MIN_SHARE:.0%}); "
        f"service before {_rounded(before)}, after {_rounded(after)}"
    )
    return complete and kept and early <= 2.0 * MIN_SHARE


def _rounded(service: dict[str, float]) -> dict[str, int]:
    return {name: round(value) for name, value in sorted(service.items())}


async def run(site: Site, seconds: float) -> int:
    claims: list[Callable[[Site, float], Awaitable[bool]]] = [
        top_class_is_steady, background_gets_its_share, tenants_share_by_weight, order_outlives_the_leader,
    ]  # fmt: skip
    async with Clients(site.grpc) as clients:
        await settled_lengths(clients)
    held = []
    for claim in claims:
        held.append(await claim(site, seconds))
        print(f"   {'holds' if held[-1] else 'DOES NOT HOLD'}\n", flush=True)
    print(f"{sum(held)} of {len(held)} claims hold")
    return 0 if all(held) else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=15.0, help="of load for each measurement (at least 12)")
    args = parser.parse_args()
    if args.seconds < 12.0:
        parser.error("--seconds must be at least 12")
    tenants = [{"name": name, "weight": w, "api_key_sha256": [digest(name)]} for name, w in WEIGHTS.items()]
    with tempfile.TemporaryDirectory(prefix="tandem-bench-") as folder:
        wanted = deployment(routers=2, decode=WORKERS, tenants=tenants)
        site = Site({**wanted, "record": {"folder": str(Path(folder, RECORDED))}}, Path(folder))
        with site.start(90.0):
            return asyncio.run(run(site, args.seconds))


if __name__ == "__main__":
    sys.exit(main())

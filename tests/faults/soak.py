"""Steady mixed load with cancellations for an hour, on the simulated engine: does anything grow?

Memory, file descriptors and threads of every process, Redis keys, bytes that wait in NATS, KV blocks, open handoffs
and what the routers keep are sampled all the time. Begin and end are measured alike: nobody asks anything for a minute
(what is kept for gap repair and against late aborts has gone by then), prefix caches emptied. The difference is the
verdict.

    python -m tests.faults.soak --minutes 60 --rate 1.5 --out build/soak
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import httpx
import psutil
import redis.asyncio

from tandem.adapters.embedded import NatsServer, RedisServer, free_port
from tests.faults.charts import Panel, svg
from tests.harness.answers import SimAnswers
from tests.harness.client import flush
from tests.harness.load import Load
from tests.harness.site import Site, accounting_of, deployment

SAMPLE_S = 10.0
#: Longer than finished requests and fences are remembered.
REST_S = 65.0
START_S = 90.0
#: From an emptied prefix cache to an emptied index, also on a machine that is too busy to answer Redis in time.
EMPTIED_S = 10.0
#: Of 100 requests: so many are cancelled at a random moment.
CANCELLED = 20
CANCEL_WITHIN_S = 3.0
OSL = (10, 40, 40, 80, 160)
ISL = ((20, 100), (100, 400), (400, 1500))


@dataclass(frozen=True)
class Sample:
    """Everything that could grow, at one moment. Memory in MB, by process."""

    minute: float
    memory: dict[str, float]
    files: dict[str, int]
    threads: dict[str, int]
    cpu_s: dict[str, float]
    redis_keys: int
    redis_memory: float
    nats_pending: int
    nats_subscriptions: int
    nats_slow_consumers: int
    kv_blocks: int
    open_handoffs: int
    router_kept: int
    in_flight: int


@dataclass
class Counts:
    started: int = 0
    complete: int = 0
    cancelled: int = 0
    failed: dict[str, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)


class Probe:
    """Looks at a cluster whose servers are ours."""

    def __init__(self, site: Site, nats: NatsServer, monitor: int, store: RedisServer) -> None:
        self._site = site
        self._servers = {"nats-server": nats.pid, "redis": store.pid}
        # nats-server closes connections that are idle for long, perhaps just when the next question is on its way.
        alone = httpx.Limits(max_keepalive_connections=0)
        self._http = httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{monitor}", trust_env=False, timeout=30.0, limits=alone
        )
        self._redis = redis.asyncio.Redis.from_url(store.url)
        self._began = time.monotonic()

    async def close(self) -> None:
        await self._http.aclose()
        await self._redis.aclose()

    def restart_clock(self) -> None:
        self._began = time.monotonic()

    async def sample(self) -> Sample:
        pids = {p["name"]: p["pid"] for p in self._site.state()["processes"]} | self._servers
        processes = {name: psutil.Process(pid) for name, pid in sorted(pids.items())}
        server = (await self._http.get("/varz")).json()
        connections = (await self._http.get("/connz", params={"limit": 1000})).json()["connections"]
        memory = await self._redis.info("memory")
        loads = (await asyncio.to_thread(self._site.loads)).values()
        routers = [await asyncio.to_thread(accounting_of, r["grpc"]) for r in self._site.processes("router")]
        return Sample(
            minute=(time.monotonic() - self._began) / 60,
            memory={name: process.memory_info().rss / 1e6 for name, process in processes.items()},
            files={name: process.num_fds() for name, process in processes.items()},
            threads={name: process.num_threads() for name, process in processes.items()},
            cpu_s={name: sum(process.cpu_times()[:2]) for name, process in processes.items()},
            redis_keys=await self._redis.dbsize(),
            redis_memory=memory["used_memory"] / 1e6,
            nats_pending=sum(connection["pending_bytes"] for connection in connections),
            nats_subscriptions=server["subscriptions"],
            nats_slow_consumers=server["slow_consumers"],
            kv_blocks=sum(load.load.kv_blocks_used for load in loads),
            open_handoffs=sum(load.load.open_handoffs for load in loads),
            router_kept=sum(accounting.kept for accounting in routers),
            in_flight=sum(accounting.in_flight for accounting in routers),
        )

    async def at_rest(self, rest_s: float) -> Sample:
        """Nothing runs, nothing is remembered of what did, prefix caches are empty."""
        await asyncio.to_thread(self._site.settled)
        await asyncio.sleep(rest_s)
        for worker in self._site.workers():
            await asyncio.to_thread(flush, worker["grpc"])
        await asyncio.sleep(EMPTIED_S)
        return await self.sample()


async def requests(load: Load, rate: float, seconds: float, rng: random.Random, counts: Counts) -> None:
    """Poisson arrivals of all kinds; a fifth of the clients leaves early. Forgets each when it has ended."""
    leaving: set[asyncio.Task[None]] = set()
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        [stream] = load.start(
            1, rng.choice((10, 40, 40, 80, 160)), isl=rng.choice(((20, 100), (100, 400), (400, 1500)))
        )
        counts.started += 1
        if rng.randrange(100) < CANCELLED:
            leaving.add(task := asyncio.create_task(_leave(stream.task, rng.uniform(0.0, CANCEL_WITHIN_S))))
            task.add_done_callback(leaving.discard)
        await asyncio.sleep(rng.expovariate(rate))
        _tally(load, counts)
    await load.ended(60.0)
    await asyncio.gather(*leaving)
    _tally(load, counts)


async def _leave(task: asyncio.Task[None] | None, after_s: float) -> None:
    await asyncio.sleep(after_s)
    if task is not None:
        task.cancel()


def _tally(load: Load, counts: Counts) -> None:
    for stream in [s for s in load.streams if s.task is not None and s.task.done()]:
        assert stream.task is not None
        if stream.wrong:
            counts.wrong.append(stream.wrong)
        elif stream.error is not None:
            counts.failed[stream.error.code] = counts.failed.get(stream.error.code, 0) + 1
        elif stream.complete:
            counts.complete += 1
        else:
            counts.cancelled += 1
        load.streams.remove(stream)


@asynccontextmanager
async def cluster(folder: Path) -> AsyncIterator[tuple[Site, Probe]]:
    """Two routers, one prefill and two decode workers, one frontend; NATS watched, Redis ours to ask."""
    monitor = free_port()
    async with NatsServer(extra_config=f"http: 127.0.0.1:{monitor}") as nats, RedisServer() as store:
        env = {"TANDEM_NATS_URL": nats.url, "TANDEM_REDIS_URL": store.url}
        site = Site(deployment(routers=2, step_s=0.05), folder, env=env)
        await asyncio.to_thread(site.start, START_S)
        probe = Probe(site, nats, monitor, store)
        try:
            yield site, probe
        finally:
            await probe.close()
            await asyncio.to_thread(site.stop)


async def soak(minutes: float, rate: float, rest_s: float, seed: int, folder: Path) -> tuple[list[Sample], Counts]:
    """The samples: at rest, all along, at rest."""
    rng, counts = random.Random(seed), Counts()
    async with cluster(folder) as (site, probe):
        async with Load(site.addresses, SimAnswers(), seed=seed, http_every=2) as load:
            await requests(load, rate, min(180.0, 6.0 * minutes), rng, Counts())  # first times cost memory once
        samples = [await probe.at_rest(rest_s)]
        probe.restart_clock()
        async with Load(site.addresses, SimAnswers(), seed=seed + 1, http_every=2) as load:
            running = asyncio.create_task(requests(load, rate, 60.0 * minutes, rng, counts))
            while not running.done():
                samples.append(await probe.sample())
                print(_line(samples[-1], counts), flush=True)
                with suppress(TimeoutError):
                    await asyncio.wait_for(asyncio.shield(running), SAMPLE_S)
            await running
        samples.append(await probe.at_rest(rest_s))
    return samples, counts


def _line(sample: Sample, counts: Counts) -> str:
    return (
        f"{sample.minute:6.1f} min  {sum(sample.memory.values()):7.1f} MB  {sum(sample.files.values()):5} files  "
        f"{sample.redis_keys:6} keys  {sample.nats_pending:6} B pending  {sample.kv_blocks:5} KV blocks  "
        f"{counts.complete} complete, {counts.cancelled} cancelled, {sum(counts.failed.values())} failed"
    )


#: A pool of connections to Redis keeps what its busiest moment needed, up to a bound; Redis sees all of them.
_POOLS = {"redis": 16, "router-1": 8, "router-2": 8}


@dataclass(frozen=True)
class Verdict:
    what: str
    begin: float
    end: float
    #: By how much the end may exceed the beginning.
    slack: float

    @property
    def good(self) -> bool:
        return self.end <= self.begin + self.slack


def verdicts(samples: Sequence[Sample]) -> list[Verdict]:
    begin, end = samples[0], samples[-1]
    found = [
        # An allocator keeps what the busiest moment needed; growth with time is more than that.
        *(Verdict(f"memory of {n}, MB", m, end.memory.get(n, 0.0), max(8.0, 0.1 * m)) for n, m in begin.memory.items()),
        *(Verdict(f"files of {n}", f, end.files.get(n, 0), _POOLS.get(n, 2)) for n, f in begin.files.items()),
        *(Verdict(f"threads of {n}", t, end.threads.get(n, 0), 4) for n, t in begin.threads.items()),
        Verdict("Redis memory, MB", begin.redis_memory, end.redis_memory, 1.0),
    ]
    plain = ("redis_keys", "nats_pending", "nats_subscriptions", "nats_slow_consumers", "kv_blocks")
    names = (*plain, "open_handoffs", "router_kept", "in_flight")
    return found + [Verdict(name.replace("_", " "), getattr(begin, name), getattr(end, name), 0) for name in names]


def chart(samples: Sequence[Sample]) -> str:
    names = list(samples[0].memory)
    of = lambda key: {n: [getattr(s, key).get(n, 0) for s in samples] for n in names}  # noqa: E731
    one = lambda key: [float(getattr(s, key)) for s in samples]  # noqa: E731
    panels = [
        Panel("Memory (RSS), MB", of("memory")),
        Panel("Open file descriptors", of("files")),
        Panel("Redis keys", {"keys": one("redis_keys")}),
        Panel("Bytes waiting in NATS", {"pending": one("nats_pending")}),
        Panel("KV blocks in use, open handoffs", {"blocks": one("kv_blocks"), "handoffs": one("open_handoffs")}),
        Panel("Requests in the routers", {"in flight": one("in_flight"), "kept": one("router_kept")}),
    ]
    return svg("Soak: simulated engine, steady mixed load", [s.minute for s in samples], panels)


def page(samples: Sequence[Sample], counts: Counts, command: str) -> str:
    busy = [b - a for a, b in zip(_cpu(samples[0]), _cpu(samples[-1]), strict=False)]
    rows = [
        f"| {v.what} | {v.begin:.1f} | {v.end:.1f} | {v.end - v.begin:+.1f} | {'yes' if v.good else '**no**'} |"
        for v in verdicts(samples)
    ]
    return "\n".join(
        [
            "# Soak",
            "",
            f"Written by `{command}` on the *simulated* engine: two routers, one prefill worker, two decode workers, "
            f"one frontend, NATS and Redis; {platform.machine()}, {psutil.cpu_count()} cores, commit `{_commit()}`.",
            "",
            f"{samples[-2].minute:.0f} minutes of steady load, half gRPC, half HTTP (streamed or not), prompts of 20 "
            "to 1,500 tokens, 10 to 160 tokens of output, every fifth client told to leave at a random moment: "
            f"{counts.started} requests, of which {counts.complete} completed with every token as expected, "
            f"{counts.cancelled} were cancelled, {sum(counts.failed.values())} failed{_codes(counts)}, "
            f"{len(counts.wrong)} had a wrong token. "
            f"The processes together took {sum(busy) / max(1e-9, 60 * samples[-1].minute):.2f} cores.",
            "",
            "Begin and end are measured alike: after a minute without requests, prefix caches emptied. The first "
            "minutes of load, which fill caches once, come before the beginning. A router's pool of connections to "
            "Redis keeps what its busiest moment needed, up to a bound.",
            "",
            "![Chart](soak.svg)",
            "",
            "| | begin | end | change | within bounds |",
            "|---|---:|---:|---:|---|",
            *rows,
            "",
        ]
    )


def _cpu(sample: Sample) -> list[float]:
    return list(sample.cpu_s.values())


def _codes(counts: Counts) -> str:
    return f" ({', '.join(f'{code}: {n}' for code, n in counts.failed.items())})" if counts.failed else ""


def _commit() -> str:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--rate", type=float, default=1.5, help="requests per second")
    parser.add_argument("--rest", type=float, default=REST_S, help="seconds of rest before begin and end are measured")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("build/soak"), help="folder of soak.md, soak.svg, soak.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tandem-soak-") as folder:
        samples, counts = asyncio.run(soak(args.minutes, args.rate, args.rest, args.seed, Path(folder)))
    text = page(samples, counts, f"make soak MINUTES={args.minutes:g}")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "soak.md").write_text(text)
    (args.out / "soak.svg").write_text(chart(samples))
    (args.out / "soak.json").write_text(json.dumps([asdict(s) for s in samples]))
    print(text)
    return 0 if all(v.good for v in verdicts(samples)) and not counts.wrong and not counts.failed else 1


if __name__ == "__main__":
    sys.exit(main())

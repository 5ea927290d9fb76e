"""What one router process sustains and what it adds to a request, with real NATS and Redis.

    python -m bench.bench_router [--workers 8 64 256 512 1000] [--rates 1000] [--blocks 1000000]
    python -m bench.bench_router --latency [--workers 256] [--rates 100 300]

A real router process on one core; NATS, Redis and this driver share the rest. The driver plays the frontends
(prompts of 1,000 tokens, four fifths of which begin like something that a worker holds) and the workers: they report
their load ten times a second each, and tell of every request at once that its prompt is computed, that it decodes and
that it has ended. So all the router's work is there, and no engine. The prefix index holds ``--blocks`` blocks.

**How many.** An open loop in ticks of 5 ms. A rate is sustained if the router placed 98 % of what was asked within the
time, and half of it within 50 ms. First the workers only report: what the router takes then is taken off what it
takes under load; the rest is the cost of a placement. Where the driver's share of its core nears one, the driver is
what is measured.

**How long** (``--latency``). Requests arrive at random times, each by itself; load reports are sent each millisecond,
and what workers have to say at once. Redis may use all cores here: mostly it runs on the router's, which waits for it.
Four times, from the inside out: a look at the queue that placed something and the look-up in the index (both from the
router's histograms, interpolated within a bucket), from the request's arrival at the router to its assignment (which
the assignment itself says), and from the driver's publish to the assignment back at the driver.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import tempfile
import time
import urllib.request
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import uvloop
import yaml
from prometheus_client.parser import text_string_to_metric_families

from bench.bench_index import Load, fill, make_load, question
from bench.bench_index import worker_spec as indexed_spec
from bench.serve.load import cpu_s, machine_busy_s
from tandem.adapters.embedded import NatsServer, RedisServer, free_port
from tandem.adapters.nats_bus import Message, NatsBus
from tandem.adapters.redis_client import connect
from tandem.adapters.redis_store import RedisPrefixIndex, RedisRegistry
from tandem.core.types import Role, WorkerAddress, WorkerLoad, WorkerSpec
from tandem.telemetry import metric_table
from tandem.telemetry.metric_table import Metric
from tandem.v1 import bus_pb2, types_pb2
from tandem.wire import codec, subjects

CLUSTER, MODEL, FRONTEND = "bench", "bench", "driver"
BLOCK, PROMPT_TOKENS, OUTPUT_TOKENS = 16, 1000, 100
CORES = sorted(os.sched_getaffinity(0))
TICK_S, FINE_TICK_S, REPORT_S, START_S, QUIET_S = 0.005, 0.001, 0.1, 60.0, 3.0
KV_BLOCKS = 65_536
ENDED = (bus_pb2.PHASE_PREFILL_DONE, bus_pb2.PHASE_DECODING, bus_pb2.PHASE_FINISHED)


def worker_spec(number: int) -> WorkerSpec:
    """Every second one prefills."""
    return replace(
        indexed_spec(number),
        address=WorkerAddress(f"w{number}", 1, "127.0.0.1:1"),
        role=Role.PREFILL if number % 2 else Role.DECODE,
        block_size=BLOCK,
        dtype="bfloat16",
        kv_layout="bench",
        engine="sim",
        max_model_len=32_768,
        kv_blocks_total=KV_BLOCKS,
        kv_bytes_per_token=1000,
        max_batched_tokens=8192,
        max_num_seqs=1024,
        perf_profile="sim-h100-llama-8b-tp1",
        kv_endpoint="127.0.0.1:1",
        link_bytes_per_s=50e9,
    )


class Driver:
    """Frontends and workers in one."""

    def __init__(self, bus: NatsBus, specs: list[WorkerSpec], load: Load, *, fine: bool) -> None:
        """``fine``: requests at random times, reports each millisecond, and workers answer at once."""
        self._bus = bus
        self._fine = fine
        self._tick_s = FINE_TICK_S if fine else TICK_S
        self._specs = {spec.id: spec for spec in specs}
        self._load = load
        self._rng = random.Random(1)
        self._router = ""
        self._led = asyncio.Event()
        self._sent: dict[str, float] = {}
        self._ended: dict[str, list[types_pb2.RequestKey]] = defaultdict(list)
        self._count = 0
        self.waits_s: list[float] = []
        self.queued_s: list[float] = []  # of these, in the router, as it says
        self.rejects = 0

    async def begin(self) -> None:
        await self._bus.subscribe(subjects.leader(CLUSTER, MODEL), self._on_leader)
        await self._bus.subscribe(f"tandem.{CLUSTER}.work.*", self._on_work)
        await self._bus.subscribe(subjects.tokens(CLUSTER, FRONTEND), self._on_frame)
        async with asyncio.timeout(START_S):
            await self._led.wait()

    def _on_leader(self, message: Message) -> None:
        self._router = bus_pb2.LeaderAnnouncement.FromString(message.data).router
        self._led.set()

    def _on_frame(self, message: Message) -> None:
        self.rejects += len(bus_pb2.TokenFrame.FromString(message.data).rejects)

    def _on_work(self, message: Message) -> None:
        for assignment in bus_pb2.WorkerMessage.FromString(message.data).assignments:
            key = bus_pb2.Submit.FromString(assignment.submit).key
            began = self._sent.pop(key.id, None)
            if began is not None:
                self.waits_s.append(time.perf_counter() - began)
                self.queued_s.append(assignment.queued_s)
            if self._fine and not self._ended:
                asyncio.get_running_loop().call_soon(self._tell)
            self._ended[subjects.last_token(message.subject)].append(key)

    def requests(self, count: int) -> list[tuple[str, bytes]]:
        """Made ahead of time: making them is no router's work."""
        made = []
        for _ in range(count):
            self._count += 1
            key = types_pb2.RequestKey(id=f"r{self._count:012}")
            length = PROMPT_TOKENS // BLOCK
            known = self._rng.random() < 0.8
            hashes = question(self._load, length, self._rng) if known else self._rng.randbytes(8 * length)
            submit = bus_pb2.Submit(
                key=key, model=MODEL, frontend=FRONTEND, rid=self._count, timeout_ms=60_000, isl_tokens=PROMPT_TOKENS,
                prompt=bytes(4 * PROMPT_TOKENS), block_hashes=hashes,
                sampling=types_pb2.SamplingParams(max_tokens=OUTPUT_TOKENS),
            )  # fmt: skip
            made.append((key.id, bus_pb2.Submits(submits=[submit.SerializeToString()]).SerializeToString()))
        return made

    async def run(self, rate: float, seconds: float) -> None:
        """Open loop; the workers report all the while."""
        requests = self.requests(int(rate * seconds))
        reports = [(subjects.load(CLUSTER, spec.id), self._report(spec)) for spec in self._specs.values()]
        began = time.perf_counter()
        apart = asyncio.create_task(self._send_at_random(requests, seconds)) if self._fine else None
        sent = reported = 0
        while (now := time.perf_counter() - began) < seconds:
            while apart is None and sent < min(len(requests), int(now * rate)):
                self._send(requests[sent])
                sent += 1
            for _ in range(int(now / REPORT_S * len(reports)) - reported):
                self._bus.publish(*reports[reported % len(reports)])
                reported += 1
            self._tell()
            await asyncio.sleep(self._tick_s)
        if apart is not None:
            await apart

    async def _send_at_random(self, requests: Sequence[tuple[str, bytes]], seconds: float) -> None:
        """By a thread that sleeps: the loop's own timers are good to a millisecond, and bunch what is due in one."""
        began = time.perf_counter()
        times = sorted(self._rng.uniform(0.0, seconds) for _ in requests)
        for request, due in zip(requests, times, strict=True):
            if (wait_s := began + due - time.perf_counter()) > 0.0:
                await asyncio.to_thread(time.sleep, wait_s)
            self._send(request)

    def _send(self, request: tuple[str, bytes]) -> None:
        key, submits = request
        self._sent[key] = time.perf_counter()
        subject, reply = subjects.requests(CLUSTER, MODEL, self._router), subjects.tokens(CLUSTER, FRONTEND)
        self._bus.publish(subject, submits, reply)

    def _tell(self) -> None:
        """What has ended since."""
        subject = subjects.events(CLUSTER, MODEL)
        for worker, keys in self._ended.items():
            events = [
                bus_pb2.LifecycleEvent(key=key, phase=phase, output_tokens=OUTPUT_TOKENS)
                for key in keys
                for phase in ENDED
            ]
            about = codec.address_to_wire(self._specs[worker].address)
            self._bus.publish(subject, bus_pb2.LifecycleEvents(worker=about, events=events).SerializeToString())
        self._ended.clear()

    def _report(self, spec: WorkerSpec) -> bytes:
        load = WorkerLoad(spec.id, spec.address.incarnation, kv_blocks_total=KV_BLOCKS, role=spec.role)
        report = codec.load_to_wire(load)
        report.worker.CopyFrom(codec.address_to_wire(spec.address))
        report.model = MODEL
        return report.SerializeToString()

    async def settle(self) -> None:
        """What is under way ends."""
        await self.run(0.0, 0.5)
        self.waits_s.clear()
        self.queued_s.clear()
        self._sent.clear()


@asynccontextmanager
async def router(nats: str, redis: str, folder: Path, metrics_port: int) -> AsyncIterator[int]:
    """Its process, on the first core."""
    deployment = {
        "cluster": CLUSTER,
        "models": [{"name": MODEL, "path": MODEL, "pools": [{"role": "aggregated", "engine": "sim"}]}],
        "console": {"enabled": False},
    }
    (folder / "deployment.yaml").write_text(yaml.safe_dump(deployment))
    env = {k: v for k, v in os.environ.items() if not k.startswith("TANDEM_")} | {
        "TANDEM_NATS_URL": nats, "TANDEM_REDIS_URL": redis, "TANDEM_DEPLOYMENT": str(folder / "deployment.yaml"),
        "TANDEM_LOG_LEVEL": "ERROR", "TANDEM_METRICS_PORT": str(metrics_port),
    }  # fmt: skip
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "services.router", env=env)
    try:
        os.sched_setaffinity(process.pid, {0})
        yield process.pid
    finally:
        process.terminate()
        await asyncio.wait_for(process.wait(), 30.0)


@dataclass(frozen=True)
class Bench:
    driver: Driver
    workers: int
    metrics_port: int
    pids: dict[str, int]

    def cpu_s(self) -> dict[str, float]:
        """Of each process, and of all others on the machine."""
        spent = {name: cpu_s(pid) for name, pid in self.pids.items()}
        return spent | {"others": machine_busy_s() - sum(spent.values())}


@asynccontextmanager
async def open_bench(workers: int, blocks: int, *, fine: bool) -> AsyncIterator[Bench]:
    load = make_load(workers, blocks, random.Random(workers))
    with tempfile.TemporaryDirectory(prefix="tandem-bench-") as name:
        async with NatsServer() as nats, RedisServer() as redis:
            client = await connect(redis.url, timeout_s=10.0)
            registry, index = RedisRegistry(client, CLUSTER), RedisPrefixIndex(client, CLUSTER)
            specs = [await registry.register(worker_spec(i), ttl_s=3600) for i in range(workers)]
            await fill(index, specs, load)
            bus = await NatsBus.connect(nats.url, name="driver")
            port = free_port()
            async with router(nats.url, redis.url, Path(name), port) as pid:
                if fine:
                    os.sched_setaffinity(redis.pid, CORES)
                driver = Driver(bus, specs, load, fine=fine)
                await driver.begin()
                await driver.run(0.0, QUIET_S)  # the new leader has told every worker of itself
                await driver.run(200.0, 2.0)
                pids = {"router": pid, "driver": os.getpid(), "nats": nats.pid, "redis": redis.pid}
                yield Bench(driver, workers, port, pids)
            await bus.close()
            await client.aclose()


# -- how many ----------------------------------------------------------------------------------------------------------


async def measure(workers: int, rates: Sequence[float], blocks: int, seconds: float) -> list[dict[str, float]]:
    found = []
    async with open_bench(workers, blocks, fine=False) as bench:
        driver = bench.driver
        for rate in rates:
            await driver.settle()
            rest_s = bench.cpu_s()["router"]
            await driver.run(0.0, seconds)
            cpu, rejects = bench.cpu_s(), driver.rejects
            rest_s = cpu["router"] - rest_s
            await driver.run(rate, seconds)
            cpu = {name: after - cpu[name] for name, after in bench.cpu_s().items()}
            found.append(row(workers, rate, seconds, driver.waits_s, cpu, rest_s, driver.rejects - rejects))
            print(json.dumps(found[-1]), flush=True)
            if not found[-1]["sustained"]:
                break  # what is queued now would be in the way of the next
    return found


def row(
    workers: int,
    rate: float,
    seconds: float,
    waits_s: Sequence[float],
    cpu_s: dict[str, float],
    rest_s: float,
    rejects: int,
) -> dict[str, float]:
    """``rest_s``: CPU of the router in as much time with reports only."""
    waits, placed = _Sorted(waits_s), len(waits_s)
    return {
        "workers": workers,
        "asked_per_s": rate,
        "placed_per_s": round(placed / seconds, 1),
        "rejected": rejects,
        "p50_ms": round(1e3 * waits.at(0.5), 2),
        "p99_ms": round(1e3 * waits.at(0.99), 2),
        "router_us_per_request": round(1e6 * cpu_s["router"] / max(1, placed)),
        "router_us_per_placement": round(1e6 * (cpu_s["router"] - rest_s) / max(1, placed)),
        "router_us_per_report": round(1e6 * rest_s * REPORT_S / seconds / workers, 1),
        "router_cpu_reports_only": round(rest_s / seconds, 3),
        **{f"{name}_cpu": round(spent / seconds, 3) for name, spent in cpu_s.items()},
        "sustained": placed >= 0.98 * rate * seconds and waits.at(0.5) < 0.05,
    }


# -- how long ----------------------------------------------------------------------------------------------------------


async def latency(workers: int, rates: Sequence[float], blocks: int, seconds: float) -> list[dict[str, float]]:
    found = []
    async with open_bench(workers, blocks, fine=True) as bench:
        for rate in rates:
            await bench.driver.settle()
            decisions, lookups = (Buckets(metric) for metric in (metric_table.DECISION, metric_table.INDEX_LOOKUP))
            for histogram in (decisions, lookups):
                await histogram.begin(bench.metrics_port)
            before = bench.cpu_s()
            await bench.driver.run(rate, seconds)
            cpu = {f"{name}_cpu": round((after - before[name]) / seconds, 3) for name, after in bench.cpu_s().items()}
            for histogram in (decisions, lookups):
                await histogram.end(bench.metrics_port)
            times = {
                "decision": decisions.at,
                "lookup": lookups.at,
                "in_router": _Sorted(bench.driver.queued_s).at,
                "driver_to_driver": _Sorted(bench.driver.waits_s).at,
            }
            found.append(
                {"workers": workers, "asked_per_s": rate, "placed": len(bench.driver.waits_s)}
                | {f"{name}_p{q}_ms": round(1e3 * at(q / 100), 3) for name, at in times.items() for q in (50, 99)}
                | {"in_router_within_1_ms": round(_share_within(bench.driver.queued_s, 1e-3), 3)}
                | cpu
            )
            print(json.dumps(found[-1]), flush=True)
    return found


def _share_within(values: Sequence[float], bound: float) -> float:
    return sum(value <= bound for value in values) / max(1, len(values))


class _Sorted:
    def __init__(self, values: Sequence[float]) -> None:
        self._values = sorted(values)

    def at(self, share: float) -> float:
        return self._values[int(share * len(self._values))] if self._values else 0.0


class Buckets:
    """What a histogram of the router has counted between two looks."""

    def __init__(self, metric: Metric) -> None:
        self._metric = metric
        self._counts: list[float] = []

    async def begin(self, port: int) -> None:
        self._counts = await self._read(port)

    async def end(self, port: int) -> None:
        self._counts = [after - before for before, after in zip(self._counts, await self._read(port), strict=True)]

    async def _read(self, port: int) -> list[float]:
        def text() -> str:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10.0) as answer:
                return str(answer.read().decode())

        families = text_string_to_metric_families(await asyncio.to_thread(text))
        samples = next(family.samples for family in families if family.name == self._metric.name)
        return [sample.value for sample in samples if sample.name.endswith("_bucket")]

    def at(self, share: float) -> float:
        """Interpolated within a bucket; what is beyond the last is its bound."""
        bounds, wanted = (0.0, *self._metric.buckets), share * self._counts[-1]
        below = 0.0
        for (low, high), count in zip(pairwise(bounds), self._counts, strict=False):
            if count >= wanted and count > below:
                return low + (high - low) * (wanted - below) / (count - below)
            below = count
        return bounds[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--latency", action="store_true", help="how long a placement takes, instead of how many there are")
    add("--workers", type=int, nargs="*")
    add("--rates", type=float, nargs="*")
    add("--blocks", type=int, default=1_000_000)
    add("--seconds", type=float, default=5.0, help="of each rate")
    add("--output", type=Path, default=Path("build/bench-router.json"))
    args = parser.parse_args()
    os.sched_setaffinity(0, CORES[1:] or CORES)  # and with it NATS and Redis
    part = latency if args.latency else measure
    fleets = args.workers or ([256] if args.latency else [64, 256])
    rates = args.rates or ([100.0, 300.0] if args.latency else [1000.0, 2000.0, 3000.0, 4000.0])
    found: list[dict[str, float]] = []
    for workers in fleets:
        found += uvloop.run(part(workers, rates, args.blocks, args.seconds))
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(found, indent=1))
    print(f"All of it: {args.output}")


if __name__ == "__main__":
    main()

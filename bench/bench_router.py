"""How many placements a second one router process sustains, with real NATS and Redis.

    python -m bench.bench_router [--workers 64 256] [--rates 1000 2000 3000 4000] [--blocks 1000000]

A real router process on a core of its own; NATS, Redis and this driver share the rest. The driver plays the frontends
(prompts of 1,000 tokens, four fifths of which begin like something that a worker holds) and the workers: they report
their load ten times a second each, and tell of every request at once that its prompt is computed, that it decodes and
that it has ended. So all the router's work is there, and no engine. The prefix index holds ``--blocks`` blocks.

A rate is sustained if the router placed 98 % of what was asked within the time, and half of it within 50 ms.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import yaml

from bench.bench_index import Load, fill, make_load, question
from bench.bench_index import worker_spec as indexed_spec
from bench.serve.load import cpu_s
from tandem.adapters.embedded import NatsServer, RedisServer
from tandem.adapters.nats_bus import Message, NatsBus
from tandem.adapters.redis_client import connect
from tandem.adapters.redis_store import RedisPrefixIndex, RedisRegistry
from tandem.core.types import Role, WorkerAddress, WorkerLoad, WorkerSpec
from tandem.v1 import bus_pb2, types_pb2
from tandem.wire import codec, subjects

CLUSTER, MODEL, FRONTEND = "bench", "bench", "driver"
BLOCK, PROMPT_TOKENS, OUTPUT_TOKENS = 16, 1000, 100
TICK_S, REPORT_S, START_S = 0.005, 0.1, 60.0
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

    def __init__(self, bus: NatsBus, specs: list[WorkerSpec], load: Load) -> None:
        self._bus = bus
        self._specs = {spec.id: spec for spec in specs}
        self._load = load
        self._rng = random.Random(1)
        self._router = ""
        self._led = asyncio.Event()
        self._sent: dict[str, float] = {}
        self._ended: dict[str, list[types_pb2.RequestKey]] = defaultdict(list)
        self._count = 0
        self.waits_s: list[float] = []
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
        assignment = bus_pb2.WorkerMessage.FromString(message.data).assignment
        if not assignment.submit:
            return
        key = bus_pb2.Submit.FromString(assignment.submit).key
        began = self._sent.pop(key.id, None)
        if began is not None:
            self.waits_s.append(time.perf_counter() - began)
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
            made.append((key.id, submit.SerializeToString()))
        return made

    async def run(self, rate: float, seconds: float) -> None:
        """Open loop; the workers report all the while."""
        waiting = iter(self.requests(int(rate * seconds)))
        subject, reply = subjects.requests(CLUSTER, MODEL, self._router), subjects.tokens(CLUSTER, FRONTEND)
        reports = [(subjects.load(CLUSTER, spec.id), self._report(spec)) for spec in self._specs.values()]
        began = time.perf_counter()
        sent = reported = 0
        while (now := time.perf_counter() - began) < seconds:
            for _ in range(int(now * rate) - sent):
                request = next(waiting, None)
                if request is None:
                    break
                self._sent[request[0]] = time.perf_counter()
                self._bus.publish(subject, request[1], reply)
                sent += 1
            for _ in range(int(now / REPORT_S * len(reports)) - reported):
                self._bus.publish(*reports[reported % len(reports)])
                reported += 1
            self._tell()
            await asyncio.sleep(TICK_S)

    def _tell(self) -> None:
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
        await self.run(0.0, 1.0)
        self.waits_s.clear()
        self._sent.clear()


@asynccontextmanager
async def router(nats: str, redis: str, folder: Path) -> AsyncIterator[int]:
    """Its process, on the first core."""
    deployment = {
        "cluster": CLUSTER,
        "models": [{"name": MODEL, "path": MODEL, "pools": [{"role": "aggregated", "engine": "sim"}]}],
        "console": {"enabled": False},
    }
    (folder / "deployment.yaml").write_text(yaml.safe_dump(deployment))
    env = {k: v for k, v in os.environ.items() if not k.startswith("TANDEM_")} | {
        "TANDEM_NATS_URL": nats, "TANDEM_REDIS_URL": redis, "TANDEM_DEPLOYMENT": str(folder / "deployment.yaml"),
        "TANDEM_LOG_LEVEL": "ERROR",
    }  # fmt: skip
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "services.router", env=env)
    try:
        os.sched_setaffinity(process.pid, {0})
        yield process.pid
    finally:
        process.terminate()
        await asyncio.wait_for(process.wait(), 30.0)


async def measure(workers: int, rates: list[float], blocks: int, seconds: float) -> list[dict[str, float]]:
    found = []
    load = make_load(workers, blocks, random.Random(workers))
    with tempfile.TemporaryDirectory(prefix="tandem-bench-") as name:
        async with NatsServer() as nats, RedisServer() as redis:
            client = await connect(redis.url, timeout_s=10.0)
            registry, index = RedisRegistry(client, CLUSTER), RedisPrefixIndex(client, CLUSTER)
            specs = [await registry.register(worker_spec(i), ttl_s=3600) for i in range(workers)]
            await fill(index, specs, load)
            bus = await NatsBus.connect(nats.url, name="driver")
            async with router(nats.url, redis.url, Path(name)) as pid:
                driver = Driver(bus, specs, load)
                await driver.begin()
                await driver.run(200.0, 2.0)
                for rate in rates:
                    await driver.settle()
                    cpu, rejects = cpu_s(pid), driver.rejects
                    await driver.run(rate, seconds)
                    cpu = cpu_s(pid) - cpu
                    waits = sorted(driver.waits_s)
                    found.append(row(workers, rate, seconds, waits, cpu, driver.rejects - rejects))
                    print(json.dumps(found[-1]), flush=True)
                    if not found[-1]["sustained"]:
                        break  # what is queued now would be in the way of the next
            await bus.close()
            await client.aclose()
    return found


def row(
    workers: int, rate: float, seconds: float, waits_s: list[float], router_s: float, rejects: int
) -> dict[str, float]:
    placed = len(waits_s)
    half_s = statistics.median(waits_s) if waits_s else 0.0
    return {
        "workers": workers,
        "asked_per_s": rate,
        "placed_per_s": round(placed / seconds, 1),
        "rejected": rejects,
        "p50_ms": round(1e3 * half_s, 2),
        "p99_ms": round(1e3 * waits_s[int(0.99 * placed)], 2) if placed else 0.0,
        "router_cpu": round(router_s / seconds, 3),
        "router_us_per_request": round(1e6 * router_s / max(1, placed)),
        "sustained": placed >= 0.98 * rate * seconds and half_s < 0.05,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--workers", type=int, nargs="*", default=[64, 256])
    add("--rates", type=float, nargs="*", default=[1000, 2000, 3000, 4000])
    add("--blocks", type=int, default=1_000_000)
    add("--seconds", type=float, default=5.0, help="of each rate")
    add("--output", type=Path, default=Path("build/bench-router.json"))
    args = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[1:] or cores)  # and with it NATS and Redis
    found: list[dict[str, float]] = []
    for workers in args.workers:
        found += asyncio.run(measure(workers, args.rates, args.blocks, args.seconds))
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(found, indent=1))
    print(f"All of it: {args.output}")


if __name__ == "__main__":
    main()

"""The prefix index in a real Redis: time of one lookup, bytes per block.

    python bench/bench_index.py [--blocks 1000000] [--lookups 2000]

Each worker holds conversations of 64 to 512 blocks, and all share a system prompt of 8 blocks. Asked is for prompts
that some worker holds in part, in full or, but for the system prompt, not at all. Prints one JSON object per number
of workers; times are those that the router sees, Redis and client included: of one look-up after the other, and of 300
a second at random times (*now and then*), which find nobody awake.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import statistics
import subprocess
import time
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import repeat

from tandem.adapters.embedded import RedisServer
from tandem.adapters.redis_client import RedisClient, connect
from tandem.adapters.redis_store import RedisPrefixIndex, RedisRegistry
from tandem.core.types import Role, WorkerAddress, WorkerSpec

MODEL = "bench"
SYSTEM_PROMPT_BLOCKS = 8
NOW_AND_THEN_PER_S = 300.0


@dataclass(frozen=True)
class Load:
    """What the workers hold: sequence hashes are random numbers here, chains are lists of them."""

    conversations: list[tuple[int, array[int]]]  # worker, chain


def make_load(workers: int, blocks: int, rng: random.Random) -> Load:
    system = array("Q", (rng.getrandbits(64) for _ in range(SYSTEM_PROMPT_BLOCKS)))
    conversations: list[tuple[int, array[int]]] = []
    made = 0
    while made < blocks:
        length = rng.randint(64, 512)
        chain = array("Q", system) + array("Q", (rng.getrandbits(64) for _ in range(length - SYSTEM_PROMPT_BLOCKS)))
        conversations.append((rng.randrange(workers), chain))
        made += length - SYSTEM_PROMPT_BLOCKS
        if rng.random() < 0.2:  # the same conversation on a second worker, further or less far
            conversations.append((rng.randrange(workers), chain[: rng.randint(SYSTEM_PROMPT_BLOCKS, length)]))
    return Load(conversations)


def worker_spec(number: int) -> WorkerSpec:
    return WorkerSpec(
        address=WorkerAddress(f"w{number}", 1),
        model=MODEL,
        role=Role.DECODE,
        slot=0,
        block_size=16,
        dtype="",
        kv_layout="",
        engine="",
        engine_version="",
        max_model_len=0,
        kv_blocks_total=0,
        kv_bytes_per_token=0,
        max_batched_tokens=0,
        max_num_seqs=0,
        perf_profile="",
    )


async def fill(index: RedisPrefixIndex, specs: list[WorkerSpec], load: Load) -> float:
    """Seconds per block written, one writer at a time."""
    began = time.perf_counter()
    for worker, chain in load.conversations:
        await index.update(specs[worker], add=chain, remove=[])
    return (time.perf_counter() - began) / sum(len(chain) for _, chain in load.conversations)


def question(load: Load, length: int, rng: random.Random) -> bytes:
    """A prompt of ``length`` blocks; a fifth of them cold but for the system prompt."""
    _, chain = rng.choice(load.conversations)
    known = SYSTEM_PROMPT_BLOCKS if rng.random() < 0.2 else rng.randint(1, length)
    asked = chain[:known][:length]
    return (asked + array("Q", (rng.getrandbits(64) for _ in range(length - len(asked))))).tobytes()


def summary(times_s: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(times_s, n=100)
    return {
        "p50_ms": round(cuts[49] * 1e3, 3),
        "p99_ms": round(cuts[98] * 1e3, 3),
        "max_ms": round(max(times_s) * 1e3, 3),
    }


async def time_lookups(index: RedisPrefixIndex, questions: list[bytes], pauses: Iterable[float]) -> dict[str, float]:
    """With a pause, in seconds, before each."""
    times: list[float] = []
    for asked, pause_s in zip(questions, pauses, strict=False):
        if pause_s:
            await asyncio.to_thread(time.sleep, pause_s)  # more exact than the loop's timers
        began = time.perf_counter()
        await index.lookup(MODEL, asked)
        times.append(time.perf_counter() - began)
    return summary(times)


async def in_server(client: RedisClient, index: RedisPrefixIndex, questions: list[bytes]) -> float:
    """Microseconds that Redis itself spends on one lookup, by its own count."""
    await client.call("CONFIG", "RESETSTAT")
    for asked in questions:
        await index.lookup(MODEL, asked)
    stats = await client.call("INFO", "commandstats")
    return float(stats["cmdstat_evalsha"]["usec_per_call"])


async def used_memory(client: RedisClient) -> int:
    memory = await client.call("INFO", "memory")
    return int(memory["used_memory"])


async def measure(workers: int, blocks: int, lookups: int) -> dict[str, object]:
    rng = random.Random(workers)
    load = make_load(workers, blocks, rng)
    async with RedisServer() as server:
        client = await connect(server.url, timeout_s=10.0)
        registry, index = RedisRegistry(client, "bench"), RedisPrefixIndex(client, "bench")
        specs = [await registry.register(worker_spec(i), ttl_s=3600) for i in range(workers)]
        before = await used_memory(client)
        write_s = await fill(index, specs, load)
        size = await index.size(MODEL)
        result: dict[str, object] = {
            "workers": workers,
            "blocks": size,
            "bytes_per_block": round((await used_memory(client) - before) / size, 1),
            "write_us_per_block": round(write_s * 1e6, 2),
        }
        for length in (32, 512):
            questions = [question(load, length, rng) for _ in range(lookups)]
            await time_lookups(index, questions[:100], repeat(0.0))
            result[f"lookup_{length}_blocks"] = await time_lookups(index, questions, repeat(0.0))
            now_and_then = (rng.expovariate(NOW_AND_THEN_PER_S) for _ in questions)
            result[f"lookup_{length}_blocks_now_and_then"] = await time_lookups(index, questions, now_and_then)
            result[f"in_server_{length}_blocks_us"] = await in_server(client, index, questions)
        result["lookup_512_blocks_beside_a_writer"] = await beside_a_writer(index, specs, load, questions)
        began = time.perf_counter()
        await registry.deregister(specs[0])
        while await index.sweep(MODEL):
            pass
        result["sweep_of_one_worker_s"] = round(time.perf_counter() - began, 2)
        await client.aclose()
        return result


async def beside_a_writer(
    index: RedisPrefixIndex, specs: list[WorkerSpec], load: Load, questions: list[bytes]
) -> dict[str, float]:
    """One worker announces without a pause meanwhile."""

    async def write() -> None:
        while True:
            for worker, chain in load.conversations:
                if worker == 1:
                    await index.update(specs[1], add=[], remove=chain[: SYSTEM_PROMPT_BLOCKS - 1 : -1])
                    await index.update(specs[1], add=chain, remove=[])

    writer = asyncio.create_task(write())
    try:
        return await time_lookups(index, questions, repeat(0.0))
    finally:
        writer.cancel()
        await asyncio.wait([writer])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=1_000_000)
    parser.add_argument("--lookups", type=int, default=2000)
    parser.add_argument("--workers", type=int, nargs="*", default=[64, 256])
    options = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    machine = {"cpus": os.cpu_count(), "python": platform.python_version(), "commit": commit.stdout.strip()}
    for workers in options.workers:
        print(json.dumps(asyncio.run(measure(workers, options.blocks, options.lookups)) | machine))


if __name__ == "__main__":
    main()

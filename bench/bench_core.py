"""What the decision core costs: microseconds of one core per call, on fleets and queues of several sizes.

    python bench/bench_core.py            prints a table; no engine, no network, no clock inside the core

Each row is the median of its samples. A placement is ``poll`` for one request that can start at once (filters, every
candidate's score, booking, explanation kept but not rendered); ``submit`` includes admission with a deadline.
"""

from __future__ import annotations

import platform
import random
import statistics
import time
from collections import deque
from collections.abc import Callable

from tandem.core.perf_model import PerfModel
from tandem.core.policy import Policy, RequestClass
from tandem.core.profiles import PROFILES
from tandem.core.scheduler import Place, Scheduler
from tandem.core.types import Request, RequestKey, Role, StepTiming, WorkerAddress, WorkerLoad, WorkerSpec

PROFILE = "sim-h100-llama-70b-tp4"
CLASSES = {"chat": RequestClass(name="chat", ttft_slo_s=6000.0, tpot_slo_s=0.05)}


def worker(name: str, role: Role) -> WorkerSpec:
    return WorkerSpec(
        address=WorkerAddress(name, 1),
        model="m",
        role=role,
        slot=0,
        block_size=16,
        dtype="bfloat16",
        kv_layout="x",
        engine="sim",
        engine_version="1",
        max_model_len=131072,
        kv_blocks_total=30000,
        kv_bytes_per_token=327680,
        max_batched_tokens=8192 if role is Role.PREFILL else 1024,
        max_num_seqs=1024,
        perf_profile=PROFILE,
        kv_endpoint="here",
        link_bytes_per_s=50e9,
    )


def fleet(size: int) -> Scheduler:
    scheduler = Scheduler(Policy(queue_limit_tokens=10**9), classes=CLASSES, tenants={}, rng=random.Random(0))
    for i in range(size // 2):
        scheduler.worker_up(worker(f"p{i:03}", Role.PREFILL), 0.0)
        scheduler.worker_up(worker(f"d{i:03}", Role.DECODE), 0.0)
    return scheduler


def request(number: int, now: float) -> Request:
    return Request(RequestKey(f"r{number}"), "m", 3000, 300, arrival_s=now, timeout_s=600.0)


def cached_on(size: int, rng: random.Random) -> dict[str, int]:
    """The prompt's first part lies on a tenth of the workers, at least two."""
    names = [f"{kind}{i:03}" for kind in "pd" for i in range(size // 2)]
    return {name: rng.randrange(0, 2900) // 16 * 16 for name in rng.sample(names, max(2, size // 10))}


def timed(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return 1e6 * (time.perf_counter() - begin)


def placement(size: int, samples: int = 400) -> tuple[float, float]:
    """(submit, poll that places it) at a steady load of about half the capacity."""
    scheduler, rng = fleet(size), random.Random(1)
    submits, polls = [], []
    prefilling: deque[RequestKey] = deque()
    decoding: deque[RequestKey] = deque()
    now = 0.0
    for i in range(samples):
        now += 0.4 / size
        req, cached = request(i, now), cached_on(size, rng)
        submits.append(timed(lambda req=req, cached=cached, now=now: scheduler.submit(req, cached, now)))  # type: ignore[misc]
        begin = time.perf_counter()
        effects = scheduler.poll(now)
        took = 1e6 * (time.perf_counter() - begin)
        if len(effects) == 1:
            polls.append(took)
        prefilling.extend(effect.request.key for effect in effects if isinstance(effect, Place))
        if len(prefilling) > size // 2:
            decoding.append(prefilling.popleft())
            scheduler.prefill_done(decoding[-1], now)
            scheduler.decode_started(decoding[-1], now)
        if len(decoding) > 8 * size:
            scheduler.finished(decoding.popleft(), 300, 0, now)
    return statistics.median(submits), statistics.median(polls)


def overloaded(size: int, queued: int, samples: int = 200) -> tuple[float, float, float]:
    """(submit, event, poll per event) with ``queued`` requests waiting."""
    scheduler, rng = fleet(size), random.Random(1)
    submits = []
    for i in range(queued):
        req, cached = request(i, 0.0), cached_on(size, rng)
        submits.append(timed(lambda req=req, cached=cached: scheduler.submit(req, cached, 0.0)))  # type: ignore[misc]
    running = [effect.request.key for effect in scheduler.poll(0.0) if isinstance(effect, Place)]
    events, polls = [], []
    now = 0.0
    for _ in range(min(samples, queued)):
        now += 0.15 / size
        key = running.pop(0)
        events.append(timed(lambda key=key, now=now: scheduler.decode_started(key, now)))  # type: ignore[misc]
        scheduler.finished(key, 300, 0, now)
        begin = time.perf_counter()
        effects = scheduler.poll(now)
        polls.append(1e6 * (time.perf_counter() - begin))
        running += [effect.request.key for effect in effects if isinstance(effect, Place)]
    return statistics.median(submits[-samples:]), statistics.median(events), statistics.median(polls)


def report(size: int, samples: int = 300) -> float:
    """A load report with 8 step timings to learn from."""
    scheduler = fleet(size)
    steps = tuple(StepTiming(0.02, 0, 0, 10 + i, 20000) for i in range(8))
    load = WorkerLoad("d000", 1, running_requests=5, kv_blocks_used=900, kv_tokens=9000, steps=steps)
    return statistics.median(timed(lambda i=i: scheduler.worker_load(load, 0.1 * i)) for i in range(samples))  # type: ignore[misc]


def learning(samples: int = 2000) -> float:
    model = PerfModel(PROFILES[PROFILE])
    steps = [[StepTiming(0.1, 1000, 500_000, 10, 20000)] for _ in range(samples)]
    return statistics.median(timed(lambda step=step: model.observe(step)) for step in steps)  # type: ignore[misc]


def main() -> None:
    print(f"decision core, {platform.python_implementation()} {platform.python_version()}, us per call (median)\n")
    print(f"{'workers':>8} {'submit':>8} {'place':>8} {'load report':>12}")
    for size in (2, 8, 32, 128, 512, 1000):
        submit_us, poll_us = placement(size)
        print(f"{size:>8} {submit_us:>8.0f} {poll_us:>8.0f} {report(size):>12.0f}")
    print(f"\n{'workers':>8} {'queued':>8} {'submit':>8} {'event':>8} {'poll':>8}")
    for size, queued in ((8, 100), (8, 1000), (8, 10_000), (256, 10_000)):
        submit_us, event_us, poll_us = overloaded(size, queued)
        print(f"{size:>8} {queued:>8} {submit_us:>8.0f} {event_us:>8.0f} {poll_us:>8.0f}")
    print(f"\nlearning from one step timing: {learning():.0f}")


if __name__ == "__main__":
    main()

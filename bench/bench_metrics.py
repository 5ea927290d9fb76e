"""What metrics cost: CPU of one process, in microseconds, best of several runs.

    python -m bench.bench_metrics [--json FILE]

Per request at the frontend (its end; errors told), at the router (its placement), and of a scrape: what the event loop
pays, and what the endpoint's thread does with it. No server, no network.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Callable

import prometheus_client
from msgspec.structs import replace

from services.frontend.cluster import Cluster
from services.frontend.generation import Generation, GenerationRequest, Generations
from services.frontend.metrics import FrontendMetrics
from services.frontend.served_model import load
from tandem.adapters import clock, deployment
from tandem.adapters.deployment import Deployment
from tandem.adapters.memory_bus import MemoryBus, MemoryHub
from tandem.adapters.process_metrics import instruments_of
from tandem.core.types import SamplingParams
from tandem.errors import Overloaded
from tandem.models.prepare import prepare_smollm2
from tandem.telemetry import metric_table as table
from tandem.telemetry.classic_text import ClassicText
from tandem.telemetry.instruments import Counter, Histogram

RUNS, COUNT = 7, 20_000
TENANTS, CLASSES, MODELS = 20, 3, 2


def wanted(folder: str) -> Deployment:
    return deployment.parse(
        json.dumps(
            {
                "models": [
                    {"name": f"m{n}", "path": folder, "pools": [{"role": "aggregated", "engine": "sim"}]}
                    for n in range(MODELS)
                ],
                "classes": [{"name": f"c{n}", "ttft_slo_s": 1.0, "tpot_slo_s": 0.1} for n in range(CLASSES)],
                "tenants": [{"name": f"t{n}"} for n in range(TENANTS)],
            }
        )
    )


def ended(generations: Generations, request: GenerationRequest) -> Generation:
    """As it is when the last frame of its tokens has come."""
    generation = generations.begin(request)
    generation.start()
    for journey in generation.journeys:
        journey.first_token_s = request.arrival_s + 0.1
        journey.tokens.extend(range(128))
    generation.usage.completion_tokens = 128
    return generation


def microseconds(work: Callable[[], object], count: int = COUNT) -> float:
    best = float("inf")
    for _ in range(RUNS):
        began = time.process_time()
        for _ in range(count):
            work()
        best = min(best, time.process_time() - began)
    return best / count * 1e6


async def lateness(in_thread: Callable[[], object]) -> float:
    """Of the event loop, at worst, in microseconds, while that runs in a thread; median of several runs."""
    found = []
    for _ in range(RUNS):
        worst, running = 0.0, asyncio.create_task(asyncio.to_thread(in_thread))
        while not running.done():
            due = time.perf_counter() + 1e-3
            await asyncio.sleep(1e-3)
            worst = max(worst, time.perf_counter() - due)
        found.append(worst)
    return statistics.median(found) * 1e6


async def measured() -> dict[str, float]:
    folder = str(prepare_smollm2())
    file, bus = wanted(folder), MemoryBus(MemoryHub())
    instruments = instruments_of("frontend", file, bus)
    metrics = FrontendMetrics(instruments, file, clock.monotonic)
    generations = Generations(Cluster(bus, cluster="bench", instance="bench"))
    request = GenerationRequest(
        id="bench",
        model=load(file.models[0]),
        prompts=[[1] * 1024],
        sampling=SamplingParams(max_tokens=128),
        arrival_s=clock.monotonic(),
        timeout_s=600.0,
        tenant="t0",
        request_class="c0",
    )
    one = ended(generations, request)
    error = Overloaded("full")
    counter, histogram = Counter(), Histogram(table.TIME_TO_FIRST_TOKEN.buckets)
    library_counter = prometheus_client.Counter("a", "a", registry=None)
    library_histogram = prometheus_client.Histogram("b", "b", buckets=table.TIME_TO_FIRST_TOKEN.buckets, registry=None)
    found = {
        "one counter": microseconds(lambda: counter.add()),
        "one histogram": microseconds(lambda: histogram.observe(0.3)),
        "the library's counter": microseconds(lambda: library_counter.inc()),
        "the library's histogram": microseconds(lambda: library_histogram.observe(0.3)),
        "frontend, a request's end": microseconds(lambda: metrics.ended(one)),
        "frontend, an error told": microseconds(lambda: metrics.told(error)),
    }
    for model in (one.request.model, load(file.models[1])):
        for tenant in file.tenants:
            for request_class in file.classes:
                other = replace(request, model=model, tenant=tenant.name, request_class=request_class.name)
                metrics.ended(ended(generations, other))
    text, read = ClassicText(), instruments.read()
    found["scrape, on the loop"] = microseconds(instruments.read, 10)
    found["scrape, in its thread"] = microseconds(lambda: text.of(read), 5)
    found["scrape, loop late by at most"] = await lateness(lambda: text.of(read))
    found["series"] = sum(len(line) > 0 and line[0] != "#" for line in text.of(read).split("\n"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="What metrics cost")
    parser.add_argument("--json", metavar="FILE", help="write the figures there, too")
    args = parser.parse_args()
    found = asyncio.run(measured())
    print(f"{TENANTS} tenants, {CLASSES} classes, {MODELS} models; CPU in microseconds, best of {RUNS}")
    for name, value in found.items():
        print(f"  {name:28} {value:10.2f}" if name != "series" else f"  {name:28} {value:10.0f}")
    if args.json:
        with open(args.json, "w") as file:
            json.dump(found, file, indent=1)


if __name__ == "__main__":
    main()

"""What the console's space-time map costs a browser: script per frame while a large fleet streams into it.

    python bench/bench_console.py [--workers 500] [--seconds 20] [--chromium PATH] [--screenshot FILE]

A console on an in-memory bus gets what so many workers would publish: a load report each every 100 ms with its step
timings, and lifecycle events. Headless Chromium shows its page meanwhile; frames and feed batches are timed there.
"Thread" figures are CPU time of the page's main thread (Chrome's thread ticks), which other programs on the machine do
not lengthen; "wall" figures are what `performance.now` saw. Prints JSON with the machine and the commit.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from services.console.app import Console
from services.console.config import ConsoleSettings
from tandem.adapters import deployment
from tandem.adapters.bus import Bus
from tandem.adapters.memory_bus import MemoryBus, MemoryHub
from tandem.v1 import bus_pb2, types_pb2
from tandem.wire import subjects

MODEL, CLUSTER = "model", "bench"
VARIANTS = 12
DEPLOYMENT = f"""
cluster: {CLUSTER}
models: [{{name: {MODEL}, path: nowhere, pools: [{{role: prefill, engine: sim}}, {{role: decode, engine: sim}}]}}]
"""
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


class Fleet:
    """What workers would publish, made beforehand: a few reports of each, given out in turn."""

    def __init__(self, bus: Bus, workers: int, rng: random.Random) -> None:
        self._bus = bus
        self._rng = rng
        self.names = [f"prefill-{i + 1}" for i in range(workers // 4)]
        self.names += [f"decode-{i + 1}" for i in range(workers - len(self.names))]
        self._refs = {name: types_pb2.WorkerRef(id=name, incarnation=1) for name in self.names}
        self._reports = {name: [self._report(name) for _ in range(VARIANTS)] for name in self.names}
        self._running: dict[str, list[str]] = {name: [] for name in self.names}
        self._count = 0
        self.reports = 0

    def _report(self, name: str) -> bytes:
        prefill, rng = name.startswith("prefill"), self._rng
        steps: list[bus_pb2.StepTiming] = []
        room = 0.1 if rng.random() < 0.85 else 0.0
        while room > 0:
            both = not prefill and rng.random() < 0.2
            took = rng.uniform(0.01, 0.05) if prefill or both else rng.uniform(0.008, 0.014)
            sequences = 0 if prefill else rng.randint(4, 60)
            steps.append(
                bus_pb2.StepTiming(
                    duration_s=min(took, room), prefill_tokens=500 if prefill or both else 0, decode_sequences=sequences
                )
            )
            room -= took
        load = bus_pb2.LoadReport(
            worker=self._refs[name],
            model=MODEL,
            role=types_pb2.ROLE_PREFILL if prefill else types_pb2.ROLE_DECODE,
            running_requests=len(steps),
            kv_blocks_used=rng.randint(0, 900),
            kv_blocks_total=1000,
            step_timings=steps,
        )
        return load.SerializeToString()

    async def run(self) -> None:
        """Spread over each 100 ms, as real workers are. Until cancelled."""
        slices = 10
        turn, began = 0, time.monotonic()
        while True:
            self.reports += len(self.names) // slices
            for name in self.names[turn % slices :: slices]:
                data = self._reports[name][(turn // slices + len(name)) % VARIANTS]
                self._bus.publish(subjects.load(CLUSTER, name), data)
                if self._rng.random() < 0.15:
                    self._lifecycle(name)
            turn += 1
            due = began + turn * 0.1 / slices
            # A machine that cannot keep up gets fewer reports, and says so (`reports_per_s`).
            began += max(0.0, time.monotonic() - due - 0.2)
            await asyncio.sleep(max(0.001, due - time.monotonic()))

    def _lifecycle(self, name: str) -> None:
        running, events = self._running[name], []
        if len(running) > 12 or (running and self._rng.random() < 0.5):
            events.append((running.pop(0), bus_pb2.PHASE_FINISHED))
        else:
            self._count += 1
            running.append(f"request-{self._count}")
            events += [(running[-1], bus_pb2.PHASE_ACCEPTED), (running[-1], bus_pb2.PHASE_DECODING)]
        batch = bus_pb2.LifecycleEvents(
            worker=self._refs[name],
            events=[bus_pb2.LifecycleEvent(key=types_pb2.RequestKey(id=i), phase=phase) for i, phase in events],
        )
        self._bus.publish(subjects.events(CLUSTER, MODEL), batch.SerializeToString())


def find_browser() -> str | None:
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


async def start_console(hub: MemoryHub, **options: Any) -> Console:
    """On any free ports."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(DEPLOYMENT)
        file.flush()
        wanted = deployment.read(file.name)
    settings = ConsoleSettings(deployment="", http_port=0, **options)
    console = Console(settings, wanted, MemoryBus(hub))
    await console.start()
    return console


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--chromium", default=find_browser(), help="path of a Chromium")
    parser.add_argument("--screenshot", help="write a picture of the page here")
    args = parser.parse_args()
    if not args.chromium:
        sys.exit("no Chromium found: install Debian's `chromium`, or name one with --chromium")
    hub = MemoryHub()
    console = await start_console(hub)
    fleet = Fleet(MemoryBus(hub), args.workers, random.Random(1))
    running = [asyncio.create_task(console.run()), asyncio.create_task(fleet.run())]
    cpu = time.process_time()
    began = time.monotonic()
    try:
        url = f"http://127.0.0.1:{console.http_port}/"
        figures = await measured(url, args.chromium, args.seconds, args.screenshot)
        share = (time.process_time() - cpu) / (time.monotonic() - began)
        print(
            json.dumps(
                {
                    **about(args.workers),
                    **figures,
                    "reports_per_s": round(fleet.reports / (time.monotonic() - began)),
                    "console_and_fleet_cpu_share": round(share, 2),
                },
                indent=1,
            )
        )
    finally:
        await console.close()
        for task in running:
            task.cancel()
        await asyncio.wait(running)


def about(workers: int) -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "workers": workers,
        "commit": commit.stdout.strip(),
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {_cpu()}",
    }


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")


async def measured(url: str, chromium: str, seconds: float, screenshot: str | None) -> dict[str, Any]:
    from playwright.async_api import async_playwright

    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = await browser.new_page(viewport={"width": 1440, "height": 1300})
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        await page.goto(url)
        await page.wait_for_function("window.tandemMap && tandemMap.ordered.length > 0")
        await asyncio.sleep(3)
        session = await page.context.new_cdp_session(page)
        await session.send("Performance.enable", {"timeDomain": "threadTicks"})
        before = await _metrics(session)
        await page.evaluate("tandemMap.timing = {frames: 0, total: 0, worst: 0, recent: []}; tandemCost.reset()")
        await asyncio.sleep(seconds)
        after = await _metrics(session)
        timing = await page.evaluate("({...tandemMap.timing, ...tandemCost.now(), note: tandemMap.decimation()})")
        rows = await page.evaluate("tandemMap.ordered.length")
        if screenshot:
            await page.screenshot(path=screenshot)
        await browser.close()
    frames = max(1, timing["frames"])
    recent = sorted(timing["recent"])
    script, task = (after[name] - before[name] for name in ("ScriptDuration", "TaskDuration"))
    return {
        "rows": rows,
        "seconds": seconds,
        "frames_per_s": round(frames / seconds, 1),
        "thread_script_ms_per_frame": round(1e3 * script / frames, 2),
        "thread_task_ms_per_frame": round(1e3 * task / frames, 2),
        "wall_map_ms_per_frame": {
            "mean": round(timing["total"] / frames, 2),
            "p50": round(recent[len(recent) // 2], 2),
            "p95": round(recent[int(0.95 * len(recent))], 2),
        },
        "wall_batch_ms": round(timing["batchTotal"] / max(1, timing["batches"]), 2),
        "batches_per_s": round(timing["batches"] / seconds, 1),
        "decimation": timing["note"],
        "page_errors": errors,
    }


async def _metrics(session: Any) -> dict[str, float]:
    answer = await session.send("Performance.getMetrics")
    return {metric["name"]: metric["value"] for metric in answer["metrics"]}


if __name__ == "__main__":
    asyncio.run(main())

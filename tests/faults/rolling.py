"""Every process of a cluster restarted in turn, by SIGTERM, under load: no request is lost.

Two frontends, two routers, two workers of each role, NATS and Redis. Clients do what the usual libraries do: a request
that was refused before anything was answered, or whose frontend is not there, is sent again, to the other frontend. A
request is lost when it breaks off, or fails after that. Each process has to leave by itself, with status 0, when its
last stream and its last pull are done.

    python -m tests.faults.rolling --engine sim
"""

from __future__ import annotations

import argparse
import asyncio
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.faults.recorded import recorded_answers, tie
from tests.harness.answers import Answers, SimAnswers
from tests.harness.load import Load, Stream
from tests.harness.site import Site, deployment

RETRIES = 4
#: The supervisor waits longer and longer for what leaves again and again; nothing here leaves twice.
BACK_S = 90.0
#: From a process's end to the line that says so.
SAID_S = 10.0


@dataclass(frozen=True)
class Scale:
    every_s: float
    tokens: int
    isl: tuple[int, int]
    start_s: float
    end_s: float


SCALES = {"sim": Scale(0.12, 120, (40, 400), 90.0, 60.0), "vllm": Scale(0.7, 32, (40, 200), 600.0, 240.0)}


@dataclass(frozen=True)
class Restart:
    name: str
    left_s: float
    back_s: float
    #: It ended by itself, and well.
    clean: bool


@dataclass(frozen=True)
class Outcome:
    restarts: Sequence[Restart]
    streams: Sequence[Stream]
    hanging: int
    ties: int

    @property
    def lost(self) -> list[Stream]:
        return [stream for stream in self.streams if not stream.complete]

    @property
    def good(self) -> bool:
        return not self.lost and not self.hanging and all(restart.clean for restart in self.restarts)

    def text(self) -> str:
        rows = [
            f"| {r.name} | {r.left_s:.1f} s | {r.back_s:.1f} s | {'yes' if r.clean else '**no**'} |"
            for r in self.restarts
        ]
        again = Counter(code for stream in self.streams for code in stream.retried)
        why = {stream.wrong or f"{stream.error}" for stream in self.lost}
        return "\n".join(
            [
                "| process | left after | back after | by itself, status 0 |",
                "|---|---:|---:|---|",
                *rows,
                "",
                f"{len(self.streams) - len(self.lost)} of {len(self.streams)} requests completed; "
                f"{sum(bool(stream.retried) for stream in self.streams)} were sent again before anything was answered "
                f"({', '.join(f'{n} times {code}' for code, n in sorted(again.items())) or 'none'})."
                + (f" {self.ties} ties." if self.ties else "")
                + (f" Lost: {'; '.join(sorted(why))}" if why else ""),
            ]
        )


async def restart(site: Site, name: str) -> Restart:
    before = len(site.log())
    began = time.monotonic()
    pid = site.signal(name, signal.SIGTERM)
    left_s, back_s = await asyncio.gather(_left(pid, began), _back(site, name, pid, began))
    if name not in ("nats-server", "redis"):  # servers end as they like: nats-server with status 1
        await _until(lambda: f"{name}: ended with " in site.log()[before:], SAID_S)
        return Restart(name, left_s, back_s, f"{name}: ended with status 0" in site.log()[before:])
    return Restart(name, left_s, back_s, True)


async def _until(condition: Callable[[], bool], within_s: float) -> None:
    """Or for so long."""
    began = time.monotonic()
    while not condition() and time.monotonic() - began < within_s:  # noqa: ASYNC110
        await asyncio.sleep(0.05)


async def _left(pid: int, began: float) -> float:
    await _until(lambda: not psutil.pid_exists(pid), BACK_S)
    return time.monotonic() - began


async def _back(site: Site, name: str, pid: int, began: float) -> float:
    """A frontend's successor may be there before it has left."""
    await asyncio.to_thread(site.wait_restarted, name, pid, BACK_S)
    return time.monotonic() - began


async def rolling(engine: str, folder: Path, only: str = "") -> Outcome:
    """``only``: a regular expression that finds the names of those that are restarted."""
    scale = SCALES[engine]
    wanted = deployment(engine=engine, routers=2, frontends=2)
    wanted["models"][0]["pools"][0]["replicas"] = 2 if engine == "sim" else 1
    site = Site(wanted, folder)
    await asyncio.to_thread(site.start, scale.start_s)
    try:
        answers: Answers = SimAnswers()
        if engine == "vllm":
            answers = await asyncio.to_thread(recorded_answers, site, scale.tokens, scale.isl)
        timeout_s = scale.end_s + 120.0
        async with Load(site.addresses, answers, timeout_s=timeout_s, http_every=3, retries=RETRIES) as load:
            arriving = asyncio.create_task(load.arrive(scale.every_s, scale.tokens, isl=scale.isl))
            await asyncio.sleep(2.0)
            restarts = []
            for name in [p["name"] for p in site.state()["processes"] if re.search(only, p["name"])]:
                restarts.append(await restart(site, name))
                print(
                    f"{name}: left after {restarts[-1].left_s:.1f} s, back after {restarts[-1].back_s:.1f} s",
                    flush=True,
                )
                await asyncio.sleep(1.0)
            arriving.cancel()
            hanging = await load.ended(scale.end_s)
        await asyncio.to_thread(site.settled, scale.end_s)
        ties = 0
        for stream in load.streams:
            if stream.differs_at is not None and await tie(site, answers, stream):
                ties += 1
                stream.wrong, stream.complete = "", stream.error is None
        return Outcome(restarts, load.streams, len(hanging), ties)
    except BaseException:
        print(site.log()[-10_000:])
        raise
    finally:
        await asyncio.to_thread(site.stop)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("sim", "vllm"), default="sim")
    parser.add_argument("--only", default="", help="processes whose name this regular expression finds")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tandem-rolling-") as folder:
        outcome = asyncio.run(rolling(args.engine, Path(folder), args.only))
    print(outcome.text())
    return 0 if outcome.good else 1


if __name__ == "__main__":
    sys.exit(main())

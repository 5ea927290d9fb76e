"""Any mix of faults, by seed, for minutes: what must hold holds for every request, whatever happens at once.

Rounds of one to three faults within seconds of each other, on streams that run and requests that come. After each
round everything is resumed, every request has ended complete or with a retryable error, and nothing is left behind.

    python -m tests.faults.chaos --engine sim --minutes 10 --seed 1
"""

from __future__ import annotations

import argparse
import asyncio
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.recorded import recorded_answers, tie
from tests.harness.answers import Answers, SimAnswers
from tests.harness.load import Load
from tests.harness.site import Site, deployment

FAULTS = (signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM)
#: What cannot be told to leave without being missed, and comes back by itself.
SERVERS = ("nats-server", "redis")


@dataclass(frozen=True)
class Scale:
    streams: int
    tokens: int
    arrivals: int
    every_s: float
    new_tokens: int
    isl: tuple[int, int]
    start_s: float
    end_s: float


SCALES = {
    "sim": Scale(24, 120, 16, 0.1, 30, (40, 400), 90.0, 60.0),
    "vllm": Scale(16, 64, 8, 0.5, 8, (40, 200), 600.0, 240.0),
}


@dataclass
class Tally:
    """Of all rounds."""

    done: list[str] = field(default_factory=list)
    rounds: int = 0
    faults: int = 0
    completed: int = 0
    total: int = 0
    ties: int = 0
    errors: dict[str, int] = field(default_factory=dict)

    def summary(self) -> str:
        errors = ", ".join(f"{count} {code}" for code, count in sorted(self.errors.items())) or "none"
        return (
            f"{self.rounds} rounds, {self.faults} faults: {self.completed} of {self.total} requests completed, "
            f"errors: {errors}" + (f"; {self.ties} ties" if self.ties else "")
        )


def plan(names: Sequence[str], rng: random.Random) -> list[tuple[str, signal.Signals, float]]:
    """(process, signal, seconds until the next one)"""
    chosen = rng.sample(names, k=rng.choice((1, 1, 2, 3)))
    return [
        (name, rng.choice(FAULTS[:2] if name in SERVERS else FAULTS), rng.choice((0.0, 0.0, 0.3, 1.0)))
        for name in chosen
    ]


async def _harm(site: Site, rng: random.Random, tally: Tally) -> None:
    for name, fault, pause_s in plan([process["name"] for process in site.state()["processes"]], rng):
        tally.done.append(f"{fault.name} {name}")
        tally.faults += 1
        with suppress(ProcessLookupError):  # just restarting
            if fault is signal.SIGSTOP:
                site.signal_whole(name, fault)
            else:
                site.signal(name, fault)
        await asyncio.sleep(pause_s)


async def one_round(site: Site, answers: Answers, scale: Scale, rng: random.Random, tally: Tally) -> None:
    """AssertionError for what must not be."""
    timeout_s = scale.end_s + 60.0
    async with Load(site.addresses, answers, seed=rng.getrandbits(32), timeout_s=timeout_s, http_every=4) as load:
        await load.flowing(load.start(scale.streams, scale.tokens, isl=scale.isl), scale.end_s)
        harming = asyncio.create_task(_harm(site, rng, tally))
        for _ in range(scale.arrivals):
            load.start(1, scale.new_tokens, isl=scale.isl)
            await asyncio.sleep(scale.every_s)
        await harming
        await asyncio.sleep(rng.choice((0.5, 3.0, 5.0)))
        await asyncio.to_thread(site.resume_all)
        hanging = await load.ended(scale.end_s)
        assert not hanging, f"{len(hanging)} of {len(load.streams)} requests hang"
        streams = list(load.streams)
    await asyncio.to_thread(site.settled, scale.end_s)
    for stream in streams:
        if stream.differs_at is not None and await tie(site, answers, stream):
            tally.ties += 1
            stream.wrong, stream.complete = "", stream.error is None
        assert not stream.wrong, stream.wrong
        if stream.error is not None:
            assert stream.error.retryable, f"{stream.error.code}: {stream.error}"
            tally.errors[stream.error.code] = tally.errors.get(stream.error.code, 0) + 1
    tally.rounds += 1
    tally.completed += sum(stream.complete for stream in streams)
    tally.total += len(streams)


async def chaos(site: Site, answers: Answers, scale: Scale, seed: int, minutes: float, rounds: int) -> Tally:
    """Until the time is over or that many rounds are done, whichever is later."""
    rng, tally = random.Random(seed), Tally()
    until = time.monotonic() + 60 * minutes
    try:
        while tally.rounds < rounds or time.monotonic() < until:
            tally.done.append(f"round {tally.rounds}:")
            await one_round(site, answers, scale, rng, tally)
            print(tally.summary(), flush=True)
    except BaseException:
        print(f"seed {seed}:", ", ".join(tally.done), flush=True)
        raise
    return tally


async def _run(engine: str, seed: int, minutes: float, folder: Path) -> Tally:
    scale = SCALES[engine]
    site = Site(deployment(engine=engine, routers=2), folder)
    await asyncio.to_thread(site.start, scale.start_s)
    try:
        answers: Answers = SimAnswers()
        if engine == "vllm":
            answers = await asyncio.to_thread(recorded_answers, site, scale.tokens, scale.isl)
        return await chaos(site, answers, scale, seed, minutes, 1)
    except BaseException:
        print(site.log()[-20_000:])
        raise
    finally:
        site.resume_all()
        await asyncio.to_thread(site.stop)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("sim", "vllm"), default="sim")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tandem-chaos-") as folder:
        tally = asyncio.run(_run(args.engine, args.seed, args.minutes, Path(folder)))
    print(f"seed {args.seed}: {', '.join(tally.done)}")
    print(tally.summary())
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What is left of requests whose clients went away, and what they cost the next one.

Two tables. Where: a request is cancelled in the router's queue, in prefill, in the KV transfer and in decode, over
gRPC, HTTP streamed and HTTP not streamed; how long until nothing of it is left, and what is left then (simulated
engine, slowed down so that each stage can be met). What it costs: the first token of a short prompt right after ten
6,000-token prompts were cancelled, against the same on idle workers (either engine).

    python -m tests.faults.cancel --engine vllm
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.harness.answers import Answers, SimAnswers
from tests.harness.client import flush
from tests.harness.load import Load, Stream, Way
from tests.harness.site import Site, accounting_of, deployment

CANCELLED, LONG, SHORT = 10, 6000, 40
#: A short prompt may start so much later than on idle workers.
LATER_S = 1.0
#: Nothing is left of a cancelled request after this long; engines finish the step that they are in.
GONE_WITHIN_S = 2.0
PROTOCOLS = {"gRPC": Way.GRPC, "HTTP, streamed": Way.STREAMED, "HTTP, not streamed": Way.WHOLE}


@dataclass(frozen=True)
class Left:
    """Of all requests, anywhere in the cluster. What is kept for gap repair (30 s) is no part of it."""

    queued: int
    booked: int
    kept: int
    running: int
    handoffs: int
    kv_blocks: int

    def __bool__(self) -> bool:
        return any((self.queued, self.booked, self.kept, self.running, self.handoffs, self.kv_blocks))

    def __str__(self) -> str:
        return (
            f"{self.kv_blocks} KV blocks, {self.handoffs} handoffs, {self.running} running, {self.queued} queued, "
            f"{self.booked} booked, {self.kept} entries in the router's table"
        )


def left(site: Site) -> Left:
    loads = [answer.load for answer in site.loads().values()]
    routers = [accounting_of(router["grpc"]) for router in site.processes("router")]
    return Left(
        queued=sum(router.queued for router in routers),
        booked=sum(router.in_flight for router in routers),
        kept=sum(router.kept for router in routers),
        running=sum(load.running_requests + load.waiting_requests for load in loads),
        handoffs=sum(load.open_handoffs for load in loads),
        kv_blocks=sum(load.kv_blocks_used for load in loads),
    )


async def gone(site: Site, within_s: float) -> tuple[float, Left]:
    """Seconds until nothing is left, and what is left then."""
    began = time.monotonic()
    while True:
        found = await asyncio.to_thread(left, site)
        took = time.monotonic() - began
        if not found or took > within_s:
            return took, found
        await asyncio.sleep(0.02)


# -- where ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    stage: str
    protocol: str
    took_s: float
    left: Left

    @property
    def good(self) -> bool:
        return not self.left


def slow_deployment() -> dict[str, Any]:
    """A prompt of 2,000 tokens takes two seconds to compute and five to move."""
    wanted = deployment(decode=1)
    kv_bytes = 131072
    link = 400 * kv_bytes
    slow = {
        "step_s": 0.05,
        "max_num_seqs": 16,
        "max_batched_tokens": 50,
        "kv_bytes_per_token": kv_bytes,
        "link_bytes_per_s": link,
    }
    for pool in wanted["models"][0]["pools"]:
        pool["engine_args"] = {**pool["engine_args"], **slow}
    wanted["models"][0]["kv_lease_s"] = 30.0
    return wanted


def _at(site: Site, stage: str) -> bool:
    match stage:
        case "router's queue":
            return left(site).queued > 0
        case "prefill":
            return site.loads()["prefill-1"].load.pending_prefill_tokens > 0
        case "KV transfer":
            return left(site).handoffs > 0
        case _:
            return not left(site).handoffs and site.loads()["decode-1"].load.running_requests > 0


STAGES = ("router's queue", "prefill", "KV transfer", "decode")


async def cancelled_in(site: Site, stage: str, protocol: str, within_s: float) -> Cell:
    """AssertionError if the request does not get there."""
    way = PROTOCOLS[protocol]
    async with Load(site.addresses, SimAnswers(), way=way, timeout_s=60.0) as load:
        streams = load.start(3 if stage == "router's queue" else 1, 400, isl=(2000, 2000))
        await _until(lambda: _at(site, stage), 60.0, f"a request in {stage}")
        await load.cancel(streams)
        took, found = await gone(site, within_s)
    return Cell(stage, protocol, took, found)


async def _until(condition: Callable[[], bool], within_s: float, what: str) -> None:
    began = time.monotonic()
    while not await asyncio.to_thread(condition):
        assert time.monotonic() - began < within_s, f"{what}: not within {within_s:g} s"
        await asyncio.sleep(0.01)


async def where(folder: Path, within_s: float = GONE_WITHIN_S) -> list[Cell]:
    site = Site(slow_deployment(), folder)
    await asyncio.to_thread(site.start, 90.0)
    try:
        cells = []
        for stage in STAGES:
            for protocol in PROTOCOLS:
                cells.append(await cancelled_in(site, stage, protocol, within_s))
                await asyncio.to_thread(site.settled)
        return cells
    finally:
        await asyncio.to_thread(site.stop)


# -- what it costs -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    idle_s: Sequence[float]
    after_s: Sequence[float]
    gone_s: Sequence[float]
    left: Left

    @property
    def later_s(self) -> float:
        return statistics.median(self.after_s) - statistics.median(self.idle_s)

    @property
    def good(self) -> bool:
        return self.later_s < LATER_S and not self.left


class _Texts(SimAnswers):
    """Whatever a real model says to random prompts is right: only its first token's time is of interest."""

    def expected(self, prompt: Sequence[int], count: int) -> list[int]:
        return [300] * count


async def _first_token(site: Site, answers: Answers, seed: int) -> float:
    async with Load(site.addresses, answers, seed=seed) as load:
        [stream] = load.start(1, 4, isl=(SHORT, SHORT))
        await load.ended(60.0)
        assert stream.error is None, stream.error
        return stream.first_s - stream.began_s


async def cost(engine: str, folder: Path, rounds: int = 5) -> Cost:
    answers: Answers = SimAnswers() if engine == "sim" else _Texts()
    wanted = deployment(engine=engine, decode=1)
    model = wanted["models"][0]
    model["max_model_len"] = 8192
    wanted["policy"] = {}
    if engine == "vllm":
        model["dtype"] = "bfloat16"
        for pool in model["pools"]:
            pool["engine_args"] = {"kv_cache_memory_bytes": 384 << 20}
    site = Site(wanted, folder)
    await asyncio.to_thread(site.start, 600.0)
    try:
        await _first_token(site, answers, 0)  # what compiles, compiles now
        idle = [await _first_token(site, answers, 10 + n) for n in range(rounds)]
        after, left_after_s, found = [], [], left(site)
        for n in range(rounds):
            for worker in site.workers():
                await asyncio.to_thread(flush, worker["grpc"])
            async with Load(site.addresses, answers, seed=100 + n, http_every=2) as load:
                long: list[Stream] = load.start(CANCELLED, 200, isl=(LONG, LONG))
                await _until(lambda: left(site).running > 0, 30.0, "a prefill")
                await asyncio.sleep(0.5)
                await load.cancel(long)
                began = time.monotonic()
                after.append(await _first_token(site, answers, 200 + n))
            _, found = await gone(site, 10.0)
            left_after_s.append(time.monotonic() - began)
        return Cost(idle, after, left_after_s, found)
    finally:
        await asyncio.to_thread(site.stop)


# -- said ----------------------------------------------------------------------------------------------------------


def where_table(cells: Sequence[Cell]) -> str:
    rows = [f"| {c.stage} | {c.protocol} | {c.took_s:.2f} s | {c.left} |" for c in cells]
    head = "| cancelled in | over | nothing left after | left then |\n|---|---|---:|---|"
    return "\n".join([head, *rows])


def cost_text(engine: str, cost: Cost) -> str:
    what = "real vLLM, SmolLM2-135M on CPU" if engine == "vllm" else "simulated engine"
    return (
        f"First token of a {SHORT}-token prompt on idle workers ({what}, one prefill and one decode worker): "
        f"median {statistics.median(cost.idle_s):.2f} s, longest {max(cost.idle_s):.2f} s of {len(cost.idle_s)}.\n"
        f"Right after {CANCELLED} prompts of {LONG} tokens were cancelled (5 over gRPC, 5 over HTTP): median "
        f"{statistics.median(cost.after_s):.2f} s, longest {max(cost.after_s):.2f} s of {len(cost.after_s)}: "
        f"{cost.later_s:+.2f} s in the median ({LATER_S:g} s may be), "
        f"{max(cost.after_s) - max(cost.idle_s):+.2f} s from longest to longest.\n"
        f"Left: {cost.left}."
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("sim", "vllm"), default="sim", help="for what it costs")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tandem-cancel-") as folder:
        good = True
        if args.engine == "sim":
            cells = asyncio.run(where(Path(folder) / "where"))
            print(where_table(cells), flush=True)
            good = all(cell.good for cell in cells)
        measured = asyncio.run(cost(args.engine, Path(folder) / "cost"))
        print("\n" + cost_text(args.engine, measured))
    return 0 if good and measured.good else 1


if __name__ == "__main__":
    sys.exit(main())

"""Does the simulator predict this machine? A real cluster under load, and the same arrivals in the simulator.

    python -m bench.bench_profile                     fits a profile first, about three minutes more
    python -m bench.bench_profile --profile FILE      with one of `tandem profile`

The cluster is what `tandem up` starts: vLLM on the CPU, SmolLM2-135M, one prefill and one decode worker. The load comes
through the frontend, prompts of mixed lengths that nobody has seen before, at random times. Status 1 if the simulated
median of the time to the first token, or of the gaps between tokens, is more than ``--within`` off the real one.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import log
from pathlib import Path
from statistics import median

import grpc

from tandem.cli import deployments
from tandem.core.types import Plan, RequestKey
from tandem.sim.metrics import SLOS, Job, percentile
from tandem.sim.study import Setup, simulate
from tandem.sim.workload import Offered, Workload
from tandem.v1 import inference_pb2, inference_pb2_grpc
from tandem.wire import profile_file, record
from tests.harness.client import workers
from tests.harness.cluster import Cluster, wait_for

START_S, REQUEST_S, FIT_S = 240.0, 300.0, 900.0
TOKENS = range(300, 40_000)


@dataclass
class Seen:
    """One real request."""

    offered: Offered
    prompt: list[int]
    ttft_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)
    wrong: str = ""
    journey: Journey | None = None


@dataclass
class Journey:
    """What the router knew of one request, by its record. Seconds after it came."""

    came_s: float
    place: str = ""
    placed_s: float = 0.0
    decoding_s: float = 0.0


def fit(profile: Path) -> None:
    """Two engines at once, as the cluster has them: they share this machine's caches and memory."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("TANDEM_")}
    command = [sys.executable, "-m", "tandem.cli.main", "profile", "--repeat", "2"]
    with tempfile.TemporaryFile() as unread:
        other = subprocess.Popen(
            [*command, "--seed", "1", "-o", str(profile.with_suffix(".other"))], env=env, stdout=unread, stderr=unread
        )
        try:
            subprocess.run([*command, "-o", str(profile)], env=env, check=True, timeout=FIT_S)
        finally:
            other.terminate()
            other.wait(60.0)


def arrivals(args: argparse.Namespace) -> list[Seen]:
    rng = random.Random(args.seed)
    clock, found = 0.0, []
    for _ in range(args.requests):
        clock += rng.expovariate(args.rate)
        isl = max(32, min(args.longest, round(rng.lognormvariate(log(args.median), 0.8))))
        osl = rng.randint(16, 48)
        found.append(Seen(Offered(clock, isl, osl), rng.choices(TOKENS, k=isl)))
    return found


async def ask(stub: inference_pb2_grpc.InferenceServiceStub, model: str, seen: Seen, began: float) -> None:
    await asyncio.sleep(max(0.0, began + seen.offered.arrival_s - time.monotonic()))
    request = inference_pb2.GenerateRequest(
        model=model,
        token_ids=inference_pb2.TokenIds(ids=seen.prompt),
        options=inference_pb2.GenerateOptions(max_tokens=seen.offered.osl_tokens, temperature=0.0, ignore_eos=True),
    )
    sent = last = time.monotonic()
    tokens = 0
    try:
        async for answer in stub.Generate(request, timeout=REQUEST_S):
            now = time.monotonic()
            if answer.token_ids:
                if not tokens:
                    seen.ttft_s = now - sent
                else:
                    seen.gaps_s += [(now - last) / len(answer.token_ids)] * len(answer.token_ids)
                tokens += len(answer.token_ids)
                last = now
    except grpc.aio.AioRpcError as error:
        seen.wrong = f"{error.code().name}: {error.details()}"
    if not seen.wrong and tokens != seen.offered.osl_tokens:
        seen.wrong = f"{tokens} tokens instead of {seen.offered.osl_tokens}"


async def load(address: str, model: str, all_seen: Sequence[Seen], warm_up: Sequence[Seen]) -> None:
    async with grpc.aio.insecure_channel(address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        for seen in warm_up:  # imports, handshakes between the workers
            await ask(stub, model, seen, 0.0)
        began = time.monotonic() + 0.5
        await asyncio.gather(*(ask(stub, model, seen, began) for seen in all_seen))


def real(args: argparse.Namespace, profile: Path, all_seen: Sequence[Seen]) -> None:
    base = deployments.default()
    [model] = base.models
    pools = tuple(pool.model_copy(update={"profile": str(profile)}) for pool in model.pools)
    wanted = base.model_copy(update={"models": (model.model_copy(update={"pools": pools}),)})
    rng = random.Random(args.seed + 1)
    warm_up = [Seen(Offered(0.0, n, 8), rng.choices(TOKENS, k=n)) for n in (40, 400, 900, 100, 600)]
    with tempfile.TemporaryDirectory(prefix="tandem-bench-") as folder:
        recorded = {"record": {"folder": str(Path(folder, "record"))}}
        cluster = Cluster(wanted.model_dump(mode="json", exclude_defaults=True) | recorded, Path(folder))
        with cluster.start(START_S):
            [router] = cluster.state()["routers"]
            wait_for(lambda: len(workers(router)) == len(pools), START_S, "the router to know both workers")
            asyncio.run(load(cluster.grpc, model.name, all_seen, warm_up))
        log = cluster.log()
        [recording] = Path(folder, "record").iterdir()
        for seen, journey in zip(all_seen, list(journeys(recording))[len(warm_up) :], strict=True):
            seen.journey = journey
    wrong = [seen.wrong for seen in (*warm_up, *all_seen) if seen.wrong]
    if wrong:
        sys.exit(f"{log[-3000:]}\n{len(wrong)} requests failed: {wrong[0]}")


def place(plan: Plan | None) -> str:
    return "" if plan is None else f"{plan.prefill_worker or 'itself'} > {plan.decode_worker}"


def journeys(recording: Path) -> Iterator[Journey]:
    """Of the first attempts, in the order in which they came."""
    known: dict[RequestKey, Journey] = {}
    for line in record.read(recording):
        match line:
            case record.Submitted(request=request):
                known.setdefault(request.key, Journey(line.at))
            case record.Polled(decisions=decisions):
                for decision in decisions:
                    if decision.kind == "place":
                        one = known[decision.key]
                        one.place, one.placed_s = place(decision.plan), line.at - one.came_s
            case record.DecodeStarted(key=key):
                known[key].decoding_s = line.at - known[key].came_s
    yield from known.values()


def simulated(args: argparse.Namespace, profile: Path, all_seen: Sequence[Seen]) -> tuple[list[Job], float]:
    """Jobs, and the median gap between tokens."""
    block = profile_file.load(profile).worker.block_size
    workload = Workload("the same arrivals", block, tuple(seen.offered for seen in all_seen))
    outcome = simulate(Setup(workload, str(profile), "1P1D", "tandem-no-slo", SLOS["loose"], seed=args.seed))
    gaps = outcome.workers[-1].activity.gaps
    for worker in outcome.workers[:-1]:
        gaps.merge(worker.activity.gaps)
    return outcome.jobs, gaps.percentiles((0.5,))[0]


def compare(args: argparse.Namespace, all_seen: Sequence[Seen], jobs: Sequence[Job], gap_s: float) -> int:
    ttft = sorted(seen.ttft_s for seen in all_seen)
    predicted = sorted(job.ttft_s or 0.0 for job in jobs)
    gaps = sorted(gap for seen in all_seen for gap in seen.gaps_s)
    tpot = sorted(sum(seen.gaps_s) / len(seen.gaps_s) for seen in all_seen)
    predicted_tpot = sorted(job.tpot_s or 0.0 for job in jobs)
    each = median((job.ttft_s or 0.0) / seen.ttft_s for seen, job in zip(all_seen, jobs, strict=True))
    rows = [
        ("TTFT, median", median(ttft), median(predicted)),
        ("TTFT, 90th percentile", percentile(ttft, 0.9), percentile(predicted, 0.9)),
        ("ITL, median", median(gaps), gap_s),
        ("TPOT, median", median(tpot), median(predicted_tpot)),
    ]
    longest = max(seen.offered.isl_tokens for seen in all_seen)
    print(
        f"{len(all_seen)} requests at {args.rate:g}/s, prompts of {args.median} tokens in the middle, up to {longest}"
    )
    print("this machine's vLLM against the simulator")
    print(f"{'':<24} {'real ms':>10} {'simulated ms':>13} {'ratio':>7}")
    for name, was, found in rows:
        print(f"{name:<24} {1e3 * was:10.1f} {1e3 * found:13.1f} {found / was:7.2f}")
    print(f"TTFT of each request, simulated over real: median {each:.2f}")
    if args.each:
        for seen, job in zip(all_seen, jobs, strict=True):
            went = seen.journey or Journey(0.0)
            print(
                f"  at {seen.offered.arrival_s:6.1f} s, {seen.offered.isl_tokens:5} tokens: "
                f"{1e3 * seen.ttft_s:7.0f} ms, {went.place} after {1e3 * went.placed_s:.0f}, "
                f"prompt done after {1e3 * went.decoding_s:.0f}; "
                f"simulated {1e3 * (job.ttft_s or 0.0):7.0f}, {place(job.plan)}"
            )
    off = [abs(found / was - 1.0) for name, was, found in rows if name in ("TTFT, median", "ITL, median")]
    good = max(off) <= args.within
    print(f"medians of TTFT and ITL within {args.within:.0%}: {'yes' if good else 'NO'} (worst {max(off):.1%})")
    return 0 if good else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--profile", metavar="FILE", help="of `tandem profile`; without it one is fitted now")
    add("--requests", type=int, default=80, metavar="N")
    add("--rate", type=float, default=0.5, metavar="R", help="mean requests/s")
    add("--median", type=int, default=320, metavar="N", help="prompt tokens in the middle")
    add("--longest", type=int, default=2048, metavar="N")
    add("--each", action="store_true", help="print every request's times to the first token, too")
    add("--within", type=float, default=0.2)
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tandem-bench-") as folder:
        profile = Path(args.profile or Path(folder, "profile.json")).resolve()
        if not args.profile:
            fit(profile)
        all_seen = arrivals(args)
        real(args, profile, all_seen)
        jobs, gap_s = simulated(args, profile, all_seen)
        return compare(args, all_seen, jobs, gap_s)


if __name__ == "__main__":
    sys.exit(main())

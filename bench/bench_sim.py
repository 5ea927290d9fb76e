"""TW goodput of our policy against the best static alternative, per workload and SLO. Everything is simulated.

    python bench/bench_sim.py --quick [--trace FILE ...]     one seed, 2,000 requests
    python bench/bench_sim.py [--trace FILE ...]             the best two and ours with five seeds, all requests

Static alternatives: every split of the fleet under Dynamo's cost, with and without its conditional thresholds, and the
aggregated fleet under Dynamo's cost, least-loaded and round-robin. They are raced with one seed: who does not hold
3 % above the best so far is out after one run. Ours runs on one split (4P4D) with one configuration. Each run's
outcome is kept in build/bench-sim, by policy, profile, workload, seed and commit (with what is changed in src/).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

from tandem.sim import traces
from tandem.sim.study import Setup, slo_named, tw_goodput, tw_holds
from tandem.sim.synthetic import generate
from tandem.sim.workload import Workload

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "build" / "bench-sim"
SLOS = ("medium", "tight")
SYNTHETIC = ("multi-turn", "smooth-chat")
SCREEN_REQUESTS, SEEDS = 2000, 5
WORKERS = 8
#: A challenger must hold this much above the best so far: what ``tw_goodput`` can tell apart.
STEP = 1.03


class Cache:
    """Outcomes of runs; one file per state of the source."""

    def __init__(self) -> None:
        self._file = KEPT / f"{_commit()}.json"
        self._known: dict[str, bool] = json.loads(self._file.read_text()) if self._file.exists() else {}
        self._digests: dict[int, tuple[Workload, str]] = {}

    def holds(self, setup: Setup, rate: float) -> bool:
        key = self._key(setup, rate)
        if key not in self._known:
            self._known[key] = tw_holds(setup, rate)
            KEPT.mkdir(parents=True, exist_ok=True)
            self._file.write_text(json.dumps(self._known))
        return self._known[key]

    def _key(self, setup: Setup, rate: float) -> str:
        workers = [(asdict(worker.hardware), worker.role, worker.chunk_tokens) for worker in setup.fleet().workers]
        slo, knobs = asdict(setup.slo), dict(setup.knobs)
        said = (workers, setup.policy, slo, knobs, setup.seed, self._digest(setup.workload), f"{rate:.9g}")
        return hashlib.sha256(repr(said).encode()).hexdigest()

    def _digest(self, workload: Workload) -> str:
        if id(workload) not in self._digests:
            self._digests[id(workload)] = workload, hashlib.sha256(repr(workload).encode()).hexdigest()
        return self._digests[id(workload)][1]


def _commit() -> str:
    def git(*args: str) -> str:
        return subprocess.run(("git", *args), cwd=ROOT, capture_output=True, text=True, check=True, timeout=30).stdout

    changed = hashlib.sha256(git("diff", "HEAD", "--", "src").encode()).hexdigest()[:12]
    return f"{git('rev-parse', 'HEAD').strip()[:12]}-{changed}"


def static_alternatives(setup: Setup) -> Iterator[Setup]:
    """The likeliest first: what comes early sets the bar for the rest."""
    for prefill in sorted(range(1, WORKERS), key=lambda count: abs(count - WORKERS / 2)):
        for policy in ("dynamo-conditional", "dynamo"):
            yield replace(setup, policy=policy, split=f"{prefill}P{WORKERS - prefill}D")
    for policy in ("dynamo", "least-loaded", "round-robin"):
        yield replace(setup, policy=policy, split=f"{WORKERS}D")


def screened(setup: Setup, start: float, cache: Cache) -> list[tuple[float, Setup]]:
    """Who led the race, the winner last, with their goodput."""
    leaders: list[tuple[float, Setup]] = []
    best = 0.0
    for candidate in static_alternatives(setup):
        if best and not cache.holds(candidate, best * STEP):
            continue
        rate = tw_goodput(candidate, best * STEP or start, tried=cache.holds)
        if rate > best:
            best = rate
            leaders.append((rate, candidate))
    return leaders


def load(name: str, seed: int, requests: int | None, block_size: int) -> Workload:
    if name in SYNTHETIC:
        return generate(name, seed, requests)
    workload = traces.load(Path(name).expanduser(), seed, block_size)
    return workload.first(requests) if requests else workload


def goodput(setup: Setup, name: str, start: float, args: argparse.Namespace, cache: Cache) -> float:
    """Median over seeds, on all requests."""
    rates = []
    for seed in range(SEEDS):
        seeded = replace(setup, workload=load(name, seed, None, args.block_size), seed=seed)
        rates.append(tw_goodput(seeded, start, tried=cache.holds))
    return statistics.median(rates)


def compare(name: str, slo: str, args: argparse.Namespace, cache: Cache) -> float:
    """Prints one row; returns ours over the best static."""
    workload = load(name, 0, args.requests, args.block_size)
    ours = Setup(workload=workload, hardware=args.hardware, split=args.split, policy="tandem", slo=slo_named(slo))
    leaders = screened(ours, args.start, cache)
    if not leaders:
        print(f"{workload.name:<24} {slo:<7} no static alternative holds at any rate tried", flush=True)
        return float("nan")
    static, best = leaders[-1]
    if args.quick:
        rate = tw_goodput(ours, static, tried=cache.holds)
    else:
        static, best = max(
            ((goodput(setup, name, start, args, cache), setup) for start, setup in leaders[-2:]),
            key=lambda pair: pair[0],
        )
        rate = goodput(ours, name, static, args, cache)
    print(
        f"{workload.name:<24} {slo:<7} {rate:8.2f} {static:12.2f}   {rate / static:5.2f}x   {best.policy} {best.split}",
        flush=True,
    )
    return rate / static


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--quick", action="store_true")
    add("--trace", action="append", default=[], metavar="FILE", help="Mooncake JSONL or Azure CSV; again for several")
    add("--requests", type=int, default=SCREEN_REQUESTS, metavar="N", help="that the race (and --quick) runs on")
    add("--block-size", type=int, default=512, help="tokens per hash id of a Mooncake trace")
    add("--slo", action="append", metavar="NAME", help="again for several (medium and tight)")
    add("--hardware", default="h100-70b-tp4")
    add("--split", default="4P4D", help="what ours runs on")
    add("--start", type=float, default=8.0, metavar="R", help="requests/s at which the first search begins")
    args = parser.parse_args()
    cache = Cache()
    kind = f"one seed, {args.requests} requests" if args.quick else f"median of {SEEDS} seeds, all requests"
    print(f"TW goodput in requests/s, {WORKERS} workers of {args.hardware} (simulated), {kind}")
    print(f"{'workload':<24} {'SLO':<7} {'ours':>8} {'best static':>12}   {'ratio':>6}   which")
    ratios = [compare(name, slo, args, cache) for name in (*args.trace, *SYNTHETIC) for slo in args.slo or SLOS]
    known = [ratio for ratio in ratios if ratio > 0]
    if known:
        print(
            f"geometric mean of the ratios: {statistics.geometric_mean(known):.2f}x over {len(known)} of {len(ratios)}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""TW goodput of our policy against the best static alternative, per workload and SLO. Everything is simulated.

    python -m bench.bench_sim --quick [--trace FILE ...]     one seed, the first requests of each workload
    python -m bench.bench_sim [--trace FILE ...]             the best two and ours with five seeds, all requests

Static alternatives: every split of the fleet under Dynamo's cost, with and without its conditional thresholds, and the
aggregated fleet with four chunk sizes under Dynamo's cost, least-loaded and round-robin. They are raced with one seed:
who does not hold 3 % above the best so far is out after one run. Ours runs with one configuration everywhere.

Sections (``--section``, again for several): ``goals``; ``peer``, Dynamo's cost function on its own published workload;
``mixed``, half of the fleet A100s; ``handicaps``, the same race with news that are late and a model that is wrong;
``oracle``, ours against ours that knows output lengths; ``bound``, ours against a clairvoyant fluid fleet, which no
scheduler can pass, and where ours spends its workers' time; ``less``, ours less each ingredient, at a fixed rate.
Each run's outcome is kept in build/bench-sim by policy, fleet, workload, seed and the source that decides it.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from resource import RUSAGE_CHILDREN, RUSAGE_SELF, getrusage

from bench.fluid_bound import budget, fluid_bound
from tandem.adapters.clock import monotonic
from tandem.sim import traces
from tandem.sim.fleet import hardware_named
from tandem.sim.metrics import attainment
from tandem.sim.report import figures
from tandem.sim.simulation import Timing
from tandem.sim.study import ABLATIONS, Setup, simulate, slo_named, tw_goodput, tw_holds
from tandem.sim.synthetic import generate
from tandem.sim.workload import Workload

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "build" / "bench-sim"
#: What decides a run's outcome.
SOURCE = ("src/tandem/core", "src/tandem/enginemodel", "src/tandem/sim")
SLOS = ("medium", "tight")
SECTIONS = ("goals", "peer", "mixed", "handicaps", "oracle", "bound", "less")
#: Made from the seed, and how many requests: at tens of them per second fewer would not last long enough.
SYNTHETIC = {"multi-turn": 8000, "smooth-chat": 6000}
SCREEN_REQUESTS, SEEDS, WORKERS = 2000, 5, 8
#: A challenger must hold this much above the best so far: what ``tw_goodput`` can tell apart.
STEP = 1.03
MIXED = ("h100-70b-tp4", "a100-70b-tp4")
HANDICAPS: dict[str, dict[str, object]] = {
    "steps 30 % longer than the profile": {"misfit": 1.3},
    "steps 30 % shorter than the profile": {"misfit": 0.7},
    "load reports 500 ms old": {"timing": Timing(report_age_s=0.5)},
    "prefix index 1 s stale": {"timing": Timing(index_age_s=1.0)},
}


@dataclass(frozen=True)
class Bench:
    """What the command line says."""

    quick: bool
    requests: int
    block_size: int
    hardware: str
    split: str
    start: float


@dataclass(frozen=True)
class Row:
    """Ours beside the best static alternative (or another rival): requests/s."""

    label: str
    slo: str
    ours: float
    rival: float
    which: str

    @property
    def ratio(self) -> float:
        return self.ours / self.rival if self.rival else math.nan

    def __str__(self) -> str:
        return f"{self.label:<38} {self.slo:<7} {self.ours:8.2f} {self.rival:12.2f}   {self.ratio:5.2f}x   {self.which}"


# --- runs that are kept ---------------------------------------------------------------------------------------------


def holds(setup: Setup, rate: float) -> bool:
    """``tw_holds``, from the cache where it is known."""
    kept = KEPT / _source() / _key(setup, rate)
    if kept.exists():
        return kept.read_text() == "True"
    found = tw_holds(setup, rate)
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(str(found))
    return found


def _key(setup: Setup, rate: float) -> str:
    workers = [(asdict(w.hardware), w.role, w.chunk_tokens, w.misfit) for w in setup.fleet().workers]
    said = (
        workers, setup.policy, asdict(setup.slo), dict(setup.knobs), setup.seed, setup.timing,
        _digest(setup.workload), f"{rate:.9g}",
    )  # fmt: skip
    return hashlib.sha256(repr(said).encode()).hexdigest()


@lru_cache(maxsize=8)
def _digest(workload: Workload) -> str:
    return hashlib.sha256(repr(workload).encode()).hexdigest()


@lru_cache(maxsize=1)
def _source() -> str:
    def git(*args: str) -> str:
        return subprocess.run(("git", *args), cwd=ROOT, capture_output=True, text=True, check=True, timeout=30).stdout

    trees = git("rev-parse", *(f"HEAD:{path}" for path in SOURCE))
    return hashlib.sha256((trees + git("diff", "HEAD", "--", *SOURCE)).encode()).hexdigest()[:16]


@lru_cache(maxsize=4)
def load(name: str, seed: int, requests: int | None, block_size: int) -> Workload:
    """``requests`` None: all."""
    if name in SYNTHETIC:
        return generate(name, seed, SYNTHETIC[name] if requests is not None else 2 * SYNTHETIC[name])
    workload = traces.load(Path(name).expanduser(), seed, block_size)
    return workload.first(requests) if requests else workload


# --- the race -------------------------------------------------------------------------------------------------------


def static_alternatives(setup: Setup) -> Iterator[Setup]:
    """The likeliest first: what comes early sets the bar for the rest."""
    for prefill in (6, 5, 4, 7, 3, 2, 1):
        for policy in ("dynamo-conditional", "dynamo"):
            yield replace(setup, policy=policy, split=f"{prefill}P{WORKERS - prefill}D")
    for chunk in (2048, 1024, 512, 256):
        for policy in ("dynamo", "least-loaded"):
            yield replace(setup, policy=policy, split=f"{WORKERS}D", chunk_tokens=chunk)
    yield replace(setup, policy="round-robin", split=f"{WORKERS}D")


def mixed_alternatives(setup: Setup) -> Iterator[Setup]:
    """Each kind prefills for the other, both do both, or all are aggregated."""
    fast, slow = MIXED
    splits = (
        f"4P0D@{fast}+4D@{slow}", f"4P0D@{slow}+4D@{fast}", f"2P2D@{fast}+2P2D@{slow}", f"3P1D@{fast}+1P3D@{slow}",
        f"1P3D@{fast}+3P1D@{slow}", f"3P1D@{fast}+3P1D@{slow}", f"4D@{fast}+4D@{slow}",
    )  # fmt: skip
    for split in splits:
        for policy in ("dynamo-conditional", "dynamo") if "P" in split else ("dynamo", "least-loaded"):
            yield replace(setup, policy=policy, split=split)


def screened(candidates: Iterable[Setup], start: float) -> list[tuple[float, Setup]]:
    """Who led the race, the winner last, with their goodput."""
    leaders: list[tuple[float, Setup]] = []
    best = 0.0
    for candidate in candidates:
        if best and not holds(candidate, best * STEP):
            continue
        rate = tw_goodput(candidate, best * STEP or start, tried=holds)
        if rate > best:
            best = rate
            leaders.append((rate, candidate))
    return leaders


def over_seeds(setup: Setup, name: str, start: float, bench: Bench) -> float:
    """Median over seeds, on all requests; in a quick run the one at hand."""
    if bench.quick:
        return tw_goodput(setup, start, tried=holds)
    rates = []
    for seed in range(SEEDS):
        seeded = replace(setup, workload=load(name, seed, None, bench.block_size), seed=seed)
        rates.append(tw_goodput(seeded, start, tried=holds))
    return statistics.median(rates)


def ours_for(name: str, slo: str, bench: Bench, **changes: object) -> Setup:
    workload = load(name, 0, bench.requests, bench.block_size)
    setup = Setup(workload=workload, hardware=bench.hardware, split=bench.split, policy="tandem", slo=slo_named(slo))
    return replace(setup, **changes)  # type: ignore[arg-type]


Alternatives = Callable[[Setup], Iterator[Setup]]


def race(label: str, name: str, slo: str, setup: Setup, bench: Bench, alternatives: Alternatives) -> Row:
    """Ours against the best of the alternatives."""
    leaders = screened(alternatives(setup), bench.start)
    if not leaders:
        return Row(label, slo, over_seeds(setup, name, bench.start, bench), 0.0, "no static alternative holds at all")
    static, best = leaders[-1]
    if not bench.quick:
        finals = [(over_seeds(rival, name, rate, bench), rival) for rate, rival in leaders[-2:]]
        static, best = max(finals, key=lambda pair: pair[0])
    chunk = f", chunk {best.chunk_tokens}" if "P" not in best.split else ""
    which = f"{best.policy} {best.split}{chunk}"
    return Row(label, slo, over_seeds(setup, name, static * 1.2, bench), static, which)


# --- sections: each task gives one row ------------------------------------------------------------------------------

Task = Callable[[], Row]


def goal(name: str, slo: str, bench: Bench) -> Row:
    return race(Path(name).stem, name, slo, ours_for(name, slo, bench), bench, static_alternatives)


def mixed(name: str, slo: str, bench: Bench) -> Row:
    fast, slow = MIXED
    setup = ours_for(name, slo, bench, split=f"4P0D@{fast}+0P4D@{slow}")
    return race(f"{Path(name).stem}, 4 H100 + 4 A100", name, slo, setup, bench, mixed_alternatives)


def handicapped(name: str, slo: str, handicap: str, bench: Bench) -> Row:
    setup = ours_for(name, slo, bench, **HANDICAPS[handicap])
    return race(f"{Path(name).stem}: {handicap}", name, slo, setup, bench, static_alternatives)


def oracle(name: str, slo: str, bench: Bench) -> Row:
    setup = ours_for(name, slo, bench)
    knows = over_seeds(replace(setup, policy="tandem-oracle"), name, bench.start, bench)
    rate = over_seeds(setup, name, knows or bench.start, bench)
    return Row(Path(name).stem, slo, rate, knows, "the same, knowing output lengths")


def tasks_of(section: str, names: Sequence[str], slos: Sequence[str], bench: Bench) -> list[Task]:
    match section:
        case "goals":
            return [partial(goal, name, slo, bench) for name in names for slo in slos]
        case "mixed":
            return [partial(mixed, name, slo, bench) for name in names for slo in slos]
        case "handicaps":
            return [partial(handicapped, name, slo, h, bench) for h in HANDICAPS for name in names for slo in slos]
        case _:
            return [partial(oracle, name, slo, bench) for name in names for slo in slos]


TITLES = {
    "goals": "ours against the best static alternative",
    "mixed": "half of the fleet A100s",
    "handicaps": "both under the same handicap",
    "oracle": "ours against an oracle",
}


def _call(task: Task) -> Row:
    return task()


def run_section(section: str, names: Sequence[str], slos: Sequence[str], bench: Bench, jobs: int) -> None:
    print(f"\n{TITLES[section]}")
    print(f"{'workload':<38} {'SLO':<7} {'ours':>8} {'rival':>12}   {'ratio':>6}   which", flush=True)
    rows = []
    with ProcessPoolExecutor(jobs) as pool:
        for row in pool.map(_call, tasks_of(section, names, slos, bench)):
            print(row, flush=True)
            rows.append(row)
    known = [row.ratio for row in rows if row.ratio > 0]
    if known:
        mean = statistics.geometric_mean(known)
        print(f"geometric mean {mean:.2f}x, least {min(known):.2f}x, over {len(known)} of {len(rows)}", flush=True)


def peer() -> None:
    """Dynamo's own replay of this recipe: hit rate 0.751, 0.751, 0.752; round-robin 0.484, 0.484, 0.514."""
    print(
        "\nDynamo's cost function on its published shared-prefix workload: 4 workers of 49,152 KV tokens, 20 requests/s"
    )
    print(f"{'policy':<14} {'hit rate of seeds 1 to 3':<28} {'mean TTFT, ms':<24}")
    for policy in ("round-robin", "dynamo", "tandem"):
        found = []
        for seed in (1, 2, 3):
            workload = generate("shared-prefix", seed, 1000, 20.0)
            setup = Setup(workload, "h100-70b-tp4", "4D", policy, slo_named("medium"), seed, kv_tokens=49_152)
            found.append(figures(setup, simulate(setup)))
        hits = " ".join(f"{one['hit_rate']:.3f}" for one in found)
        ttft = " ".join(f"{1e3 * one['ttft_s']['mean']:.1f}" for one in found)
        print(f"{policy:<14} {hits:<28} {ttft:<24}", flush=True)


def bound(names: Sequence[str], slos: Sequence[str], bench: Bench) -> None:
    """With the requests of a quick run: the linear program grows with them."""
    print("\nours against what no scheduler can pass (bench/fluid_bound.py), and where its worker seconds go")
    for name in names:
        for slo in slos:
            setup = ours_for(name, slo, bench)
            kind = hardware_named(bench.hardware)
            rate = tw_goodput(setup, bench.start, tried=holds)
            limit = fluid_bound(setup.workload, kind, WORKERS, setup.slo, rate or 1.0)
            spent = budget(simulate(replace(setup, workload=setup.workload.at_rate(rate or 1.0))), kind, setup.slo)
            print(
                f"{Path(name).stem:<24} {slo:<7} {rate:6.2f} of {limit:6.2f}, {rate / limit:.2f}; {spent}", flush=True
            )


def less(names: Sequence[str], slos: Sequence[str], bench: Bench) -> None:
    """At the goodput of ours: what attains less there, needs its ingredient."""
    print("\nours less each ingredient, at the rate that ours holds: attainment by requests / by tokens")
    for name in names:
        for slo in slos:
            setup = ours_for(name, slo, bench)
            rate = tw_goodput(setup, bench.start, tried=holds)
            print(f"{Path(name).stem}, {slo}, {rate:.2f} requests/s")
            for policy in ("tandem", *ABLATIONS):
                wanted = replace(setup, policy=policy, workload=setup.workload.at_rate(rate))
                met = attainment(simulate(wanted).jobs, setup.slo)
                print(f"  {policy:<24} {met.requests:.3f} / {met.tokens:.3f}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--quick", action="store_true")
    add("--trace", action="append", default=[], metavar="FILE", help="Mooncake JSONL or Azure CSV; again for several")
    add("--workload", action="append", choices=SYNTHETIC, help="instead of all that are made from a seed")
    add("--section", action="append", choices=SECTIONS, help="again for several (goals and peer)")
    add("--requests", type=int, default=SCREEN_REQUESTS, metavar="N", help="of a trace, for the race and --quick")
    add("--block-size", type=int, default=512, help="tokens per hash id of a Mooncake trace")
    add("--slo", action="append", metavar="NAME", help="again for several (medium and tight)")
    add("--hardware", default="h100-70b-tp4")
    add("--split", default="4P4D", help="what ours runs on")
    add(
        "--start",
        type=float,
        default=64.0,
        metavar="R",
        help="requests/s at which the first search begins: what is far too much shows at once, what is too little last",
    )
    add("--jobs", type=int, default=2, metavar="N", help="processes")
    args = parser.parse_args()
    began = monotonic()
    bench = Bench(args.quick, args.requests, args.block_size, args.hardware, args.split, args.start)
    names = (*args.trace, *(args.workload or SYNTHETIC))
    kind = f"one seed, {args.requests} requests of a trace" if args.quick else f"median of {SEEDS} seeds, all requests"
    print(f"TW goodput in requests/s, {WORKERS} workers of {args.hardware} (simulated), ours on {args.split}; {kind}")
    for section in args.section or ("goals", "peer"):
        if section == "peer":
            peer()
        elif section in ("bound", "less"):
            (bound if section == "bound" else less)(names, args.slo or SLOS, bench)
        else:
            run_section(section, names, args.slo or SLOS, bench, args.jobs)
    cpu_s = sum(u.ru_utime + u.ru_stime for u in map(getrusage, (RUSAGE_SELF, RUSAGE_CHILDREN)))
    print(f"\n{monotonic() - began:.0f} s, {cpu_s:.0f} s of CPU, {args.jobs} processes")
    return 0


if __name__ == "__main__":
    sys.exit(main())

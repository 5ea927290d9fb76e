"""One run, described and carried out: workload x fleet x policy x SLO. Also the search for a policy's goodput."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from tandem.core.policy import policy_from
from tandem.errors import ConfigError
from tandem.sim.baselines import DynamoCost, LeastLoaded, RoundRobin
from tandem.sim.fleet import DECODE_CHUNK, Fleet, make_fleet
from tandem.sim.metrics import SLOS, Slo
from tandem.sim.routing import CoreRouter, Lookup, Router
from tandem.sim.simulation import Outcome, Simulation, Timing
from tandem.sim.worker import SimWorker
from tandem.sim.workload import Workload

#: Policy -> what it is.
POLICIES: Mapping[str, str] = MappingProxyType(
    {
        "tandem": "the router's own decision core, with the SLO as its requests' SLO",
        "tandem-no-slo": "the same; its requests carry no SLO, so nothing is refused for lateness",
        "tandem-oracle": "the same, knowing each output's length",
        "round-robin": "one worker after the other",
        "least-loaded": "fewest requests in flight",
        "dynamo": "Dynamo's published cost function with overlap credit",
        "dynamo-conditional": "the same, short uncached prompts computed on the decode worker",
        "tandem-less-tpot-guard": "no steep rise near the TPOT target",
        "tandem-less-queue": "no central queue: every request is placed at once",
        "tandem-less-deadlines": "the queue in order of arrival",
        "tandem-less-refusal": "late requests run behind the rest instead of being refused",
        "tandem-less-local": "prefill workers compute every prompt",
        "tandem-less-remote": "every prompt is computed where it decodes",
        "tandem-less-lending": "roles bind: only prefill workers compute for others, and they never decode",
        "tandem-less-effort": "worker time has no price: streams spread over all workers",
        "tandem-less-pace": "requests start even where the streams would miss their TPOT by it",
    }
)

#: Our policy less one ingredient -> the knobs that take it out.
ABLATIONS: Mapping[str, Mapping[str, float | int | bool]] = MappingProxyType(
    {
        "tandem-less-tpot-guard": {"tpot_guard": 1e9},
        "tandem-less-queue": {"credit_s": 1e9},
        "tandem-less-deadlines": {"deadline_order": False},
        "tandem-less-refusal": {},  # of the request class, not a knob
        "tandem-less-local": {"local_prefill": False},
        "tandem-less-remote": {"remote_prefill": False},
        "tandem-less-lending": {"flexible": False},
        "tandem-less-effort": {"effort": 0.0},
        "tandem-less-pace": {"tpot_limit": 1e9},
    }
)

#: Each request's limit is the length of its answer, and that is known.
_ORACLE: Mapping[str, float | int | bool] = MappingProxyType({"osl_known": True})


@dataclass(frozen=True, slots=True)
class Setup:
    """Everything that a run depends on."""

    workload: Workload
    hardware: str
    split: str
    policy: str
    slo: Slo
    seed: int = 0
    timing: Timing = field(default_factory=Timing)
    misfit: float = 1.0  # real steps take so many times what the profiles say
    chunk_tokens: int = DECODE_CHUNK
    concurrency: int = 0  # closed loop of so many requests, instead of the workload's arrival times
    kv_tokens: int = 0  # of each worker; 0 = what its memory leaves
    knobs: Mapping[str, float | int | bool] = field(default_factory=dict)  # of the core's Policy

    def fleet(self) -> Fleet:
        return make_fleet(
            self.hardware, self.split, chunk_tokens=self.chunk_tokens, misfit=self.misfit, kv_tokens=self.kv_tokens
        )

    def router(self, workers: Sequence[SimWorker], lookup: Lookup) -> Router:
        match self.policy:
            case "round-robin":
                return RoundRobin(workers)
            case "least-loaded":
                return LeastLoaded(workers)
            case "dynamo" | "dynamo-conditional":
                conditional = self.policy == "dynamo-conditional"
                return DynamoCost(workers, lookup, self.workload.block_size, conditional=conditional)
            case name if name in ("tandem", "tandem-no-slo", "tandem-oracle", *ABLATIONS):
                slo = None if name == "tandem-no-slo" else self.slo
                oracle = name == "tandem-oracle"
                policy = policy_from({**ABLATIONS.get(name, {}), **(_ORACLE if oracle else {}), **self.knobs})
                osl, best_effort = self.workload.max_osl_tokens, name == "tandem-less-refusal"
                return CoreRouter(
                    workers, lookup, slo, osl, policy, self.seed, best_effort=best_effort, exact_lengths=oracle
                )
        raise ConfigError(f"no policy {self.policy!r}; there are {', '.join(POLICIES)}", param="policy")


def slo_named(name: str) -> Slo:
    """ConfigError if there is none."""
    if name not in SLOS:
        raise ConfigError(f"no SLO {name!r}; there are {', '.join(SLOS)}", param="slo")
    return SLOS[name]


def simulate(setup: Setup, progress: Callable[[int, int], None] | None = None, *, coalesce: bool = True) -> Outcome:
    """ConfigError if the set-up makes no sense."""
    simulation = _simulation(setup, coalesce=coalesce, progress=progress)
    with _no_collection():
        return simulation.run()


def _simulation(
    setup: Setup,
    *,
    coalesce: bool = True,
    progress: Callable[[int, int], None] | None = None,
    until_known: Slo | None = None,
) -> Simulation:
    if not setup.workload.requests:
        raise ConfigError("the workload has no requests", param="workload")
    return Simulation(
        setup.workload,
        setup.fleet(),
        setup.router,
        setup.timing,
        concurrency=setup.concurrency,
        coalesce=coalesce,
        progress=progress,
        until_known=until_known,
    )


@contextmanager
def _no_collection() -> Iterator[None]:
    """A run keeps what it makes until its end: looking for garbage meanwhile finds none, and takes longer each time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


#: Rates are found to this precision.
_PRECISION = 0.03


def tw_holds(setup: Setup, rate: float) -> bool:
    """Whether TW attainment holds at this mean rate: what a whole run would say, told as soon as it is known."""
    simulation = _simulation(replace(setup, workload=setup.workload.at_rate(rate)), until_known=setup.slo)
    with _no_collection():
        simulation.run()
    return simulation.holds


def tw_goodput(
    setup: Setup,
    start_rate: float,
    seen: Callable[[float, bool], None] | None = None,
    tried: Callable[[Setup, float], bool] = tw_holds,
    precision: float = _PRECISION,
) -> float:
    """The highest mean rate (requests per second, to 3 %) at which TW attainment holds; 0 if at none tried.

    ``tried``: answers in place of ``tw_holds``, from a cache.
    """

    def holds(rate: float) -> bool:
        ok = tried(setup, rate)
        if seen is not None:
            seen(rate, ok)
        return ok

    low, high = 0.0, start_rate
    while holds(high):
        low, high = high, high * 1.5
        if low > len(setup.workload.requests):
            return low  # all within a second: it is no load that could fail
    if not low:
        low = high
        while not holds(low):
            high, low = low, low / 1.5
            if low < start_rate / 50.0:
                return 0.0
    while high / low > 1.0 + precision:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low

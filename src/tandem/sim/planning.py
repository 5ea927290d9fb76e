"""Which fleet serves a workload within its SLO, and at what cost: a search over fleets, each tried in the simulator.

A *level* is how many GPUs of each type are used. At each level the fleets are: every way to cut them into workers of
the offered sizes (tensor parallelism), and for each of these the aggregated fleet and the splits into prefill and
decode workers. Splits are climbed, not enumerated: from the split that the time per phase suggests, onwards as long as
it pays. A fleet's *goodput* is the highest rate at which TW attainment holds (sim/metrics.py), under Tandem's own
policy. Everything follows from the arguments and the seed; levels do not depend on each other and can be searched
side by side.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from tandem.enginemodel.profile import context_sum, step_s
from tandem.errors import ConfigError
from tandem.sim.fleet import HARDWARE, Hardware, hardware_named
from tandem.sim.metrics import Slo
from tandem.sim.study import Setup, tw_goodput, tw_holds
from tandem.sim.workload import Workload
from tandem.wire import profile_file

#: US dollars per GPU and hour where the user gives none: about what clouds ask without a contract.
PRICES: Mapping[str, float] = {"h100": 3.0, "a100": 1.8}
_POLICY = "tandem"
#: A challenger counts as better from here on: what a goodput search can tell apart.
_STEP = 1.05
_PRECISION = 0.05
#: Simulated seconds of load that a run has at what its level might serve: a burst of a few seconds fits into queues and
#: would flatter the fleet. And the fewest requests, so that quartiles by prompt length mean something.
_HORIZON_S, _LEAST_REQUESTS = 12.0, 400
#: Levels per GPU type that are tried where there are several types, and where there is one; then some in between.
_LEVELS_OF_MANY, _LEVELS_OF_ONE, _LEVELS_BETWEEN = 4, 8, 4
_KIND = re.compile(r"(?P<gpu>[a-z0-9]+)-(?P<model>.+?)(?:-tp\d+)?")


@dataclass(frozen=True, slots=True)
class Size:
    """One way to make a worker: a kind of hardware (or a profile's file), and the GPUs that it takes."""

    gpu: str
    kind: str
    gpus: int
    hardware: Hardware


@dataclass(frozen=True, slots=True)
class Group:
    """Workers of one size."""

    size: Size
    prefill: int
    decode: int

    @property
    def workers(self) -> int:
        return self.prefill + self.decode


@dataclass(frozen=True, slots=True)
class Candidate:
    groups: tuple[Group, ...]

    @property
    def split(self) -> str:
        return "+".join(f"{g.prefill}P{g.decode}D@{g.size.kind}" for g in self.groups)

    @property
    def disaggregated(self) -> bool:
        return any(group.prefill for group in self.groups)

    def __str__(self) -> str:
        parts = []
        for group in self.groups:
            name = f"{group.size.gpu.upper()} x{group.size.gpus}"
            if not self.disaggregated:
                parts.append(f"{group.decode} aggregated on {name}")
                continue
            roles = [f"{n} {role}" for n, role in ((group.prefill, "prefill"), (group.decode, "decode")) if n]
            parts.append(f"{' + '.join(roles)} on {name}")
        return ", ".join(parts)


@dataclass(frozen=True, slots=True)
class Task:
    """What is asked of all levels."""

    workload: Workload
    slo: Slo
    seed: int


@dataclass(frozen=True, slots=True)
class Level:
    """GPUs used, by type."""

    gpus: tuple[tuple[str, int], ...]
    sizes: tuple[Size, ...]

    def cost(self, prices: Mapping[str, float]) -> float:
        return sum(prices[gpu] * count for gpu, count in self.gpus)

    @property
    def total(self) -> int:
        return sum(count for _, count in self.gpus)

    def __str__(self) -> str:
        return " + ".join(f"{count} {gpu.upper()}" for gpu, count in self.gpus)


@dataclass(frozen=True, slots=True)
class Found:
    """The best of each family at one level; goodput in requests/s, 0 = none holds at any rate tried."""

    level: Level
    aggregated: Candidate | None
    aggregated_rate: float
    split: Candidate | None
    split_rate: float
    runs: int

    @property
    def rate(self) -> float:
        return max(self.aggregated_rate, self.split_rate)

    @property
    def best(self) -> Candidate:
        """Aggregated where a split is no better: it is simpler to run."""
        chosen = self.split if self.split_rate > self.aggregated_rate * _STEP else self.aggregated
        chosen = chosen or self.split
        assert chosen is not None
        return chosen


# -- what there is -----------------------------------------------------------------------------------------------------


def models() -> dict[str, list[str]]:
    """Model -> GPU types that a timing profile is known for."""
    found: dict[str, list[str]] = {}
    for kind in HARDWARE:
        match = _KIND.fullmatch(kind)
        if match is not None and match["gpu"] not in found.setdefault(match["model"], []):
            found[match["model"]].append(match["gpu"])
    return found


def sizes(model: str, gpu: str) -> tuple[Size, ...]:
    """``gpu``: a type with built-in profiles, or a file of `tandem profile`. ConfigError if there is no such."""
    if profile_file.is_file(gpu):
        kind = str(Path(gpu).expanduser().resolve())
        hardware = hardware_named(kind)
        return (Size(Path(gpu).stem, kind, hardware.gpus, hardware),)
    known = models()
    if model not in known:
        raise ConfigError(f"no model {model!r} is known; there are {', '.join(known)}", param="model")
    if gpu not in known[model]:
        raise ConfigError(f"no timing profile of {model} on {gpu!r}; there is {', '.join(known[model])}", param="gpus")
    found = [
        Size(gpu, kind, hardware.gpus, hardware)
        for kind, hardware in HARDWARE.items()
        if (match := _KIND.fullmatch(kind)) is not None and (match["gpu"], match["model"]) == (gpu, model)
    ]
    return tuple(sorted(found, key=lambda size: size.gpus))


#: (sizes of one GPU type, how many GPUs of it there are), of each type.
Offer = Sequence[tuple[tuple[Size, ...], int]]


def levels(offered: Offer) -> list[Level]:
    """To begin with, the smallest first."""
    return _levels(offered, _LEVELS_OF_ONE if len(offered) == 1 else _LEVELS_OF_MANY)


def between(offered: Offer, found: Sequence[Found], prices: Mapping[str, float], need: float) -> list[Level]:
    """Levels cheaper than the cheapest that serves enough, and not known to serve too little: the cheapest might be one
    of them. The dearest of those, as the likeliest."""
    enough = [each.level.cost(prices) for each in found if each.rate >= need]
    if not enough:
        return []
    known = {each.level.gpus for each in found}
    too_small = [dict(each.level.gpus) for each in found if each.rate < need]
    left = [
        level
        for level in _levels(offered, 1 << 16)
        if level.gpus not in known
        and level.cost(prices) < min(enough)
        and not any(all(count <= small.get(gpu, 0) for gpu, count in level.gpus) for small in too_small)
    ]
    return sorted(left, key=lambda level: (-level.cost(prices), level.gpus))[:_LEVELS_BETWEEN]


def _levels(offered: Offer, at_most: int) -> list[Level]:
    choices = [_counts(kinds, count, at_most, alone=len(offered) == 1) for kinds, count in offered]
    found = []
    for counts in product(*choices):
        used = [(kinds, count) for (kinds, _), count in zip(offered, counts, strict=True) if count]
        if used:
            every = tuple(size for kinds, _ in used for size in kinds)
            found.append(Level(tuple((kinds[0].gpu, count) for kinds, count in used), every))
    return sorted(found, key=lambda level: (level.total, level.gpus))


def _counts(kinds: Sequence[Size], count: int, at_most: int, *, alone: bool) -> list[int]:
    """Numbers of GPUs to try: multiples of the smallest worker, thinned out evenly."""
    unit = min(size.gpus for size in kinds)
    if count < unit:
        raise ConfigError(f"{count} {kinds[0].gpu} are too few: a worker takes {unit}", param="gpus")
    every = list(range(unit, count - count % unit + 1, unit))
    thinned = sorted({every[-(-len(every) * (i + 1) // at_most) - 1] for i in range(at_most)}) if at_most else every
    chosen = every if len(every) <= at_most else thinned
    return chosen if alone else [0, *chosen]


def _compositions(level: Level) -> Iterator[tuple[tuple[Size, int], ...]]:
    """Ways to cut the level's GPUs into workers that leave none idle, or as few as any."""
    per_type = []
    for gpu, count in level.gpus:
        kinds = [size for size in level.sizes if size.gpu == gpu]
        ranges = [range(count // size.gpus + 1) for size in kinds]
        cuts = [
            tuple(zip(kinds, numbers, strict=True))
            for numbers in product(*ranges)
            if sum(n * size.gpus for n, size in zip(numbers, kinds, strict=True)) == count
        ]
        per_type.append(cuts)
    for parts in product(*per_type):
        yield tuple((size, n) for part in parts for size, n in part if n)


# -- one level ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Work:
    """Seconds of a worker that the mean request takes, by phase; the decode's at the largest batch within the SLO."""

    prefill_s: float
    decode_s: float


def _work(size: Size, task: Task) -> _Work:
    profile, requests = size.hardware.profile, task.workload.requests
    isl = sum(r.isl_tokens for r in requests) / len(requests)
    osl = sum(r.osl_tokens for r in requests) / len(requests)
    prefill = step_s(profile, round(isl), context_sum(0, round(isl)), 0, 0)
    context = isl + osl / 2
    room = min(size.hardware.max_num_seqs, size.hardware.kv_tokens / (isl + osl))
    in_time = (task.slo.tpot_s - profile.d0) / (profile.d1 + profile.d2 * context)
    batch = max(1.0, min(room, in_time))
    step = profile.d0 + batch * (profile.d1 + profile.d2 * context)
    return _Work(prefill, osl * step / batch)


def _with_prefill(composition: Sequence[tuple[Size, int]], prefill: int) -> Candidate:
    """So many prefill workers, of the sizes that compute fastest for what they read: those decode at a loss."""
    order = sorted(composition, key=lambda part: part[0].hardware.profile.p1 / part[0].hardware.profile.d0)
    groups = []
    for size, count in order:
        taken = min(prefill, count)
        prefill -= taken
        groups.append(Group(size, taken, count - taken))
    return Candidate(tuple(groups))


def fitted(task: Task, level: Level) -> Task:
    """With as many requests as the level needs to be tried: the first ones."""
    most = 0.0
    for gpu, count in level.gpus:
        size = min((size for size in level.sizes if size.gpu == gpu), key=lambda size: size.gpus)
        work = _work(size, task)
        most += count / size.gpus / (work.prefill_s + work.decode_s)
    return replace(task, workload=task.workload.first(max(_LEAST_REQUESTS, round(most * _HORIZON_S))))


def setup_of(candidate: Candidate, task: Task) -> Setup:
    return Setup(task.workload, candidate.groups[0].size.kind, candidate.split, _POLICY, task.slo, task.seed)


class _Search:
    """Goodput of candidates of one level; no run is done twice."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._known: dict[tuple[str, float], bool] = {}

    @property
    def runs(self) -> int:
        return len(self._known)

    def goodput(self, candidate: Candidate, start: float) -> float:
        return tw_goodput(setup_of(candidate, self._task), start, tried=self._tried, precision=_PRECISION)

    def holds(self, candidate: Candidate, rate: float) -> bool:
        return self._tried(setup_of(candidate, self._task), rate)

    def _tried(self, setup: Setup, rate: float) -> bool:
        key = (setup.split, rate)
        if key not in self._known:
            self._known[key] = tw_holds(setup, rate)
        return self._known[key]


def search(level: Level, task: Task) -> Found:
    """The best aggregated fleet of the level, and its best split."""
    task = fitted(task, level)
    races = _Search(task)
    aggregated: Candidate | None = None
    split: Candidate | None = None
    best = {False: 0.0, True: 0.0}
    for composition in _compositions(level):
        work = [(_work(size, task), count) for size, count in composition]
        # More than it will hold: that shows early in a run, too little only at its end.
        guess = 1.1 * sum(count / (each.prefill_s + each.decode_s) for each, count in work)
        whole = _with_prefill(composition, 0)
        rate = _race(races, whole, best[False], guess)
        if rate > best[False] or aggregated is None:
            aggregated, best[False] = whole, rate
        found, rate = _climb(races, composition, work, best[True], best[False] or guess)
        if rate > best[True] or split is None:
            split, best[True] = found or split, max(rate, best[True])
    return Found(level, aggregated, best[False], split, best[True], races.runs)


def _race(races: _Search, candidate: Candidate, best: float, start: float) -> float:
    """Its goodput; 0 if it does not beat the best so far. Who beats it seldom does by much: small steps first."""
    if not best:
        return races.goodput(candidate, start)
    low, factor = best, _STEP
    while races.holds(candidate, low * factor):
        low, factor = low * factor, min(factor * factor, 1.5)
    if low == best:
        return 0.0
    high = low * factor
    while high / low > 1.01 * _STEP:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if races.holds(candidate, middle) else (low, middle)
    return low


def _climb(
    races: _Search,
    composition: Sequence[tuple[Size, int]],
    work: Sequence[tuple[_Work, int]],
    best: float,
    start: float,
) -> tuple[Candidate | None, float]:
    """The best number of prefill workers, from the balanced one on, in both directions as long as it pays."""
    workers = sum(count for _, count in work)
    if workers < 2:
        return None, 0.0
    share = sum(count * each.prefill_s / (each.prefill_s + each.decode_s) for each, count in work) / workers
    middle = min(workers - 1, max(1, round(workers * share)))
    top, rate = _with_prefill(composition, middle), 0.0
    rate = _race(races, top, best, start)
    best = max(best, rate)
    found: Candidate | None = top if rate else None
    for step in (1, -1):
        prefill = middle + step
        while 1 <= prefill < workers:
            candidate = _with_prefill(composition, prefill)
            better = _race(races, candidate, best, start)
            if not better:
                break
            found, rate, best = candidate, better, better
            prefill += step
    return found, rate

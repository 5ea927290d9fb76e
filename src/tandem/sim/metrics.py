"""What a simulation counts: each request's times, each worker's activity, and the figures made from them.

*Attained*: the request got its first token within its TTFT target and its mean time per output token within its TPOT
target; refused and failed requests did not. *TW*: request-weighted and token-weighted attainment are both at least
0.9, and each quartile by prompt length is at least 0.8.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import exp, log

from tandem.compiled import pickled_by_fields
from tandem.core.types import Plan, StepTiming
from tandem.enginemodel.sequence import StepResult
from tandem.sim.workload import Offered


@dataclass(frozen=True, slots=True)
class Slo:
    """TTFT target = ``ttft_s`` + ``ttft_per_token_s`` * ISL."""

    name: str
    ttft_s: float
    ttft_per_token_s: float
    tpot_s: float

    def ttft_for(self, isl_tokens: int) -> float:
        return self.ttft_s + self.ttft_per_token_s * isl_tokens


pickled_by_fields(Slo)

SLOS = {
    slo.name: slo
    for slo in (
        Slo("tight", 0.4, 0.1e-3, 0.025),
        Slo("medium", 1.0, 0.25e-3, 0.05),
        Slo("loose", 2.0, 0.5e-3, 0.1),
    )
}


#: What TW attainment asks for: of all requests and of their tokens, and of each quartile by prompt length.
LEAST_SHARE, LEAST_OF_QUARTILE = 0.9, 0.8


@dataclass(eq=False, slots=True)
class Job:
    """One offered request and what became of it."""

    index: int
    offered: Offered
    id: str
    attempt: int = 0
    plan: Plan | None = None
    placed_s: float | None = None
    handoff_s: float | None = None  # prompt computed on another worker
    pulled_s: float | None = None  # its KV has arrived
    first_token_s: float | None = None
    finished_s: float | None = None
    cached_tokens: int = 0  # of the prompt, on the worker that computed it
    refused: str = ""  # error code
    preemptions: int = 0

    @property
    def tokens(self) -> int:
        return self.offered.isl_tokens + self.offered.osl_tokens

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_token_s is None else self.first_token_s - self.offered.arrival_s

    @property
    def tpot_s(self) -> float | None:
        if self.finished_s is None or self.first_token_s is None or self.offered.osl_tokens < 2:
            return None
        return (self.finished_s - self.first_token_s) / (self.offered.osl_tokens - 1)

    def in_time(self, slo: Slo) -> bool:
        """The first token came within its target."""
        return self.ttft_s is not None and self.ttft_s <= slo.ttft_for(self.offered.isl_tokens)

    def attained(self, slo: Slo) -> bool:
        tpot = self.tpot_s
        return self.finished_s is not None and self.in_time(slo) and (tpot is None or tpot <= slo.tpot_s)


class GapHistogram:
    """Inter-token gaps in bins of 2 %."""

    _WIDTH = log(1.02)
    _LEAST_S = 1e-5

    def __init__(self) -> None:
        self._bins: dict[int, int] = {}

    def add(self, gap_s: float, count: int) -> None:
        position = int(log(max(gap_s, self._LEAST_S) / self._LEAST_S) / self._WIDTH)
        self._bins[position] = self._bins.get(position, 0) + count

    def merge(self, other: GapHistogram) -> None:
        for position, count in other._bins.items():
            self._bins[position] = self._bins.get(position, 0) + count

    def percentiles(self, shares: Sequence[float]) -> list[float]:
        """Middle of the bin that each share of the gaps ends in; 0 if there are none."""
        positions = sorted(self._bins)
        totals: list[int] = []
        for position in positions:
            totals.append((totals[-1] if totals else 0) + self._bins[position])
        if not totals:
            return [0.0 for _ in shares]
        found = [positions[min(bisect_left(totals, share * totals[-1]), len(totals) - 1)] for share in shares]
        return [self._LEAST_S * exp((position + 0.5) * self._WIDTH) for position in found]


@dataclass(slots=True)
class Span:
    """Steps of one kind in a row: "prefill", "decode", or "mixed"."""

    kind: str
    begin_s: float
    end_s: float
    sequence_s: float = 0.0  # decoding sequences, integrated over time
    prefill_tokens: int = 0


#: Steps of a kind that begin so soon after each other make one span.
_SPAN_GAP_S = 0.001


@dataclass(slots=True)
class Activity:
    """What one worker did when."""

    worker: str
    spans: list[Span] = field(default_factory=list)
    busy_s: float = 0.0
    prefill_s: float = 0.0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    gaps: GapHistogram = field(default_factory=GapHistogram)

    def add(self, begin: float, result: StepResult, timing: StepTiming) -> None:
        """``timing``: of one step, or the mean of a quiet run."""
        duration, sequences = result.duration_s, timing.decode_sequences
        self.busy_s += duration
        self.prefill_tokens += timing.prefill_tokens
        self.decode_tokens += sequences * result.steps
        kind = "decode"
        if timing.prefill_tokens:
            kind = "mixed" if sequences else "prefill"
            self.prefill_s += duration
        if sequences:
            self.gaps.add(timing.duration_s, sequences * result.steps)
        last = self.spans[-1] if self.spans else None
        if last is None or last.kind != kind or begin - last.end_s > _SPAN_GAP_S:
            last = Span(kind, begin, begin)
            self.spans.append(last)
        last.end_s = begin + duration
        last.sequence_s += sequences * duration
        last.prefill_tokens += timing.prefill_tokens


def percentile(values: Sequence[float], share: float) -> float:
    """Of sorted values; 0 if there are none."""
    return values[min(len(values) - 1, int(share * len(values)))] if values else 0.0


@dataclass(frozen=True, slots=True)
class Attainment:
    requests: float
    tokens: float
    quartiles: tuple[float, ...]  # by prompt length, shortest first

    @property
    def tw(self) -> bool:
        return min(self.requests, self.tokens) >= LEAST_SHARE and min(self.quartiles) >= LEAST_OF_QUARTILE


def quartiles(jobs: Sequence[Job]) -> list[list[Job]]:
    """By prompt length, the shortest first."""
    by_length = sorted(jobs, key=lambda job: (job.offered.isl_tokens, job.index))
    bounds = [len(jobs) * i // 4 for i in range(5)]
    return [by_length[a:b] for a, b in pairwise(bounds)]


def attainment(jobs: Sequence[Job], slo: Slo) -> Attainment:
    if not jobs:
        return Attainment(0.0, 0.0, (0.0,) * 4)
    good = {job.index for job in jobs if job.attained(slo)}
    tokens = sum(job.tokens for job in jobs)
    good_tokens = sum(job.tokens for job in jobs if job.index in good)
    shares = tuple(sum(job.index in good for job in group) / len(group) if group else 1.0 for group in quartiles(jobs))
    return Attainment(len(good) / len(jobs), good_tokens / tokens, shares)


_SHARES = (0.5, 0.9, 0.95, 0.99)


def spread(values: Iterable[float]) -> dict[str, float]:
    """Mean and percentiles."""
    ordered = sorted(values)
    figures = {"mean": sum(ordered) / len(ordered) if ordered else 0.0}
    return figures | {f"p{100 * share:.0f}": percentile(ordered, share) for share in _SHARES}

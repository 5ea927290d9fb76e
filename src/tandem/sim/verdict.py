"""Whether TW attainment holds in a run, known as soon as nothing that is still to come could change it.

A search for goodput asks of each run only that. Most runs of a fleet at its limits are decided early: a queue that
grows makes more misses than are allowed long before its last request has come, let alone ended. The answer is always
the one that ``metrics.attainment`` gives at the end of the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tandem.sim.metrics import LEAST_OF_QUARTILE, LEAST_SHARE, Job, Slo, quartiles


@dataclass(slots=True)
class _Share:
    """Of a group of requests, or of their tokens."""

    total: int
    least: float
    good: int = 0
    missed: int = 0

    @property
    def lost(self) -> bool:
        return (self.total - self.missed) / self.total < self.least

    @property
    def won(self) -> bool:
        return self.good / self.total >= self.least


class Verdict:
    """``holds`` is None until it is known."""

    def __init__(self, jobs: Sequence[Job], slo: Slo) -> None:
        self.holds: bool | None = None
        self._slo = slo
        self._requests = _Share(len(jobs), LEAST_SHARE)
        self._tokens = _Share(sum(job.tokens for job in jobs), LEAST_SHARE)
        self._quartile: dict[int, _Share] = {}
        for group in quartiles(jobs):
            share = _Share(len(group), LEAST_OF_QUARTILE)
            self._quartile.update((job.index, share) for job in group)
        self._shares = [self._requests, self._tokens, *{id(s): s for s in self._quartile.values()}.values()]
        self._open = {job.index for job in jobs}
        self._due = sorted(jobs, key=self._deadline, reverse=True)  # the soonest last

    def _deadline(self, job: Job) -> float:
        return job.offered.arrival_s + self._slo.ttft_for(job.offered.isl_tokens)

    def told(self, job: Job) -> None:
        """Something has become known of it: refused, first token, end."""
        if job.refused or (job.first_token_s is not None and not job.in_time(self._slo)):
            self._settle(job, good=False)
        elif job.finished_s is not None:
            self._settle(job, good=job.attained(self._slo))

    def passes(self, now: float) -> None:
        """Who has no first token by its deadline has missed it, whenever it will come."""
        while self._due and self._deadline(self._due[-1]) < now:
            job = self._due.pop()
            # At the very moment rounding may still say "in time": then its token decides.
            if job.first_token_s is None and now - job.offered.arrival_s > self._slo.ttft_for(job.offered.isl_tokens):
                self._settle(job, good=False)

    def _settle(self, job: Job, *, good: bool) -> None:
        if self.holds is not None or job.index not in self._open:
            return
        self._open.discard(job.index)
        for share, count in ((self._requests, 1), (self._tokens, job.tokens), (self._quartile[job.index], 1)):
            if good:
                share.good += count
            else:
                share.missed += count
                if share.lost:
                    self.holds = False
        if good and self._requests.won and all(share.won for share in self._shares):
            self.holds = True

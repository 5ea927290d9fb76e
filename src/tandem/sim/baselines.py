"""Policies to compare with: what is common elsewhere, each in a fair configuration. All place at once.

Dynamo's cost is the published one (docs/design-docs/router-design.md of ai-dynamo/dynamo), in blocks:

    cost(w) = max(active prefill + incoming prompt - cached, 0) + active decode blocks with the incoming ones

On separate workers its prefill stage leaves out the second term, its decode stage the first and the cached part; with
``conditional`` a prompt with fewer than 2,048 and less than 70 % uncached tokens on a decode worker is computed there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from tandem.core.types import Plan, Role, WorkerLoad
from tandem.sim.metrics import Job
from tandem.sim.routing import Decided, Lookup, Placement, by_role
from tandem.sim.worker import SimWorker

_BYPASS_TOKENS, _BYPASS_SHARE = 2048, 0.7


class _Immediate:
    """A router that decides at arrival and needs nothing later."""

    wants_reports = False

    def prefill_done(self, job: Job, now: float) -> Decided:
        return ()

    def decode_started(self, job: Job, now: float) -> Decided:
        return ()

    def finished(self, job: Job, now: float) -> Decided:
        return ()

    def report(self, load: WorkerLoad, now: float) -> None:
        return

    def poll(self, now: float) -> Decided:
        return ()

    def next_wakeup(self, now: float) -> float | None:
        return None


class RoundRobin(_Immediate):
    """One after the other; with prefill workers, each stage by itself."""

    def __init__(self, workers: Sequence[SimWorker]) -> None:
        self._prefill = [worker.id for worker in by_role(workers, Role.PREFILL)]
        self._decode = [worker.id for worker in by_role(workers, Role.DECODE)]
        self._turn = 0

    def arrive(self, job: Job, now: float) -> Decided:
        turn, self._turn = self._turn, self._turn + 1
        decode = self._decode[turn % len(self._decode)]
        prefill = self._prefill[turn % len(self._prefill)] if self._prefill and job.offered.osl_tokens > 1 else None
        return [Placement(job, Plan(decode, prefill))]


class LeastLoaded(_Immediate):
    """The worker with the fewest requests in flight, of each stage."""

    def __init__(self, workers: Sequence[SimWorker]) -> None:
        self._prefill = {worker.id: 0 for worker in by_role(workers, Role.PREFILL)}
        self._decode = {worker.id: 0 for worker in by_role(workers, Role.DECODE)}

    def arrive(self, job: Job, now: float) -> Decided:
        decode = min(self._decode, key=lambda worker: self._decode[worker])
        self._decode[decode] += 1
        prefill = None
        if self._prefill and job.offered.osl_tokens > 1:
            prefill = min(self._prefill, key=lambda worker: self._prefill[worker])
            self._prefill[prefill] += 1
        return [Placement(job, Plan(decode, prefill))]

    def prefill_done(self, job: Job, now: float) -> Decided:
        if job.plan is not None and job.plan.prefill_worker is not None:
            self._prefill[job.plan.prefill_worker] -= 1
        return ()

    def finished(self, job: Job, now: float) -> Decided:
        assert job.plan is not None
        self._decode[job.plan.decode_worker] -= 1
        return ()


class _Load:
    """What Dynamo's router books on one worker, in tokens and blocks."""

    def __init__(self) -> None:
        self.prefill_tokens: dict[str, int] = {}
        self.blocks = 0
        self._shared: Counter[int] = Counter()
        self._private: dict[str, int] = {}

    @property
    def active_prefill(self) -> int:
        return sum(self.prefill_tokens.values())

    def new_blocks(self, hashes: Sequence[int], count: int) -> int:
        """Of a prompt's ``count`` blocks, those that are not active here."""
        return count - sum(block in self._shared for block in hashes) if self._shared else count

    def add(self, job: Job, hashes: Sequence[int], count: int) -> None:
        self.blocks += self.new_blocks(hashes, count)
        self._shared.update(hashes)
        self._private[job.id] = count - len(hashes)

    def remove(self, job: Job, hashes: Sequence[int]) -> None:
        self.blocks -= self._private.pop(job.id)
        for block in hashes:
            self._shared[block] -= 1
            if not self._shared[block]:
                del self._shared[block]
                self.blocks -= 1


class DynamoCost(_Immediate):
    """See the module docstring. Without prefill workers: aggregated."""

    def __init__(
        self, workers: Sequence[SimWorker], lookup: Lookup, block_size: int, *, conditional: bool = False
    ) -> None:
        self._prefill = {worker.id: _Load() for worker in by_role(workers, Role.PREFILL)}
        self._decode = {worker.id: _Load() for worker in by_role(workers, Role.DECODE)}
        self._lookup = lookup
        self._size = block_size
        self._conditional = conditional

    def arrive(self, job: Job, now: float) -> Decided:
        cached = self._lookup(job)
        isl = job.offered.isl_tokens
        hashes, count = self._blocks(job)
        prefill = None
        costs = {
            worker: self._prefill_blocks(load, isl, cached.get(worker, 0)) + self._decode_blocks(load, hashes, count)
            for worker, load in self._decode.items()
        }
        decode = min(costs, key=lambda worker: costs[worker])
        if self._prefill and job.offered.osl_tokens > 1:
            fresh = isl - cached.get(decode, 0)
            if not (self._conditional and fresh < _BYPASS_TOKENS and fresh < _BYPASS_SHARE * isl):
                prefill = min(
                    self._prefill,
                    key=lambda worker: self._prefill_blocks(self._prefill[worker], isl, cached.get(worker, 0)),
                )
                decode = min(self._decode, key=lambda worker: self._decode[worker].blocks + count)
        first = self._prefill[prefill] if prefill else self._decode[decode]
        first.prefill_tokens[job.id] = isl - cached.get(prefill or decode, 0)
        self._decode[decode].add(job, hashes, count)
        return [Placement(job, Plan(decode, prefill))]

    def prefill_done(self, job: Job, now: float) -> Decided:
        assert job.plan is not None
        load = self._prefill if job.plan.prefill_worker else self._decode
        load[job.plan.first_worker].prefill_tokens.pop(job.id, None)
        return ()

    def finished(self, job: Job, now: float) -> Decided:
        assert job.plan is not None
        self._decode[job.plan.decode_worker].remove(job, self._blocks(job)[0])
        return ()

    def _prefill_blocks(self, load: _Load, isl: int, cached: int) -> float:
        return max(0.0, (load.active_prefill + isl - cached) / self._size)

    def _decode_blocks(self, load: _Load, hashes: Sequence[int], count: int) -> int:
        return load.blocks + load.new_blocks(hashes, count)

    def _blocks(self, job: Job) -> tuple[Sequence[int], int]:
        isl = job.offered.isl_tokens
        return job.offered.hashes[: isl // self._size], -(-isl // self._size)

"""The event loop of the simulator: a heap of events over virtual time."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from tandem.core.types import Leg
from tandem.enginemodel.sequence import Output, StepResult
from tandem.errors import ConfigError, InternalError
from tandem.sim.fleet import Fleet
from tandem.sim.index import LateIndex
from tandem.sim.metrics import Job, Slo
from tandem.sim.routing import Decided, Lookup, Placement, Refusal, Router, Withdrawal
from tandem.sim.verdict import Verdict
from tandem.sim.worker import SimWorker, sequence
from tandem.sim.workload import Workload


@dataclass(frozen=True, slots=True)
class Timing:
    """What lies between the parts. Seconds."""

    report_interval_s: float = 0.1
    report_age_s: float = 0.0  # reports reach the router so late
    index_age_s: float = 0.0  # the prefix index shows the caches as they were so long ago


@dataclass(slots=True)
class Transfer:
    """KV under way from one worker to another: for the space-time map."""

    source: str
    target: str
    begin_s: float
    end_s: float
    num_bytes: int


@dataclass(slots=True)
class Outcome:
    """What a run leaves: every job, every worker's activity."""

    workload: Workload
    fleet: Fleet
    jobs: list[Job]
    workers: list[SimWorker]
    transfers: list[Transfer] = field(default_factory=list)
    end_s: float = 0.0


MakeRouter = Callable[[Sequence[SimWorker], Lookup], Router]


class Simulation:
    """Runs one workload against one fleet under one router.

    ``concurrency``: closed loop, the next request comes when one ends; arrival times are then not the workload's.
    ``until_known``: the run ends as soon as it is known whether TW attainment by this SLO holds; ``holds`` says it.
    """

    def __init__(
        self,
        workload: Workload,
        fleet: Fleet,
        make_router: MakeRouter,
        timing: Timing | None = None,
        *,
        concurrency: int = 0,
        coalesce: bool = True,
        progress: Callable[[int, int], None] | None = None,
        until_known: Slo | None = None,
    ) -> None:
        if concurrency and until_known is not None:
            raise ConfigError("a closed loop has no rate, and so no goodput to search for", param="concurrency")
        self._timing = timing or Timing()
        self._workload = workload
        self._events: list[tuple[float, int, Callable[..., None], object]] = []
        self._order = 0
        self._now = 0.0
        self._progress = progress
        self._left = len(workload.requests)
        self._concurrency = concurrency
        self.jobs = [Job(i, offered, f"r{i}") for i, offered in enumerate(workload.requests)]
        self._by_id = {job.id: job for job in self.jobs}
        self._verdict = Verdict(self.jobs, until_known) if until_known is not None else None
        schedule = self._schedule_tick
        self.workers = [SimWorker(setup, workload.block_size, schedule, coalesce) for setup in fleet.workers]
        self._index = LateIndex(self._timing.index_age_s) if self._timing.index_age_s > 0 else None
        for worker in self.workers:
            worker.index = self._index
        self._worker = {worker.id: worker for worker in self.workers}
        self._fleet = fleet
        self._transfers: list[Transfer] = []
        self._wakeup: float | None = None
        self._queue: deque[Job] = deque()  # closed loop: who comes next
        self._router = make_router(self.workers, self._lookup)

    def run(self) -> Outcome:
        """Until every request has ended, or what was to be known is."""
        self._queue = deque(self.jobs)
        for job in self.jobs[: self._concurrency or len(self.jobs)]:
            self._queue.popleft()
            self._push(0.0 if self._concurrency else job.offered.arrival_s, self._arrive, job)
        if self._router.wants_reports:
            self._push(self._timing.report_interval_s, self._report, None)
        events, pop = self._events, heapq.heappop
        while self._left:
            if not events:
                raise InternalError(f"{self._left} requests wait and nothing will happen any more")
            now, _, handler, subject = pop(events)
            self._now = now
            handler(subject)
            if self._verdict is not None and self._verdict.holds is not None:
                break
        return Outcome(self._workload, self._fleet, self.jobs, self.workers, self._transfers, self._now)

    @property
    def holds(self) -> bool:
        """Of a run ``until_known``, after its end."""
        return self._verdict is not None and bool(self._verdict.holds)

    # -- events --------------------------------------------------------------------------------------------------

    def _push(self, at: float, handler: Callable[..., None], subject: object) -> None:
        self._order += 1
        heapq.heappush(self._events, (at, self._order, handler, subject))

    def _schedule_tick(self, at: float, worker: SimWorker) -> None:
        self._push(at, self._tick, worker)

    def _arrive(self, job: Job) -> None:
        if self._concurrency and not job.attempt:
            job.offered = replace(job.offered, arrival_s=self._now)
        if self._verdict is not None:
            self._verdict.passes(self._now)
        self._carry_out(self._router.arrive(job, self._now))

    def _tick(self, worker: SimWorker) -> None:
        if worker.next_tick != self._now or not worker.busy:
            return  # the run was cut short: another tick has been or will be
        for output in worker.tick().outputs:
            self._news(output)
        worker.told()
        self._go_on(worker)

    def _report(self, _: object) -> None:
        loads = [worker.load(self._now) for worker in self.workers]
        self._push(self._now + self._timing.report_age_s, self._reported, loads)
        self._push(self._now + self._timing.report_interval_s, self._report, None)

    def _reported(self, loads: Sequence[object]) -> None:
        for load in loads:
            self._router.report(load, self._now)  # type: ignore[arg-type]

    def _wake(self, _: object) -> None:
        if self._wakeup is not None and self._wakeup <= self._now:
            self._wakeup = None
            self._carry_out(self._router.poll(self._now))

    # -- a request's life ----------------------------------------------------------------------------------------

    def _carry_out(self, decided: Decided) -> None:
        for one in decided:
            match one:
                case Placement():
                    self._place(one)
                case Withdrawal():
                    self._withdraw(one.job)
                case Refusal():
                    one.job.refused = one.code
                    self._ended(one.job)
        wakeup = self._router.next_wakeup(self._now)
        if wakeup is not None and (self._wakeup is None or wakeup < self._wakeup):
            self._wakeup = wakeup
            self._push(wakeup, self._wake, None)

    def _place(self, placement: Placement) -> None:
        job, plan = placement.job, placement.plan
        job.plan, job.placed_s = plan, self._now
        offered = job.offered
        remote = plan.leg is Leg.PREFILL
        first = sequence(
            job.id, offered.isl_tokens, offered.osl_tokens, offered.hashes,
            priority=placement.priority, produce_handoff=remote,
        )  # fmt: skip
        worker = self._worker[plan.first_worker]
        try:
            worker.submit(first, self._now)
        except ValueError:
            job.refused = "context_length_exceeded"
            self._ended(job)
            return
        self._go_on(worker)

    def _withdraw(self, job: Job) -> None:
        """Its prefill makes way; it comes again as its owner would submit it."""
        assert job.plan is not None
        worker = self._worker[job.plan.first_worker]
        worker.interrupt(self._now)
        worker.model.abort(job.id)
        job.attempt += 1
        job.plan = job.placed_s = None
        self._push(self._now, self._arrive, job)
        self._go_on(worker)

    def _news(self, output: Output) -> None:
        job = self._by_id[output.sequence.request_id]
        now = self._now
        if output.handoff is not None:
            job.handoff_s = now
            job.cached_tokens = output.sequence.cached_tokens or 0
            self._carry_out(self._router.prefill_done(job, now))
            self._hand_over(job)
            return
        if job.first_token_s is None:
            job.first_token_s = now
            if self._verdict is not None:
                self._verdict.told(job)
            if job.handoff_s is None:
                job.cached_tokens = output.sequence.cached_tokens or 0
                self._carry_out(self._router.prefill_done(job, now))
        if output.finish is not None:
            job.finished_s = now
            job.preemptions = output.sequence.preemptions
            self._ended(job)
            self._carry_out(self._router.finished(job, now))

    def _hand_over(self, job: Job) -> None:
        assert job.plan is not None
        offered, worker = job.offered, self._worker[job.plan.decode_worker]
        worker.submit(
            sequence(job.id, offered.isl_tokens, offered.osl_tokens, offered.hashes, remote=True), self._now
        )  # fmt: skip
        self._go_on(worker)

    def _go_on(self, worker: SimWorker) -> None:
        result = worker.go_on(self._now)
        if result is not None:
            self._start_pulls(worker, result)

    def _start_pulls(self, worker: SimWorker, result: StepResult) -> None:
        size, bytes_per_token = worker.model.config.block_size, worker.setup.hardware.kv_bytes_per_token
        for pull in result.pulls:
            job = self._by_id[pull.request_id]
            assert job.plan is not None and job.plan.prefill_worker is not None
            source = self._worker[job.plan.prefill_worker]
            num_bytes = pull.num_blocks * size * bytes_per_token
            end = max(source.link_out.send(self._now, num_bytes), worker.link_in.send(self._now, num_bytes))
            self._transfers.append(Transfer(source.id, worker.id, self._now, end, num_bytes))
            self._push(end, self._pulled, job)
        for request_id in result.released:
            self._let_go(self._by_id[request_id])

    def _pulled(self, job: Job) -> None:
        assert job.plan is not None
        worker = self._worker[job.plan.decode_worker]
        worker.interrupt(self._now)
        waiting = worker.model.sequences[job.id]
        worker.model.pull_done(job.id, worker.model.expected_contents(waiting, waiting.hit_blocks))
        self._let_go(job)
        self._go_on(worker)

    def _let_go(self, job: Job) -> None:
        """The prefill worker need not hold the prompt any longer."""
        assert job.plan is not None and job.plan.prefill_worker is not None
        job.pulled_s = self._now
        source = self._worker[job.plan.prefill_worker]
        source.interrupt(self._now)
        source.model.release_handoff(job.id)
        self._go_on(source)
        self._carry_out(self._router.decode_started(job, self._now))

    def _ended(self, job: Job) -> None:
        self._left -= 1
        if self._verdict is not None:
            self._verdict.told(job)
        if self._queue:
            self._push(self._now, self._arrive, self._queue.popleft())
        if self._progress is not None:
            self._progress(len(self.jobs) - self._left, len(self.jobs))

    def _lookup(self, job: Job) -> dict[str, int]:
        hashes = job.offered.hashes[: job.offered.isl_tokens // self._workload.block_size]
        if not hashes:
            return {}
        if self._index is not None:
            size = self._workload.block_size
            return {worker: depth * size for worker, depth in self._index.lookup(hashes, self._now).items()}
        found = ((worker.id, worker.cached_tokens(hashes, self._now)) for worker in self.workers)
        return {worker: tokens for worker, tokens in found if tokens}

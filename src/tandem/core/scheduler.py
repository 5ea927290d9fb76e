"""The scheduler of one model: events in, effects out. It owns the queue, the accounting of what is in flight, and a
view of each worker. No I/O and no clock: ``now`` is an argument, ``rng`` a parameter.

Every event method is cheap and takes no decision. ``poll`` decides: call it after events, and again at
``next_wakeup``. The router drives this class with messages, the simulator with a virtual clock.

    submit ──> queue ──poll──> Place ──> prefill_done ──> decode_started ──> finished | failed
                 │                └── worker_down, worker_up(new incarnation): keys returned, forgotten here
                 └── Refuse (timeout, deadline, no workers), abort

Late binding: a request leaves the queue when the first worker of its best plan has less than ``credit_s`` of
predicted prefill pending, so that what waits, waits here, where the order can still change. Requests that a hard filter
blocks are passed over; one that has been for ``ageing_s`` gets a decode worker reserved. INVARIANTS.md lists what
holds at all times.
"""

from __future__ import annotations

import heapq
import random
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from tandem.core import admission
from tandem.core.accounting import Booking, WorkerView
from tandem.core.lifecycle import Event, State, advance
from tandem.core.perf_model import PerfModel
from tandem.core.placement import (
    Candidate,
    Decision,
    Inquiry,
    decide,
    disturbance_window_s,
    need_blocks,
    pending_prefill_s,
    suffix_context,
    unfit,
)
from tandem.core.policy import Policy, RequestClass, Tenant
from tandem.core.profiles import profile_named
from tandem.core.queueing import Depth, Entry, FairCounters, FairQueue
from tandem.core.slo import Targets, deadline_s, targets
from tandem.core.types import Explanation, Plan, Request, RequestKey, Role, WorkerLoad, WorkerSpec
from tandem.errors import DeadlineInfeasible, InvalidRequest, NoWorkers, QueueTimeout, TandemError

#: Ended keys that are remembered, so that a repeated submit is recognised.
_REMEMBERED = 20_000
#: poll is never asked for again sooner than this, seconds.
_MIN_WAKEUP_S = 0.002


@dataclass(frozen=True, slots=True)
class Place:
    """Send the request to ``plan.first_worker``."""

    request: Request
    plan: Plan
    cached_tokens: int  # of the prompt, believed to be cached on the first worker
    priority: int  # for the engine's own queue: lower runs first
    decision: Decision
    candidate: Candidate

    @property
    def explanation(self) -> Explanation:
        return self.decision.explanation(self.candidate)


@dataclass(frozen=True, slots=True)
class Refuse:
    """Tell the frontend."""

    request: Request
    error: TandemError


Effect = Place | Refuse


@dataclass(frozen=True, slots=True)
class WorkerSnapshot:
    id: str
    incarnation: int
    role: Role
    draining: bool
    suspect: bool
    in_flight: int
    pending_prefill_s: float
    kv_blocks_in_use: int
    kv_blocks_total: int
    sequences: int
    model_error: float


@dataclass(frozen=True, slots=True)
class Snapshot:
    """For status pages, metrics and the planner."""

    workers: tuple[WorkerSnapshot, ...]
    queue_by_class: Mapping[str, Depth]
    queue_by_tenant: Mapping[str, Depth]
    oldest_wait_s: float
    in_flight: int


@dataclass(slots=True, eq=False)
class _Job:
    """A request from submit to its end."""

    entry: Entry
    state: State = State.QUEUED
    plan: Plan | None = None
    charged_input: float = 0.0
    charged_output: float = 0.0
    expected_osl: float = 0.0
    step_s: float = 0.0  # predicted ITL when it was placed
    decoding_since: float | None = None

    @property
    def request(self) -> Request:
        return self.entry.request


class _OutputLengths:
    """Mean output length per class and its mean deviation, learnt from finished requests."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._mean: dict[str, tuple[float, float]] = {}

    def mean(self, name: str) -> float:
        return self._mean[name][0] if name in self._mean else float(self._policy.default_osl_tokens)

    def generous(self, name: str) -> float:
        """What to reserve for: longer than most."""
        mean, deviation = self._mean.get(name, (float(self._policy.default_osl_tokens), 0.0))
        return mean + 2.0 * deviation

    def learn(self, name: str, tokens: int) -> None:
        mean, deviation = self._mean.get(name, (float(self._policy.default_osl_tokens), 0.0))
        weight = self._policy.osl_memory
        deviation += weight * (abs(tokens - mean) - deviation)
        self._mean[name] = (mean + weight * (tokens - mean), deviation)


class Scheduler:
    """See the module docstring."""

    def __init__(
        self,
        policy: Policy,
        *,
        classes: Mapping[str, RequestClass],
        tenants: Mapping[str, Tenant],
        rng: random.Random,
    ) -> None:
        self.policy = policy
        self._classes = dict(classes) or {"default": RequestClass()}
        self._default_class = next(iter(self._classes))
        self._tenants = dict(tenants)
        self._rng = rng
        self._workers: dict[str, WorkerView] = {}
        self._sorted: list[WorkerView] = []
        self._counters = FairCounters(self._tenants)
        self._queue = FairQueue(self._classes.values(), self._counters, policy.share_window_s)
        self._jobs: dict[RequestKey, _Job] = {}
        self._by_id: dict[str, list[RequestKey]] = {}
        self._ended: OrderedDict[RequestKey, TandemError | None] = OrderedDict()
        self._timeouts: list[tuple[float, int, RequestKey]] = []
        self._arrivals: dict[RequestKey, float] = {}  # of queued requests, in the order of their submission
        self._reserved: dict[str, RequestKey] = {}  # decode worker -> who waits for room on it
        self._osl = _OutputLengths(policy)
        self._cap = admission.RefusalCap(policy.refusal_cap)
        self._order = 0
        self._no_workers_since: float | None = None
        self._credit_at: float | None = None  # when the next worker gets credit, if somebody waits for it
        self._rate_tokens = 0.0  # tokens dispatched, decayed: what the queue drains at
        self._rate_at = 0.0

    # --- workers ----------------------------------------------------------------------------------------------------

    def worker_up(self, spec: WorkerSpec, now: float) -> list[RequestKey]:
        """A new worker, a new incarnation, or news (role, draining) of a known one. Returns the keys that were in
        flight on a replaced incarnation: they are lost and forgotten here."""
        known = self._workers.get(spec.id)
        lost: list[RequestKey] = []
        if known is not None and known.spec.address.incarnation == spec.address.incarnation:
            known.spec = spec
            known.role = spec.role
            known.draining = spec.draining
        else:
            if known is not None:
                lost = self._drop_worker(known, now)
            perf = PerfModel(profile_named(spec.perf_profile))
            sibling = self._sibling(spec)
            if sibling is not None:
                perf.adopt(sibling.perf.state())
            self._workers[spec.id] = WorkerView(spec, perf, self.policy.report_lag_s)
        self._fleet_changed()
        return lost

    def worker_load(self, load: WorkerLoad, now: float) -> None:
        """A load report; of an unknown incarnation it is dropped."""
        view = self._workers.get(load.worker)
        if view is None or view.spec.address.incarnation != load.incarnation:
            return
        before = (view.draining, view.role)
        view.report(load, now)
        if self.policy.learn and load.steps:
            every = -(-len(load.steps) // max(1, self.policy.learn_steps_per_report))
            view.perf.observe(load.steps[::every])
        for key in view.finished_by_report(now):
            self._repair(key, view, now)
        if (view.draining, view.role) != before:
            self._fleet_changed()

    def worker_suspect(self, worker: str, suspect: bool, now: float) -> None:
        """Silent for a while, or heard again: no new work meanwhile, nothing declared lost."""
        view = self._workers.get(worker)
        if view is not None and view.suspect != suspect:
            view.suspect = suspect
            self._fleet_changed()

    def worker_down(self, worker: str, incarnation: int, now: float) -> list[RequestKey]:
        """It is gone. Returns the keys that were in flight on it, on either leg; they are forgotten here."""
        view = self._workers.get(worker)
        if view is None or view.spec.address.incarnation != incarnation:
            return []
        lost = self._drop_worker(view, now)
        self._fleet_changed()
        return lost

    def _drop_worker(self, view: WorkerView, now: float) -> list[RequestKey]:
        del self._workers[view.id]
        self._reserved.pop(view.id, None)
        lost = list(view.bookings)
        for key in lost:
            self._end(key, Event.LOSE, now)
        return lost

    def _fleet_changed(self) -> None:
        self._sorted = [self._workers[worker] for worker in sorted(self._workers)]
        self._reserved = {w: k for w, k in self._reserved.items() if w in self._workers and self._workers[w].usable}
        self._queue.unpark()

    def _sibling(self, spec: WorkerSpec) -> WorkerView | None:
        """The worker of the same kind that has learnt most."""
        alike = [v for v in self._sorted if (v.spec.perf_profile, v.spec.pool) == (spec.perf_profile, spec.pool)]
        return max(alike, key=lambda v: v.perf.observations, default=None)

    # --- requests ---------------------------------------------------------------------------------------------------

    def submit(self, request: Request, cached: Mapping[str, int], now: float) -> None:
        """Queues it. ``cached``: worker id -> prompt tokens that the index believes to be cached there.

        Raises what it is refused for: NoWorkers, ContextLengthExceeded, Overloaded, DeadlineInfeasible,
        InvalidRequest (unknown class). A repeated key changes nothing; one that was refused is refused again.
        """
        if request.key in self._jobs:
            return
        if request.key in self._ended:
            error = self._ended[request.key]
            if error is not None:
                raise error
            return
        try:
            entry = self._admit(request, cached, now)
        except TandemError as error:
            self._remember(request.key, error)
            raise
        self._jobs[request.key] = _Job(entry)
        self._by_id.setdefault(request.key.id, []).append(request.key)
        self._arrivals[request.key] = request.arrival_s
        heapq.heappush(self._timeouts, (request.arrival_s + request.timeout_s, entry.order, request.key))
        self._queue.add(entry)

    def prefill_done(self, key: RequestKey, now: float) -> None:
        """The prompt is computed: credit returns. On a local leg decoding begins."""
        job = self._jobs.get(key)
        if job is None or job.plan is None:
            return
        if job.plan.prefill_worker is None:
            self.decode_started(key, now)
            return
        job.state = advance(job.state, Event.PREFILL_DONE)
        view = self._workers.get(job.plan.prefill_worker)
        if view is not None:
            view.prefill_done(key, now)

    def decode_started(self, key: RequestKey, now: float) -> None:
        """The decode worker has the KV: the prefill worker's room returns."""
        job = self._jobs.get(key)
        if job is None or job.plan is None:
            return
        job.state = advance(job.state, Event.DECODE_STARTED)
        if job.decoding_since is None:
            job.decoding_since = now
        if job.plan.prefill_worker is not None and job.plan.prefill_worker in self._workers:
            self._workers[job.plan.prefill_worker].release(key, now)
        view = self._workers.get(job.plan.decode_worker)
        if view is not None:
            view.prefill_done(key, now)
            view.transfer_done(key)

    def finished(self, key: RequestKey, output_tokens: int, cached_tokens: int, now: float) -> None:
        """Its last token is out. Charges become what was really used."""
        job = self._jobs.get(key)
        if job is None or job.plan is None:
            return
        self._osl.learn(job.entry.request_class.name, output_tokens)
        really_input = float(max(0, job.request.isl_tokens - cached_tokens))
        really_output = self.policy.output_weight * output_tokens
        self._settle(job, really_input, really_output, now)
        self._end(key, Event.FINISH, now)

    def failed(self, key: RequestKey, now: float) -> None:
        """A worker could not do it, or the caller gives it up. The tenant is not charged; the frontend submits again,
        and the same key may come again."""
        job = self._jobs.get(key)
        if job is None:
            return
        self._settle(job, 0.0, 0.0, now)
        self._end(key, Event.FAIL, now)

    def abort(self, request_id: str, max_attempt: int, now: float, *, choice: int | None = None) -> list[RequestKey]:
        """Ends every attempt up to ``max_attempt``, of one choice or of all. Returns the keys that ended by it."""
        ended: list[RequestKey] = []
        for key in list(self._by_id.get(request_id, ())):
            if key.attempt > max_attempt or (choice is not None and key.choice != choice):
                continue
            job = self._jobs[key]
            if job.state.placed:
                self._settle(job, *self._used_so_far(job, now), now)
            self._end(key, Event.ABORT, now)
            ended.append(key)
        return ended

    def _admit(self, request: Request, cached: Mapping[str, int], now: float) -> Entry:
        request_class = self._class_of(request)
        self._cap.offer(request.isl_tokens)
        admission.check_feasible(request, self._sorted)
        fresh = request.isl_tokens - min(request.isl_tokens, max(cached.values(), default=0))
        osl = min(float(request.max_osl_tokens), self._osl.mean(request_class.name))
        tokens = fresh + int(self.policy.output_weight * osl)
        admission.check_capacity(
            request, request_class.rank, tokens, self._queue, self._counters, self.policy, self._drain_rate(now)
        )
        self._order += 1
        entry = Entry(request, cached, request_class, deadline_s(request, request_class), tokens, self._order)
        if self._hopeless(entry, now):
            if self._refuse_late(entry):
                raise self._late_error(entry, now)
            entry.late = True
        return entry

    def _class_of(self, request: Request) -> RequestClass:
        name = request.request_class
        if not name:
            tenant = self._tenants.get(request.tenant)
            name = (tenant.request_class if tenant else "") or self._default_class
        if name not in self._classes:
            raise InvalidRequest(f"no request class {name!r}; there are: {', '.join(self._classes)}", param="class")
        return self._classes[name]

    # --- driving ----------------------------------------------------------------------------------------------------

    def poll(self, now: float) -> list[Effect]:
        """Places what can be placed and refuses what must be refused, now."""
        effects: list[Effect] = []
        self._expire(now, effects)
        self._refuse_without_workers(now, effects)
        self._credit_at = None
        if not len(self._queue) or not self._credit_anywhere(now):
            return effects
        passed: list[Entry] = []
        passed_per_tenant: dict[tuple[str, str], int] = {}
        while len(passed) < self.policy.scan_depth:
            entry = self._queue.pop(now)
            if entry is None:
                break
            if self._try(entry, now, effects):
                if not self._credit_anywhere(now):
                    break
                continue
            if not entry.queued:
                continue  # refused
            passed.append(entry)
            lane = (entry.request.tenant, entry.request_class.name)
            passed_per_tenant[lane] = passed_per_tenant.get(lane, 0) + 1
            if passed_per_tenant[lane] >= self.policy.scan_per_tenant:
                self._queue.set_aside(entry)
        self._queue.restore(passed)
        return effects

    def next_wakeup(self, now: float) -> float | None:
        """Absolute time at which ``poll`` must be called even if no event comes; None = never."""
        times: list[float] = []
        while self._timeouts and self._timeouts[0][2] not in self._jobs:
            heapq.heappop(self._timeouts)
        if self._timeouts:
            times.append(self._timeouts[0][0])
        if len(self._queue):
            if self._credit_at is not None:
                times.append(self._credit_at)
            if self._no_workers_since is not None:
                times.append(self._no_workers_since + self.policy.no_worker_grace_s)
        return max(now + _MIN_WAKEUP_S, min(times)) if times else None

    def explain(self, request: Request, cached: Mapping[str, int], now: float) -> Explanation:
        """Which plan would be chosen now, with every term of every candidate. Places nothing.

        InvalidRequest for an unknown class.
        """
        request_class = self._class_of(request)
        entry = Entry(request, cached, request_class, deadline_s(request, request_class), 0, 0)
        decision = decide(self._inquiry(entry, now), self._sorted, self.policy, now)
        best = decision.best
        if best is None:
            return decision.explanation(None)
        explanation = decision.explanation(best)
        pending = best.pending_s
        if pending >= self.policy.credit_s:
            wait = f"; it would wait for credit: {best.first.id} has {1e3 * pending:.0f} ms of prefill pending"
            explanation = replace(explanation, summary=explanation.summary + wait)
        return explanation

    # --- deciding ---------------------------------------------------------------------------------------------------

    def _try(self, entry: Entry, now: float, effects: list[Effect]) -> bool:
        """Places the entry, or refuses it, or leaves it queued (then False, and maybe parked)."""
        if not entry.late and self._hopeless(entry, now):
            if self._refuse_late(entry):
                self._refuse(entry, self._late_error(entry, now), now, effects)
                return False
            self._queue.demote(entry)
            return False
        decision = decide(self._inquiry(entry, now), self._sorted, self.policy, now)
        candidate = self._with_credit(decision, entry, now)
        if candidate is None:
            if not decision.candidates:
                self._blocked(entry, now)
            return False
        self._dispatch(entry, decision, candidate, now, effects)
        return True

    def _with_credit(self, decision: Decision, entry: Entry, now: float) -> Candidate | None:
        """The best plan if its first worker has credit; else, after ``hold_s``, the best that has and harms nobody."""
        best = decision.best
        if best is None:
            return None
        credit = self.policy.credit_s
        if best.pending_s < credit:
            return best
        if now - entry.request.arrival_s >= self.policy.hold_s:
            for candidate in decision.candidates:
                harmless = candidate.itl_of_target <= 1.0 or candidate.decode.idle
                if candidate.pending_s < credit and harmless:
                    return candidate
        self._note_credit(now + best.pending_s - credit)
        return None

    def _inquiry(self, entry: Entry, now: float) -> Inquiry:
        request, request_class = entry.request, entry.request_class
        mean_osl = min(float(request.max_osl_tokens), self._osl.mean(request_class.name))
        generous = min(float(request.max_osl_tokens), self._osl.generous(request_class.name))
        guarded = request_class.background and not self._queue.owed(request_class.name, request_class.min_share, now)
        return Inquiry(
            request=request,
            cached=entry.cached,
            targets=self._targets(entry),
            waited_s=max(0.0, now - request.arrival_s),
            mean_osl=max(1.0, mean_osl),
            reserve_tokens=request.isl_tokens + max(1, int(generous)),
            guard_share=self.policy.background_guard if guarded else 1.0,
            reserved=self._reserved,
        )

    def _targets(self, entry: Entry) -> Targets:
        idle_prefill, idle_step = self._idle_best(entry)
        return targets(entry.request, entry.request_class, self.policy, idle_prefill, idle_step)

    def _idle_best(self, entry: Entry) -> tuple[float, float]:
        """(prefill seconds, decode step seconds) of the fastest idle workers for this request, inflated."""
        isl = entry.request.isl_tokens
        prefill = step = float("inf")
        for view in self._sorted:
            if not view.usable:
                continue
            cached = min(entry.cached.get(view.id, 0), isl - 1)
            prefill = min(
                prefill, view.perf.prefill_s(isl - cached, suffix_context(isl, cached), view.spec.max_batched_tokens)
            )
            if view.role is Role.DECODE:
                step = min(step, view.perf.decode_step_s(1, isl))
        inflation = self.policy.inflation
        return (
            prefill * inflation if prefill < float("inf") else 0.0,
            step * inflation if step < float("inf") else 0.0,
        )

    def _hopeless(self, entry: Entry, now: float) -> bool:
        goal = self._targets(entry)
        if not goal.binding or not self._sorted:
            return False
        return max(0.0, now - entry.request.arrival_s) + self._idle_best(entry)[0] > goal.ttft_s

    def _refuse_late(self, entry: Entry) -> bool:
        """Whether a hopeless request is refused; else it runs behind the rest."""
        return not entry.request_class.best_effort and self._cap.may_refuse(entry.request.isl_tokens)

    def _late_error(self, entry: Entry, now: float) -> DeadlineInfeasible:
        self._cap.refused(entry.request.isl_tokens)
        waiting = self._queue.tokens_up_to(entry.request_class.rank)
        return DeadlineInfeasible(
            f"the first token cannot come within {self._targets(entry).ttft_s:.2f} s",
            retry_after_s=admission.retry_after_s(waiting, self._drain_rate(now)),
        )

    def _dispatch(
        self, entry: Entry, decision: Decision, candidate: Candidate, now: float, effects: list[Effect]
    ) -> None:
        request, policy = entry.request, self.policy
        job = self._jobs[request.key]
        job.state = advance(job.state, Event.PLACE)
        job.plan = candidate.plan
        job.step_s = candidate.row[4] / 1e3
        isl = request.isl_tokens
        first, decode = candidate.first, candidate.decode
        cached = min(entry.cached.get(first.id, 0), isl - 1)
        inquiry = self._inquiry(entry, now)
        tau = disturbance_window_s(inquiry.mean_osl, inquiry.targets.tpot_s)
        fresh, context = isl - cached, suffix_context(isl, cached)
        reserve = need_blocks(decode, inquiry.reserve_tokens)
        if candidate.prefill is None:
            booking = Booking(request.key, fresh, context, candidate.prefill_s, reserve, True, isl)
            decode.book(booking, now, tau)
        else:
            moved = candidate.transfer_bytes
            held = need_blocks(first, isl)
            first.book(Booking(request.key, fresh, context, candidate.prefill_s, held, False, 0, moved), now, tau)
            decode.book(Booking(request.key, 0, 0.0, 0.0, reserve, True, isl, moved), now, tau)
        job.expected_osl = inquiry.mean_osl
        job.charged_input = float(fresh)
        job.charged_output = policy.output_weight * inquiry.mean_osl
        charge = job.charged_input + job.charged_output
        self._queue.remove(entry)
        self._queue.charge(request.tenant, charge)
        self._queue.count_share(entry.request_class.name, charge, now)
        self._count_rate(entry.tokens, now)
        self._arrivals.pop(request.key, None)
        self._release_reservation(request.key)
        effects.append(Place(request, candidate.plan, cached, entry.request_class.rank, decision, candidate))

    def _blocked(self, entry: Entry, now: float) -> None:
        """No plan passes the hard filters: parked if none could, else a decode worker is reserved once it has aged."""
        if not admission.fits_somewhere(entry.request, self._sorted):
            self._queue.park(entry)
            return
        if entry.blocked_since is None:
            entry.blocked_since = now
        due = entry.blocked_since + entry.request_class.ageing_s
        if now < due:
            self._note_credit(due)
            return
        key = entry.request.key
        if entry.request_class.background or key in self._reserved.values():
            return
        open_ = [
            view
            for view in self._sorted
            if view.role is Role.DECODE and view.id not in self._reserved and not unfit(view, entry.request)
        ]
        decoders = sum(1 for view in self._sorted if view.role is Role.DECODE and view.usable)
        if open_ and len(self._reserved) < max(1, decoders // 2):
            roomiest = max(open_, key=lambda view: view.spec.kv_blocks_total - view.blocks_in_use)
            self._reserved[roomiest.id] = key

    def _release_reservation(self, key: RequestKey) -> None:
        for worker in [w for w, k in self._reserved.items() if k == key]:
            del self._reserved[worker]

    def _credit_anywhere(self, now: float) -> bool:
        """Whether any worker may get work; if none, notes when the first will."""
        credit = self.policy.credit_s
        soonest = float("inf")
        for view in self._sorted:
            if not view.usable:
                continue
            pending = pending_prefill_s(view, now, self.policy)
            if pending < credit:
                return True
            soonest = min(soonest, pending)
        if soonest < float("inf"):
            self._note_credit(now + soonest - credit)
        return False

    def _note_credit(self, at: float) -> None:
        if self._credit_at is None or at < self._credit_at:
            self._credit_at = at

    # --- ends -------------------------------------------------------------------------------------------------------

    def _expire(self, now: float, effects: list[Effect]) -> None:
        """Queued past their hard limit: QueueTimeout. Placed and long past it: their end got lost, room returns."""
        while self._timeouts and self._timeouts[0][0] <= now:
            at, order, key = heapq.heappop(self._timeouts)
            job = self._jobs.get(key)
            if job is None:
                continue
            if job.state is State.QUEUED:
                error = QueueTimeout(f"waited {now - job.request.arrival_s:.1f} s in the queue", retry_after_s=1.0)
                self._refuse(job.entry, error, now, effects)
            elif at + self.policy.forget_after_s <= now or at > job.request.arrival_s + job.request.timeout_s:
                self._end(key, Event.LOSE, now)
            else:
                heapq.heappush(self._timeouts, (at + self.policy.forget_after_s, order, key))

    def _refuse_without_workers(self, now: float, effects: list[Effect]) -> None:
        if any(view.role is Role.DECODE for view in self._sorted):
            self._no_workers_since = None
            return
        if self._no_workers_since is None:
            self._no_workers_since = now
        if now - self._no_workers_since < self.policy.no_worker_grace_s:
            return
        for key in list(self._arrivals):
            entry = self._jobs[key].entry
            self._refuse(entry, NoWorkers("no worker came in time", retry_after_s=1.0), now, effects)

    def _refuse(self, entry: Entry, error: TandemError, now: float, effects: list[Effect]) -> None:
        self._end(entry.request.key, Event.REFUSE, now, error)
        effects.append(Refuse(entry.request, error))

    def _end(self, key: RequestKey, event: Event, now: float, error: TandemError | None = None) -> None:
        """The one way out: gives back whatever this request holds, and forgets it."""
        job = self._jobs.pop(key)
        job.state = advance(job.state, event)
        if event is Event.LOSE:
            self._settle(job, 0.0, 0.0, now)
        if job.entry.queued:
            self._queue.remove(job.entry)
        self._arrivals.pop(key, None)
        self._release_reservation(key)
        if job.plan is not None:
            for worker in (job.plan.prefill_worker, job.plan.decode_worker):
                if worker is not None and worker in self._workers:
                    self._workers[worker].release(key, now)
        siblings = self._by_id[key.id]
        siblings.remove(key)
        if not siblings:
            del self._by_id[key.id]
        if event not in (Event.FAIL, Event.LOSE):
            self._remember(key, error)

    def _remember(self, key: RequestKey, error: TandemError | None) -> None:
        self._ended[key] = error
        while len(self._ended) > _REMEMBERED:
            self._ended.popitem(last=False)

    def _repair(self, key: RequestKey, view: WorkerView, now: float) -> None:
        """The worker's report shows that it is done with this request: an event got lost."""
        job = self._jobs.get(key)
        if job is None or job.plan is None:
            view.release(key, now)
        elif job.plan.prefill_worker == view.id:
            self.prefill_done(key, now)
        else:
            self._end(key, Event.FINISH, now)

    # --- charges ----------------------------------------------------------------------------------------------------

    def _settle(self, job: _Job, really_input: float, really_output: float, now: float) -> None:
        """Corrects what was charged at dispatch to what was used."""
        difference = really_input + really_output - job.charged_input - job.charged_output
        job.charged_input, job.charged_output = really_input, really_output
        if difference:
            self._queue.charge(job.request.tenant, difference)

    def _used_so_far(self, job: _Job, now: float) -> tuple[float, float]:
        """(input, output) charges of a request that ends early: no output before decoding, no input before prefill
        was at work; output as predicted from the time it has been decoding."""
        if job.decoding_since is None:
            return (job.charged_input if job.state is not State.PREFILLING else 0.0, 0.0)
        produced = (now - job.decoding_since) / max(job.step_s, 1e-4)
        produced = min(produced, float(job.request.max_osl_tokens))
        return job.charged_input, self.policy.output_weight * produced

    def _count_rate(self, tokens: float, now: float) -> None:
        self._rate_tokens = self._drain_rate(now) * self.policy.share_window_s + tokens
        self._rate_at = now

    def _drain_rate(self, now: float) -> float:
        """Tokens per second that leave the queue, over the last window."""
        window = self.policy.share_window_s
        decay = max(0.0, 1.0 - (now - self._rate_at) / window) if self._rate_tokens else 0.0
        return self._rate_tokens * decay / window

    # --- readings ---------------------------------------------------------------------------------------------------

    def state_of(self, key: RequestKey) -> State | None:
        """None = unknown, or ended."""
        job = self._jobs.get(key)
        return job.state if job else None

    def plan_of(self, key: RequestKey) -> Plan | None:
        job = self._jobs.get(key)
        return job.plan if job else None

    def queued(self) -> list[RequestKey]:
        """Keys that wait, in the order of their submission."""
        return list(self._arrivals)

    def prefilling_on(self, worker: str) -> list[RequestKey]:
        """Keys whose prompt this worker is to compute for another one and has not yet."""
        view = self._workers.get(worker)
        if view is None:
            return []
        jobs = ((key, self._jobs[key]) for key in view.bookings)
        return [
            k for k, job in jobs if job.state is State.PREFILLING and job.plan and job.plan.prefill_worker == worker
        ]

    def workers(self) -> Iterable[WorkerView]:
        """In the order of their ids; to look at, not to change."""
        return tuple(self._sorted)

    def snapshot(self, now: float) -> Snapshot:
        workers = tuple(
            WorkerSnapshot(
                id=view.id,
                incarnation=view.spec.address.incarnation,
                role=view.role,
                draining=view.draining,
                suspect=view.suspect,
                in_flight=len(view.bookings),
                pending_prefill_s=pending_prefill_s(view, now, self.policy),
                kv_blocks_in_use=view.blocks_in_use,
                kv_blocks_total=view.spec.kv_blocks_total,
                sequences=view.sequences,
                model_error=view.perf.relative_error,
            )
            for view in self._sorted
        )
        oldest = min(self._arrivals.values(), default=now)
        queued = len(self._arrivals)
        return Snapshot(
            workers,
            self._queue.depth_by_class(),
            self._queue.depth_by_tenant(),
            max(0.0, now - oldest) if queued else 0.0,
            len(self._jobs) - queued,
        )

    def service_counters(self) -> dict[str, float]:
        """Tenants' service, for a store: fairness survives a change of leader."""
        return self._counters.dump()

    def restore_counters(self, counters: Mapping[str, float]) -> None:
        """What a former leader stored. A tenant's counter never falls by it."""
        self._counters.load(counters)

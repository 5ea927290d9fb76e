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

import random
from collections.abc import Iterable, Mapping

from mypy_extensions import mypyc_attr

from tandem.core.accounting import Booking, WorkerView
from tandem.core.admission import Admission, fits_somewhere
from tandem.core.effects import Effect, Place, Recall, Refuse
from tandem.core.fleet import Fleet
from tandem.core.holders import without
from tandem.core.ledger import Job, Ledger
from tandem.core.lifecycle import Event, State, advance
from tandem.core.placement import (
    Candidate,
    Decision,
    Inquiry,
    decide,
    disturbance_window_s,
    need_blocks,
    suffix_context,
)
from tandem.core.policy import Policy, RequestClass, Tenant
from tandem.core.profiles import PROFILES, Profile
from tandem.core.queueing import Entry, FairCounters, FairQueue, Wait
from tandem.core.snapshot import Snapshot, worker_snapshot
from tandem.core.types import Explanation, Plan, Request, RequestKey, WorkerLoad, WorkerSpec
from tandem.errors import NoWorkers, QueueTimeout, TandemError

__all__ = ["Effect", "Place", "Recall", "Refuse", "Scheduler", "Snapshot"]

#: ``poll`` is never asked for again sooner than this, seconds.
_MIN_WAKEUP_S = 0.002
#: A request that could not start is looked at again after so long even if nothing has happened.
_PATIENCE_S = 0.02
#: Ends for which the tenant does not pay.
_UNPAID = frozenset({Event.LOSE, Event.FAIL, Event.RECALL})


def _declared(classes: Mapping[str, RequestClass]) -> dict[str, RequestClass]:
    """The first is the default."""
    return dict(classes) or {"default": RequestClass()}


@mypyc_attr(allow_interpreted_subclasses=True)  # the router records calls in one
class Scheduler:
    """See the module docstring."""

    def __init__(
        self,
        policy: Policy,
        *,
        classes: Mapping[str, RequestClass],
        tenants: Mapping[str, Tenant],
        rng: random.Random,
        profiles: Mapping[str, Profile] = PROFILES,
    ) -> None:
        """``profiles``: what workers' names of timing profiles stand for."""
        self.policy = policy
        self.classes: Mapping[str, RequestClass] = _declared(classes)
        self.tenants = tenants
        self._rng = rng
        self._fleet = Fleet(policy, profiles)
        self._counters = FairCounters(tenants)
        self._queue = FairQueue(self.classes.values(), self._counters, policy.share_window_s)
        self._admission = Admission(policy, self.classes, tenants, self._fleet, self._queue, self._counters)
        self._ledger = Ledger()
        self._generation = 0  # of the fleet, when parked entries were last looked at
        self._no_decoders_since: float | None = None
        self._openings = 0  # of the fleet, at the last scan
        self._stirred = False  # something has happened since the last fruitless scan
        self._room_wanted = False  # the last scan passed over somebody who had no room on some worker
        self._retry_at: float | None = None  # time alone may make a scan fruitful then

    def reconfigure(
        self, policy: Policy, *, classes: Mapping[str, RequestClass], tenants: Mapping[str, Tenant], now: float
    ) -> None:
        """For what is decided from now on. Requests that wait keep their deadlines, and are of the first class if
        theirs is gone. What has been learnt and the tenants' counters stay."""
        self.policy = policy
        self.classes = known = _declared(classes)
        self.tenants = tenants
        waiting = [job.entry for job in self._ledger if job.state is State.QUEUED]
        for entry in waiting:
            entry.request_class = known.get(entry.request_class.name) or next(iter(known.values()))
        self._fleet.reconfigure(policy)
        self._counters.reconfigure(tenants)
        self._queue.reconfigure(known.values(), policy.share_window_s, waiting, now)
        self._admission.reconfigure(policy, known, tenants, waiting)
        self._stirred = True

    # --- workers ----------------------------------------------------------------------------------------------------

    def worker_up(self, spec: WorkerSpec, now: float) -> list[RequestKey]:
        """A new worker, a new incarnation, or news (role, draining) of a known one. Returns the keys that were in
        flight on a replaced incarnation: they are lost and forgotten here."""
        if self._fleet.find(spec.id, spec.address.incarnation) is None:
            for job in self._ledger:
                if job.state is State.QUEUED:
                    job.entry.cached = without(job.entry.cached, spec.id, job.entry.common)
        replaced = self._fleet.up(spec)
        self._stirred = True
        return self._lose(replaced, now) if replaced is not None else []

    def worker_load(self, load: WorkerLoad, now: float) -> None:
        """A load report; of an unknown incarnation it is dropped."""
        view = self._fleet.find(load.worker, load.incarnation)
        if view is None:
            return
        foreign = view.foreign
        self._fleet.report(view, load, now)
        if view.foreign != foreign:
            self._stirred = True
        for key in view.finished_by_report(now):
            self._repair(key, view, now)

    def worker_suspect(self, worker: str, suspect: bool, now: float) -> None:
        """Silent for a while, or heard again: no new work meanwhile, nothing declared lost."""
        self._fleet.suspect(worker, suspect)

    def worker_down(self, worker: str, incarnation: int, now: float) -> list[RequestKey]:
        """It is gone. Returns the keys that were in flight on it, on either leg; they are forgotten here."""
        view = self._fleet.find(worker, incarnation)
        if view is None:
            return []
        self._fleet.remove(view)
        return self._lose(view, now)

    def _lose(self, view: WorkerView, now: float) -> list[RequestKey]:
        lost = list(view.bookings)
        for key in lost:
            self._close(key, Event.LOSE, now)
        return lost

    def _repair(self, key: RequestKey, view: WorkerView, now: float) -> None:
        """The worker's report shows that it is done with this request: an event got lost."""
        job = self._ledger.find(key)
        if job is None or job.plan is None:
            self._fleet.touch(view)
            view.release(key, now)
        elif job.plan.prefill_worker == view.id:
            self.prefill_done(key, now)
        else:
            self._close(key, Event.FINISH, now)

    # --- requests ---------------------------------------------------------------------------------------------------

    def submit(self, request: Request, cached: Mapping[str, int], now: float) -> None:
        """Queues it. ``cached``: worker id -> prompt tokens that the index believes to be cached there.

        Raises what it is refused for: NoWorkers, ContextLengthExceeded, Overloaded, DeadlineInfeasible,
        InvalidRequest (unknown class). A repeated key changes nothing; one that was refused is refused again.
        """
        if self._ledger.is_repeat(request.key):
            return
        try:
            entry = self._admission.entry(request, cached)
            self._admission.admit(entry, now)
        except TandemError as error:
            self._ledger.remember(request.key, error)
            raise
        self._ledger.open(entry)
        self._queue.add(entry)
        self._admission.backlog.add(entry)
        self._stirred = True

    def prefill_done(self, key: RequestKey, now: float) -> None:
        """The prompt is computed: credit returns. On a local leg decoding begins."""
        job = self._ledger.find(key)
        if job is None or job.plan is None:
            return
        if job.plan.prefill_worker is None:
            self.decode_started(key, now)
            return
        job.state = advance(job.state, Event.PREFILL_DONE)
        view = self._giving(job.plan.prefill_worker)
        if view is not None:
            view.prefill_done(key, now)

    def decode_started(self, key: RequestKey, now: float) -> None:
        """The decode worker has the KV: the prefill worker's room returns."""
        job = self._ledger.find(key)
        if job is None or job.plan is None:
            return
        job.state = advance(job.state, Event.DECODE_STARTED)
        if job.decoding_since is None:
            job.decoding_since = now
        self._release(job.plan.prefill_worker, key, now)
        view = self._giving(job.plan.decode_worker)
        if view is not None:
            view.prefill_done(key, now)
            view.transfer_done(key)

    def finished(self, key: RequestKey, output_tokens: int, cached_tokens: int, now: float) -> None:
        """Its last token is out. Charges become what was really used."""
        job = self._ledger.find(key)
        if job is None or job.plan is None:
            return
        self._admission.lengths.learn(job.entry.request_class.name, output_tokens)
        fresh = max(0, job.request.isl_tokens - cached_tokens)
        self._settle(job, float(fresh), self.policy.output_weight * output_tokens)
        self._close(key, Event.FINISH, now)

    def failed(self, key: RequestKey, now: float) -> None:
        """A worker could not do it, or the caller gives it up. The tenant is not charged; the frontend submits again,
        and the same key may come again."""
        if self._ledger.find(key) is not None:
            self._close(key, Event.FAIL, now)

    def abort(self, request_id: str, max_attempt: int, now: float, *, choice: int | None = None) -> list[RequestKey]:
        """Ends every attempt up to ``max_attempt``, of one choice or of all. Returns the keys that ended by it."""
        ended: list[RequestKey] = []
        for key in self._ledger.of_id(request_id):
            if key.attempt > max_attempt or (choice is not None and key.choice != choice):
                continue
            job = self._ledger.find(key)
            if job is not None and job.state.placed:
                self._settle(job, *job.used_by(now, self.policy.output_weight))
            self._close(key, Event.ABORT, now)
            ended.append(key)
        return ended

    # --- driving ----------------------------------------------------------------------------------------------------

    def poll(self, now: float) -> list[Effect]:
        """Places what can be placed and refuses what must be refused, now."""
        effects: list[Effect] = []
        self._expire(now, effects)
        self._refuse_the_homeless(now, effects)
        if self._generation != self._fleet.generation:
            self._generation = self._fleet.generation
            self._queue.unpark()
            self._stirred = True
        if len(self._queue) and self._worth_a_scan(now):
            self._retry_at = None
            self._stirred = self._room_wanted = False
            if self._fleet.reserved:
                self._place_reserved(now, effects)
            self._scan(now, effects)
        return effects

    def next_wakeup(self, now: float) -> float | None:
        """Absolute time at which ``poll`` must be called even if no event comes; None = never."""
        times = [self._ledger.next_limit()]
        if len(self._queue):
            times += [self._retry_at, self._grace_end()]
        known = [at for at in times if at is not None]
        return max(now + _MIN_WAKEUP_S, min(known)) if known else None

    def explain(self, request: Request, cached: Mapping[str, int], now: float) -> Explanation:
        """Which plan would be chosen now, with every term of every candidate. Places nothing.

        InvalidRequest for an unknown class.
        """
        inquiry = self._inquiry(self._admission.entry(request, cached), now)
        decision = self._decide(inquiry, now, rng=None)
        best = decision.best
        if best is None or best.pending_s < inquiry.credit_s:
            return decision.explanation(best)
        wait = f"; it would wait for credit: {best.first.id} has {1e3 * best.pending_s:.0f} ms of prefill pending"
        return decision.explanation(best, wait)

    # --- deciding ---------------------------------------------------------------------------------------------------

    def _worth_a_scan(self, now: float) -> bool:
        """Whether anything has changed since the last fruitless one."""
        self._fleet.anyone_open(now)
        if self._openings != self._fleet.openings:
            self._openings = self._fleet.openings
            return True
        return self._stirred or (self._retry_at is not None and self._retry_at <= now)

    def _scan(self, now: float, effects: list[Effect]) -> None:
        """Takes entries in the queue's order and places those that can start, until nobody has credit.

        Whoever waits for a busy worker by choice is overtaken by other tenants only as far as ``overtake_tokens``.
        """
        policy = self.policy
        overtaken: dict[str, float] = {}  # by class, the lowest counter of a tenant that was passed over for credit
        passed: list[Entry] = []
        passed_in: dict[tuple[str, str], int] = {}
        while len(passed) < policy.scan_depth:
            if not self._fleet.anyone_open(now) and (passed or not policy.recalls):
                break
            entry = self._queue.pop(now)
            if entry is None:
                break
            name, counter = entry.request_class.name, self._counters.value(entry.request.tenant)
            if counter > overtaken.get(name, counter) + policy.overtake_tokens:
                passed.append(entry)
                break
            if self._try(entry, now, effects) or not entry.queued or entry.parked:
                continue
            passed.append(entry)
            if entry.waits_for is Wait.CREDIT:
                overtaken[name] = min(counter, overtaken.get(name, counter))
            lane = (entry.request.tenant, name)
            passed_in[lane] = passed_in.get(lane, 0) + 1
            if passed_in[lane] >= policy.scan_per_tenant:
                self._queue.set_aside(entry)
        if passed:
            self._queue.restore(passed)
        if not self._fleet.anyone_open(now):
            self._look_again(self._fleet.next_credit())

    def _place_reserved(self, now: float, effects: list[Effect]) -> None:
        """Requests for which room is held go first: nobody else may use it."""
        for key in list(self._fleet.reserved.values()):
            job = self._ledger.find(key)
            if job is None:
                continue
            inquiry = self._inquiry(job.entry, now)
            decision = self._decide(inquiry, now, self._rng)
            candidate = self._with_credit(decision, inquiry)
            if candidate is not None:
                self._dispatch(job.entry, inquiry, decision, candidate, now, effects)
                continue
            self._room_wanted = True
            if decision.best is not None:
                self._look_again(now + max(_MIN_WAKEUP_S, decision.best.pending_s - inquiry.credit_s))

    def _try(self, entry: Entry, now: float, effects: list[Effect]) -> bool:
        """Places the entry (True), or refuses, parks or leaves it."""
        inquiry = self._inquiry(entry, now)
        hopeful = inquiry.targets.binding and not entry.late
        if hopeful and self._admission.cannot_meet(entry, inquiry.targets, now):
            return self._give_up(entry, inquiry, now, effects)
        decision = self._decide(inquiry, now, self._rng)
        if hopeful and decision.best is not None and decision.best.ttft_of_target > self.policy.late_share:
            return self._give_up(entry, inquiry, now, effects)
        candidate = self._with_credit(decision, inquiry)
        if candidate is not None:
            self._dispatch(entry, inquiry, decision, candidate, now, effects)
            return True
        self._room_wanted |= decision.partial or len(decision.excluded) > len(self._fleet.set_aside)
        if decision.best is None:
            self._blocked(entry, inquiry, decision, now)
        else:
            if self._recall_for(entry, decision.best, now, effects):
                return self._try(entry, now, effects)
            entry.waits_for = Wait.CREDIT
            self._look_again(now + max(_PATIENCE_S, decision.best.pending_s - inquiry.credit_s))
            if inquiry.waited_s < self.policy.hold_s:
                self._look_again(now + self.policy.hold_s - inquiry.waited_s)
        return False

    def _give_up(self, entry: Entry, inquiry: Inquiry, now: float, effects: list[Effect]) -> bool:
        """It will be late: refused, or from now on behind the rest. False, as nothing is placed."""
        if self._admission.refuses_late(entry):
            self._refuse(entry, self._admission.late_error(entry, inquiry.targets), now, effects)
        else:
            self._queue.demote(entry)
            self._look_again(now)
        return False

    def _with_credit(self, decision: Decision, inquiry: Inquiry) -> Candidate | None:
        """The best plan if its first worker has credit; else, after ``hold_s``, the best that has and harms nobody."""
        best = decision.best
        if best is None or (best.pending_s < inquiry.credit_s and self._paced(best, inquiry)):
            return best
        if inquiry.waited_s >= self.policy.hold_s:
            for candidate in decision.candidates:
                harmless = candidate.itl_of_target <= 1.0 or candidate.disturbs_nobody
                if candidate.pending_s < inquiry.credit_s and harmless and self._paced(candidate, inquiry):
                    return candidate
        return None

    def _paced(self, candidate: Candidate, inquiry: Inquiry) -> bool:
        """With an SLO it waits rather than start where the streams would miss theirs by it."""
        late = inquiry.targets.binding and candidate.itl_of_target > self.policy.tpot_limit
        return not late or candidate.disturbs_nobody

    def _decide(self, inquiry: Inquiry, now: float, rng: random.Random | None) -> Decision:
        fleet = self._fleet
        return decide(
            inquiry, fleet.decoders, fleet.prefillers, self.policy, now, rng, fleet.set_aside, fleet.standings,
            fleet.reluctant,
        )  # fmt: skip

    def _inquiry(self, entry: Entry, now: float) -> Inquiry:
        request, request_class, lengths = entry.request, entry.request_class, self._admission.lengths
        name = request_class.name
        guarded = request_class.background and not self._queue.owed(request_class, now)
        return Inquiry(
            request=request,
            cached=entry.cached,
            targets=self._admission.targets(entry, now),
            waited_s=max(0.0, now - request.arrival_s),
            expected_osl=lengths.expected(name, request),
            stream_osl=lengths.mean(name),
            reserve_tokens=request.isl_tokens + lengths.generous(name, request),
            avoid=self._avoid(request),
            credit_s=self.policy.background_credit_s if guarded else self.policy.credit_s,
            guard_share=self.policy.background_guard if guarded else 1.0,
            reserved=self._fleet.reserved,
            common=entry.common,
        )

    def _avoid(self, request: Request) -> frozenset[str]:
        """Workers that failed it before, unless only they are left."""
        avoid = request.avoid_workers
        if not avoid or all(view.id in avoid for view in self._fleet.decoders):
            return frozenset()
        return avoid

    def _dispatch(
        self,
        entry: Entry,
        inquiry: Inquiry,
        decision: Decision,
        candidate: Candidate,
        now: float,
        effects: list[Effect],
    ) -> None:
        request = entry.request
        first = candidate.first
        isl = request.isl_tokens
        cached = min(entry.cached.get(first.id, entry.common), isl - 1)
        self._book(candidate, inquiry, cached, now)
        job = self._ledger.find(request.key)
        assert job is not None
        job.placed(candidate, float(isl - cached), self.policy.output_weight * inquiry.expected_osl)
        self._ledger.dequeued(request.key)
        self._dequeue(entry)
        charge = job.charged_input + job.charged_output
        self._queue.charge(request.tenant, charge)
        self._queue.count_share(entry.request_class.name, charge, now)
        rank = entry.request_class.rank
        assert job.plan is not None
        effects.append(Place(request, job.plan, cached, rank, decision, candidate, entry.waits_for))

    def _book(self, candidate: Candidate, inquiry: Inquiry, cached: int, now: float) -> None:
        """Takes prefill credit on the first worker and KV room on every worker of the plan."""
        key, isl = inquiry.request.key, inquiry.isl_tokens
        first, decode = candidate.first, candidate.decode
        tau = disturbance_window_s(inquiry.stream_osl, inquiry.targets.tpot_s)
        fresh, context = isl - cached, suffix_context(isl, cached)
        room = need_blocks(decode, inquiry.reserve_tokens)
        if candidate.prefill is None:
            decode.book(
                Booking(key, fresh, context, candidate.prefill_s, room, True, isl, extra_s=candidate.extra_s), now, tau
            )
        else:
            moved = candidate.transfer_bytes
            held = need_blocks(first, isl)
            first.book(
                Booking(key, fresh, context, candidate.prefill_s, held, False, 0, moved, extra_s=candidate.extra_s),
                now,
                tau,
            )
            decode.book(Booking(key, 0, 0.0, 0.0, room, True, isl, moved), now, tau)
            self._fleet.touch(decode)
        self._fleet.touch(first)

    # --- what cannot start ------------------------------------------------------------------------------------------

    def _blocked(self, entry: Entry, inquiry: Inquiry, decision: Decision, now: float) -> None:
        """No plan passes the hard filters: parked if none ever could, else a decode worker is reserved in time."""
        fleet = self._fleet
        if not fits_somewhere(entry.request, (*fleet.decoders, *fleet.reluctant), inquiry.avoid):
            if entry.homeless_since is None:
                entry.homeless_since = now
            entry.waits_for = Wait.WORKER
            self._queue.park(entry)
            return
        entry.homeless_since = None
        entry.waits_for = Wait.GUARD if decision.guarded else Wait.ROOM
        if decision.guarded:
            self._look_again(now + self.policy.credit_s)
            return
        if entry.blocked_since is None:
            entry.blocked_since = now
        due = entry.blocked_since + entry.request_class.ageing_s
        if now < due:
            self._look_again(due)
        elif not entry.request_class.background:
            self._fleet.reserve_for(entry.request, inquiry.avoid)

    def _recall_for(self, entry: Entry, best: Candidate, now: float, effects: list[Effect]) -> bool:
        """Background work whose prefill blocks a foreground request makes way, if the policy lets it."""
        before = len(effects)
        if not self.policy.recalls or entry.request_class.background:
            return False
        for key in list(best.first.bookings):
            job = self._ledger.find(key)
            if job is None or job.plan is None or not job.entry.request_class.background:
                continue
            if job.state is State.PREFILLING and key.attempt < self.policy.recalls:
                effects.append(Recall(job.request, job.plan))
                self._close(key, Event.RECALL, now)
        return len(effects) > before

    def _look_again(self, at: float | None) -> None:
        if at is not None and (self._retry_at is None or at < self._retry_at):
            self._retry_at = at

    # --- ends -------------------------------------------------------------------------------------------------------

    def _expire(self, now: float, effects: list[Effect]) -> None:
        """Queued past their hard limit: QueueTimeout. Placed and long past it: their end got lost, room returns."""
        for job in self._ledger.pop_expired(now):
            limit = job.request.arrival_s + job.request.timeout_s
            if job.state is State.QUEUED:
                waited = now - job.request.arrival_s
                error = QueueTimeout(f"waited {waited:.1f} s in the queue, its whole time limit", retry_after_s=1.0)
                self._refuse(job.entry, error, now, effects)
            elif now < limit + self.policy.forget_after_s:
                self._ledger.limit_at(limit + self.policy.forget_after_s, job.entry)
            else:
                self._close(job.request.key, Event.LOSE, now)

    def _refuse_the_homeless(self, now: float, effects: list[Effect]) -> None:
        """Requests that no worker of the fleet can take, after a grace: workers may be coming."""
        if self._fleet.decoders:
            self._no_decoders_since = None
            if not self._queue.num_parked:
                return  # as mostly
        elif self._no_decoders_since is None:
            self._no_decoders_since = now
        grace = self.policy.no_worker_grace_s
        if self._no_decoders_since is not None and now - self._no_decoders_since >= grace:
            gone = [job.entry for job in self._ledger if job.state is State.QUEUED]
        else:
            gone = [e for e in self._queue.parked if e.homeless_since is not None and now - e.homeless_since >= grace]
        for entry in gone:
            error = NoWorkers(f"no worker that could run this came within {grace:.0f} s", retry_after_s=1.0)
            self._refuse(entry, error, now, effects)

    def _grace_end(self) -> float | None:
        since = [e.homeless_since for e in self._queue.parked if e.homeless_since is not None]
        if self._no_decoders_since is not None:
            since.append(self._no_decoders_since)
        return min(since) + self.policy.no_worker_grace_s if since else None

    def _refuse(self, entry: Entry, error: TandemError, now: float, effects: list[Effect]) -> None:
        self._close(entry.request.key, Event.REFUSE, now, error)
        effects.append(Refuse(entry.request, error))

    def _close(self, key: RequestKey, event: Event, now: float, error: TandemError | None = None) -> None:
        """The one way out: gives back whatever this request holds, and forgets it."""
        job = self._ledger.close(key, event, error)
        if event in _UNPAID:
            self._settle(job, 0.0, 0.0)
        self._dequeue(job.entry)
        if job.plan is not None:
            self._release(job.plan.prefill_worker, key, now)
            self._release(job.plan.decode_worker, key, now)

    def _dequeue(self, entry: Entry) -> None:
        if entry.queued:
            self._queue.remove(entry)
            self._admission.backlog.remove(entry)
            if self._fleet.release_reservation(entry.request.key):
                self._stirred = True

    def _settle(self, job: Job, input_tokens: float, output_tokens: float) -> None:
        difference = job.settle(input_tokens, output_tokens)
        if difference:
            self._queue.charge(job.request.tenant, difference)

    def _release(self, worker: str | None, key: RequestKey, now: float) -> None:
        """All that the request takes there is given back."""
        view = self._giving(worker)
        if view is not None:
            view.release(key, now)
            if view.idle:
                self._stirred = True  # an idle worker takes what a busy one may not

    def _giving(self, worker: str | None) -> WorkerView | None:
        """It is about to give something back, if it is still there: credit shows by itself, KV room and seats matter
        when somebody waits for them."""
        if self._room_wanted:
            self._stirred = True
        view = self._fleet.views.get(worker) if worker is not None else None
        if view is not None:
            self._fleet.touch(view)
        return view

    # --- readings ---------------------------------------------------------------------------------------------------

    def state_of(self, key: RequestKey) -> State | None:
        """None = unknown, or ended."""
        job = self._ledger.find(key)
        return job.state if job else None

    def plan_of(self, key: RequestKey) -> Plan | None:
        job = self._ledger.find(key)
        return job.plan if job else None

    @property
    def num_queued(self) -> int:
        return self._ledger.num_queued()

    def queued(self) -> list[RequestKey]:
        """Keys that wait, in the order of their submission."""
        return self._ledger.queued()

    def prefilling_on(self, worker: str) -> list[RequestKey]:
        """Keys whose prompt this worker is to compute for another one and has not yet."""
        view = self._fleet.views.get(worker)
        found = [self._ledger.find(key) for key in view.bookings] if view is not None else []
        return [
            job.request.key
            for job in found
            if job is not None and job.state is State.PREFILLING and job.plan and job.plan.prefill_worker == worker
        ]

    def workers(self) -> Iterable[WorkerView]:
        """In the order of their ids; to look at, not to change."""
        return tuple(self._fleet.ordered)

    def snapshot(self, now: float) -> Snapshot:
        oldest = self._ledger.oldest_arrival()
        return Snapshot(
            workers=tuple(worker_snapshot(view, now, self.policy.inflation) for view in self._fleet.ordered),
            queue_by_class=self._queue.depth_by_class(),
            queue_by_tenant=self._queue.depth_by_tenant(),
            oldest_wait_s=max(0.0, now - oldest) if oldest is not None else 0.0,
            oldest_wait_by_class={name: max(0.0, now - at) for name, at in self._ledger.oldest_arrivals().items()},
            in_flight=len(self._ledger) - self._ledger.num_queued(),
        )

    def service_counters(self) -> dict[str, float]:
        """Tenants' service, for a store: fairness survives a change of leader."""
        return self._counters.dump()

    def restore_counters(self, counters: Mapping[str, float]) -> None:
        """What a former leader stored. A tenant's counter never falls by it."""
        self._counters.load(counters)

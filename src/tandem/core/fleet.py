"""The workers of one model: who may be given work, who has credit, who is held for whom. Decides nothing.

*Usable* workers are neither draining nor silent. A worker has *credit* while its predicted pending prefill is below
``Policy.credit_s``; the set of those is kept up to date by event and by a heap of the times at which the others will
have it, so that asking costs nothing per worker. Workers are listed in the order of their ids: decisions do not
depend on who registered first.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping

from tandem.core.accounting import WorkerView
from tandem.core.perf_model import PerfModel
from tandem.core.placement import Standings, suffix_context, unfit
from tandem.core.policy import Policy
from tandem.core.profiles import Profile, profile_named
from tandem.core.standing import Standing, backlog_s, next_step_s
from tandem.core.types import Request, RequestKey, Role, WorkerLoad, WorkerSpec

#: Prompt length at which workers are compared for speed, tokens.
_REFERENCE_TOKENS = 1024


def _idle_prefill_s(view: WorkerView, isl: int, cached: Mapping[str, int], common: int) -> float:
    held = min(cached.get(view.id, common), isl - 1)
    return view.perf.prefill_s(isl - held, suffix_context(isl, held), view.chunk_tokens)


class Fleet:
    def __init__(self, policy: Policy, profiles: Mapping[str, Profile]) -> None:
        self._policy = policy
        self._profiles = profiles
        self.views: dict[str, WorkerView] = {}
        self.ordered: list[WorkerView] = []
        self.decoders: list[WorkerView] = []  # usable ones
        self.prefillers: list[WorkerView] = []  # usable ones that compute prompts for others
        self.reluctant: list[WorkerView] = []  # usable prefill workers that decode, too, beside those whose role it is
        self.set_aside: tuple[tuple[str, str], ...] = ()  # (worker id, why it is not usable)
        #: Prompt and output that the largest decode worker holds, usable or not; where none is left, that the last ones
        #: held; 0 = there never was one.
        self.longest_tokens = 0
        self.num_usable = 0
        self.generation = 0  # rises when the set of usable workers, or a role, changes
        self.reserved: dict[str, RequestKey] = {}  # decode worker -> who waits for room on it
        self.openings = 0  # times that a worker got credit
        self.standings = Standings(Standing(next_step_s), Standing(backlog_s), Standing(backlog_s))
        self._open: set[str] = set()  # has credit, by the last look
        self._dirty: set[str] = set()  # has changed since
        self._credit_times: list[tuple[float, str]] = []
        self._fastest_prefill: WorkerView | None = None
        self._fastest_decode: WorkerView | None = None
        self._reports = 0

    def reconfigure(self, policy: Policy) -> None:
        self._policy = policy
        self._changed()

    # --- membership -------------------------------------------------------------------------------------------------

    def up(self, spec: WorkerSpec) -> WorkerView | None:
        """Adds or updates a worker. Returns the view of the incarnation that this one replaces, if any."""
        known = self.views.get(spec.id)
        if known is not None and known.spec.address.incarnation == spec.address.incarnation:
            known.update(spec)
            self._changed()
            return None
        perf = PerfModel(profile_named(spec.perf_profile, self._profiles))
        sibling = self._sibling(spec)
        if sibling is not None:
            perf.adopt(sibling.perf.state())
        if known is not None:
            self.remove(known)
        self.views[spec.id] = WorkerView(spec, perf, self._policy.report_lag_s)
        self._changed()
        return known

    def remove(self, view: WorkerView) -> None:
        del self.views[view.id]
        self._open.discard(view.id)
        self._changed()

    def suspect(self, worker: str, suspect: bool) -> None:
        view = self.views.get(worker)
        if view is not None and view.suspect != suspect:
            view.suspect = suspect
            self._changed()

    def find(self, worker: str, incarnation: int) -> WorkerView | None:
        view = self.views.get(worker)
        return view if view is not None and view.spec.address.incarnation == incarnation else None

    def report(self, view: WorkerView, load: WorkerLoad, now: float) -> None:
        before = (view.draining, view.role)
        view.report(load, now)
        if self._policy.learn and load.steps:
            every = -(-len(load.steps) // max(1, self._policy.learn_steps_per_report))
            view.learn(load.steps[::every])
        self.touch(view)
        self._reports += 1
        if (view.draining, view.role) != before:
            self._changed()
        elif self._reports >= 16 * len(self.views):
            self._rank()

    def _changed(self) -> None:
        self.generation += 1
        self.ordered = [self.views[worker] for worker in sorted(self.views)]
        usable = [view for view in self.ordered if view.usable]
        self.num_usable = len(usable)
        self.decoders = [view for view in usable if view.role is Role.DECODE]
        lending = self._policy.flexible
        # Where no worker may do both for a request, none that prefills decodes either.
        both = lending and self._policy.local_prefill and bool(self.decoders)
        self.reluctant = [v for v in usable if v.role is Role.PREFILL] if both else []
        self.prefillers = [v for v in usable if v.role is Role.PREFILL or (lending and v.kv_kind >= 0)]
        self.set_aside = tuple((v.id, "draining" if v.draining else "silent") for v in self.ordered if not v.usable)
        held = [v.capacity_tokens for v in self.ordered if v.role is Role.DECODE]
        self.longest_tokens = max(held) if held else self.longest_tokens
        decoding = {view.id for view in self.decoders}
        self.reserved = {worker: key for worker, key in self.reserved.items() if worker in decoding}
        self._dirty.update(self.views)
        self.standings.decoders.reset(self.decoders)
        self.standings.prefillers.reset(v for v in self.prefillers if v.role is Role.PREFILL)
        self.standings.lenders.reset(v for v in self.prefillers if v.role is not Role.PREFILL)
        self._appraise()
        self._rank()

    def _appraise(self) -> None:
        """What a second of each worker is worth: the faster it is, by its profile, the dearer. So a kind of worker does
        what it is best at *beside the others*: of GPUs that compute thrice as fast and read memory 1.6 times as fast,
        the fast ones prefill, and the others decode."""
        speeds = [v.perf.profile.speed for v in self.ordered]
        mean = sum(speeds) / max(1, len(speeds))
        for view, speed in zip(self.ordered, speeds, strict=True):
            view.worth = speed / mean

    def _rank(self) -> None:
        """Finds the fastest workers again: what they learn shifts slowly."""
        self._reports = 0
        context = suffix_context(_REFERENCE_TOKENS, 0)
        self._fastest_prefill = min(
            self.decoders + self.prefillers,
            key=lambda v: v.perf.prefill_s(_REFERENCE_TOKENS, context, v.spec.max_batched_tokens),
            default=None,
        )
        self._fastest_decode = min(
            self.decoders, key=lambda v: v.perf.decode_step_s(1, _REFERENCE_TOKENS), default=None
        )

    def _sibling(self, spec: WorkerSpec) -> WorkerView | None:
        """The worker of the same kind that has learnt most."""
        kind = (spec.perf_profile, spec.pool, spec.max_batched_tokens)
        alike = (v for v in self.ordered if (v.spec.perf_profile, v.spec.pool, v.spec.max_batched_tokens) == kind)
        return max(alike, key=lambda v: v.perf.observations, default=None)

    # --- credit -----------------------------------------------------------------------------------------------------

    def touch(self, view: WorkerView) -> None:
        """Its accounting has changed."""
        worker, standings = view.id, self.standings
        self._dirty.add(worker)
        standings.decoders.touch(worker)
        standings.prefillers.touch(worker)
        standings.lenders.touch(worker)

    def anyone_open(self, now: float) -> bool:
        """Whether any usable worker has credit."""
        while self._credit_times and self._credit_times[0][0] <= now:
            self._dirty.add(heapq.heappop(self._credit_times)[1])
        if self._dirty:
            for worker in sorted(self._dirty):
                self._look(worker, now)
            self._dirty.clear()
        return bool(self._open)

    def next_credit(self) -> float | None:
        """When the next worker is expected to have credit that has none now."""
        return self._credit_times[0][0] if self._credit_times else None

    def _look(self, worker: str, now: float) -> None:
        view = self.views.get(worker)
        if view is None or not view.usable:
            self._open.discard(worker)
            return
        missing = self._policy.inflation * view.reading(now).pending_s - self._policy.credit_s
        if missing < 0.0:
            if worker not in self._open:
                self.openings += 1
            self._open.add(worker)
        else:
            self._open.discard(worker)
            heapq.heappush(self._credit_times, (now + max(missing, 1e-3), worker))

    # --- reservations -----------------------------------------------------------------------------------------------

    def reserve_for(self, request: Request, avoid: frozenset[str]) -> None:
        """Holds the roomiest decode worker that could take it. At most half of them, or one, are held at a time."""
        if request.key in self.reserved.values() or len(self.reserved) >= max(1, len(self.decoders) // 2):
            return
        free = [v for v in self.decoders if v.id not in self.reserved and not unfit(v, request, avoid)]
        if free:
            roomiest = max(free, key=lambda view: view.spec.kv_blocks_total - view.blocks_in_use)
            self.reserved[roomiest.id] = request.key

    def release_reservation(self, key: RequestKey) -> bool:
        """Whether there was one."""
        if not self.reserved:
            return False
        held = [worker for worker, holder in self.reserved.items() if holder == key]
        for worker in held:
            del self.reserved[worker]
        return bool(held)

    # --- what an idle fleet could do --------------------------------------------------------------------------------

    def idle_prefill_s(self, isl_tokens: int, cached: Mapping[str, int], common: int, holder: str | None) -> float:
        """Seconds of the prompt on the fastest worker, or on the ``holder`` of most of it: a lower bound, not inflated.
        0 = no workers."""
        fastest = self._fastest_prefill
        best = _idle_prefill_s(fastest, isl_tokens, cached, common) if fastest is not None else 0.0
        most = self.views.get(holder) if holder is not None else None
        if most is not None and most.usable:
            seconds = _idle_prefill_s(most, isl_tokens, cached, common)
            best = seconds if not best else min(best, seconds)
        return best

    def idle_step_s(self, isl_tokens: int) -> float:
        """Seconds of a decode step with this request alone, not inflated; 0 = no workers."""
        if self._fastest_decode is None:
            return 0.0
        return self._fastest_decode.perf.decode_step_s(1, isl_tokens)

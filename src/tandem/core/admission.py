"""Whether a request may wait at all, and whether it still makes sense.

A request without an SLO is refused for capacity only: the queue limit, in tokens, counted over everything of equal or
better rank, so that a flood of background work closes no door to interactive work; past the limit those tenants are
refused who hold more than their share of it, so that one tenant's flood closes no door to another.

A request with an SLO is also refused as soon as it cannot be met. On arrival that is a lower bound: what is certainly
ahead of it would take too long even with every worker of the fleet at it. Later it is a prediction: when its turn
comes and the best plan's first token, inflated, would miss the SLO by ``late_share``; computing it all the same
would only make others late. A class with ``best_effort`` has them run behind the rest instead, and ``refusal_cap``
does so for a share of each prompt-length class (powers of two). Both cost dearly under overload: late prompts take
the time in which others would have been on time.

Every refusal says when a retry has a chance: the predicted time until the work that is there now is out of the way,
counted pessimistically. It holds if nothing else arrives meanwhile. 0 = no wait will help.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from tandem.core.accounting import WorkerView
from tandem.core.backlog import Backlog
from tandem.core.demand import OutputLengths
from tandem.core.fleet import Fleet
from tandem.core.holders import apart, deepest
from tandem.core.placement import unfit
from tandem.core.policy import Policy, RequestClass, Tenant
from tandem.core.queueing import Entry, FairCounters, FairQueue
from tandem.core.slo import Targets, deadline_s, targets
from tandem.core.types import Request
from tandem.errors import ContextLengthExceeded, DeadlineInfeasible, InvalidRequest, NoWorkers, Overloaded

_MIN_RETRY_S, _MAX_RETRY_S = 0.1, 600.0


def check_feasible(request: Request, longest_tokens: int) -> None:
    """Raises NoWorkers if nothing that decodes ever registered, ContextLengthExceeded if no worker could ever hold it.

    ``longest_tokens``: what the largest decode worker holds, 0 = there never was one. A silent, draining or lost one
    counts: whoever asks now may wait for it or for its successor, as long as those may who asked before it went.
    """
    if not longest_tokens:
        raise NoWorkers(f"no worker of model {request.model!r} can decode at the moment", retry_after_s=1.0)
    # The first comparison decides nothing, and saves the property's call in nearly all cases.
    if request.isl_tokens >= longest_tokens and request.least_tokens > longest_tokens:
        raise ContextLengthExceeded(
            f"the prompt has {request.isl_tokens} tokens, and the largest worker of model {request.model!r} holds "
            f"{longest_tokens} tokens of prompt and output",
            param="prompt",
        )


def fits_somewhere(request: Request, decoders: Iterable[WorkerView], avoid: frozenset[str]) -> bool:
    """Whether one of these workers could take it if it were idle."""
    return any(not unfit(view, request, avoid) for view in decoders)


def over_limit(entry: Entry, queue: FairQueue, counters: FairCounters, policy: Policy) -> int:
    """Tokens by which the queue would be too full for this entry; 0 = it may wait. An empty queue takes any size."""
    tenant = entry.request.tenant
    ahead = queue.tokens_up_to(entry.request_class.rank)
    excess = ahead + entry.tokens - policy.queue_limit_tokens
    if not ahead or excess <= 0:
        return 0
    waiting = {*queue.waiting_tenants(), tenant}
    fair = policy.queue_limit_tokens * counters.weight(tenant) / sum(counters.weight(name) for name in waiting)
    held = queue.tokens_of(tenant)
    return excess if held and held + entry.tokens > fair else 0


def _bounded_retry_s(seconds: float) -> float:
    return min(_MAX_RETRY_S, max(_MIN_RETRY_S, seconds))


class RefusalCap:
    """Shares of requests refused for lateness, by prompt length (powers of two), with exponential memory."""

    _MEMORY = 0.99

    def __init__(self, cap: float) -> None:
        self._cap = cap
        self._offered: dict[int, float] = {}
        self._refused: dict[int, float] = {}

    def reconfigure(self, cap: float) -> None:
        self._cap = cap

    def offer(self, isl_tokens: int) -> None:
        length = isl_tokens.bit_length()
        self._offered[length] = self._offered.get(length, 0.0) * self._MEMORY + 1.0
        self._refused[length] = self._refused.get(length, 0.0) * self._MEMORY

    def may_refuse(self, isl_tokens: int) -> bool:
        """The first of its kind always may."""
        refused = self._refused.get(isl_tokens.bit_length(), 0.0)
        return refused < 0.5 or refused + 1.0 <= self._cap * self._offered.get(isl_tokens.bit_length(), 0.0)

    def refused(self, isl_tokens: int) -> None:
        length = isl_tokens.bit_length()
        self._refused[length] = self._refused.get(length, 0.0) + 1.0


class Admission:
    """Turns requests into queue entries, or refuses them; says what an entry aims at."""

    def __init__(
        self,
        policy: Policy,
        classes: Mapping[str, RequestClass],
        tenants: Mapping[str, Tenant],
        fleet: Fleet,
        queue: FairQueue,
        counters: FairCounters,
    ) -> None:
        self._policy = policy
        self._classes = classes
        self._default_class = next(iter(classes))
        self._tenants = tenants
        self._fleet = fleet
        self._queue = queue
        self._counters = counters
        self.lengths = OutputLengths(policy)
        self.backlog = Backlog(classes.values())
        self._cap = RefusalCap(policy.refusal_cap)
        self._order = 0

    def reconfigure(
        self,
        policy: Policy,
        classes: Mapping[str, RequestClass],
        tenants: Mapping[str, Tenant],
        waiting: Iterable[Entry],
    ) -> None:
        """``waiting``: all entries that wait, their classes exchanged already."""
        self._policy = policy
        self._classes = classes
        self._default_class = next(iter(classes))
        self._tenants = tenants
        self.lengths.reconfigure(policy)
        self._cap.reconfigure(policy.refusal_cap)
        self.backlog = Backlog(classes.values())
        for entry in waiting:
            self.backlog.add(entry)

    def entry(self, request: Request, cached: Mapping[str, int]) -> Entry:
        """InvalidRequest for an unknown class."""
        request_class = self._class_of(request)
        cached, common = apart(cached, len(self._fleet.views))
        holder, isl = deepest(cached), request.isl_tokens
        most = common if holder is None else cached[holder]
        fresh = isl - min(isl, most)
        output = self.lengths.expected(request_class.name, request)
        self._order += 1
        return Entry(
            request=request,
            cached=cached,
            request_class=request_class,
            deadline=deadline_s(request, request_class) if self._policy.deadline_order else request.arrival_s,
            tokens=fresh + int(self._policy.output_weight * output),
            prefill_s=self._fleet.idle_prefill_s(isl, cached, common, holder),
            order=self._order,
            common=common,
        )

    def admit(self, entry: Entry, now: float) -> None:
        """Raises what the entry is refused for; marks it late if it is to run behind the rest."""
        check_feasible(entry.request, self._fleet.longest_tokens)
        excess = over_limit(entry, self._queue, self._counters, self._policy)
        if excess:
            raise self._overloaded(entry, excess)
        goal = self.targets(entry, now)
        if not goal.binding:
            return
        self._cap.offer(entry.request.isl_tokens)
        ahead = self.backlog.surely_ahead_s(entry, self._queue.share_of(entry.request.tenant))
        servers = max(1, self._fleet.num_usable)
        if self.cannot_meet(entry, goal, now, ahead / servers):
            if self.refuses_late(entry):
                raise self.late_error(entry, goal)
            entry.late = True

    def targets(self, entry: Entry, now: float) -> Targets:
        request = entry.request
        idle_step_s = self._fleet.idle_step_s(request.isl_tokens)
        late_s = max(0.0, now - request.arrival_s) if entry.late else 0.0
        return targets(request, entry.request_class, self._policy, entry.prefill_s + late_s, idle_step_s, entry.late)

    def cannot_meet(self, entry: Entry, goal: Targets, now: float, ahead_s: float = 0.0) -> bool:
        """Late even if only ``ahead_s`` is before it and the fleet were idle."""
        waited = max(0.0, now - entry.request.arrival_s)
        return bool(self._fleet.decoders) and waited + ahead_s + entry.prefill_s > goal.ttft_s

    def refuses_late(self, entry: Entry) -> bool:
        """Whether a request that cannot meet its SLO is refused; else it runs behind the rest."""
        return not entry.request_class.best_effort and self._cap.may_refuse(entry.request.isl_tokens)

    def late_error(self, entry: Entry, goal: Targets) -> DeadlineInfeasible:
        """Counts the refusal, too."""
        self._cap.refused(entry.request.isl_tokens)
        if entry.prefill_s > goal.ttft_s:
            return DeadlineInfeasible(
                f"the prompt alone takes {entry.prefill_s:.2f} s on an idle worker; asked for: {goal.ttft_s:.2f} s"
            )
        drain_s = self._drain_s(entry.request_class.rank)
        retry_s = drain_s + self._policy.credit_s + entry.prefill_s - goal.ttft_s
        return DeadlineInfeasible(
            f"the first token cannot come within {goal.ttft_s:.2f} s; about {drain_s:.2f} s of work are ahead",
            retry_after_s=_bounded_retry_s(retry_s),
        )

    def _overloaded(self, entry: Entry, excess: int) -> Overloaded:
        waiting = self._queue.tokens_up_to(entry.request_class.rank)
        return Overloaded(
            f"{waiting} tokens wait already, and the limit is {self._policy.queue_limit_tokens}",
            retry_after_s=_bounded_retry_s(self._drain_s(entry.request_class.rank) * excess / waiting),
        )

    def _drain_s(self, rank: int) -> float:
        """Until all that waits in classes of this rank or better is computed, by those whose job it is."""
        servers = len(self._fleet.prefillers) or len(self._fleet.decoders)
        return self.backlog.total_s(rank) / max(1, servers)

    def _class_of(self, request: Request) -> RequestClass:
        name = request.request_class
        if not name:
            tenant = self._tenants.get(request.tenant)
            name = (tenant.request_class if tenant else "") or self._default_class
        if name not in self._classes and request.key.attempt > 0:
            name = self._default_class  # it was there when the request came first
        if name not in self._classes:
            raise InvalidRequest(f"no request class {name!r}; there are: {', '.join(self._classes)}", param="class")
        return self._classes[name]

"""Whether a request may wait at all, and whether it still makes sense.

A request without an SLO is refused for capacity only: the queue limit, in tokens, counted over everything of equal or
better rank, so that a flood of background work closes no door to interactive work; past the limit those tenants are
refused who hold more than their share of it, so that one tenant's flood closes no door to another.

A request with an SLO is also refused as soon as it cannot be met: on arrival, if the work that is ahead of it would
take too long even with every worker of the fleet at it; later, if what it has waited plus an idle fleet's prefill
exceeds it. Both are lower bounds: who is refused would have been late. How many may be refused for lateness is capped
per prompt-length class (powers of two), so that goodput is not bought by dropping the giants; past the cap they run
as best effort, behind the rest.

Every refusal says when a retry has a chance: the predicted time until the work that is there now is out of the way,
counted pessimistically. It holds if nothing else arrives meanwhile. 0 = no wait will help.
"""

from __future__ import annotations

from collections.abc import Iterable

from tandem.core.accounting import WorkerView
from tandem.core.placement import unfit
from tandem.core.policy import Policy, RequestClass
from tandem.core.queueing import Entry, FairCounters, FairQueue
from tandem.core.types import Request, Role
from tandem.errors import ContextLengthExceeded, NoWorkers, Overloaded

_MIN_RETRY_S, _MAX_RETRY_S = 0.1, 600.0
#: Deadlines are told apart to this many seconds.
_BUCKET_S = 0.25


def check_feasible(request: Request, workers: Iterable[WorkerView]) -> None:
    """Raises NoWorkers if nothing that decodes is registered, ContextLengthExceeded if no worker could ever hold it.

    A silent or draining worker counts as registered: whoever asks now may wait for it or for its successor.
    """
    longest = 0
    found = False
    for view in workers:
        if view.role is Role.DECODE and view.spec.model == request.model:
            found = True
            longest = max(longest, view.capacity_tokens)
    if not found:
        raise NoWorkers(f"no worker of model {request.model!r} can decode at the moment", retry_after_s=1.0)
    if request.isl_tokens >= longest:
        raise ContextLengthExceeded(
            f"the prompt has {request.isl_tokens} tokens, and the largest worker of model {request.model!r} holds "
            f"{longest} tokens of prompt and output",
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


def overloaded(
    entry: Entry, queue: FairQueue, excess: int, backlog: Backlog, servers: int, policy: Policy
) -> Overloaded:
    """The refusal of an entry that exceeds the queue limit by ``excess`` tokens."""
    waiting = queue.tokens_up_to(entry.request_class.rank)
    drain_s = backlog.total_s(entry.request_class.rank) / max(1, servers)
    return Overloaded(
        f"{waiting} tokens wait already, and the limit is {policy.queue_limit_tokens}",
        retry_after_s=bounded_retry_s(drain_s * excess / waiting),
    )


def bounded_retry_s(seconds: float) -> float:
    return min(_MAX_RETRY_S, max(_MIN_RETRY_S, seconds))


class _Due:
    """Seconds of prefill by deadline."""

    __slots__ = ("_latest", "_seconds")

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}
        self._latest: dict[int, float] = {}  # deadline that was ever put into the bucket while it was not empty

    def change(self, deadline: float, seconds: float) -> None:
        bucket = int(deadline / _BUCKET_S)
        left = self._seconds.get(bucket, 0.0) + seconds
        if left > 1e-9:
            self._seconds[bucket] = left
            self._latest[bucket] = max(deadline, self._latest.get(bucket, deadline))
        else:
            self._seconds.pop(bucket, None)
            self._latest.pop(bucket, None)

    def total(self) -> float:
        return sum(self._seconds.values())

    def surely_before(self, deadline: float) -> float:
        """Of earlier buckets, and of the same one if all of it is due no later."""
        due = int(deadline / _BUCKET_S)
        before = sum(seconds for bucket, seconds in self._seconds.items() if bucket < due)
        if self._latest.get(due, deadline + 1.0) <= deadline:
            before += self._seconds[due]
        return before

    def __bool__(self) -> bool:
        return bool(self._seconds)


class Backlog:
    """Seconds of prefill that wait, by class, tenant and deadline: what is ahead of a newcomer."""

    def __init__(self, classes: Iterable[RequestClass]) -> None:
        self._ranks = {c.name: c.rank for c in classes}
        self._by_class = {name: _Due() for name in self._ranks}
        self._by_tenant: dict[tuple[str, str], _Due] = {}

    def add(self, entry: Entry) -> None:
        self._change(entry, entry.prefill_s)

    def remove(self, entry: Entry) -> None:
        self._change(entry, -entry.prefill_s)

    def _change(self, entry: Entry, seconds: float) -> None:
        lane = (entry.request_class.name, entry.request.tenant)
        of_tenant = self._by_tenant.setdefault(lane, _Due())
        for due in (self._by_class[entry.request_class.name], of_tenant):
            due.change(entry.deadline, seconds)
        if not of_tenant:
            del self._by_tenant[lane]

    def total_s(self, rank: int) -> float:
        """Of classes of this rank or better."""
        return sum(due.total() for name, due in self._by_class.items() if self._ranks[name] <= rank)

    def surely_ahead_s(self, entry: Entry, tenant_share: float) -> float:
        """At least this much is served before the entry: what is due earlier in its class, but no more than its own
        tenant's fair share lets others have. ``tenant_share``: of the service, as long as all wait."""
        everyone = self._by_class[entry.request_class.name].surely_before(entry.deadline)
        own = self._by_tenant.get((entry.request_class.name, entry.request.tenant))
        ours = own.surely_before(entry.deadline) if own is not None else 0.0
        return min(everyone, ours / max(tenant_share, 1e-6))


class RefusalCap:
    """Shares of requests refused for lateness, by prompt length (powers of two), with exponential memory."""

    _MEMORY = 0.99

    def __init__(self, cap: float) -> None:
        self._cap = cap
        self._offered: dict[int, float] = {}
        self._refused: dict[int, float] = {}

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

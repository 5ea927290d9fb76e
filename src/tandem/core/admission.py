"""Whether a request may wait at all, and whether it still makes sense.

A request without an SLO is refused for capacity only: the queue limit, in tokens, counted over everything of equal or
better rank, so that a flood of background work closes no door to interactive work; past the limit those tenants are
refused who hold more than their share of it, so that one tenant's flood closes no door to another. A request with an
SLO is also refused when even an idle fleet could no longer meet it. How many may be refused for lateness is capped per
prompt-length class (powers of two), so that goodput is not bought by dropping the giants; past the cap they run as
best effort.

Every refusal says when a retry has a chance: the predicted time to drain what is in the way.
"""

from __future__ import annotations

from collections.abc import Iterable

from tandem.core.accounting import WorkerView
from tandem.core.placement import capacity_tokens, unfit
from tandem.core.policy import Policy
from tandem.core.queueing import FairCounters, FairQueue
from tandem.core.types import Request, Role
from tandem.errors import ContextLengthExceeded, NoWorkers, Overloaded

_MIN_RETRY_S, _MAX_RETRY_S = 0.1, 60.0


def check_feasible(request: Request, workers: Iterable[WorkerView]) -> None:
    """Raises NoWorkers if nothing that decodes is registered, ContextLengthExceeded if no worker could ever hold it.

    A silent or draining worker counts as registered: whoever asks now may wait for it or its successor.
    """
    longest = 0
    found = False
    for view in workers:
        if view.role is not Role.DECODE or view.spec.model != request.model:
            continue
        found = True
        longest = max(longest, capacity_tokens(view))
    if not found:
        raise NoWorkers(f"no worker of model {request.model!r} can decode at the moment", retry_after_s=1.0)
    if request.isl_tokens + 1 > longest:
        raise ContextLengthExceeded(
            f"the prompt has {request.isl_tokens} tokens, and the largest worker of model {request.model!r} holds "
            f"{longest} tokens of prompt and output",
            param="prompt",
        )


def check_capacity(
    request: Request,
    rank: int,
    tokens: int,
    queue: FairQueue,
    counters: FairCounters,
    policy: Policy,
    drain_tokens_per_s: float,
) -> None:
    """Raises Overloaded when the queue is full and this tenant holds more than its share of it."""
    limit = policy.queue_limit_tokens
    ahead = queue.tokens_up_to(rank)
    if not ahead or ahead + tokens <= limit:
        return  # an empty queue takes a request of any size
    weights = sum(counters.weight(name) for name in {*queue.waiting_tenants(), request.tenant})
    fair = limit * counters.weight(request.tenant) / weights
    held = queue.tokens_of(request.tenant)
    if not held or held + tokens <= fair:
        return
    excess = ahead + tokens - limit
    raise Overloaded(
        f"{ahead} tokens wait already, the limit is {limit}",
        retry_after_s=retry_after_s(excess, drain_tokens_per_s),
    )


def retry_after_s(tokens: float, drain_tokens_per_s: float) -> float:
    """Seconds until ``tokens`` have been served, within sane bounds."""
    if drain_tokens_per_s <= 0.0:
        return _MAX_RETRY_S
    return min(_MAX_RETRY_S, max(_MIN_RETRY_S, tokens / drain_tokens_per_s))


class RefusalCap:
    """Shares of requests refused for lateness, by prompt length (powers of two), decayed by count."""

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
        length = isl_tokens.bit_length()
        return self._refused.get(length, 0.0) + 1.0 <= self._cap * max(
            1.0 / max(self._cap, 1e-9), self._offered.get(length, 0.0)
        )

    def refused(self, isl_tokens: int) -> None:
        length = isl_tokens.bit_length()
        self._refused[length] = self._refused.get(length, 0.0) + 1.0


def fits_somewhere(request: Request, workers: Iterable[WorkerView]) -> bool:
    """Whether the fleet as it is has a worker that could take it if it were idle."""
    return any(view.role is Role.DECODE and not unfit(view, request) for view in workers)

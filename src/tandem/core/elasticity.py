"""How many replicas of each role the traffic needs: from queue depth in tokens, oldest wait and measured arrivals.

    prefill replicas = (arriving prefill seconds per second + queued prefill seconds / drain time) / target utilisation
    decode replicas  = max(streams at once / streams that one replica carries at the TPOT target,
                           KV tokens at once / KV tokens of a replica) / target utilisation

Streams at once follow from Little's law: arriving output tokens per second times the time per token. Up at once, down
only when every wish of the last ``settle_s`` allows it, so that a lull of seconds starts nothing. An SLO that a single
idle replica misses already cannot be bought with more of them: that is said, with both numbers, and nothing is scaled
for it. Choosing local or remote prefill per request absorbs what shifts within seconds; this loop is for minutes.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from tandem.core.perf_model import PerfModel
from tandem.core.placement import suffix_context


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """One look at a model. Rates are measured at arrival, before anything is refused."""

    requests_per_s: float
    isl_tokens: float  # mean prompt
    cached_tokens: float  # mean of it that needs no computing
    osl_tokens: float  # mean output
    p95_isl_tokens: float
    queued_tokens: float  # prompt tokens still to compute, of all that wait
    oldest_wait_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaKind:
    """What one replica can do."""

    perf: PerfModel
    chunk_tokens: int
    kv_tokens: int
    max_num_seqs: int
    inflation: float = 1.15


@dataclass(frozen=True, slots=True, kw_only=True)
class Goals:
    ttft_s: float = 2.0
    tpot_s: float = 0.05
    utilisation: float = 0.75  # what is planned for at most; the rest is for bursts
    settle_s: float = 300.0  # a wish for fewer must hold this long
    min_prefill: int = 0
    min_decode: int = 1
    max_replicas: int = 64


@dataclass(frozen=True, slots=True)
class Wish:
    prefill: int
    decode: int
    infeasible: str  # empty, or which SLO no number of replicas can meet, with both numbers
    reason: str


class Elasticity:
    """Call ``observe`` every few seconds. Without prefill replicas in the deployment (``disaggregated`` False) the
    decode replicas do both and are sized for the sum."""

    def __init__(self, goals: Goals, *, disaggregated: bool) -> None:
        self._goals = goals
        self._disaggregated = disaggregated
        self._wishes: deque[tuple[float, int, int]] = deque()

    def observe(self, demand: Demand, prefill: ReplicaKind, decode: ReplicaKind, now: float) -> Wish:
        goals = self._goals
        fresh = max(0.0, demand.isl_tokens - demand.cached_tokens)
        per_prompt = _prompt_s(prefill, demand.isl_tokens, demand.cached_tokens)
        per_token = per_prompt / fresh if fresh else 0.0
        drain_s = max(0.5, goals.ttft_s - demand.oldest_wait_s)
        busy = demand.requests_per_s * per_prompt + demand.queued_tokens * per_token / drain_s
        for_prefill = busy / goals.utilisation
        for_decode = self._decode_load(demand, decode) / goals.utilisation
        if self._disaggregated:
            wanted = math.ceil(for_prefill - 1e-9), math.ceil(for_decode - 1e-9)
        else:
            wanted = 0, math.ceil(for_prefill + for_decode - 1e-9)
        return self._settled(*wanted, demand, _infeasible(demand, goals, prefill, decode), now)

    def _decode_load(self, demand: Demand, kind: ReplicaKind) -> float:
        """Replicas that would be fully used."""
        context = demand.isl_tokens + demand.osl_tokens / 2
        streams = self._streams_per_replica(kind, context)
        at_once = demand.requests_per_s * demand.osl_tokens * _step_s(kind, streams, context)
        return max(at_once / streams, at_once * context / kind.kv_tokens)

    def _streams_per_replica(self, kind: ReplicaKind, context: float) -> float:
        """As many as keep the TPOT target, the KV and the batch limit; 1 if none does."""
        fixed = kind.inflation * kind.perf.d0
        each = kind.inflation * (kind.perf.d1 + kind.perf.d2 * context)
        by_pace = (self._goals.tpot_s - fixed) / each
        return max(1.0, min(by_pace, kind.kv_tokens / context, float(kind.max_num_seqs)))

    def _settled(self, prefill: int, decode: int, demand: Demand, infeasible: str, now: float) -> Wish:
        goals = self._goals
        self._wishes.append((now, prefill, decode))
        while self._wishes[0][0] < now - goals.settle_s:
            self._wishes.popleft()
        most_prefill = max(wish[1] for wish in self._wishes)
        most_decode = max(wish[2] for wish in self._wishes)
        reason = (
            f"{demand.requests_per_s:.2f} requests/s, {demand.queued_tokens:.0f} prompt tokens wait, the oldest for "
            f"{demand.oldest_wait_s:.1f} s: needs {prefill} prefill and {decode} decode now"
        )
        bounded = [
            min(goals.max_replicas, max(most_prefill, goals.min_prefill)) if self._disaggregated else 0,
            min(goals.max_replicas, max(most_decode, goals.min_decode)),
        ]
        return Wish(bounded[0], bounded[1], infeasible, reason)


def _prompt_s(kind: ReplicaKind, isl: float, cached: float) -> float:
    tokens, held = math.ceil(isl), math.floor(min(cached, isl))
    return kind.inflation * kind.perf.prefill_s(tokens - held, suffix_context(tokens, held), kind.chunk_tokens)


def _step_s(kind: ReplicaKind, streams: float, context: float) -> float:
    return kind.inflation * kind.perf.decode_step_s(streams, streams * context)


def _infeasible(demand: Demand, goals: Goals, prefill: ReplicaKind, decode: ReplicaKind) -> str:
    long_s = _prompt_s(prefill, demand.p95_isl_tokens, 0.0)
    if long_s > goals.ttft_s:
        return f"TTFT of {goals.ttft_s:.2f} s: a long prompt (p95) alone takes {long_s:.2f} s on an idle replica"
    step_s = _step_s(decode, 1.0, demand.isl_tokens)
    if step_s > goals.tpot_s:
        return f"TPOT of {1e3 * goals.tpot_s:.0f} ms: one stream alone takes {1e3 * step_s:.0f} ms per token"
    return ""

"""Where a request runs: the plan of least predicted harm, in milliseconds.

For each decode worker d two kinds of plan: ``local(d)``, d computes the prompt itself, and ``remote(p, d)``, prefill
worker p computes it and d pulls what it lacks. A plan is scored by what it does to the request (``r1``, its time to
the first token over the target) and to everyone who decodes beside it (``r2``, their inter-token latency over the
target, the *TPOT guard*):

    score = r1^2 + r2^2 + 200*max(0, r1-0.9) + 200*max(0, r2-0.85) + 50*max(0, kv-0.95)          lowest wins

Prefix hits count on both sides: cached tokens need no computing on p or d and no transfer to d. Hard filters take a
worker out whatever its score; each names its reason. Nothing here changes any state: the answer is a ``Decision``,
which can explain itself. Ties go to the candidate that comes first in the order of worker ids.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from tandem.core.accounting import WorkerView
from tandem.core.policy import Policy
from tandem.core.slo import Targets
from tandem.core.types import CandidateScore, Explanation, Plan, Request, Role

_STEEP = 200.0
_KV_STEEP = 50.0
#: Share of time that prefill may take from decodes in the ITL formula.
_MAX_DISTURBANCE = 0.95
_MIN_TAU_S, _MAX_TAU_S, _TAU_SHARE = 0.3, 6.0, 0.6


def disturbance_window_s(mean_osl: float, tpot_s: float) -> float:
    """Time over which prefill beside decodes is averaged: about the life of a stream that is to keep its TPOT."""
    return min(_MAX_TAU_S, max(_MIN_TAU_S, _TAU_SHARE * mean_osl * tpot_s))


def blocks_for(tokens: int, block_size: int) -> int:
    return -(-tokens // block_size)


def suffix_context(isl: int, cached: int) -> float:
    """Sum over the uncached prompt tokens of the context before each."""
    return (isl - cached) * (isl + cached - 1) / 2.0


@dataclass(frozen=True, slots=True)
class Inquiry:
    """One request as placement sees it, with everything it depends on resolved."""

    request: Request
    cached: Mapping[str, int]
    targets: Targets
    waited_s: float
    mean_osl: float
    reserve_tokens: int  # KV tokens to reserve on the decode worker
    guard_share: float = 1.0  # background: share of TPOT target and KV that it may fill
    reserved: Mapping[str, object] = field(default_factory=dict)  # decode workers held for others, by id


#: ttft_ms, waited_ms, prefill_ms, transfer_ms, itl_ms, kv_share, r1, r2
Row = tuple[float, float, float, float, float, float, float, float]
_TERM_NAMES = (
    "ttft_ms",
    "waited_ms",
    "prefill_ms",
    "transfer_ms",
    "itl_ms",
    "kv_share",
    "ttft_of_target",
    "itl_of_target",
)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A plan with its score; ``row`` holds the terms named in ``_TERM_NAMES``."""

    score: float
    decode: WorkerView
    prefill: WorkerView | None
    prefill_s: float  # computing this prompt's own tokens, without what is pending before them
    pending_s: float  # predicted pending prefill of the first worker, without this request
    transfer_bytes: float
    row: Row

    @property
    def first(self) -> WorkerView:
        return self.prefill or self.decode

    @property
    def plan(self) -> Plan:
        return Plan(self.decode.id, self.prefill.id if self.prefill else None)

    @property
    def itl_of_target(self) -> float:
        return self.row[7]


@dataclass(frozen=True, slots=True)
class Decision:
    """What was found: candidates by score, and what the hard filters took out."""

    candidates: tuple[Candidate, ...]
    excluded: tuple[tuple[str, str], ...] = ()  # (worker id, reason)

    @property
    def best(self) -> Candidate | None:
        return self.candidates[0] if self.candidates else None

    def explanation(self, chosen: Candidate | None, summary: str = "") -> Explanation:
        scores = [CandidateScore(c.plan, c.score, dict(zip(_TERM_NAMES, c.row, strict=True))) for c in self.candidates]
        scores += [CandidateScore(Plan(worker), math.inf, {}, reason) for worker, reason in self.excluded]
        if not summary:
            summary = _summary(chosen, len(self.candidates))
        return Explanation(chosen.plan if chosen else None, tuple(scores), summary)


def _summary(chosen: Candidate | None, count: int) -> str:
    if chosen is None:
        return f"no plan among {count} candidates can start now" if count else "no worker can take this request now"
    where = (
        f"prefill on {chosen.prefill.id}, decode on {chosen.decode.id}"
        if chosen.prefill
        else f"all on {chosen.decode.id}"
    )
    ttft, itl = chosen.row[0], chosen.row[4]
    return f"{where}: first token predicted {ttft:.0f} ms after arrival, then {itl:.1f} ms per token; best of {count}"


def capacity_tokens(view: WorkerView) -> int:
    """Prompt and output tokens of one request that fit on the worker when it is idle."""
    spec = view.spec
    return min(spec.max_model_len, spec.kv_blocks_total * spec.block_size)


def need_blocks(view: WorkerView, tokens: int) -> int:
    """KV blocks to reserve; an expected output that would not fit even alone reserves the whole worker."""
    return min(blocks_for(tokens, view.spec.block_size), view.spec.kv_blocks_total)


# --- hard filters ---------------------------------------------------------------------------------------------------


def unfit(view: WorkerView, request: Request) -> str:
    """Why this worker cannot take the request whatever its load; empty = it can."""
    if view.draining:
        return "draining"
    if view.suspect:
        return "silent"
    if view.spec.model != request.model:
        return "other model"
    if request.lora and request.lora not in view.spec.loras:
        return "lacks the LoRA"
    if view.id in request.avoid_workers:
        return "failed this request before"
    if request.isl_tokens + 1 > capacity_tokens(view):
        return "prompt too long for it"
    return ""


def full(view: WorkerView, inquiry: Inquiry, need: int, policy: Policy) -> str:
    """Why there is no room on it now; empty = there is. An idle worker takes whatever fits at all."""
    spec = view.spec
    if inquiry.reserved.get(view.id, inquiry.request.key) != inquiry.request.key:
        return "reserved for a request that waited longer"
    if view.idle:
        return ""
    share = min(policy.kv_share, inquiry.guard_share)
    if view.blocks_in_use + need > share * spec.kv_blocks_total:
        return "no KV room"
    if view.sequences >= spec.max_num_seqs:
        return "batch full"
    return ""


def can_transfer(prefill: WorkerView, decode: WorkerView) -> bool:
    a, b = prefill.spec, decode.spec
    return bool(a.kv_endpoint and b.kv_endpoint) and (a.dtype, a.kv_layout, a.block_size) == (
        b.dtype,
        b.kv_layout,
        b.block_size,
    )


# --- scoring --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Prefill:
    """One worker as the place where the prompt is computed."""

    view: WorkerView
    total_s: float  # until the prompt is computed, pending work included
    own_s: float
    pending_s: float
    queue_bytes: float


def pending_prefill_s(view: WorkerView, now: float, policy: Policy) -> float:
    """Predicted seconds until what was given to it so far is computed: what credit is counted in."""
    tokens, context = view.pending(now)
    return policy.inflation * view.perf.prefill_s(
        tokens, context, view.spec.max_batched_tokens, view.sequences, view.kv_tokens
    )


def _prefill_on(view: WorkerView, inquiry: Inquiry, now: float, inflation: float) -> _Prefill:
    isl = inquiry.request.isl_tokens
    cached = min(inquiry.cached.get(view.id, 0), isl - 1)
    tokens, context = view.pending(now)
    perf, chunk = view.perf, view.spec.max_batched_tokens
    batch, kv = view.sequences, view.kv_tokens
    per_step = perf.p0 + perf.p1 * batch + perf.p3 * kv
    p1, p2 = perf.p1, perf.p2
    fresh = isl - cached
    fresh_context = suffix_context(isl, cached)
    all_tokens = tokens + fresh
    total = p1 * all_tokens + p2 * (context + fresh_context) + math.ceil(all_tokens / chunk) * per_step
    pending = p1 * tokens + p2 * context + math.ceil(tokens / chunk) * per_step
    own = p1 * fresh + p2 * fresh_context + math.ceil(fresh / chunk) * per_step
    return _Prefill(view, inflation * total, inflation * own, inflation * pending, view.transfer_bytes)


def _score(r1: float, r2: float, kv: float, policy: Policy) -> float:
    score = r1 * r1 + r2 * r2
    if r1 > policy.first_token_guard:
        score += _STEEP * (r1 - policy.first_token_guard)
    if r2 > policy.tpot_guard:
        score += _STEEP * (r2 - policy.tpot_guard)
    if kv > policy.kv_guard:
        score += _KV_STEEP * (kv - policy.kv_guard)
    return score


def decide(inquiry: Inquiry, workers: Sequence[WorkerView], policy: Policy, now: float) -> Decision:
    """Scores every plan for ``inquiry`` over ``workers`` (in the order of their ids)."""
    request = inquiry.request
    decoders: list[WorkerView] = []
    prefillers: list[WorkerView] = []
    excluded: list[tuple[str, str]] = []
    remote = not request.local_only and request.max_osl_tokens > 1
    for view in workers:
        reason = unfit(view, request)
        if not reason:
            if view.role is Role.PREFILL:
                if remote and view.spec.kv_endpoint:
                    reason = full(view, inquiry, need_blocks(view, request.isl_tokens), policy)
                    if not reason:
                        prefillers.append(view)
            else:
                reason = full(view, inquiry, need_blocks(view, inquiry.reserve_tokens), policy)
                if not reason:
                    decoders.append(view)
        if reason:
            excluded.append((view.id, reason))
    if len(decoders) > policy.exact_candidates:
        decoders = _promising(decoders, inquiry, policy.exact_candidates)
    sources = sorted(
        (_prefill_on(view, inquiry, now, policy.inflation) for view in prefillers), key=lambda source: source.total_s
    )
    candidates: list[Candidate] = []
    for view in decoders:
        candidates.extend(_plans_on(view, sources, inquiry, policy, now))
    candidates.sort(key=lambda candidate: candidate.score)
    return Decision(tuple(candidates), tuple(excluded))


def _promising(decoders: list[WorkerView], inquiry: Inquiry, count: int) -> list[WorkerView]:
    """The cheap filter of a large fleet: the most cached, and of the rest those with the fastest step after this."""
    cached = inquiry.cached
    held = [view for view in decoders if cached.get(view.id)]
    held.sort(key=lambda view: -cached[view.id])
    chosen = held[: count // 2]
    taken = {view.id for view in chosen}
    rest = [view for view in decoders if view.id not in taken]
    rest.sort(
        key=lambda view: view.perf.decode_step_s(view.sequences + 1, view.kv_tokens) + view.own_tokens * view.perf.p1
    )
    return sorted(chosen + rest[: count - len(chosen)], key=lambda view: view.id)


def _plans_on(
    decode: WorkerView, sources: Iterable[_Prefill], inquiry: Inquiry, policy: Policy, now: float
) -> Iterable[Candidate]:
    request, targets, inflation = inquiry.request, inquiry.targets, policy.inflation
    isl = request.isl_tokens
    spec = decode.spec
    batch = decode.sequences + 1
    osl_half = 0.5 * inquiry.mean_osl
    kv_tokens = decode.kv_tokens + isl + osl_half * batch
    step_s = inflation * decode.perf.decode_step_s(batch, kv_tokens)
    tau = disturbance_window_s(inquiry.mean_osl, targets.tpot_s)
    rho = decode.prefill_share_s(now, tau)
    kv = (decode.blocks_in_use + need_blocks(decode, inquiry.reserve_tokens)) / max(1, spec.kv_blocks_total)
    waited = inquiry.waited_s

    local = _prefill_on(decode, inquiry, now, inflation)
    itl = step_s / (1.0 - min(_MAX_DISTURBANCE, (rho + local.own_s) / tau))
    plans = [_candidate(decode, None, local, 0.0, 0.0, waited + local.total_s, itl, kv, inquiry, policy)]

    missing = isl - min(inquiry.cached.get(decode.id, 0), isl)
    needed_bytes = float(missing * spec.kv_bytes_per_token)
    quiet_itl = step_s / (1.0 - min(_MAX_DISTURBANCE, rho / tau))
    best: tuple[float, float, _Prefill] | None = None
    for source in sources:
        if best is not None and source.total_s >= best[0]:
            break  # sorted: no later one can be better, whatever its link
        if not can_transfer(source.view, decode):
            continue
        link = max(1.0, min(source.view.spec.link_bytes_per_s, spec.link_bytes_per_s))
        transfer_s = (needed_bytes + max(source.queue_bytes, decode.transfer_bytes)) / link
        if best is None or source.total_s + transfer_s < best[0]:
            best = (source.total_s + transfer_s, transfer_s, source)
    if best is not None:
        until_kv, transfer_s, source = best
        ttft = waited + until_kv + step_s
        plans.append(
            _candidate(
                decode, source.view, source, transfer_s, max(1.0, needed_bytes), ttft, quiet_itl, kv, inquiry, policy
            )
        )
    return [plan for plan in plans if plan.itl_of_target <= inquiry.guard_share] if inquiry.guard_share < 1.0 else plans


def _candidate(
    decode: WorkerView,
    prefill: WorkerView | None,
    source: _Prefill,
    transfer_s: float,
    transfer_bytes: float,
    ttft_s: float,
    itl_s: float,
    kv: float,
    inquiry: Inquiry,
    policy: Policy,
) -> Candidate:
    r1 = ttft_s / inquiry.targets.ttft_s
    r2 = itl_s / inquiry.targets.tpot_s
    row = (
        1e3 * ttft_s,
        1e3 * inquiry.waited_s,
        1e3 * source.total_s,
        1e3 * transfer_s,
        1e3 * itl_s,
        kv,
        r1,
        r2,
    )
    return Candidate(_score(r1, r2, kv, policy), decode, prefill, source.own_s, source.pending_s, transfer_bytes, row)

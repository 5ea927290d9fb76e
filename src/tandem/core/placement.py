"""Where a request runs: the plan of least predicted harm, in milliseconds.

For each decode worker d two kinds of plan: ``local(d)``, d computes the prompt itself, and ``remote(p, d)``, another
worker p computes it and d pulls what it lacks; p may be a prefill worker or one that decodes, too, and d a prefill
worker: roles are preferences, and decoding against one's role costs ``reluctance``. A plan is scored by
what it does to the request (``r1``, its time to the first token over the target), to everyone who decodes beside it, on
d and on p (``r2``, their inter-token latency over the target, the *TPOT guard*), and by the worker time that it adds
(``effort``, over the TTFT target):

    score = r1^2 + r2^2 + 200*max(0, r1-0.8) + 200*max(0, r2-0.85) + 50*max(0, kv-0.95) + 0.03*r1 + effort + reluctance

The lowest wins.

Effort makes roles emerge where workers have none: a stream beside others costs its share of their steps, the first one
on a worker whole steps. So streams gather on as few workers as the guard allows, and the rest is free to prefill; a
short prompt costs least in the steps of a worker that decodes anyway.

Prefix hits count on both sides: cached tokens need no computing on p or d and no transfer to d. Hard filters take a
worker out whatever its score; each names its reason. Nothing here changes any state: the answer is a ``Decision``,
which can explain itself. Ties go to the candidate that comes first in the order of worker ids.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Final

from tandem.core.accounting import Reading, WorkerView
from tandem.core.holders import front
from tandem.core.policy import Policy
from tandem.core.slo import Targets
from tandem.core.standing import Standing, next_step_s, streams_step_s
from tandem.core.types import CandidateScore, Explanation, Plan, Request, RequestKey, Role

_STEEP = 200.0
_KV_STEEP = 50.0
#: Share of time that prefill may take from decodes in the ITL formula.
_MAX_DISTURBANCE = 0.95
#: Fleets of more than so many times the workers that are scored exactly are looked at from the front.
_LARGE = 2
#: Of the holders of a prompt, so many times that number are looked at: those that hold most.
_HOLDERS = 4
_MIN_TAU_S, _MAX_TAU_S, _TAU_SHARE = 0.3, 6.0, 0.6


def disturbance_window_s(mean_osl: float, tpot_s: float) -> float:
    """Time over which prefill beside decodes is averaged: about the life of a stream that is to keep its TPOT."""
    return min(_MAX_TAU_S, max(_MIN_TAU_S, _TAU_SHARE * mean_osl * tpot_s))


def blocks_for(tokens: int, block_size: int) -> int:
    return -(-tokens // block_size)


def suffix_context(isl: int, cached: int) -> float:
    """Sum over the uncached prompt tokens of the context before each."""
    return (isl - cached) * (isl + cached - 1) / 2.0


class Standings:
    __slots__ = ("decoders", "lenders", "prefillers")

    def __init__(self, decoders: Standing, prefillers: Standing, lenders: Standing) -> None:
        self.decoders = decoders
        self.prefillers = prefillers  # by role
        self.lenders = lenders  # of the decoders, those that may prefill for others


_NOBODY: Final[frozenset[str]] = frozenset()
_NOTHING: Final[dict[str, RequestKey]] = {}
_NO_VIEWS: Final[list[WorkerView]] = []
_PREFILL: Final = Role.PREFILL


class Inquiry:
    """One request as placement sees it, with everything it depends on resolved. Nobody changes it. A plain class: a
    dataclass is made by Python code even where it is compiled, for every look at a request."""

    __slots__ = (
        "avoid", "cached", "common", "credit_s", "expected_osl", "guard_share", "isl_tokens", "request",
        "reserve_tokens", "reserved", "stream_osl", "targets", "waited_s",
    )  # fmt: skip

    def __init__(
        self,
        request: Request,
        cached: Mapping[str, int],
        targets: Targets,
        waited_s: float,
        expected_osl: float,
        stream_osl: float,
        reserve_tokens: int,
        avoid: frozenset[str] = _NOBODY,
        credit_s: float = 0.2,
        guard_share: float = 1.0,
        reserved: Mapping[str, RequestKey] = _NOTHING,
        common: int = 0,
    ) -> None:
        self.request = request
        self.isl_tokens = request.isl_tokens  # once more, as a machine number
        self.cached = cached  # by those that hold more than all do
        self.targets = targets
        self.waited_s = waited_s
        self.expected_osl = expected_osl  # of this request
        self.stream_osl = stream_osl  # of those that it runs beside
        self.reserve_tokens = reserve_tokens  # KV tokens to reserve on the decode worker
        self.avoid = avoid
        self.credit_s = credit_s  # it starts on a worker that has less prefill pending than this
        self.guard_share = guard_share  # background: share of TPOT target and KV that it may fill
        self.reserved = reserved  # decode workers held for somebody, by id
        self.common = common  # cached tokens on everybody else

    def near(self, best_tpot_s: float, slack: float) -> Inquiry:
        """With the pace aimed at near the best that there is now."""
        aim = self.targets
        pace = Targets(aim.ttft_s, min(aim.tpot_s, slack * best_tpot_s), aim.binding, aim.near)
        return Inquiry(
            self.request,
            self.cached,
            pace,
            self.waited_s,
            self.expected_osl,
            self.stream_osl,
            self.reserve_tokens,
            self.avoid,
            self.credit_s,
            self.guard_share,
            self.reserved,
            self.common,
        )


class _Knobs:
    """Of a policy, what the inner loops read: here these are machine numbers, there they are not compiled."""

    __slots__ = (
        "effort", "exact_candidates", "first_token_guard", "haste", "inflation", "kv_guard", "local_prefill", "policy",
        "reluctance", "tpot_guard",
    )  # fmt: skip

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.inflation = policy.inflation
        self.first_token_guard = policy.first_token_guard
        self.tpot_guard = policy.tpot_guard
        self.kv_guard = policy.kv_guard
        self.haste = policy.haste
        self.effort = policy.effort
        self.reluctance = policy.reluctance
        self.local_prefill = policy.local_prefill
        self.exact_candidates = policy.exact_candidates


_knobs = _Knobs(Policy())


def _knobs_of(policy: Policy) -> _Knobs:
    """Made once for each policy: nobody changes one."""
    global _knobs
    if _knobs.policy is not policy:
        _knobs = _Knobs(policy)
    return _knobs


#: Of a score, as explanations name them.
TERMS = (
    "ttft_ms", "waited_ms", "prefill_ms", "transfer_ms", "itl_ms", "kv_share", "ttft_of_target", "itl_of_target",
    "effort_ms",
)  # fmt: skip


class Candidate:
    """A plan with its score and the terms of it. A plain class, as all that is made in the inner loops: compiled, its
    numbers are machine numbers."""

    __slots__ = (
        "decode", "effort_s", "extra_s", "itl_of_target", "itl_s", "kv_share", "pending_s", "prefill", "prefill_s",
        "score", "total_s", "transfer_bytes", "transfer_s", "ttft_of_target", "ttft_s", "waited_s",
    )  # fmt: skip

    def __init__(
        self,
        score: float,
        seat: _Seat,
        source: _Source,
        prefill: WorkerView | None,
        ttft_s: float,
        waited_s: float,
        transfer_s: float,
        transfer_bytes: float,
        itl_s: float,
        ttft_of_target: float,
        itl_of_target: float,
        effort_s: float,
    ) -> None:
        self.score = score
        self.decode = seat.view
        self.prefill = prefill
        self.prefill_s = source.own_s  # computing this prompt's own tokens, without what is pending before them
        self.pending_s = source.pending_s  # predicted pending prefill of the first worker, without this request
        self.total_s = source.total_s  # both
        self.extra_s = source.extra_s  # of prefill_s, what it adds to the first worker's steps: decodes go on in them
        self.kv_share = seat.kv
        self.ttft_s = ttft_s
        self.waited_s = waited_s
        self.transfer_s = transfer_s
        self.transfer_bytes = transfer_bytes
        self.itl_s = itl_s
        self.ttft_of_target = ttft_of_target
        self.itl_of_target = itl_of_target
        self.effort_s = effort_s

    @property
    def first(self) -> WorkerView:
        return self.prefill or self.decode

    @property
    def plan(self) -> Plan:
        return Plan(self.decode.id, self.prefill.id if self.prefill else None)

    @property
    def disturbs_nobody(self) -> bool:
        """No streams run where it decodes, and none where it prefills."""
        lender = self.prefill
        return self.decode.idle and (lender is None or not lender.own_sequences + lender.foreign_sequences)

    @property
    def terms(self) -> dict[str, float]:
        """Of its score: for an explanation."""
        values = (
            1e3 * self.ttft_s, 1e3 * self.waited_s, 1e3 * self.total_s, 1e3 * self.transfer_s, 1e3 * self.itl_s,
            self.kv_share, self.ttft_of_target, self.itl_of_target, 1e3 * self.effort_s,
        )  # fmt: skip
        return dict(zip(TERMS, values, strict=True))


class Decision:
    """What was found: candidates by score, and what the hard filters took out."""

    __slots__ = ("candidates", "excluded", "guarded", "partial")

    def __init__(
        self,
        candidates: tuple[Candidate, ...],
        excluded: tuple[tuple[str, str], ...],
        guarded: bool,
        partial: bool,
    ) -> None:
        self.candidates = candidates
        self.excluded = excluded  # (worker id, reason)
        self.guarded = guarded  # the guard of background work took candidates out
        self.partial = partial  # of a large fleet not everyone was looked at

    @property
    def best(self) -> Candidate | None:
        return self.candidates[0] if self.candidates else None

    def explanation(self, chosen: Candidate | None, note: str = "") -> Explanation:
        scores = [CandidateScore(c.plan, c.score, c.terms) for c in self.candidates]
        scores += [CandidateScore(Plan(worker), math.inf, {}, reason) for worker, reason in self.excluded]
        return Explanation(chosen.plan if chosen else None, tuple(scores), self.summary(chosen) + note)

    def summary(self, chosen: Candidate | None) -> str:
        """In words."""
        return _summary(chosen, len(self.candidates))


def _summary(chosen: Candidate | None, count: int) -> str:
    if chosen is None:
        return f"none of {count} plans can start now" if count else "no worker can take this request now"
    decode = chosen.decode.id
    where = f"prefill on {chosen.prefill.id}, decode on {decode}" if chosen.prefill else f"all on {decode}"
    ttft, itl = 1e3 * chosen.ttft_s, 1e3 * chosen.itl_s
    return f"{where}: first token predicted {ttft:.0f} ms after arrival, then {itl:.1f} ms per token; best of {count}"


# --- hard filters ---------------------------------------------------------------------------------------------------


def need_blocks(view: WorkerView, tokens: int) -> int:
    """KV blocks to reserve; an expected output that would not fit even alone reserves the whole worker."""
    blocks = -(-tokens // view.block_size)
    return blocks if blocks < view.kv_blocks_total else view.kv_blocks_total


def unfit(view: WorkerView, request: Request, avoid: frozenset[str] = frozenset()) -> str:
    """Why this worker cannot take the request whatever its load; empty = it can."""
    if view.model != request.model:
        return "serves another model"
    if request.lora and request.lora not in view.spec.loras:
        return "lacks the LoRA"
    if view.id in avoid:
        return "failed this request before"
    if request.least_tokens > view.capacity_tokens:
        return "too small for the prompt"
    return ""


def full(view: WorkerView, need: int, share: float) -> str:
    """Why there is no room on it now; empty = there is. An idle worker takes whatever fits at all."""
    if not view.bookings and not view.foreign_sequences:
        return ""
    if view.blocks_in_use + need > share * view.kv_blocks_total:
        return "no KV room"
    if view.own_sequences + view.foreign_sequences >= view.max_num_seqs:
        return "batch full"
    return ""


def can_transfer(prefill: WorkerView, decode: WorkerView) -> bool:
    """Whether KV of one can be read by the other."""
    return prefill.kv_kind >= 0 and prefill.kv_kind == decode.kv_kind


def may_be_remote(request: Request) -> bool:
    """A request for one token has nothing to hand over; ``local_only`` also stands for prompt log-probabilities."""
    return not request.local_only and request.max_osl_tokens > 1


# --- scoring --------------------------------------------------------------------------------------------------------


class _Source:
    """One worker as the place where the prompt is computed. Inflated seconds."""

    __slots__ = ("extra_s", "harm", "own_s", "pending_s", "total_s", "view")

    def __init__(self, view: WorkerView, total_s: float, own_s: float, pending_s: float, extra_s: float) -> None:
        self.view = view
        self.total_s = total_s  # until the prompt is computed, pending work included
        self.own_s = own_s
        self.pending_s = pending_s
        self.extra_s = extra_s  # of own_s, what it adds to the worker's steps: decodes beside it go on in them
        #: What computing it for another worker does to the streams here: their inter-token latency, of target.
        self.harm = 0.0


def _source(view: WorkerView, reading: Reading, inquiry: Inquiry, inflation: float) -> _Source:
    isl = inquiry.isl_tokens
    cached = inquiry.cached.get(view.id, inquiry.common)
    if cached >= isl:
        cached = isl - 1  # the last token is always computed
    perf, chunk = view.perf, view.chunk_tokens
    fresh = isl - cached
    work = perf.p1 * fresh + perf.p2 * (fresh * (isl + cached - 1) / 2.0)  # suffix_context, in the inner loop
    step_s = reading.step_s
    total = perf.p1 * reading.tokens + perf.p2 * reading.context + work
    total += math.ceil((reading.tokens + fresh) / chunk) * step_s
    steps = math.ceil(fresh / chunk)
    own = extra = work + steps * step_s
    batch = view.own_sequences + view.foreign_sequences
    if batch:
        decode_s = perf.d0 + perf.d1 * batch + perf.d2 * (view.own_kv_tokens + view.foreign_kv_tokens)
        extra = own - steps * decode_s
        if extra < work:
            extra = work
    return _Source(view, inflation * total, inflation * own, inflation * reading.pending_s, inflation * extra)


class _Lows:
    """The two lowest harms so far."""

    __slots__ = ("first", "second")

    def __init__(self) -> None:
        self.first = self.second = math.inf


def _lenders(
    views: list[WorkerView], inquiry: Inquiry, inflation: float, now: float, tau: float, sources: dict[str, _Source]
) -> list[_Source]:
    """Workers that could compute the prompt for another one: the soonest first, without those that two others beat in
    time and harm: one may be the decode worker itself.

    All of ``views`` as places to compute the prompt go to ``sources``, by worker.
    """
    tpot_s, osl = inquiry.targets.tpot_s, inquiry.stream_osl
    found: list[_Source] = []
    for view in views:
        source = _source(view, view.reading(now), inquiry, inflation)
        sources[view.id] = source
        batch = view.own_sequences + view.foreign_sequences
        if batch:
            step_s = view.perf.decode_step_s(batch, view.own_kv_tokens + view.foreign_kv_tokens + 0.5 * osl * batch)
            share = (view.prefill_share_s(now, tau) + source.extra_s) / tau
            source.harm = (
                inflation * step_s / (1.0 - (share if share < _MAX_DISTURBANCE else _MAX_DISTURBANCE)) / tpot_s
            )
        found.append(source)
    if len(found) > 1:
        found.sort(key=_total_s)
    kept: list[_Source] = []
    least: dict[int, _Lows] = {}  # among those whose KV is alike
    for source in found:
        harm, kind = source.harm, source.view.kv_kind
        lows = least.get(kind)
        if lows is None:
            lows = least[kind] = _Lows()
        if harm < lows.second:
            kept.append(source)
            if harm < lows.first:
                lows.first, lows.second = harm, lows.first
            else:
                lows.second = harm
    return kept


def _score(r1: float, r2: float, kv: float, effort: float, knobs: _Knobs) -> float:
    """``effort``: worker time that is added, of the TTFT target."""
    score = r1 * r1 + r2 * r2
    if r1 > knobs.first_token_guard:
        score += _STEEP * (r1 - knobs.first_token_guard)
    if r2 > knobs.tpot_guard:
        score += _STEEP * (r2 - knobs.tpot_guard)
    if kv > knobs.kv_guard:
        score += _KV_STEEP * (kv - knobs.kv_guard)
    return score + knobs.haste * r1 + effort


def decide(
    inquiry: Inquiry,
    decoders: list[WorkerView],
    prefillers: list[WorkerView],
    policy: Policy,
    now: float,
    rng: random.Random | None = None,
    set_aside: tuple[tuple[str, str], ...] = (),
    standings: Standings | None = None,
    reluctant: list[WorkerView] = _NO_VIEWS,
) -> Decision:
    """Scores every plan for ``inquiry`` over usable workers, each list in the order of ids.

    ``rng`` breaks ties between equally good first candidates (idle twins); without it the first id wins.
    ``set_aside``: workers that are not usable and why, for the explanation. With ``standings`` of the same workers a
    large fleet is not gone through: who comes into question is found from them, and is the same in all but ties.
    ``reluctant``: prefill workers that decode at a price; looked at if no plan is better than that alone.
    """
    knobs = _knobs_of(policy)
    count = knobs.exact_candidates
    large = _LARGE * count
    excluded = list(set_aside)
    share = min(policy.kv_share, inquiry.guard_share)
    partial = False
    able_p: list[WorkerView] = []
    holders: list[str] = []
    if standings is not None and max(len(decoders), len(prefillers), len(reluctant)) > large:
        holders = front(inquiry.cached, _HOLDERS * count)
    if standings is not None and len(decoders) > large:
        able_d, partial = _first_able(
            standings.decoders, holders, inquiry, inquiry.reserve_tokens, share, inquiry.reserved, count, excluded
        )
    else:
        able_d = _able(decoders, inquiry, inquiry.reserve_tokens, share, inquiry.reserved, excluded)
    if (able_d or reluctant) and prefillers and policy.remote_prefill and may_be_remote(inquiry.request):
        isl = inquiry.isl_tokens
        if standings is not None and len(prefillers) > large:
            for standing in (standings.prefillers, standings.lenders):
                found_p, more = _first_able(standing, holders, inquiry, isl, share, _NOTHING, 2 * count, excluded)
                able_p += found_p
                partial = partial or more
        else:
            able_p = _able(prefillers, inquiry, isl, share, _NOTHING, excluded)
    if len(able_d) > count:
        able_d = _promising_decoders(able_d, inquiry, count)
    if len(able_p) > count:
        able_p = _promising_prefillers(able_p, inquiry, count)
    tau = disturbance_window_s(inquiry.stream_osl, inquiry.targets.tpot_s)
    seats = [_seat(view, inquiry, knobs, now, tau) for view in able_d]
    if inquiry.targets.near and seats:
        inquiry = inquiry.near(_best_pace_s(seats), policy.pace_slack)
    sources: dict[str, _Source] = {}
    lenders = _lenders(able_p, inquiry, knobs.inflation, now, tau, sources)
    candidates: list[Candidate] = []
    for seat in seats:
        _plans_on(seat, lenders, sources, inquiry, knobs, now, candidates)
    if reluctant and _lowest(candidates) > _least_reluctant(lenders, inquiry, knobs):
        able_r, more = _seats_among(reluctant, holders, inquiry, share, count, standings, excluded)
        partial = partial or more
        for view in able_r:
            _plans_on(_seat(view, inquiry, knobs, now, tau), lenders, sources, inquiry, knobs, now, candidates)
    found = len(candidates)
    if inquiry.guard_share < 1.0:
        candidates = [candidate for candidate in candidates if candidate.itl_of_target <= inquiry.guard_share]
    if len(candidates) > 1:
        candidates.sort(key=_score_of)
        if rng is not None:
            _break_tie(candidates, rng)
    # A worker that may take either part is looked at twice.
    out = tuple(dict.fromkeys(excluded)) if excluded else ()
    return Decision(tuple(candidates), out, found > len(candidates), partial)


def _best_pace_s(seats: list[_Seat]) -> float:
    best = math.inf
    for seat in seats:
        pace_s = _undisturbed_s(seat)
        if pace_s < best:
            best = pace_s
    return best


def _lowest(candidates: list[Candidate]) -> float:
    lowest = math.inf
    for candidate in candidates:
        if candidate.score < lowest:
            lowest = candidate.score
    return lowest


def _least_reluctant(lenders: list[_Source], inquiry: Inquiry, knobs: _Knobs) -> float:
    """No plan with a reluctant worker scores less: mostly they need not be looked at."""
    soonest_s = lenders[0].total_s if lenders else 0.0
    return knobs.reluctance + _score((inquiry.waited_s + soonest_s) / inquiry.targets.ttft_s, 0.0, 0.0, 0.0, knobs)


def _seats_among(
    views: list[WorkerView],
    holders: list[str],
    inquiry: Inquiry,
    share: float,
    count: int,
    standings: Standings | None,
    excluded: list[tuple[str, str]],
) -> tuple[list[WorkerView], bool]:
    """Prefill workers that could decode, at most about ``count``; and whether others were left out."""
    tokens = inquiry.reserve_tokens
    if standings is not None and len(views) > _LARGE * count:
        able, partial = _first_able(standings.prefillers, holders, inquiry, tokens, share, _NOTHING, count, excluded)
    else:
        able, partial = _able(views, inquiry, tokens, share, _NOTHING, excluded), False
    return (_promising_decoders(able, inquiry, count) if len(able) > count else able), partial


def _total_s(source: _Source) -> float:
    return source.total_s


def _score_of(candidate: Candidate) -> float:
    return candidate.score


def _break_tie(candidates: list[Candidate], rng: random.Random) -> None:
    """Equal scores are idle twins: the first place goes to one of them at random, so that caches fill evenly."""
    equal = 1
    while equal < len(candidates) and candidates[equal].score == candidates[0].score:
        equal += 1
    if equal > 1:
        chosen = rng.randrange(equal)
        candidates[0], candidates[chosen] = candidates[chosen], candidates[0]


def _able(
    views: list[WorkerView],
    inquiry: Inquiry,
    tokens: int,
    share: float,
    reserved: Mapping[str, RequestKey],
    excluded: list[tuple[str, str]],
) -> list[WorkerView]:
    """Those that pass every hard filter; the others go to ``excluded``."""
    request, avoid = inquiry.request, inquiry.avoid
    able: list[WorkerView] = []
    picky = bool(request.lora or avoid or reserved)
    isl, model = inquiry.isl_tokens, request.model
    for view in views:
        if (
            not picky
            and isl < view.capacity_tokens
            and view.own_blocks - view.shared_blocks + view.foreign_blocks - (-tokens // view.block_size)
            <= share * view.kv_blocks_total
            and view.own_sequences + view.foreign_sequences < view.max_num_seqs
            and view.model == model
        ):
            able.append(view)  # the common case of the checks below, in one go: this loop is most of a large fleet
            continue
        reason = unfit(view, request, avoid) or full(view, need_blocks(view, tokens), share)
        if not reason and reserved and reserved.get(view.id, request.key) != request.key:
            reason = "reserved for a request that waited longer"
        if reason:
            excluded.append((view.id, reason))
        else:
            able.append(view)
    return able


def _first_able(
    standing: Standing,
    holders: list[str],
    inquiry: Inquiry,
    tokens: int,
    share: float,
    reserved: Mapping[str, RequestKey],
    count: int,
    excluded: list[tuple[str, str]],
) -> tuple[list[WorkerView], bool]:
    """In the order of ids: the ``holders``, and of the others the first ``count`` by standing, all of them able; and
    whether the rest was left out."""
    holding = [view for worker in holders if (view := standing.find(worker)) is not None]
    known = {view.id for view in holding}
    found = _able(holding, inquiry, tokens, share, reserved, excluded)
    wanted = len(found) + count
    some: list[WorkerView] = []
    for view in standing.ranked():
        if view.id in known:
            continue
        some.append(view)
        if len(some) == count:
            found += _able(some, inquiry, tokens, share, reserved, excluded)
            if len(found) >= wanted:
                break
            some = []
    else:
        found += _able(some, inquiry, tokens, share, reserved, excluded)
    found.sort(key=_id_of)
    return found, len(found) >= wanted


def _id_of(view: WorkerView) -> str:
    return view.id


def _promising_decoders(views: list[WorkerView], inquiry: Inquiry, count: int) -> list[WorkerView]:
    """The cheap filter of a large fleet: those that hold most of the prompt, and those with the fastest next step."""
    cached = inquiry.cached
    priced = [_Priced(view, -cached[view.id]) for view in views if view.id in cached]
    priced.sort(key=_cost_of)
    holding = [each.view for each in priced[: count // 2]]
    taken = {view.id for view in holding}
    rest = sorted([v for v in views if v.id not in taken], key=next_step_s)[: count - len(holding)]
    return sorted(holding + rest, key=_id_of)


class _Priced:
    """A worker and what it is sorted by: as a key, an attribute costs less than a closure."""

    __slots__ = ("cost", "view")

    def __init__(self, view: WorkerView, cost: float) -> None:
        self.view = view
        self.cost = cost


def _cost_of(priced: _Priced) -> float:
    return priced.cost


def _promising_prefillers(views: list[WorkerView], inquiry: Inquiry, count: int) -> list[WorkerView]:
    """Those with the least to compute before the prompt is done, roughly, and the least to disturb; half of the places
    are for prefill workers by role, which a fleet of idle lenders must not crowd out."""
    cached, common, isl = inquiry.cached, inquiry.common, inquiry.isl_tokens
    priced: list[_Priced] = []
    for view in views:
        tokens = view.own_tokens + view.foreign_tokens + isl - cached.get(view.id, common)
        priced.append(_Priced(view, view.perf.p1 * tokens + streams_step_s(view)))
    priced.sort(key=_cost_of)
    by_cost = [each.view for each in priced]
    by_role = [view for view in by_cost if view.role is _PREFILL][: count // 2]
    taken = {view.id for view in by_role}
    rest = [view for view in by_cost if view.id not in taken][: count - len(by_role)]
    return sorted(by_role + rest, key=_id_of)


class _Seat:
    """A place in a decode worker's batch, as a plan of any kind would take it."""

    __slots__ = ("kv", "longer_s", "price", "rho", "step_s", "streams", "tau", "view")

    def __init__(
        self, view: WorkerView, step_s: float, longer_s: float, tau: float, rho: float, kv: float, price: float
    ) -> None:
        self.view = view
        self.step_s = step_s  # of a step with this request, inflated
        self.longer_s = longer_s  # the time that it adds to all its steps, inflated
        self.tau = tau
        self.rho = rho
        self.kv = kv
        self.price = price  # of decoding there at all
        self.streams = view.own_sequences + view.foreign_sequences  # that it has


def _undisturbed_s(seat: _Seat) -> float:
    """Its pace beside the prompts that are pending there already."""
    share = seat.rho / seat.tau
    return seat.step_s / (1.0 - (share if share < _MAX_DISTURBANCE else _MAX_DISTURBANCE))


def _seat(view: WorkerView, inquiry: Inquiry, knobs: _Knobs, now: float, tau: float) -> _Seat:
    osl, perf = inquiry.expected_osl, view.perf
    batch = view.own_sequences + view.foreign_sequences
    others = view.own_kv_tokens + view.foreign_kv_tokens + 0.5 * inquiry.stream_osl * batch
    kv_tokens = inquiry.isl_tokens + 0.5 * osl
    step_s = perf.decode_step_s(batch + 1, others + kv_tokens)
    # An idle worker would decode for this request alone: all of the step is its own.
    longer_s = step_s if not batch else perf.d1 + perf.d2 * kv_tokens
    blocks = view.blocks_in_use + need_blocks(view, inquiry.reserve_tokens)
    inflation = knobs.inflation
    return _Seat(
        view, inflation * step_s, inflation * osl * longer_s, tau, view.prefill_share_s(now, tau),
        blocks / view.kv_blocks_total, knobs.reluctance if view.role is _PREFILL else 0.0,
    )  # fmt: skip


def _plans_on(
    seat: _Seat,
    lenders: list[_Source],
    sources: dict[str, _Source],
    inquiry: Inquiry,
    knobs: _Knobs,
    now: float,
    found: list[Candidate],
) -> None:
    """Appends ``local(decode)`` and the best ``remote(p, decode)``, as far as the policy allows. ``sources``: places to
    compute the prompt that are known already, by worker."""
    decode = seat.view
    if knobs.local_prefill or not any(
        source.view is not decode and can_transfer(source.view, decode) for source in lenders
    ):
        here = sources.get(decode.id)
        if here is None:
            here = _source(decode, decode.reading(now), inquiry, knobs.inflation)
        # Its own prompt delays nobody where it is alone: its tokens come after it.
        share = (seat.rho + here.extra_s if seat.streams else seat.rho) / seat.tau
        itl_s = seat.step_s / (1.0 - (share if share < _MAX_DISTURBANCE else _MAX_DISTURBANCE))
        found.append(_candidate(seat, here, None, inquiry.waited_s + here.total_s, 0.0, itl_s, 0.0, inquiry, knobs))
    if lenders and decode.kv_kind >= 0:
        _remote_plan(seat, lenders, inquiry, knobs, found)


def _remote_plan(seat: _Seat, lenders: list[_Source], inquiry: Inquiry, knobs: _Knobs, found: list[Candidate]) -> None:
    """Appends the best plan that prefills elsewhere, if there is one. The innermost loop of a decision."""
    decode, targets, waited_s = seat.view, inquiry.targets, inquiry.waited_s
    ttft_target, tpot_target, effort, step_s, kv = targets.ttft_s, targets.tpot_s, knobs.effort, seat.step_s, seat.kv
    missing = max(0, inquiry.isl_tokens - inquiry.cached.get(decode.id, inquiry.common))
    moved = float(missing * decode.kv_bytes_per_token)
    undisturbed_s = _undisturbed_s(seat)
    longer_s = seat.longer_s * decode.worth
    kind, own_link, own_transfers = decode.kv_kind, decode.link_bytes_per_s, decode.transfer_bytes
    least = math.inf
    best: _Source | None = None
    best_ttft_s = best_transfer_s = best_itl_s = 0.0
    for source in lenders:
        view = source.view
        if view is decode or view.kv_kind != kind:  # as can_transfer says
            continue
        link, before = view.link_bytes_per_s, view.transfer_bytes
        if link > own_link:
            link = own_link
        transfer_s = (moved + (before if before > own_transfers else own_transfers)) / (link if link > 1.0 else 1.0)
        ttft_s = waited_s + (source.total_s + transfer_s) + step_s
        itl_s = source.harm * tpot_target
        if itl_s < undisturbed_s:
            itl_s = undisturbed_s
        added = effort * (source.extra_s * view.worth + longer_s) / ttft_target
        score = _score(ttft_s / ttft_target, itl_s / tpot_target, kv, added, knobs)
        if score < least:
            least, best = score, source
            best_ttft_s, best_transfer_s, best_itl_s = ttft_s, transfer_s, itl_s
    if best is not None:
        moved = max(1.0, moved)
        found.append(_candidate(seat, best, best.view, best_ttft_s, best_transfer_s, best_itl_s, moved, inquiry, knobs))


def _candidate(
    seat: _Seat,
    source: _Source,
    prefill: WorkerView | None,
    ttft_s: float,
    transfer_s: float,
    itl_s: float,
    moved: float,
    inquiry: Inquiry,
    knobs: _Knobs,
) -> Candidate:
    targets, waited_s = inquiry.targets, inquiry.waited_s
    r1, r2 = ttft_s / targets.ttft_s, itl_s / targets.tpot_s
    effort_s = source.extra_s * source.view.worth + seat.longer_s * seat.view.worth
    score = seat.price + _score(r1, r2, seat.kv, knobs.effort * effort_s / targets.ttft_s, knobs)
    return Candidate(
        score, seat, source, prefill, ttft_s, waited_s, transfer_s, moved, itl_s, r1, r2, effort_s,
    )  # fmt: skip

"""Service-level objectives: what a request aims at, and whether it got there.

An SLO is opt-in, by class or by request, and binding: what cannot meet it is refused or runs behind the rest. A
request without one still has *targets*, so that placement can weigh its first token against its neighbours' pace; they
refuse nothing. The first token is aimed at within ``target_slack`` times what an idle fleet would take: with a far aim
it would wait where it need not. The pace is aimed at within ``pace_slack`` times what the best worker would give *now*,
and no farther than ``default_tpot_s``: so streams spread while there is room, and a busy fleet is not asked for an idle
one's pace, which would cost it throughput (docs/decisions). Background work aims far.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from tandem.core.policy import Policy, RequestClass
from tandem.core.types import Request


class Targets:
    """Seconds; ``ttft_s`` counts from arrival. ``binding``: the TTFT is an SLO and not only an aim. ``near``: the pace
    is aimed at near what the best worker gives now, ``tpot_s`` being the farthest."""

    __slots__ = ("binding", "near", "tpot_s", "ttft_s")

    def __init__(self, ttft_s: float, tpot_s: float, binding: bool, near: bool = False) -> None:
        self.ttft_s = ttft_s
        self.tpot_s = tpot_s
        self.binding = binding
        self.near = near


def ttft_slo_s(request: Request, request_class: RequestClass) -> float | None:
    """The request's own SLO, else its class's, else None."""
    if request.ttft_slo_s is not None:
        return request.ttft_slo_s
    if request_class.ttft_slo_s is None:
        return None
    return request_class.ttft_slo_s + request_class.ttft_slo_per_token_s * request.isl_tokens


def deadline_s(request: Request, request_class: RequestClass) -> float:
    """When the first token is due: what orders the queue."""
    slo = ttft_slo_s(request, request_class)
    return request.arrival_s + (request_class.ordering_deadline_s if slo is None else slo)


def targets(
    request: Request,
    request_class: RequestClass,
    policy: Policy,
    idle_prefill_s: float,
    idle_step_s: float,
    late: bool = False,
) -> Targets:
    """``idle_prefill_s``, ``idle_step_s``: the best that an idle fleet could do for this request.

    ``late``: its SLO is lost already; ``idle_prefill_s`` then includes what it has waited, and the stretched target
    keeps it from pushing others aside.
    """
    slo = ttft_slo_s(request, request_class)
    feasible = policy.target_slack * idle_prefill_s
    if slo is not None:
        ttft = max(slo, feasible) if late else slo
    elif request_class.background:
        ttft = max(request_class.ordering_deadline_s, feasible)
    else:
        ttft = feasible
    tpot = request_class.tpot_slo_s or max(policy.default_tpot_s, policy.target_slack * idle_step_s)
    near = request_class.tpot_slo_s is None and not request_class.background
    return Targets(max(ttft, 1e-3), tpot, slo is not None, near)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one *offered* request ended. ``ttft_s`` None = it got no token (refused, failed, timed out): a miss."""

    isl_tokens: int
    output_tokens: int
    ttft_s: float | None
    tpot_s: float  # mean over its tokens after the first; 0 with fewer than two
    ttft_target_s: float
    tpot_target_s: float

    @property
    def met(self) -> bool:
        return self.ttft_s is not None and self.ttft_s <= self.ttft_target_s and self.tpot_s <= self.tpot_target_s


@dataclass(frozen=True, slots=True)
class Attainment:
    """Shares of what was offered that met both SLOs. Request-weighted attainment alone can be gamed by refusing the
    long prompts; hence the other two (design: scheduling, "What to measure")."""

    by_requests: float
    by_tokens: float
    by_length_quartile: tuple[float, float, float, float]

    @property
    def good(self) -> bool:
        """Whether a rate with this attainment counts as goodput (TW goodput)."""
        return min(self.by_requests, self.by_tokens) >= 0.9 and min(self.by_length_quartile) >= 0.8


def attainment(outcomes: Sequence[Outcome]) -> Attainment:
    """Over all offered requests; of nothing offered, everything was met."""
    if not outcomes:
        return Attainment(1.0, 1.0, (1.0, 1.0, 1.0, 1.0))
    ranked = sorted(outcomes, key=lambda outcome: outcome.isl_tokens)
    edges = [len(ranked) * i // 4 for i in range(5)]
    quartiles = [_share_met(ranked[a:b]) for a, b in pairwise(edges)]
    tokens = sum(o.isl_tokens + o.output_tokens for o in outcomes)
    met = sum(o.isl_tokens + o.output_tokens for o in outcomes if o.met)
    return Attainment(
        _share_met(ranked), met / max(1, tokens), (quartiles[0], quartiles[1], quartiles[2], quartiles[3])
    )


def _share_met(outcomes: Sequence[Outcome]) -> float:
    return sum(o.met for o in outcomes) / len(outcomes) if outcomes else 1.0

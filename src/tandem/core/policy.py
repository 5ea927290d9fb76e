"""Every knob of the scheduler: the field here is its only declaration.

The deployment file, the simulator's sweeps and the reference page all read these dataclasses: name, default and, in
``metadata["help"]``, a one-line meaning. Nothing here decides anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from tandem.errors import ConfigError


def _knob(default: Any, meaning: str) -> Any:
    return field(default=default, metadata={"help": meaning})


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestClass:
    """What comes first, and what it may expect. SLOs are opt-in: without one nothing is refused for lateness."""

    name: str = _knob("default", "what a request names")
    rank: int = _knob(0, "lower goes first")
    ttft_slo_s: float | None = _knob(None, "opt-in SLO on the time to the first token, seconds")
    ttft_slo_per_token_s: float = _knob(0.0, "added to ttft_slo_s for each prompt token, seconds")
    tpot_slo_s: float | None = _knob(None, "opt-in SLO on the mean time per output token, seconds")
    ordering_deadline_s: float = _knob(5.0, "orders requests of equal standing that have no SLO; refuses nothing")
    timeout_s: float = _knob(600.0, "hard limit of a request, seconds")
    min_share: float = _knob(0.0, "share of the served tokens that is guaranteed while this class waits")
    background: bool = _knob(False, "fills what the others leave, under guard")
    best_effort: bool = _knob(False, "late requests run behind the rest instead of being refused")
    ageing_s: float = _knob(5.0, "how long a request that does not fit is passed over before room is reserved for it")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """Who asks."""

    name: str = _knob("default", "shown in metrics")
    weight: float = _knob(1.0, "share of tokens among tenants that wait")
    request_class: str = _knob("", "class of its requests that name none; empty = the first class")


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """Knobs of the decision core; one default configuration is meant to serve all workloads."""

    # predictions
    inflation: float = _knob(1.15, "predictions are multiplied by this: over-prediction is harmless")
    learn: bool = _knob(True, "adapt the performance model to each worker's own step timings")
    learn_steps_per_report: int = _knob(8, "step timings of one load report that are learnt from, at most")
    report_lag_s: float = _knob(0.6, "a load report is at most this much older than its arrival, seconds")
    default_osl_tokens: int = _knob(256, "expected output length before any request of a class has ended")
    osl_memory: float = _knob(0.02, "weight of a new request in the mean output length of its class")
    osl_known: bool = _knob(False, "requests end at their limit of tokens and never before: replays, benchmarks")
    # placement
    first_token_guard: float = _knob(0.8, "share of the TTFT target above which a plan's score rises steeply")
    tpot_guard: float = _knob(0.85, "share of the TPOT target above which a plan's score rises steeply")
    kv_guard: float = _knob(0.95, "share of a decode worker's KV above which a plan's score rises")
    default_tpot_s: float = _knob(0.1, "farthest TPOT that placement aims at where no SLO is given, seconds")
    pace_slack: float = _knob(
        1.3, "TPOT without an SLO is aimed at within this multiple of what the best worker gives now"
    )
    target_slack: float = _knob(2.0, "a target without an SLO is at least this multiple of what an idle fleet can do")
    exact_candidates: int = _knob(8, "workers of a role scored exactly; above it a cheap filter picks them")
    local_prefill: bool = _knob(True, "decode workers may prefill by themselves where a prefill worker could do it")
    remote_prefill: bool = _knob(True, "prefill workers may prefill for decode workers")
    flexible: bool = _knob(
        True, "decode workers prefill for each other, and (with local_prefill) prefill workers decode"
    )
    reluctance: float = _knob(0.3, "score that decoding on a prefill worker costs, which it does if flexible")
    effort: float = _knob(1.0, "weight of the worker time that a plan adds, as a share of the TTFT target")
    haste: float = _knob(0.03, "weight of the predicted first token, of its target: matters where all targets are far")
    # late binding
    credit_s: float = _knob(0.1, "a worker gets work while its predicted pending prefill is below this, seconds")
    kv_share: float = _knob(0.9, "share of a worker's KV blocks that may be reserved")
    tpot_limit: float = _knob(1.13, "predicted TPOT, as a share of its SLO, above which nothing with an SLO is started")
    hold_s: float = _knob(0.5, "how long a request waits for a better but busy worker while another one idles, seconds")
    scan_depth: int = _knob(8, "requests that one poll passes over at most")
    scan_per_tenant: int = _knob(3, "requests of one tenant and class that one poll passes over at most")
    deadline_order: bool = _knob(True, "equal standing: the earlier deadline goes first, else the earlier arrival")
    # admission
    queue_limit_tokens: int = _knob(4_000_000, "tokens that may wait, counted over classes of equal or better rank")
    no_worker_grace_s: float = _knob(30.0, "how long queued requests wait for any worker to come, seconds")
    late_share: float = _knob(1.15, "predicted first token, as a share of its SLO, above which a request is given up")
    refusal_cap: float = _knob(1.0, "share of each prompt-length class that may be refused for lateness; 1 = no cap")
    forget_after_s: float = _knob(30.0, "accounting of a request is dropped this long after its hard limit, seconds")
    # fairness
    output_weight: float = _knob(2.0, "an output token counts like this many uncached input tokens")
    overtake_tokens: float = _knob(
        4096.0, "weighted tokens by which others may overtake a tenant that waits for credit"
    )
    share_window_s: float = _knob(10.0, "time over which a class's minimum share is measured, seconds")
    background_guard: float = _knob(0.7, "share of TPOT target and KV that background work may fill")
    background_credit_s: float = _knob(0.02, "credit of background work that is not owed its share, seconds")
    recalls: int = _knob(0, "times that a background request may be called back before its first token; 0 = never")

    def __post_init__(self) -> None:
        for knob in fields(self):
            value = getattr(self, knob.name)
            if value < 0:
                raise ConfigError(f"policy.{knob.name} must not be negative, and is {value}", param=knob.name)
        if not 0 < self.kv_share <= 1:
            raise ConfigError(f"policy.kv_share must be in (0, 1], and is {self.kv_share}", param="kv_share")


def policy_from(values: Mapping[str, Any]) -> Policy:
    """Policy with ``values`` over the defaults. ConfigError names an unknown knob or a value of the wrong type."""
    known = {knob.name: knob for knob in fields(Policy)}
    typed: dict[str, Any] = {}
    for name, value in values.items():
        if name not in known:
            raise ConfigError(f"policy has no knob {name!r}; it has: {', '.join(sorted(known))}", param=name)
        default: Any = known[name].default
        wanted = (int, float) if isinstance(default, float) else type(default)
        if isinstance(value, bool) != isinstance(default, bool) or not isinstance(value, wanted):
            raise ConfigError(f"policy.{name} must be of type {type(default).__name__}, and is {value!r}", param=name)
        typed[name] = float(value) if isinstance(default, float) else value
    return Policy(**typed)

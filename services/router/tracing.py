"""A traced request's spans at the router: the whole of its stay (``route``), and the wait within it (``queue``).

Made when it is placed or refused, from times kept in ``Stay``; a request that is not traced keeps none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from tandem.core.effects import Place
from tandem.core.placement import Candidate
from tandem.core.reasons import reason_of
from tandem.core.types import Request, RequestKey
from tandem.errors import Cancelled, TandemError
from tandem.telemetry import spans
from tandem.telemetry.propagation import TraceContext, sampled
from tandem.telemetry.tracing import SpanRecord, Tracing, Value

#: Candidates and excluded workers that a span shows.
SHOWN = 16
#: A shorter wait is none.
NO_WAIT_S = 1e-3


@dataclass(slots=True)
class Stay:
    """Of one traced request. Times are this process's."""

    context: TraceContext
    request: Request
    received_s: float
    queued_s: float = 0.0
    ahead: int = 0
    cached: Mapping[str, int] = field(default_factory=dict)


class RouterTraces:
    def __init__(self, tracing: Tracing, router: str, now: Callable[[], float]) -> None:
        self._tracing = tracing
        self._router = router
        self._now = now

    def arrived(self, traceparent: str, request: Request) -> Stay | None:
        """None for a request that is not traced."""
        if not self._tracing.enabled:
            return None
        context = sampled(traceparent)
        return Stay(context, request, self._now()) if context is not None else None

    def queued(self, stay: Stay, cached: Mapping[str, int], ahead: int) -> None:
        stay.queued_s, stay.cached, stay.ahead = self._now(), cached, ahead

    def placed(self, stay: Stay, effect: Place) -> None:
        now = self._now()
        waited = now - stay.queued_s >= NO_WAIT_S
        route = self._route(stay, now)
        route.attributes.update(_explained(effect, stay.cached))
        queue = self._queue(stay, route, now)
        queue.attributes[spans.QUEUE_REASON] = effect.waited_for.value if waited else "none"
        self._tracing.emit(stay.context.trace_id, [route, queue])

    def ended(self, stay: Stay, error: TandemError) -> None:
        """Not placed: refused, or not wanted any more."""
        now = self._now()
        route = self._route(stay, now)
        if not isinstance(error, Cancelled):
            route.error = (error.code, error.message)
        route.attributes[spans.ERROR_TYPE] = error.code
        records = [route]
        if stay.queued_s:
            records.append(self._queue(stay, route, now))
        self._tracing.emit(stay.context.trace_id, records)

    def _route(self, stay: Stay, now: float) -> SpanRecord:
        attributes = _key(stay.request.key)
        attributes.update(_of(stay.request))
        attributes[spans.ROUTER] = self._router
        attributes[spans.INDEX_MS] = 1e3 * (stay.queued_s - stay.received_s) if stay.queued_s else 0.0
        return SpanRecord(
            spans.ROUTE.name,
            stay.received_s,
            now,
            attributes,
            span_id=self._tracing.new_span_id(),
            parent_id=stay.context.span_id,
        )

    def _queue(self, stay: Stay, route: SpanRecord, now: float) -> SpanRecord:
        attributes = _key(stay.request.key)
        attributes[spans.QUEUE_AHEAD] = stay.ahead
        return SpanRecord(
            spans.QUEUE.name, stay.queued_s, now, attributes, parent_id=route.span_id, remote_parent=False
        )


def _key(key: RequestKey) -> dict[str, Value]:
    return {spans.REQUEST_ID: key.id, spans.ATTEMPT: key.attempt, spans.CHOICE: key.choice}


def _of(request: Request) -> dict[str, Value]:
    return {
        spans.TENANT: request.tenant,
        spans.REQUEST_CLASS: request.request_class,
        spans.INPUT_TOKENS: request.isl_tokens,
    }


def _explained(effect: Place, cached: Mapping[str, int]) -> dict[str, Value]:
    """The decision, and every term of the best candidates' costs, as columns."""
    plan, chosen = effect.plan, effect.candidate.terms
    candidates = effect.decision.candidates[:SHOWN]
    terms = [candidate.terms for candidate in candidates]
    excluded = effect.decision.excluded[:SHOWN]
    found: dict[str, Value] = {
        spans.LEG: plan.leg.value,
        spans.DECODE_WORKER: plan.decode_worker,
        spans.SUMMARY: effect.decision.summary(effect.candidate),
        spans.CHOICE_REASON: reason_of(effect).value,
        spans.PREDICTED_TTFT: chosen["ttft_ms"],
        spans.PREDICTED_PREFILL: chosen["prefill_ms"],
        spans.PREDICTED_TRANSFER: chosen["transfer_ms"],
        spans.PREDICTED_ITL: chosen["itl_ms"],
        spans.PREDICTED_CACHED: effect.cached_tokens,
        spans.NUM_CANDIDATES: len(effect.decision.candidates),
        spans.CANDIDATE_DECODE: [c.decode.id for c in candidates],
        spans.CANDIDATE_PREFILL: [c.prefill.id if c.prefill else "" for c in candidates],
        spans.CANDIDATE_CACHED: [min(cached.get(c.first.id, 0), effect.request.isl_tokens - 1) for c in candidates],
        spans.CANDIDATE_SCORE: [c.score for c in candidates],
        spans.CANDIDATE_CHOSEN: _place(effect.candidate, candidates),
    }
    if plan.prefill_worker is not None:
        found[spans.PREFILL_WORKER] = plan.prefill_worker
    for term, attribute in spans.CANDIDATE_TERMS.items():
        found[attribute] = [values[term] for values in terms]
    if excluded:
        found[spans.EXCLUDED_WORKER] = [worker for worker, _ in excluded]
        found[spans.EXCLUDED_REASON] = [reason for _, reason in excluded]
    return found


def _place(chosen: Candidate, candidates: Sequence[Candidate]) -> int:
    return next((i for i, candidate in enumerate(candidates) if candidate is chosen), -1)

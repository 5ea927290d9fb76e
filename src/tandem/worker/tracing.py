"""A traced request's spans at a worker: ``prefill``, ``kv_transfer``, ``decode``, one after the other without a gap.

Made when its part here is over, from the times that its ``Running`` has kept; one that is not traced keeps none.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tandem.core.types import Leg
from tandem.telemetry import spans
from tandem.telemetry.propagation import TraceContext, sampled
from tandem.telemetry.tracing import Moment, SpanRecord, Tracing, Value
from tandem.v1 import bus_pb2, types_pb2
from tandem.wire import codec
from tandem.worker.request_table import Running


@dataclass(slots=True)
class Stay:
    """Of one traced request. Times are this process's; 0 = it did not come to that."""

    context: TraceContext
    #: Of the prefill span, which the engine's own span lies under.
    prefill_id: int
    #: A handoff was claimed.
    claimed_s: float = 0.0
    #: Its KV is here, as far as the engine says.
    pulled_s: float = 0.0
    #: It did not come: the prompt is computed here.
    fell_back_s: float = 0.0
    #: Where the KV was to come from.
    source: str = ""
    events: list[Moment] = field(default_factory=list)


class WorkerTraces:
    def __init__(self, tracing: Tracing, worker: str, now: Callable[[], float]) -> None:
        self._tracing = tracing
        self._worker = worker
        self._now = now

    def admitted(self, traceparent: str) -> Stay | None:
        """None for a request that is not traced."""
        if not self._tracing.enabled:
            return None
        context = sampled(traceparent)
        return Stay(context, self._tracing.new_span_id()) if context is not None else None

    def below(self, stay: Stay | None, *, handed_over: bool) -> str:
        """``traceparent`` for the engine's own span. A remote prefill covers it; on a decode worker it lies across two
        of our spans, and so beside them."""
        if stay is None:
            return ""
        return stay.context._replace(span_id=stay.prefill_id).header if handed_over else stay.context.header

    def fell_back(self, running: Running, why: str) -> None:
        stay = running.stay
        if stay is not None:
            stay.fell_back_s = self._now()
            stay.source = running.peer
            stay.events.append(Moment(spans.FALLBACK.name, stay.fell_back_s, {spans.REASON: why}))

    def ended(self, running: Running) -> None:
        """Its part here is over: finished, failed, aborted, or handed over."""
        stay = running.stay
        if stay is None:
            return
        running.stay = None
        self._tracing.emit(stay.context.trace_id, list(self._spans(running, stay)))

    # -- inside ----------------------------------------------------------------------------------------------------

    def _spans(self, running: Running, stay: Stay) -> Sequence[SpanRecord]:
        end_s, first_s = running.finished_at, running.token_times[0] if running.token_times else 0.0
        found = []
        began_s = running.accepted_at
        if running.pulls:
            arrived_s = stay.fell_back_s or min(stay.pulled_s or first_s or end_s, first_s or end_s)
            found.append(self._kv_transfer(running, stay, began_s, arrived_s))
            began_s = arrived_s
        if running.leg == bus_pb2.LEG_LOCAL or running.handed_over or not running.pulls:
            computed_s = first_s or end_s
            found.append(self._prefill(running, stay, began_s, computed_s))
            began_s = computed_s
        if first_s:
            found.append(self._decode(running, stay, began_s, end_s))
        error = _error(running)
        if error is not None:
            found[-1].error = error
            found[-1].attributes[spans.ERROR_TYPE] = error[0]
        return found

    def _span(self, name: str, running: Running, stay: Stay, start_s: float, end_s: float) -> SpanRecord:
        key = running.key
        attributes: dict[str, Value] = {
            spans.REQUEST_ID: key.id,
            spans.ATTEMPT: key.attempt,
            spans.CHOICE: key.choice,
            spans.WORKER: self._worker,
        }
        return SpanRecord(name, start_s, end_s, attributes, parent_id=stay.context.span_id)

    def _prefill(self, running: Running, stay: Stay, start_s: float, end_s: float) -> SpanRecord:
        span = self._span(spans.PREFILL.name, running, stay, start_s, end_s)
        span.span_id = stay.prefill_id
        leg = Leg.LOCAL if running.leg == bus_pb2.LEG_LOCAL else Leg.PREFILL
        isl = running.isl_tokens
        span.attributes.update({spans.LEG: leg.value, spans.INPUT_TOKENS: isl})
        span.attributes[spans.PREDICTED_CACHED] = running.predicted_cached_tokens
        if running.handed_over or running.token_times or running.embed:
            span.attributes[spans.CACHED_TOKENS] = running.cached_tokens
            span.attributes[spans.COMPUTED_TOKENS] = isl - running.cached_tokens
        return span

    def _kv_transfer(self, running: Running, stay: Stay, start_s: float, end_s: float) -> SpanRecord:
        span = self._span(spans.KV_TRANSFER.name, running, stay, start_s, end_s)
        timings = running.timings
        span.attributes[spans.KV_SOURCE] = stay.source or running.peer
        if stay.claimed_s:
            span.attributes[spans.KV_CLAIM_MS] = 1e3 * (stay.claimed_s - running.accepted_at)
        if timings.kv_transfer_bytes:
            span.attributes[spans.KV_BYTES] = timings.kv_transfer_bytes
        if stay.pulled_s:
            span.attributes[spans.KV_PULL_MS] = 1e3 * timings.kv_transfer_s
            span.attributes[spans.CACHED_TOKENS] = running.cached_tokens
        span.events = stay.events
        return span

    def _decode(self, running: Running, stay: Stay, start_s: float, end_s: float) -> SpanRecord:
        span = self._span(spans.DECODE.name, running, stay, start_s, end_s)
        times = running.token_times
        assert running.finish is not None
        span.attributes[spans.OUTPUT_TOKENS] = len(running.tokens)
        span.attributes[spans.FINISH_REASON] = codec.finish_from_wire(running.finish.reason).value
        gaps = sorted([1e3 * (b - a) for a, b in itertools.pairwise(times)])
        if gaps:
            span.attributes[spans.ITL_P50] = _percentile(gaps, 0.5)
            span.attributes[spans.ITL_P90] = _percentile(gaps, 0.9)
            span.attributes[spans.ITL_P99] = _percentile(gaps, 0.99)
            span.attributes[spans.ITL_MAX] = gaps[-1]
        span.events = [Moment(spans.FIRST_TOKEN.name, times[0])]
        return span


def _percentile(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def _error(running: Running) -> tuple[str, str] | None:
    finish = running.finish
    if finish is None or running.handed_over or finish.reason != types_pb2.FINISH_REASON_ERROR:
        return None
    error = codec.error_from_wire(finish.error)
    return error.code, error.message if error.retryable else error.meaning

"""A request's trace as the frontend sees it: its root, and, for one that nobody sampled and that went wrong, the rest.

Everything is made at the request's end, from times that its generation and its journeys have kept anyway. What a
request costs while it runs is two random numbers and the text of ``traceparent``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from services.frontend.generation import Generation, GenerationRequest
from services.frontend.journey import Journey
from tandem.core.types import Leg
from tandem.errors import Cancelled, TandemError
from tandem.telemetry import spans
from tandem.telemetry.tracing import Moment, SpanRecord, Trace, Tracing, Value

PROVIDER = "tandem"
FAILED, SLOW = "failed", "slow"


class RequestTraces:
    def __init__(self, tracing: Tracing, ttft_slo_s: Mapping[str, float], now: Callable[[], float]) -> None:
        """``ttft_slo_s``: of the request classes that have one."""
        self._tracing = tracing
        self._ttft_slo_s = ttft_slo_s
        self._now = now

    def begin(self, traceparent: str) -> Trace | None:
        """None when nothing is traced at all."""
        return self._tracing.begin(traceparent, self._now()) if self._tracing.enabled else None

    def ended(self, generation: Generation) -> None:
        """The whole of it is over, well or not."""
        trace = generation.trace
        if trace is None:
            return
        sampled = trace.context.sampled
        if not sampled:
            why = self._worth_a_trace(generation)
            if not why or not self._tracing.sampler.samples_late(self._now()):
                return
            trace.why = why
        records = [_root(generation, trace, self._now()), _tokenize(generation, trace)]
        if not sampled:
            for journey in generation.journeys:
                records += _reconstructed(journey, trace, self._now())
        self._tracing.emit(trace.context.trace_id, records)

    def _worth_a_trace(self, generation: Generation) -> str:
        if generation.error is not None:
            return "" if isinstance(generation.error, Cancelled) else FAILED
        request = generation.request
        limit = request.ttft_slo_s or self._ttft_slo_s.get(request.request_class, 0.0)
        limit = limit or self._tracing.sampler.policy.slow_ttft_s
        first = generation.progress().first_token_s
        return SLOW if first and first - request.arrival_s > limit else ""


def _root(generation: Generation, trace: Trace, now: float) -> SpanRecord:
    request, error = generation.request, generation.error
    attributes = _asked(request)
    progress = generation.progress()
    attributes[spans.WHY] = trace.why
    attributes[spans.OUTPUT_TOKENS] = progress.output_tokens
    attributes[spans.CACHED_TOKENS] = generation.usage.cached_tokens
    attributes[spans.ATTEMPTS] = max((journey.attempt + 1 for journey in generation.journeys), default=0)
    if generation.finish_reasons:
        attributes[spans.FINISH_REASONS] = generation.finish_reasons
    if progress.first_token_s:
        attributes[spans.TIME_TO_FIRST] = progress.first_token_s - request.arrival_s
        if generation.num_choices == 1 and progress.output_tokens > 1:
            decoding_s = progress.last_news_s - progress.first_token_s
            attributes[spans.TPOT] = 1e3 * decoding_s / (progress.output_tokens - 1)
    if error is not None:
        attributes[spans.ERROR_TYPE] = error.code
    moments = sorted(_moments(generation, now), key=lambda moment: moment.at_s)
    return SpanRecord(
        f"{request.operation} {request.model.name}",
        request.arrival_s,
        now,
        attributes,
        moments,
        error=(error.code, said(error)) if error is not None and not isinstance(error, Cancelled) else None,
        span_id=trace.context.span_id,
        parent_id=trace.parent_id,
        server=True,
    )


def _asked(request: GenerationRequest) -> dict[str, Value]:
    sampling = request.sampling
    attributes: dict[str, Value] = {
        spans.REQUEST_ID: request.id,
        spans.RESPONSE_ID: request.id,
        spans.OPERATION: request.operation,
        spans.PROVIDER: PROVIDER,
        spans.REQUEST_MODEL: request.model.name,
        spans.RESPONSE_MODEL: request.model.name,
        spans.MAX_TOKENS: sampling.max_tokens,
        spans.TEMPERATURE: sampling.temperature,
        spans.TOP_P: sampling.top_p,
        spans.STREAM: request.streaming,
        spans.TENANT: request.tenant,
        spans.REQUEST_CLASS: request.request_class,
        spans.INPUT_TOKENS: sum(map(len, request.prompts)),
    }
    if sampling.top_k:
        attributes[spans.TOP_K] = float(sampling.top_k)
    if sampling.frequency_penalty:
        attributes[spans.FREQUENCY_PENALTY] = sampling.frequency_penalty
    if sampling.presence_penalty:
        attributes[spans.PRESENCE_PENALTY] = sampling.presence_penalty
    if sampling.seed is not None:
        attributes[spans.SEED] = sampling.seed
    if request.n > 1:
        attributes[spans.CHOICE_COUNT] = request.n
    return attributes


def said(error: TandemError) -> str:
    """Its words, where they are ours: those about a client's mistake may quote the client."""
    return error.message if error.retryable else error.meaning


def _moments(generation: Generation, now: float) -> Iterator[Moment]:
    for journey in generation.journeys:
        choice = journey.order.choice
        if journey.placed_s:
            holder = journey.holder.id if journey.holder is not None else ""
            where: dict[str, Value] = {spans.ATTEMPT: journey.attempt, spans.CHOICE: choice, spans.WORKER: holder}
            yield Moment(spans.PLACED.name, journey.placed_s, where)
        if journey.first_token_s:
            yield Moment(spans.FIRST_TOKEN.name, journey.first_token_s)
        for incident in journey.incidents:
            attributes: dict[str, Value] = {spans.ATTEMPT: incident.attempt, spans.CHOICE: choice}
            more: dict[str, Value] = {
                spans.WORKER: incident.worker,
                spans.ERROR_TYPE: incident.error.code if incident.error is not None else "",
                spans.REASON: said(incident.error) if incident.error is not None else incident.reason,
                spans.TOKENS_SO_FAR: incident.tokens,
            }
            attributes.update(
                {name: value for name, value in more.items() if value and name in incident.kind.attributes}
            )
            yield Moment(incident.kind.name, incident.at_s, attributes)
    if isinstance(generation.error, Cancelled):
        yield Moment(spans.CANCELLED.name, now, {spans.REASON: generation.error.message})


def _tokenize(generation: Generation, trace: Trace) -> SpanRecord:
    request = generation.request
    return SpanRecord(
        spans.TOKENIZE.name,
        generation.received_s or request.arrival_s,
        request.tokenised_s or request.arrival_s,
        {spans.REQUEST_ID: request.id, spans.INPUT_TOKENS: sum(map(len, request.prompts))},
        parent_id=trace.context.span_id,
        remote_parent=False,
    )


# -- of what nobody sampled --------------------------------------------------------------------------------------------


def _reconstructed(journey: Journey, trace: Trace, now: float) -> list[SpanRecord]:
    """The router's and the workers' part of the last attempt. What they measured are durations; where those lie is
    seen from here: the queue ends when a worker said ``placed``, the decode with its last token."""
    if journey.attempt < 0:
        return []
    key: dict[str, Value] = {
        spans.REQUEST_ID: journey.order.id,
        spans.ATTEMPT: journey.attempt,
        spans.CHOICE: journey.order.choice,
        spans.RECONSTRUCTED: True,
    }

    def span(name: str, start_s: float, end_s: float) -> SpanRecord:
        record = SpanRecord(name, start_s, end_s, dict(key), parent_id=trace.context.span_id, remote_parent=False)
        records.append(record)
        return record

    records: list[SpanRecord] = []
    placed_s = journey.placed_s or now
    timings = journey.timings
    queue_s = timings.queue_s if timings is not None else 0.0
    span(spans.QUEUE.name, placed_s - queue_s if queue_s else journey.submitted_s, placed_s)
    if timings is None:
        return records
    remote = bool(timings.kv_transfer_s)
    prefilled_s = placed_s + timings.prefill_s
    if timings.prefill_s:
        span(spans.PREFILL.name, placed_s, prefilled_s).attributes.update(
            {
                spans.WORKER: timings.prefill_worker or timings.decode_worker,
                spans.LEG: Leg.PREFILL.value if remote else Leg.LOCAL.value,
                spans.INPUT_TOKENS: journey.order.isl_tokens,
                spans.CACHED_TOKENS: timings.cached_tokens,
                spans.COMPUTED_TOKENS: timings.computed_tokens,
            }
        )
    if remote:
        span(spans.KV_TRANSFER.name, prefilled_s, prefilled_s + timings.kv_transfer_s).attributes.update(
            {
                spans.WORKER: timings.decode_worker,
                spans.KV_SOURCE: timings.prefill_worker,
                spans.KV_BYTES: timings.kv_transfer_bytes,
            }
        )
    if journey.first_token_s:
        ended_s = journey.heard_s
        span(spans.DECODE.name, ended_s - timings.decode_s, ended_s).attributes.update(
            {
                spans.WORKER: timings.decode_worker,
                spans.OUTPUT_TOKENS: journey.expected,
                spans.FINISH_REASON: journey.outcome.reason.value if journey.outcome is not None else "",
                spans.ITL_P50: 1e3 * timings.itl_p50_s,
                spans.ITL_P99: 1e3 * timings.itl_p99_s,
            }
        )
    return records

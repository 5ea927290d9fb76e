"""A request's trace as the frontend sees it: its root, and, for one that nobody sampled and that went wrong, the rest.

Everything is made at the request's end, from times that its generation and its journeys have kept anyway. What a
request costs while it runs is two random numbers and the text of ``traceparent``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from msgspec import Struct

from services.frontend.generation import Generation, GenerationRequest, Progress
from services.frontend.journey import Journey
from tandem.adapters.deployment import Deployment
from tandem.core.types import Leg
from tandem.errors import Cancelled, TandemError
from tandem.telemetry import spans
from tandem.telemetry.tracing import Moment, SpanRecord, Trace, Tracing, Value

PROVIDER = "tandem"
EMBEDDINGS = "embeddings"
FAILED, SLOW = "failed", "slow"


class _Ending(Struct, frozen=True, kw_only=True):
    """What there is to say of a request that is over."""

    id: str
    name: str
    arrival_s: float
    #: From the whole body to the prompt's tokens.
    tokenised_s: tuple[float, float]
    input_tokens: int
    #: 0 = there was none.
    first_token_s: float
    journeys: Sequence[Journey]
    error: TandemError | None
    attributes: dict[str, Value]


class RequestTraces:
    def __init__(self, tracing: Tracing, deployment: Deployment, now: Callable[[], float]) -> None:
        self._tracing = tracing
        self._now = now
        self._ttft_slo_s: Mapping[str, float] = {}
        self.reconfigure(deployment)

    def reconfigure(self, deployment: Deployment) -> None:
        """The classes' SLOs say which first tokens are late, of requests that end from now on."""
        self._ttft_slo_s = {c.name: c.ttft_slo_s for c in deployment.classes if c.ttft_slo_s is not None}

    def begin(self, traceparent: str) -> Trace | None:
        """None when nothing is traced at all."""
        return self._tracing.begin(traceparent, self._now()) if self._tracing.enabled else None

    def ended(self, generation: Generation) -> None:
        """The whole of it is over, well or not."""
        trace = generation.trace
        if trace is None:
            return
        request = generation.request
        progress = generation.progress()
        late_after_s = request.ttft_slo_s or self._ttft_slo_s.get(request.request_class, 0.0)
        if not self._wanted(trace, generation.error, request.arrival_s, progress.first_token_s, late_after_s):
            return
        ending = _Ending(
            id=request.id,
            name=f"{request.operation} {request.model.name}",
            arrival_s=request.arrival_s,
            tokenised_s=(generation.received_s or request.arrival_s, request.tokenised_s or request.arrival_s),
            input_tokens=sum(map(len, request.prompts)),
            first_token_s=progress.first_token_s,
            journeys=generation.journeys,
            error=generation.error,
            attributes=_asked(request) | _answered(generation, progress),
        )
        self._tell(trace, ending)

    def embedded(
        self,
        trace: Trace,
        journeys: Sequence[Journey],
        error: TandemError | None,
        *,
        tokenised_s: tuple[float, float],
        cached_tokens: int,
    ) -> None:
        """The same for embeddings."""
        order = journeys[0].order
        if not self._wanted(trace, error, order.arrival_s, 0.0, 0.0):
            return
        attributes = _of(order.id, EMBEDDINGS, order.model, order.tenant, order.request_class)
        attributes |= {spans.OUTPUT_TOKENS: 0, spans.CACHED_TOKENS: cached_tokens}
        ending = _Ending(
            id=order.id,
            name=f"{EMBEDDINGS} {order.model}",
            arrival_s=order.arrival_s,
            tokenised_s=tokenised_s,
            input_tokens=sum(journey.order.isl_tokens for journey in journeys),
            first_token_s=0.0,
            journeys=journeys,
            error=error,
            attributes=attributes,
        )
        self._tell(trace, ending)

    def _tell(self, trace: Trace, ending: _Ending) -> None:
        now = self._now()
        records = [_root(ending, trace, now), _tokenize(ending, trace)]
        if not trace.context.sampled:
            for journey in ending.journeys:
                records += _reconstructed(journey, trace, now)
        self._tracing.emit(trace.context.trace_id, records)

    def _wanted(
        self, trace: Trace, error: TandemError | None, arrival_s: float, first_token_s: float, late_after_s: float
    ) -> bool:
        """Whether it is told of: nearly none is. ``first_token_s`` 0 = there was none; ``late_after_s``: when a first
        token is late, 0 = as the sampling policy says."""
        if trace.context.sampled:
            return True
        if error is not None:
            trace.why = "" if isinstance(error, Cancelled) else FAILED
        else:
            limit = late_after_s or self._tracing.sampler.policy.slow_ttft_s
            trace.why = SLOW if first_token_s and first_token_s - arrival_s > limit else ""
        return bool(trace.why) and self._tracing.sampler.samples_late(self._now())


def _root(ending: _Ending, trace: Trace, now: float) -> SpanRecord:
    error, attributes = ending.error, ending.attributes
    attributes[spans.WHY] = trace.why
    attributes[spans.INPUT_TOKENS] = ending.input_tokens
    attributes[spans.ATTEMPTS] = max((journey.attempt + 1 for journey in ending.journeys), default=0)
    if error is not None:
        attributes[spans.ERROR_TYPE] = error.code
    return SpanRecord(
        ending.name,
        ending.arrival_s,
        now,
        attributes,
        sorted(_moments(ending, now), key=lambda moment: moment.at_s),
        error=(error.code, said(error)) if error is not None and not isinstance(error, Cancelled) else None,
        span_id=trace.context.span_id,
        parent_id=trace.parent_id,
        server=True,
    )


def _of(id: str, operation: str, model: str, tenant: str, request_class: str) -> dict[str, Value]:
    return {
        spans.REQUEST_ID: id,
        spans.RESPONSE_ID: id,
        spans.OPERATION: operation,
        spans.PROVIDER: PROVIDER,
        spans.REQUEST_MODEL: model,
        spans.RESPONSE_MODEL: model,
        spans.TENANT: tenant,
        spans.REQUEST_CLASS: request_class,
    }


def _asked(request: GenerationRequest) -> dict[str, Value]:
    sampling = request.sampling
    attributes = _of(request.id, request.operation, request.model.name, request.tenant, request.request_class)
    attributes |= {
        spans.MAX_TOKENS: sampling.max_tokens,
        spans.TEMPERATURE: sampling.temperature,
        spans.TOP_P: sampling.top_p,
        spans.STREAM: request.streaming,
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


def _answered(generation: Generation, progress: Progress) -> dict[str, Value]:
    attributes: dict[str, Value] = {
        spans.OUTPUT_TOKENS: progress.output_tokens,
        spans.CACHED_TOKENS: generation.usage.cached_tokens,
    }
    if generation.finish_reasons:
        attributes[spans.FINISH_REASONS] = generation.finish_reasons
    first = progress.first_token_s
    if first:
        attributes[spans.TIME_TO_FIRST] = first - generation.request.arrival_s
        if generation.num_choices == 1 and progress.output_tokens > 1:
            attributes[spans.TPOT] = 1e3 * (progress.last_news_s - first) / (progress.output_tokens - 1)
    return attributes


def said(error: TandemError) -> str:
    """Its words, where they are ours: those about a client's mistake may quote the client."""
    return error.message if error.retryable else error.meaning


def _moments(ending: _Ending, now: float) -> Iterator[Moment]:
    for journey in ending.journeys:
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
    if isinstance(ending.error, Cancelled):
        yield Moment(spans.CANCELLED.name, now, {spans.REASON: ending.error.message})


def _tokenize(ending: _Ending, trace: Trace) -> SpanRecord:
    return SpanRecord(
        spans.TOKENIZE.name,
        *ending.tokenised_s,
        {spans.REQUEST_ID: ending.id, spans.INPUT_TOKENS: ending.input_tokens},
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
    if timings is not None and journey.first_token_s >= placed_s:  # that it was placed may have come along with it
        began_s = journey.first_token_s - timings.prefill_s - timings.kv_transfer_s
        placed_s = min(placed_s, max(journey.submitted_s, began_s))
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

"""What one line of the list of traces says, worked out from a trace's spans. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from services.console.spans import Span
from tandem.telemetry import spans as names

#: A request's root span has these.
ROOT_ATTRIBUTES = frozenset({names.OPERATION, names.REQUEST_ID})


@dataclass(frozen=True, slots=True)
class Slo:
    """Of a request class; None = no such promise."""

    ttft_s: float | None = None
    tpot_s: float | None = None

    def met(self, ttft_s: float | None, tpot_s: float | None) -> bool | None:
        """None where nothing was promised. Without a first token a promise of one is broken."""
        if self.ttft_s is None and self.tpot_s is None:
            return None
        in_time = self.ttft_s is None or (ttft_s is not None and ttft_s <= self.ttft_s)
        return in_time and (self.tpot_s is None or tpot_s is None or tpot_s <= self.tpot_s)


@dataclass(frozen=True, slots=True)
class Summary:
    """Of a request; of any other trace only ids, times and ``error``. ``None`` = not known (yet)."""

    trace_id: str
    root_id: str = ""
    request_id: str = ""
    name: str = ""
    model: str = ""
    tenant: str = ""
    request_class: str = ""
    start_ns: int = 0
    duration_s: float = 0.0
    ttft_s: float | None = None
    tpot_s: float | None = None
    itl_p50_s: float | None = None
    itl_p99_s: float | None = None
    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    predicted_cached_tokens: int | None = None
    attempts: int = 1
    prefill_worker: str = ""
    decode_worker: str = ""
    queue_s: float = 0.0
    error: str = ""
    why: str = ""
    #: The root span, which comes last of its process, is here.
    ended: bool = False
    #: Both SLOs of its class met; None where the class has none.
    slo_met: bool | None = None

    @property
    def end_ns(self) -> float:
        return self.start_ns + 1e9 * self.duration_s

    @property
    def is_request(self) -> bool:
        """Its root is here, or at least a span of ours that names the request."""
        return bool(self.request_id)


def summarise(trace_id: str, spans: Iterable[Span], slos: Mapping[str, Slo]) -> Summary:
    spans = sorted(spans, key=lambda span: span.start_ns)
    if not spans:
        return Summary(trace_id)
    root = next((span for span in spans if span.attributes.keys() >= ROOT_ATTRIBUTES), None)
    first = root or next((span for span in spans if not span.parent_id), spans[0])
    by_name: dict[str, list[Span]] = {}
    for span in spans:
        by_name.setdefault(span.name, []).append(span)
    route, decode = _last(by_name, names.ROUTE.name), _last(by_name, names.DECODE.name)
    end_ns = first.end_ns if root else max(span.end_ns for span in spans)
    ttft = first.number(names.TIME_TO_FIRST)
    tpot_ms = first.number(names.TPOT)
    tpot = tpot_ms / 1e3 if tpot_ms is not None else None
    request_class = _text(spans, names.REQUEST_CLASS)
    return Summary(
        trace_id=trace_id,
        root_id=first.span_id if root or not first.parent_id else "",
        request_id=next((i for span in spans if (i := span.text(names.REQUEST_ID))), ""),
        name=first.name,
        model=first.text(names.REQUEST_MODEL),
        tenant=_text(spans, names.TENANT),
        request_class=request_class,
        start_ns=first.start_ns,
        duration_s=(end_ns - first.start_ns) / 1e9,
        ttft_s=ttft,
        tpot_s=tpot,
        itl_p50_s=_ms(decode, names.ITL_P50),
        itl_p99_s=_ms(decode, names.ITL_P99),
        input_tokens=int(_number(spans, names.INPUT_TOKENS)),
        output_tokens=int(_number([first, *([decode] if decode else [])], names.OUTPUT_TOKENS)),
        cached_tokens=int(_number([first, *spans], names.CACHED_TOKENS)),
        predicted_cached_tokens=_whole(route, names.PREDICTED_CACHED),
        attempts=int(first.number(names.ATTEMPTS) or 1),
        prefill_worker=route.text(names.PREFILL_WORKER) if route else "",
        decode_worker=route.text(names.DECODE_WORKER) if route else decode.text(names.WORKER) if decode else "",
        queue_s=sum(span.duration_s for span in by_name.get(names.QUEUE.name, ())),
        error=_error(first, spans),
        why=first.text(names.WHY),
        ended=root is not None,
        slo_met=slos[request_class].met(ttft, tpot) if root and request_class in slos else None,
    )


def _last(by_name: dict[str, list[Span]], name: str) -> Span | None:
    found = by_name.get(name)
    return found[-1] if found else None


def _text(spans: Iterable[Span], name: str) -> str:
    return next((text for span in spans if (text := span.text(name))), "")


def _number(spans: Iterable[Span], name: str) -> float:
    return next((number for span in spans if (number := span.number(name)) is not None), 0)


def _whole(span: Span | None, name: str) -> int | None:
    number = span.number(name) if span is not None else None
    return int(number) if number is not None else None


def _ms(span: Span | None, name: str) -> float | None:
    number = span.number(name) if span is not None else None
    return number / 1e3 if number is not None else None


def _error(first: Span, spans: Iterable[Span]) -> str:
    """The request's own; a failed attempt that a later one made good is none."""
    return first.text(names.ERROR_TYPE) or first.error

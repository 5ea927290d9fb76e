"""Where a request's time went, in words, from its spans: to the first token against what was predicted, then per token.

Lengths are of spans, each within one process, and moments are the frontend's own, so hosts' clocks need not agree. What
no span covers is told as such. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from services.console.spans import Span, SpanEvent
from services.console.words import milliseconds, size
from tandem.telemetry import spans as names

#: A part of the time is told from this share on, and so many parts at most.
_LEAST_SHARE = 0.04
_MOST_PARTS = 5
#: vLLM's name: seconds in the engine's own queue.
_ENGINE_QUEUE = "gen_ai.latency.time_in_queue"


@dataclass(frozen=True, slots=True)
class Part:
    """Of the time to the first token; ``more`` goes in brackets."""

    ms: float
    what: str
    more: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.what} {milliseconds(self.ms)}" + (f" ({', '.join(self.more)})" if self.more else "")


def in_words(spans: Iterable[Span]) -> list[str]:
    """Sentences; none before the request's own span is here."""
    ordered = sorted((s for s in spans if not s.number(names.CHOICE)), key=lambda span: span.start_ns)
    root = next((span for span in ordered if names.OPERATION in span.attributes), None)
    if root is None:
        return []
    ttft_s = root.number(names.TIME_TO_FIRST)
    first = next((event for event in root.events if event.name == names.FIRST_TOKEN.name), None)
    until_ns = first.at_ns if first else root.end_ns
    lost = [event for event in root.events if event.name == names.FAILURE.name and event.at_ns <= until_ns]
    attempt = [span for span in ordered if span is not root and int(span.number(names.ATTEMPT) or 0) == len(lost)]
    before_ms = 1e3 * ttft_s if ttft_s is not None else root.duration_s * 1e3
    parts = [*_lost(root, lost), *([] if lost else _tokenised(ordered))]
    parts += _phases(attempt, [s for s in ordered if s.name == names.LLM_REQUEST.name], ended=first is None)
    complete = any(span.name == names.PREFILL.name for span in attempt)
    rest = "between spans, on the way or in a busy process," if complete else "on the way, or in a worker now gone,"
    parts.append(Part(before_ms - sum(part.ms for part in parts), rest))
    told = sorted((p for p in parts if p.ms >= _LEAST_SHARE * before_ms), key=lambda part: -part.ms)[:_MOST_PARTS]
    route = next((span for span in attempt if span.name == names.ROUTE.name), None)
    sentences = [_to_first(before_ms, route) if ttft_s is not None else f"No token in {milliseconds(before_ms)}."]
    if told:
        sentences.append("Of these, the longest first: " + "; ".join(map(str, told)) + ".")
    return sentences + _decode(root, route, ordered)


def _to_first(ttft_ms: float, route: Span | None) -> str:
    predicted = route.number(names.PREDICTED_TTFT) if route else None
    text = f"First token after {milliseconds(ttft_ms)}"
    if predicted is None:
        return f"{text}."
    later = ttft_ms - predicted
    if abs(later) < max(1.0, 0.05 * ttft_ms):
        return f"{text}, as predicted."
    return f"{text}, {milliseconds(abs(later))} {'later' if later > 0 else 'sooner'} than predicted."


def _lost(root: Span, lost: list[SpanEvent]) -> list[Part]:
    """Attempts that came to nothing, from the frontend's own moments."""
    parts, since = [], root.start_ns
    for number, event in enumerate(lost, 1):
        of = {key: str(event.attributes.get(key, "")) for key in (names.WORKER, names.ERROR_TYPE, names.REASON)}
        where = f" on {of[names.WORKER]}" if of[names.WORKER] else ""
        why = of[names.REASON] or of[names.ERROR_TYPE]
        parts.append(
            Part((event.at_ns - since) / 1e6, f"attempt {number}{where}, which was lost,", (why,) if why else ())
        )
        since = event.at_ns
    return parts


def _tokenised(spans: list[Span]) -> list[Part]:
    return [Part(1e3 * span.duration_s, "tokenizing") for span in spans if span.name == names.TOKENIZE.name][:1]


def _phases(attempt: list[Span], of_engines: list[Span], *, ended: bool) -> list[Part]:
    """``ended``: before any token came."""
    found = {span.name: span for span in reversed(attempt)}
    route, queue = found.get(names.ROUTE.name), found.get(names.QUEUE.name)
    prefill, pull, decode = (found.get(span.name) for span in (names.PREFILL, names.KV_TRANSFER, names.DECODE))
    parts = []
    if queue is not None:
        parts.append(Part(1e3 * queue.duration_s, "waiting in the router", _waited_for(queue)))
    if route is not None:
        inside_ms = 1e3 * queue.duration_s if queue is not None and queue.parent_id == route.span_id else 0.0
        index_ms = route.number(names.INDEX_MS)
        more = (f"{milliseconds(index_ms)} of it looking up prefixes",) if index_ms else ()
        parts.append(Part(max(0.0, 1e3 * route.duration_s - inside_ms), "placement", more))
    if prefill is not None:
        about = (*_in_engines_queue(prefill, of_engines), *_of_prefill(prefill, route))
        parts.append(Part(1e3 * prefill.duration_s, f"prefill on {_where(prefill)}", about))
    if pull is not None:
        what = f"KV from {pull.text(names.KV_SOURCE) or 'elsewhere'} to {_where(pull)}"
        parts.append(Part(1e3 * pull.duration_s, what, _of_pull(pull, route)))
    if decode is not None and (until_ns := _first_step(decode, ended=ended)) is not None:
        parts.append(Part((until_ns - decode.start_ns) / 1e6, f"first step on {_where(decode)}"))
    return parts


def _waited_for(queue: Span) -> tuple[str, ...]:
    reason, ahead = queue.text(names.QUEUE_REASON), int(queue.number(names.QUEUE_AHEAD) or 0)
    more = (names.QUEUE_REASONS[reason],) if reason in names.QUEUE_REASONS and reason != "none" else ()
    return (*more, f"{ahead:,} waited already") if more and ahead else more


def _in_engines_queue(prefill: Span, of_engines: list[Span]) -> tuple[str, ...]:
    """The engine's span of it is of the same process, and begins within it."""
    for span in of_engines:
        if span.instance == prefill.instance and prefill.start_ns <= span.start_ns <= prefill.end_ns:
            queued_s = span.number(_ENGINE_QUEUE) or 0.0
            return (f"{milliseconds(1e3 * queued_s)} of it in the engine's queue",) if queued_s >= 1e-3 else ()
    return ()


def _of_prefill(prefill: Span, route: Span | None) -> tuple[str, ...]:
    more = []
    if (computed := prefill.number(names.COMPUTED_TOKENS)) is not None:
        more.append(f"{int(computed):,} tokens computed")
    hoped, found = (prefill.number(name) for name in (names.PREDICTED_CACHED, names.CACHED_TOKENS))
    if hoped is not None and found is not None and found < hoped:
        more.append(f"{int(found):,} were cached instead of {int(hoped):,}")
    return (*more, *_predicted(route, names.PREDICTED_PREFILL))


def _of_pull(pull: Span, route: Span | None) -> tuple[str, ...]:
    more = []
    claim_ms = pull.number(names.KV_CLAIM_MS) or 0.0
    if claim_ms > 0.1 * 1e3 * pull.duration_s:
        more.append(f"{milliseconds(claim_ms)} of it claiming")
    if pulled := pull.number(names.KV_BYTES):
        more.append(size(pulled))
    if (pull_ms := pull.number(names.KV_PULL_MS)) is not None:
        more.append(f"the pull itself {milliseconds(pull_ms)}")
    failed = [str(e.attributes.get(names.REASON, "")) for e in pull.events if e.name == names.FALLBACK.name]
    if failed:
        more.append("it did not come, the prompt was computed here: " + ", ".join(filter(None, failed)))
    return (*more, *_predicted(route, names.PREDICTED_TRANSFER))


def _predicted(route: Span | None, name: str) -> tuple[str, ...]:
    value = route.number(name) if route else None
    return () if value is None else (f"predicted {milliseconds(value)}",)


def _first_step(decode: Span, *, ended: bool) -> int | None:
    if ended:
        return decode.end_ns
    return next((event.at_ns for event in decode.events if event.name == names.FIRST_TOKEN.name), None)


def _decode(root: Span, route: Span | None, spans: list[Span]) -> list[str]:
    tokens, tpot = root.number(names.OUTPUT_TOKENS), root.number(names.TPOT)
    if not tokens or tpot is None:
        return []
    text = f"Then {milliseconds(tpot)} per token"
    predicted = route.number(names.PREDICTED_ITL) if route else None
    if predicted:
        text += f" (predicted {milliseconds(predicted)})"
    longest = max((v for s in spans if (v := s.number(names.ITL_MAX)) is not None), default=None)
    if longest is not None and longest > 2 * tpot:
        text += f", the longest pause {milliseconds(longest)}"
    moved = [event for event in root.events if event.name == names.MIGRATION.name]
    if moved:
        text += f"; it moved to another worker {len(moved)} time{'s' if len(moved) > 1 else ''}"
    return [text + "."]


def _where(span: Span) -> str:
    return span.text(names.WORKER) or span.instance

"""A placement in words, from a ``route`` span's attributes: who was chosen, what for, and what else there was. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from services.console.spans import Span, Value
from services.console.words import milliseconds
from tandem.telemetry import spans as names

#: Terms besides the first token that a score weighs, said of (chosen, other).
_OTHER_COSTS = {
    "effort_ms": "{:.0f} ms of worker time instead of {:.0f}",
    "itl_ms": "{:.1f} ms per token instead of {:.1f}",
    "kv_share": "{:.0%} of KV instead of {:.0%}",
}


@dataclass(frozen=True, slots=True)
class Candidate:
    """One plan. Milliseconds; None = the span does not say."""

    decode_worker: str
    prefill_worker: str
    cached_tokens: int
    score: float | None
    chosen: bool
    terms: dict[str, float]

    @property
    def where(self) -> str:
        return f"{self.prefill_worker} for {self.decode_worker}" if self.prefill_worker else self.decode_worker

    @property
    def predicted_ms(self) -> float | None:
        """To the first token from now on: what was waited already is the same for all."""
        ttft = self.terms.get("ttft_ms")
        return None if ttft is None else ttft - self.terms.get("waited_ms", 0.0)


def candidates(route: Span) -> list[Candidate]:
    """Best first, as the span lists them."""
    decode = _texts(route, names.CANDIDATE_DECODE)
    prefill, cached = _texts(route, names.CANDIDATE_PREFILL), _numbers(route, names.CANDIDATE_CACHED)
    scores, chosen = _numbers(route, names.CANDIDATE_SCORE), route.number(names.CANDIDATE_CHOSEN)
    terms = {term: _numbers(route, name) for term, name in names.CANDIDATE_TERMS.items()}
    return [
        Candidate(
            decode_worker=worker,
            prefill_worker=prefill[i] if i < len(prefill) else "",
            cached_tokens=int(cached[i]) if i < len(cached) else 0,
            score=scores[i] if i < len(scores) else None,
            chosen=chosen == i,
            terms={term: values[i] for term, values in terms.items() if i < len(values)},
        )
        for i, worker in enumerate(decode)
    ]


def in_words(route: Span) -> list[str]:
    """Sentences. "decode-2: 1,024 of 1,312 tokens cached, predicted 41 ms; decode-1 would have been 118 ms"."""
    found = candidates(route)
    isl = int(route.number(names.INPUT_TOKENS) or 0)
    sentences = []
    chosen = next((c for c in found if c.chosen), None)
    if chosen is not None:
        others = [c for c in found if not c.chosen and c.predicted_ms is not None][:2]
        text = f"{chosen.where}: {chosen.cached_tokens:,} of {isl:,} tokens cached"
        if chosen.predicted_ms is not None:
            text += f", predicted {milliseconds(chosen.predicted_ms)}"
        if others:
            text += "; " + ", ".join(f"{c.where} would have been {milliseconds(c.predicted_ms or 0.0)}" for c in others)
        sentences.append(text + ".")
        if others and chosen.predicted_ms is not None and _would_be_sooner(others, chosen.predicted_ms):
            sentences.append(_why_not_sooner(chosen, others))
    elif route.text(names.SUMMARY):
        sentences.append(route.text(names.SUMMARY))
    scored = int(route.number(names.NUM_CANDIDATES) or 0)
    if scored > len(found) > 0:
        sentences.append(f"{scored} plans were scored; the best {len(found)} are listed.")
    sentences += _exclusions(route)
    if error := route.text(names.ERROR_TYPE):
        sentences.append(f"It was not placed: {error}.")
    return sentences


def _would_be_sooner(others: list[Candidate], predicted_ms: float) -> bool:
    return any(c.predicted_ms is not None and c.predicted_ms < predicted_ms for c in others)


def _why_not_sooner(chosen: Candidate, others: list[Candidate]) -> str:
    """The score weighs more than the first token: what the plan does to streams beside it, and the room it takes."""
    sooner = min(others, key=lambda c: c.predicted_ms or 0.0)
    reasons = []
    for term, words in _OTHER_COSTS.items():
        a, b = chosen.terms.get(term), sooner.terms.get(term)
        if a is not None and b is not None and a < b:
            reasons.append(words.format(a, b))
    because = " and ".join(reasons) or "its whole cost is lower"
    return f"{sooner.where} would have had the first token sooner, but {chosen.where} costs less in all: {because}."


def _exclusions(route: Span) -> list[str]:
    by_reason: dict[str, list[str]] = {}
    for worker, reason in zip(_texts(route, names.EXCLUDED_WORKER), _texts(route, names.EXCLUDED_REASON), strict=False):
        by_reason.setdefault(reason, []).append(worker)
    return [f"Not considered, {reason}: {', '.join(workers)}." for reason, workers in by_reason.items()]


def _items(route: Span, name: str) -> tuple[Value, ...]:
    value = route.attributes.get(name, ())
    return value if isinstance(value, tuple) else ()


def _texts(route: Span, name: str) -> list[str]:
    return [str(item) for item in _items(route, name)]


def _numbers(route: Span, name: str) -> list[float]:
    return [float(item) if isinstance(item, int | float) else 0.0 for item in _items(route, name)]

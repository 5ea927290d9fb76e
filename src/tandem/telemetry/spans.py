"""Every span that Tandem makes, with its attributes and events: the one table. docs/tracing.md is generated from it.

One trace per request. The root is the frontend's; all other spans are its children, whichever process made them, and
each lies within one process: its start and its end are times of that process's clock. No span, attribute or event
holds any text of a prompt or of an answer, nor a token, a key or a header of the client's.

Names follow OpenTelemetry's semantic conventions for GenAI where they have one. Durations in attributes carry their
unit in the name; what has none is in seconds where the conventions say so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

SCOPE = "tandem"


@dataclass(frozen=True, slots=True)
class Attribute:
    name: str
    kind: str
    meaning: str


@dataclass(frozen=True, slots=True)
class Event:
    """A moment within a span."""

    name: str
    meaning: str
    attributes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Span:
    """``attributes``: those that it may have; ``always``: those that it has each time."""

    name: str
    process: str
    parent: str
    meaning: str
    always: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()
    events: tuple[Event, ...] = ()

    @property
    def allowed(self) -> frozenset[str]:
        return frozenset(self.always + self.attributes)


_attributes: dict[str, Attribute] = {}


def _attribute(name: str, kind: str, meaning: str) -> str:
    _attributes[name] = Attribute(name, kind, meaning)
    return name


_TEXT, _NUMBER, _FLOAT, _FLAG = "text", "whole number", "number", "true or false"
_TEXTS, _NUMBERS, _FLOATS = "list of text", "list of whole numbers", "list of numbers"

# -- which request -----------------------------------------------------------------------------------------------------

REQUEST_ID = _attribute("tandem.request.id", _TEXT, "the request, as in the answer's `id`; on every span")
ATTEMPT = _attribute("tandem.attempt", _NUMBER, "0 = the first; raised whenever the frontend submits again")
CHOICE = _attribute("tandem.choice", _NUMBER, "which answer of `n`, or which prompt of a list")
WORKER = _attribute("tandem.worker", _TEXT, "the worker that did it")
ROUTER = _attribute("tandem.router", _TEXT, "the router that decided")
RECONSTRUCTED = _attribute(
    "tandem.reconstructed",
    _FLAG,
    "made by the frontend after the end of a request that nobody sampled: the duration is the worker's, its place in "
    "time the frontend's guess",
)
WHY = _attribute("tandem.trace.why", _TEXT, "why there is this trace: `sampled`, `failed` or `slow`")

# -- the request -------------------------------------------------------------------------------------------------------

OPERATION = _attribute("gen_ai.operation.name", _TEXT, "`chat`, `text_completion` or `embeddings`")
PROVIDER = _attribute("gen_ai.provider.name", _TEXT, "`tandem`")
REQUEST_MODEL = _attribute("gen_ai.request.model", _TEXT, "the model")
RESPONSE_MODEL = _attribute("gen_ai.response.model", _TEXT, "the model")
RESPONSE_ID = _attribute("gen_ai.response.id", _TEXT, "`id` of the answer")
MAX_TOKENS = _attribute("gen_ai.request.max_tokens", _NUMBER, "largest number of output tokens")
TEMPERATURE = _attribute("gen_ai.request.temperature", _FLOAT, "of sampling")
TOP_P = _attribute("gen_ai.request.top_p", _FLOAT, "of sampling")
TOP_K = _attribute("gen_ai.request.top_k", _FLOAT, "of sampling; not there = all tokens")
FREQUENCY_PENALTY = _attribute("gen_ai.request.frequency_penalty", _FLOAT, "of sampling, if any")
PRESENCE_PENALTY = _attribute("gen_ai.request.presence_penalty", _FLOAT, "of sampling, if any")
SEED = _attribute("gen_ai.request.seed", _NUMBER, "of sampling, if given")
CHOICE_COUNT = _attribute("gen_ai.request.choice.count", _NUMBER, "answers asked for, if more than one")
STREAM = _attribute("gen_ai.request.stream", _FLAG, "the client gets tokens as they come")
INPUT_TOKENS = _attribute("gen_ai.usage.input_tokens", _NUMBER, "tokens of the prompt")
OUTPUT_TOKENS = _attribute("gen_ai.usage.output_tokens", _NUMBER, "tokens produced")
CACHED_TOKENS = _attribute(
    "gen_ai.usage.cache_read.input_tokens", _NUMBER, "prompt tokens whose KV was in a prefix cache"
)
FINISH_REASONS = _attribute("gen_ai.response.finish_reasons", _TEXTS, "how each choice ended")
TIME_TO_FIRST = _attribute(
    "gen_ai.response.time_to_first_chunk", _FLOAT, "seconds from arrival to the first token, by the frontend's clock"
)
TPOT = _attribute("tandem.tpot_ms", _FLOAT, "mean time per output token after the first")
ERROR_TYPE = _attribute("error.type", _TEXT, "code of the error (docs/errors.md)")
TENANT = _attribute("tandem.tenant", _TEXT, "who asked")
REQUEST_CLASS = _attribute("tandem.class", _TEXT, "request class")
ATTEMPTS = _attribute("tandem.attempts", _NUMBER, "how often it was submitted, of the choice that was most often")

# -- routing -----------------------------------------------------------------------------------------------------------

LEG = _attribute("tandem.leg", _TEXT, "`prefill`: remote, KV handed over; `local`: all on the decode worker")
DECODE_WORKER = _attribute("tandem.decode.worker", _TEXT, "where tokens are produced")
PREFILL_WORKER = _attribute("tandem.prefill.worker", _TEXT, "where the prompt is computed")
SUMMARY = _attribute("tandem.route.summary", _TEXT, "the decision in words")
CHOICE_REASON = _attribute(
    "tandem.route.reason",
    _TEXT,
    "why this plan, in a word: `only`, `pace`, `prefix` or `load` (as the metric of placements has it)",
)
PREDICTED_TTFT = _attribute("tandem.route.predicted_ttft_ms", _FLOAT, "from arrival at the frontend to the first token")
PREDICTED_PREFILL = _attribute("tandem.route.predicted_prefill_ms", _FLOAT, "what is pending there included")
PREDICTED_TRANSFER = _attribute("tandem.route.predicted_transfer_ms", _FLOAT, "of the KV; 0 on a local leg")
PREDICTED_ITL = _attribute("tandem.route.predicted_itl_ms", _FLOAT, "per token on the decode worker")
PREDICTED_CACHED = _attribute(
    "tandem.route.predicted_cached_tokens", _NUMBER, "of the prompt, on the worker that computes it, as the index says"
)
INDEX_MS = _attribute("tandem.route.index_ms", _FLOAT, "look-up in the prefix index")
NUM_CANDIDATES = _attribute("tandem.route.num_candidates", _NUMBER, "plans that were scored; the lists hold 16")
CANDIDATE_DECODE = _attribute("tandem.candidates.decode_worker", _TEXTS, "of each plan, best first")
CANDIDATE_PREFILL = _attribute("tandem.candidates.prefill_worker", _TEXTS, "empty = local")
CANDIDATE_CACHED = _attribute(
    "tandem.candidates.cached_tokens", _NUMBERS, "on the worker that would compute the prompt"
)
CANDIDATE_SCORE = _attribute("tandem.candidates.score", _FLOATS, "lowest wins")
CANDIDATE_CHOSEN = _attribute("tandem.candidates.chosen", _NUMBER, "place of the chosen plan; -1 = not in the lists")
EXCLUDED_WORKER = _attribute("tandem.excluded.worker", _TEXTS, "workers that a hard filter took out, 16 at most")
EXCLUDED_REASON = _attribute("tandem.excluded.reason", _TEXTS, "why, in the same order")
_TERM_MEANING = {
    "ttft_ms": "predicted time from arrival to the first token",
    "waited_ms": "of that, waited so far",
    "prefill_ms": "of that, prefill, what is pending there included",
    "transfer_ms": "of that, KV transfer",
    "itl_ms": "predicted time per token",
    "kv_share": "share of the decode worker's KV that would be taken",
    "ttft_of_target": "first token, of its target",
    "itl_of_target": "time per token, of its target",
    "effort_ms": "worker time that the plan adds, ms",
}
#: From a term of core.placement.TERMS to the attribute with its values.
CANDIDATE_TERMS: Mapping[str, str] = {
    term: _attribute(f"tandem.candidates.{term}", _FLOATS, meaning) for term, meaning in _TERM_MEANING.items()
}
QUEUE_REASON = _attribute(
    "tandem.queue.reason",
    _TEXT,
    "what it last waited for: `none` (less than a millisecond), `turn`, `credit`, `room`, `guard` or `worker`",
)
QUEUE_AHEAD = _attribute("tandem.queue.ahead", _NUMBER, "requests that waited when it came")

# -- workers -----------------------------------------------------------------------------------------------------------

COMPUTED_TOKENS = _attribute("tandem.computed_tokens", _NUMBER, "prompt tokens computed")
KV_BYTES = _attribute("tandem.kv.bytes", _NUMBER, "KV pulled, where the connector tells")
KV_SOURCE = _attribute("tandem.kv.source", _TEXT, "the worker it was pulled from")
KV_CLAIM_MS = _attribute("tandem.kv.claim_ms", _FLOAT, "claiming the handoff from its holder")
KV_PULL_MS = _attribute("tandem.kv.pull_ms", _FLOAT, "the pull itself, as the engine measured it")
ITL_P50 = _attribute("tandem.itl_p50_ms", _FLOAT, "median time between tokens")
ITL_P90 = _attribute("tandem.itl_p90_ms", _FLOAT, "90th percentile of it")
ITL_P99 = _attribute("tandem.itl_p99_ms", _FLOAT, "99th percentile of it")
ITL_MAX = _attribute("tandem.itl_max_ms", _FLOAT, "the longest of them")
FINISH_REASON = _attribute("tandem.finish_reason", _TEXT, "`stop`, `length`, `abort` or `error`")
REASON = _attribute("tandem.reason", _TEXT, "why, in words")
TOKENS_SO_FAR = _attribute("tandem.tokens_so_far", _NUMBER, "tokens that the client had been given")

ATTRIBUTES: Mapping[str, Attribute] = _attributes

#: Values of ``tandem.queue.reason``: core.queueing.Wait, and what they mean to a reader.
QUEUE_REASONS: Mapping[str, str] = {
    "none": "it did not wait",
    "turn": "others went first, or no worker took anything from anybody (no credit, silent, draining)",
    "credit": "the worker of its best plan had more prefill pending than its credit",
    "room": "no decode worker had KV room or a seat in its batch for it",
    "guard": "background work: it would have slowed the streams beside it",
    "worker": "no worker of the fleet could take it at all",
}

# -- events ------------------------------------------------------------------------------------------------------------

FIRST_TOKEN = Event("first_token", "the first token is there")
PLACED = Event("placed", "a worker has it; the answer opens", (WORKER, ATTEMPT, CHOICE))
FAILURE = Event(
    "attempt_failed",
    "an attempt is lost: its worker died or refused, its KV did not come, its router changed",
    (ATTEMPT, CHOICE, ERROR_TYPE, WORKER, REASON, TOKENS_SO_FAR),
)
RETRY = Event("retry", "submitted again; nothing had been given to the client", (ATTEMPT, CHOICE))
MIGRATION = Event(
    "migration", "submitted again, to go on after the tokens so far on another worker", (ATTEMPT, CHOICE, TOKENS_SO_FAR)
)
GAP = Event("asked_again", "a worker was asked for what did not arrive", (ATTEMPT, CHOICE, WORKER))
FALLBACK = Event("prefill_instead", "the KV did not come: the decode worker computes the prompt", (REASON,))
CANCELLED = Event("cancelled", "the client has gone, or reads too slowly", (REASON,))

# -- spans -------------------------------------------------------------------------------------------------------------

_KEY = (REQUEST_ID, ATTEMPT, CHOICE)

CHAT = Span(
    "{operation} {model}",
    "frontend",
    "the client's span, if it sent `traceparent`; else the root",
    "The request: from the first byte of its body to its last token. The name is `chat SmolLM2-135M-Instruct`, say.",
    always=(
        REQUEST_ID, WHY, OPERATION, PROVIDER, REQUEST_MODEL, RESPONSE_MODEL, RESPONSE_ID, TENANT, REQUEST_CLASS,
        INPUT_TOKENS, OUTPUT_TOKENS, CACHED_TOKENS, ATTEMPTS,
    ),
    attributes=(
        STREAM, MAX_TOKENS, TEMPERATURE, TOP_P, TOP_K, FREQUENCY_PENALTY, PRESENCE_PENALTY, SEED, CHOICE_COUNT,
        FINISH_REASONS, TIME_TO_FIRST, TPOT, ERROR_TYPE,
    ),
    events=(PLACED, FIRST_TOKEN, FAILURE, RETRY, MIGRATION, GAP, CANCELLED),
)  # fmt: skip
TOKENIZE = Span(
    "tokenize",
    "frontend",
    "the request",
    "From the body's last byte to the prompt's tokens: parsing, chat template, tokenizer.",
    always=(REQUEST_ID, INPUT_TOKENS),
)
ROUTE = Span(
    "route",
    "router",
    "the request",
    "From the request's arrival at the router to its assignment to a worker: look-up, queue, decision. With every "
    "term of every candidate's cost.",
    always=(*_KEY, ROUTER, TENANT, REQUEST_CLASS, INPUT_TOKENS, INDEX_MS),
    attributes=(
        LEG, DECODE_WORKER, PREFILL_WORKER, SUMMARY, CHOICE_REASON, PREDICTED_TTFT, PREDICTED_PREFILL,
        PREDICTED_TRANSFER, PREDICTED_ITL, PREDICTED_CACHED, NUM_CANDIDATES, CANDIDATE_DECODE, CANDIDATE_PREFILL,
        CANDIDATE_CACHED, CANDIDATE_SCORE, CANDIDATE_CHOSEN, *CANDIDATE_TERMS.values(), EXCLUDED_WORKER,
        EXCLUDED_REASON, ERROR_TYPE,
    ),
)  # fmt: skip
QUEUE = Span(
    "queue",
    "router",
    "`route`; the request where reconstructed",
    "The wait for a worker, and what for.",
    always=_KEY,
    attributes=(QUEUE_REASON, QUEUE_AHEAD, ERROR_TYPE, RECONSTRUCTED),
)
PREFILL = Span(
    "prefill",
    "prefill worker, or decode worker on a local leg",
    "the request",
    "From the assignment's arrival to the prompt's KV (remote) or to the first token (local); the wait in the "
    "engine's own queue is part of it.",
    always=(*_KEY, WORKER, LEG, INPUT_TOKENS),
    attributes=(CACHED_TOKENS, COMPUTED_TOKENS, PREDICTED_CACHED, FINISH_REASON, ERROR_TYPE, RECONSTRUCTED),
)
KV_TRANSFER = Span(
    "kv_transfer",
    "decode worker",
    "the request",
    "From the handoff's arrival to the end of the pull: claim, wait for the engine, the blocks that were not here.",
    always=(*_KEY, WORKER, KV_SOURCE),
    attributes=(KV_BYTES, KV_CLAIM_MS, KV_PULL_MS, CACHED_TOKENS, ERROR_TYPE, RECONSTRUCTED),
    events=(FALLBACK,),
)
DECODE = Span(
    "decode",
    "decode worker",
    "the request",
    "From the end of the prefill (local) or of the KV transfer (remote) to the last token.",
    always=(*_KEY, WORKER, OUTPUT_TOKENS, FINISH_REASON),
    attributes=(ITL_P50, ITL_P90, ITL_P99, ITL_MAX, ERROR_TYPE, RECONSTRUCTED),
    events=(FIRST_TOKEN,),
)
LLM_REQUEST = Span(
    "llm_request",
    "vLLM, in prefill and decode workers",
    "`prefill` on a prefill worker; the request on a decode worker, where it covers prefill or KV transfer too",
    "vLLM's own span of its request, with vLLM's attributes: time in its queue, in prefill, in decode.",
)

SPANS: tuple[Span, ...] = (CHAT, TOKENIZE, ROUTE, QUEUE, PREFILL, KV_TRANSFER, DECODE, LLM_REQUEST)

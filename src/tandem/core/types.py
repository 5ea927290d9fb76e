"""The vocabulary of the decision core: plain values, no behaviour beyond derived properties.

Units are in the names: ``_s`` seconds, ``_tokens``, ``_blocks``, ``_bytes``. Times are ``now`` values of one
monotonic clock that the caller owns. What is made for every request, token or report is a Struct: frozen like a frozen
dataclass, and made in a tenth of its time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from msgspec import Struct


class Role(Enum):
    PREFILL = "prefill"
    DECODE = "decode"


class Leg(Enum):
    """What a worker that takes an assignment does with it."""

    __hash__ = object.__hash__  # machine code, where Enum's own is Python: dicts by leg are asked for every placement

    PREFILL = "prefill"  # compute the prompt, hand the KV over
    LOCAL = "local"  # do it all


class FinishReason(Enum):
    __hash__ = object.__hash__  # as of Leg

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class RequestKey(NamedTuple):  # hashed many times per request, and a tuple's hash costs a fifth of a dataclass's
    """(id, attempt, choice): the frontend raises ``attempt`` whenever it submits again."""

    id: str
    attempt: int = 0
    choice: int = 0


@dataclass(frozen=True, slots=True)
class StructuredOutput:
    """Exactly one is set."""

    json_schema: str | None = None
    json_object: bool = False
    regex: str | None = None
    grammar: str | None = None


class SamplingParams(Struct, frozen=True):
    """How tokens are drawn. Stop *strings* are the frontend's business and are not here."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0 = all
    min_p: float = 0.0
    seed: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    structured_output: StructuredOutput | None = None

    @property
    def continuable(self) -> bool:
        """Whether prompt + tokens so far, as a new prompt, continue this request with the same distribution."""
        return (
            (self.seed is None or self.temperature == 0.0)  # greedy: the seed draws nothing
            and self.presence_penalty == 0.0
            and self.frequency_penalty == 0.0
            and self.repetition_penalty == 1.0
            and self.logprobs is None
            and self.prompt_logprobs is None
            and self.structured_output is None
        )


@dataclass(frozen=True, slots=True)
class WorkerAddress:
    """Which process: a restarted worker has the same id and a new incarnation."""

    id: str
    incarnation: int
    grpc_address: str = ""


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """What a worker says about itself when it registers. Fixed for an incarnation, except ``role`` and ``draining``."""

    address: WorkerAddress
    model: str
    role: Role
    slot: int  # its bit in the prefix index
    block_size: int  # tokens in a KV block
    dtype: str
    kv_layout: str
    engine: str  # "vllm" | "sim"
    engine_version: str
    max_model_len: int
    kv_blocks_total: int
    kv_bytes_per_token: int
    max_batched_tokens: int  # tokens one engine step computes at most (the chunk)
    max_num_seqs: int
    perf_profile: str  # name of the timing profile to start from
    kv_endpoint: str = ""  # "" = takes no part in disaggregation
    link_bytes_per_s: float = 1e9
    loras: frozenset[str] = frozenset()
    pool: str = ""
    draining: bool = False
    wire_version: int = 3  # two more where peers of before and after could not read each other

    @property
    def id(self) -> str:
        return self.address.id


class StepTiming(Struct, frozen=True):
    """One engine step by the worker's own clock; the food of the performance model."""

    duration_s: float
    prefill_tokens: int
    prefill_context_tokens: int  # sum over prefill tokens of the context before them
    decode_sequences: int
    kv_tokens: int  # KV tokens read by the decodes


class WorkerLoad(Struct, frozen=True):
    """A load report as the scheduler sees it."""

    worker: str
    incarnation: int
    waiting_requests: int = 0
    running_requests: int = 0
    pending_prefill_tokens: int = 0
    pending_prefill_context_tokens: int = 0
    kv_blocks_used: int = 0
    kv_blocks_total: int = 0
    kv_tokens: int = 0
    last_step_age_s: float = 0.0
    steps: tuple[StepTiming, ...] = ()
    draining: bool = False
    role: Role | None = None


class Request(Struct, frozen=True):
    """What the scheduler needs to know of a request. The prompt itself it never sees."""

    key: RequestKey
    model: str
    isl_tokens: int
    max_osl_tokens: int
    arrival_s: float  # when the router got it, minus the time already waited in the frontend
    timeout_s: float  # hard limit, counted from arrival_s
    tenant: str = "default"
    request_class: str = ""  # "" = the tenant's default
    ttft_slo_s: float | None = None
    lora: str = ""
    avoid_workers: frozenset[str] = frozenset()
    local_only: bool = False

    @property
    def least_tokens(self) -> int:
        """What a worker must hold at least: the prompt, and a token where any is wanted (an embedding wants none)."""
        return self.isl_tokens + min(1, self.max_osl_tokens)


class Plan(Struct, frozen=True):
    """Where the phases of a request run. ``prefill_worker`` None = the decode worker prefills by itself."""

    decode_worker: str
    prefill_worker: str | None = None

    @property
    def leg(self) -> Leg:
        return Leg.LOCAL if self.prefill_worker is None else Leg.PREFILL

    @property
    def first_worker(self) -> str:
        """Who gets the assignment."""
        return self.prefill_worker or self.decode_worker


@dataclass(frozen=True, slots=True)
class CandidateScore:
    """One plan that was looked at: each term of its cost (milliseconds or as named), or why a filter took it out."""

    plan: Plan
    score: float
    terms: dict[str, float] = field(default_factory=dict)
    excluded: str = ""


@dataclass(frozen=True, slots=True)
class Explanation:
    chosen: Plan | None
    candidates: tuple[CandidateScore, ...]
    summary: str = ""

"""What the engine model keeps per request, and what it tells about it. Plain values; engine_model.py has the rules."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from enum import Enum

from tandem.core.types import FinishReason, StepTiming
from tandem.enginemodel.block_pool import CacheEvent
from tandem.enginemodel.content import Content


class Phase(Enum):
    WAITING = "waiting"
    PULLING = "pulling"  # KV blocks under way from another engine
    PREFILL = "prefill"
    DECODE = "decode"
    DONE = "done"


@dataclass(eq=False, slots=True)
class Sequence:
    """One request inside the engine.

    ``length`` counts prompt and output tokens, ``computed`` those whose KV is written. A decoding sequence has
    computed == length - 1: each step writes the last token's KV and draws the next.
    """

    request_id: str
    content: Content
    max_tokens: int
    priority: int = 0
    produce_handoff: bool = False
    remote: bool = False  # the prompt's KV is to be pulled from elsewhere
    arrival: int = 0  # order of submission
    phase: Phase = Phase.WAITING
    length: int = 0
    computed: int = 0
    decode_target: int = 0  # length at which the decode loop must look at this sequence again
    blocks: list[int] = field(default_factory=list)
    cached_upto: int = 0  # leading blocks that are in the prefix cache
    hit_blocks: int = 0
    cached_tokens: int | None = None  # prompt tokens found in the prefix cache at first admission
    preemptions: int = 0
    taint: int = 0

    @property
    def output_tokens(self) -> int:
        return self.length - self.content.prompt_tokens

    @property
    def rank(self) -> tuple[int, int]:
        """Who runs first; the largest is preempted first."""
        return (self.priority, self.arrival)


@dataclass(frozen=True, slots=True)
class Handoff:
    """A computed prompt whose blocks stay held for another engine."""

    handoff_id: str
    num_tokens: int
    blocks: tuple[int, ...]
    expires_at: float


@dataclass(frozen=True, slots=True)
class Pull:
    """The caller is to fetch these blocks of the prompt and then call ``pull_done``."""

    request_id: str
    first_block: int  # index in the prompt
    num_blocks: int


class Output:
    """News about one request; ``tokens`` is empty where none are modelled, or none was drawn. A plain class, as it is
    made for every step of every sequence."""

    __slots__ = ("finish", "handoff", "sequence", "stop_token_id", "tokens")

    def __init__(
        self,
        sequence: Sequence,
        tokens: Collection[int] = (),
        finish: FinishReason | None = None,
        stop_token_id: int | None = None,
        handoff: Handoff | None = None,
    ) -> None:
        self.sequence = sequence
        self.tokens = tokens
        self.finish = finish
        self.stop_token_id = stop_token_id
        self.handoff = handoff


class StepResult:
    """One step (or ``steps`` equal decode steps): outputs hold at its end, ``duration_s`` after its begin.

    ``released`` names the requests whose remote KV was all cached here already, so that nothing is pulled.
    """

    __slots__ = ("duration_s", "events", "outputs", "pulls", "released", "steps", "timing")

    def __init__(self, duration_s: float = 0.0, steps: int = 0) -> None:
        self.duration_s = duration_s
        self.steps = steps
        self.outputs: list[Output] = []
        self.events: list[CacheEvent] = []
        self.pulls: list[Pull] = []
        self.released: list[str] = []
        self.timing: StepTiming | None = None


@dataclass(frozen=True, slots=True)
class ModelConfig:
    num_blocks: int
    block_size: int = 16
    max_num_seqs: int = 256
    max_batched_tokens: int = 2048
    max_model_len: int = 0  # 0 = what fits the blocks
    lease_s: float = 30.0

    def __post_init__(self) -> None:
        if min(self.num_blocks, self.block_size, self.max_num_seqs, self.max_batched_tokens) < 1:
            raise ValueError("blocks, block size, sequences and batched tokens must be positive")
        if self.max_batched_tokens < self.max_num_seqs:
            raise ValueError(f"max_batched_tokens {self.max_batched_tokens} < max_num_seqs {self.max_num_seqs}")
        if self.context_limit > self.num_blocks * self.block_size:
            raise ValueError(f"max_model_len {self.max_model_len} does not fit {self.num_blocks} KV blocks")

    @property
    def context_limit(self) -> int:
        return self.max_model_len or self.num_blocks * self.block_size

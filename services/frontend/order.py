"""What a consumer orders, how long it is waited for, and what it hears: plain values and one interface."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from msgspec import Struct

from tandem import errors
from tandem.core.types import FinishReason, SamplingParams
from tandem.telemetry import spans
from tandem.v1 import bus_pb2, types_pb2

#: Log-probabilities of one position, as they travel.
Positions = Sequence[types_pb2.PositionLogprobs]


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long each silence is borne, seconds, and how often a request is tried."""

    leader_grace_s: float = 4.0  # no leader: then NoLeader
    bus_grace_s: float = 4.0  # no bus: then BusUnavailable
    recovery_grace_s: float = 4.0  # after a loss, "no workers" is asked again for this long
    stall_s: float = 1.5  # a silent holder is asked (Repair)
    lost_s: float = 6.0  # a holder that answers no question is lost
    repair_s: float = 0.25  # least time between two questions about one gap
    requery_s: float = 30.0  # queued and nothing heard: submitted again, in case the bus lost it
    stop_s: float = 0.5  # STOPPING lasts this long at most
    max_failures: int = 5


class Order(Struct, frozen=True, kw_only=True):
    """What the consumer asks for. ``deadline_s`` and ``arrival_s`` are times of this process's clock."""

    id: str
    model: str
    prompt: bytes  # little-endian u32
    sampling: SamplingParams
    arrival_s: float
    deadline_s: float
    choice: int = 0
    tenant: str = "default"
    request_class: str = ""
    ttft_slo_s: float = 0.0
    lora: str = ""
    cache_salt: str = ""
    block_size: int = 32
    #: Start of the chain of block hashes: core.blocks.root_hash(model, lora, cache_salt).
    hash_root: int = 0
    traceparent: str = ""
    #: The prompt's embedding is wanted, no tokens; ``sampling`` says max_tokens=0.
    embed: bool = False
    #: Nobody sees a token before the end, so the request may start again from scratch.
    restartable: bool = False
    #: Tokens that end a generation by themselves (end-of-sequence, stop tokens).
    end_tokens: frozenset[int] = frozenset()

    @property
    def isl_tokens(self) -> int:
        return len(self.prompt) // 4


class Outcome(Struct, frozen=True):
    """How it ended: ``error`` is set, or ``reason`` is STOP or LENGTH."""

    reason: FinishReason
    output_tokens: int
    cached_tokens: int = 0
    stop_token_id: int | None = None
    error: errors.TandemError | None = None
    timings: bus_pb2.Timings | None = None
    attempts: int = 1
    #: Little-endian f32.
    embedding: bytes = b""


class Incident(NamedTuple):
    """Something that befell a request, or was done about it: for its trace."""

    kind: spans.Event
    at_s: float
    attempt: int
    worker: str = ""
    error: errors.TandemError | None = None
    reason: str = ""
    tokens: int = 0


class Consumer:
    """Who reads a journey. Called in this order: opened?, (tokens | restarted)*, ended."""

    __slots__ = ()

    def opened(self) -> None:
        """A worker has it."""

    def tokens(self, tokens: Sequence[int], positions: Positions | None, prompt_positions: Positions | None) -> None:
        """New tokens, and their log-probabilities where asked for."""

    def restarted(self) -> None:
        """Forget every token so far. Only for a restartable order."""

    def ended(self, outcome: Outcome) -> None: ...

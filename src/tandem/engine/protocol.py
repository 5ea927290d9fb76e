"""The port between a worker's shell and its inference engine.

One engine per worker process. The shell submits requests with a *sink*, a plain callable that the engine calls on the
event loop with every piece of news about the request; no task, queue or generator per token on the shell's side.

Contract (tests/contract/test_engine.py runs it over every implementation):

* ``submit`` returns at once. The sink sees zero or more token outputs and then exactly one with ``finish`` set,
  whatever happens: end, abort, engine error. Nothing comes after it.
* ``abort`` of an unknown or finished request is a no-op. Of a running one: its sink sees FinishReason.ABORT by the
  next engine step, and its KV blocks are free then, or as soon as a KV transfer under way lets go of them.
* A request with ``produce_handoff`` computes the prompt, samples one token that the sink never sees, and finishes
  with ``handoff`` set. Its blocks stay held until ``release_handoff`` or the lease's end.
* A request with ``handoff`` pulls the KV blocks that it lacks. If the pull fails, the engine recomputes. A handoff
  that does not match the prompt is refused (HandoffFailed via the sink), and the engine lives.
* A request with ``embed`` sees one output: ``finish`` STOP with ``embedding`` set. Only an engine whose config says
  ``embeds`` takes it, and it takes no other.
* When the engine dies, every sink gets FinishReason.ERROR and ``dead`` is set; the shell then leaves.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from msgspec import Struct
from prometheus_client.registry import Collector

from tandem.core.types import FinishReason, SamplingParams, StepTiming
from tandem.errors import TandemError
from tandem.telemetry.instruments import Instruments

#: (token id, logprob, rank) of one candidate; the sampled token comes first.
Logprob = tuple[int, float, int]


@dataclass(frozen=True, slots=True)
class KvHandoff:
    """KV blocks of one prompt held on a prefill engine for one decode engine."""

    handoff_id: str
    engine_id: str  # changes at each engine start
    num_tokens: int
    params: bytes  # JSON, the connector's own


class EngineRequest(Struct, frozen=True):
    request_id: str  # unique within the engine's life
    prompt: Sequence[int]
    sampling: SamplingParams
    priority: int = 0  # lower runs first
    cache_salt: str = ""
    lora: str = ""
    produce_handoff: bool = False
    handoff: KvHandoff | None = None
    #: Seconds from now for which the producer promised the handoff's blocks. A read that has not ended by then counts
    #: as failed, and the engine recomputes. None = nobody knows.
    handoff_valid_s: float | None = None
    #: Of the span that the engine's own span of this request lies under; empty = it makes none.
    traceparent: str = ""
    embed: bool = False  # the prompt's embedding is wanted; ``sampling`` means nothing


class EngineOutput(Struct, frozen=True):
    """News about one request. ``token_ids`` are the new ones only."""

    token_ids: Sequence[int] = ()
    finish: FinishReason | None = None
    stop_token_id: int | None = None
    cached_tokens: int | None = (
        None  # prompt tokens that came from this engine's own prefix cache; known with the first token
    )
    transferred_bytes: int | None = None  # KV pulled for this request, where the connector tells
    transfer_s: float | None = None
    transfer_ended_s: float | None = None  # when, by this process's monotonic clock; known with the first token
    handoff: KvHandoff | None = None
    logprobs: Sequence[Sequence[Logprob]] | None = None  # per new token
    prompt_logprobs: Sequence[Sequence[Logprob] | None] | None = None
    embedding: bytes = b""  # little-endian f32
    error: TandemError | None = None


Sink = Callable[[EngineOutput], None]


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What registration needs to know; fixed for the engine's life."""

    engine: str
    engine_version: str
    engine_id: str
    dtype: str
    kv_layout: str
    block_size: int
    max_model_len: int
    kv_blocks_total: int
    kv_bytes_per_token: int
    max_batched_tokens: int
    max_num_seqs: int
    perf_profile: str
    kv_endpoint: str  # "" = no KV transfer
    link_bytes_per_s: float


@dataclass(frozen=True, slots=True)
class EngineStats:
    waiting_requests: int = 0
    running_requests: int = 0
    pending_prefill_tokens: int = 0
    pending_prefill_context_tokens: int = 0
    kv_blocks_used: int = 0
    kv_tokens: int = 0
    steps: int = 0
    last_step_age_s: float = 0.0
    open_handoffs: int = 0
    reads_after_expiry: int = 0  # KV pulls that came after their lease ended: the readers may hold wrong KV
    preemptions: int = 0


class BlocksStored(Struct, frozen=True):
    """Full blocks that entered the prefix cache, oldest first. Hashes are the engine's own, opaque."""

    block_hashes: Sequence[int | bytes]
    parent_hash: int | bytes | None
    token_ids: Sequence[int]  # block_size * len(block_hashes)
    lora: str = ""
    cache_salt: str = ""  # known for chains that start at block 0


class BlocksRemoved(Struct, frozen=True):
    block_hashes: Sequence[int | bytes]


@dataclass(frozen=True, slots=True)
class AllBlocksCleared:
    pass


@dataclass(frozen=True, slots=True)
class EventsMissed:
    """Events were lost and could not be replayed: the map of this engine's cache is no longer whole."""


KvEvent = BlocksStored | BlocksRemoved | AllBlocksCleared | EventsMissed


class Engine(Protocol):
    """See the module docstring."""

    @property
    def info(self) -> EngineInfo:
        """Valid after ``start``."""
        ...

    @property
    def dead(self) -> asyncio.Event:
        """Set when the engine can serve no more."""
        ...

    async def start(self, on_kv_events: Callable[[Sequence[KvEvent]], None]) -> None:
        """Loads the model. EngineFailed or ConfigError when it cannot. KV events arrive on the loop from now on."""
        ...

    def submit(self, request: EngineRequest, sink: Sink) -> None: ...

    def abort(self, request_id: str) -> None: ...

    def claim_handoff(self, handoff_id: str, engine_id: str) -> float | None:
        """Seconds left on the lease of a handoff that this engine produced; None = gone, or another engine's."""
        ...

    def release_handoff(self, handoff_id: str, *, pulled: bool) -> None:
        """The blocks may go now. Unknown handoff: no-op."""
        ...

    def stats(self) -> EngineStats: ...

    def take_step_timings(self) -> list[StepTiming]:
        """Timings of the steps since the last call, oldest first, bounded."""
        ...

    def expose(self, instruments: Instruments) -> Sequence[Collector]:
        """Adds its metrics, under vLLM's names, to the process's; returns what a library collects by itself."""
        ...

    async def reset_prefix_cache(self) -> None: ...

    async def stop(self) -> None: ...


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How a worker's engine is made; from the deployment file's pool."""

    engine: str  # "vllm" | "sim"
    model_path: str
    served_model: str
    worker_id: str
    run_dir: str  # sockets and the like; the process's own
    disaggregated: bool
    max_model_len: int
    block_size: int
    dtype: str
    kv_lease_s: float
    kv_host: str
    kv_port: int
    embeds: bool = False  # makes embeddings instead of tokens
    args: dict[str, object] = field(default_factory=dict)

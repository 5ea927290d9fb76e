from tandem.v1 import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Leg(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LEG_UNSPECIFIED: _ClassVar[Leg]
    LEG_PREFILL: _ClassVar[Leg]
    LEG_LOCAL: _ClassVar[Leg]

class Phase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PHASE_UNSPECIFIED: _ClassVar[Phase]
    PHASE_ACCEPTED: _ClassVar[Phase]
    PHASE_PREFILL_DONE: _ClassVar[Phase]
    PHASE_DECODING: _ClassVar[Phase]
    PHASE_FINISHED: _ClassVar[Phase]
    PHASE_FAILED: _ClassVar[Phase]
    PHASE_ABORTED: _ClassVar[Phase]
    PHASE_UNKNOWN: _ClassVar[Phase]
LEG_UNSPECIFIED: Leg
LEG_PREFILL: Leg
LEG_LOCAL: Leg
PHASE_UNSPECIFIED: Phase
PHASE_ACCEPTED: Phase
PHASE_PREFILL_DONE: Phase
PHASE_DECODING: Phase
PHASE_FINISHED: Phase
PHASE_FAILED: Phase
PHASE_ABORTED: Phase
PHASE_UNKNOWN: Phase

class Submits(_message.Message):
    __slots__ = ("submits",)
    SUBMITS_FIELD_NUMBER: _ClassVar[int]
    submits: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, submits: _Optional[_Iterable[bytes]] = ...) -> None: ...

class Submit(_message.Message):
    __slots__ = ("key", "model", "frontend", "rid", "tenant", "request_class", "timeout_ms", "ttft_slo_ms", "waited_ms", "isl_tokens", "prompt", "block_hashes", "sampling", "lora", "cache_salt", "traceparent", "avoid_workers", "local_only", "embed")
    KEY_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    FRONTEND_FIELD_NUMBER: _ClassVar[int]
    RID_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    REQUEST_CLASS_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    TTFT_SLO_MS_FIELD_NUMBER: _ClassVar[int]
    WAITED_MS_FIELD_NUMBER: _ClassVar[int]
    ISL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    BLOCK_HASHES_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    LORA_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    AVOID_WORKERS_FIELD_NUMBER: _ClassVar[int]
    LOCAL_ONLY_FIELD_NUMBER: _ClassVar[int]
    EMBED_FIELD_NUMBER: _ClassVar[int]
    key: _types_pb2.RequestKey
    model: str
    frontend: str
    rid: int
    tenant: str
    request_class: str
    timeout_ms: int
    ttft_slo_ms: int
    waited_ms: int
    isl_tokens: int
    prompt: bytes
    block_hashes: bytes
    sampling: _types_pb2.SamplingParams
    lora: str
    cache_salt: str
    traceparent: str
    avoid_workers: _containers.RepeatedScalarFieldContainer[str]
    local_only: bool
    embed: bool
    def __init__(self, key: _Optional[_Union[_types_pb2.RequestKey, _Mapping]] = ..., model: _Optional[str] = ..., frontend: _Optional[str] = ..., rid: _Optional[int] = ..., tenant: _Optional[str] = ..., request_class: _Optional[str] = ..., timeout_ms: _Optional[int] = ..., ttft_slo_ms: _Optional[int] = ..., waited_ms: _Optional[int] = ..., isl_tokens: _Optional[int] = ..., prompt: _Optional[bytes] = ..., block_hashes: _Optional[bytes] = ..., sampling: _Optional[_Union[_types_pb2.SamplingParams, _Mapping]] = ..., lora: _Optional[str] = ..., cache_salt: _Optional[str] = ..., traceparent: _Optional[str] = ..., avoid_workers: _Optional[_Iterable[str]] = ..., local_only: _Optional[bool] = ..., embed: _Optional[bool] = ...) -> None: ...

class Reject(_message.Message):
    __slots__ = ("rid", "error")
    RID_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    rid: int
    error: _types_pb2.ErrorDetail
    def __init__(self, rid: _Optional[int] = ..., error: _Optional[_Union[_types_pb2.ErrorDetail, _Mapping]] = ...) -> None: ...

class Assignment(_message.Message):
    __slots__ = ("epoch", "router", "leg", "submit", "decode", "predicted_cached_tokens", "priority", "queued_s", "others_wait")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ROUTER_FIELD_NUMBER: _ClassVar[int]
    LEG_FIELD_NUMBER: _ClassVar[int]
    SUBMIT_FIELD_NUMBER: _ClassVar[int]
    DECODE_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    QUEUED_S_FIELD_NUMBER: _ClassVar[int]
    OTHERS_WAIT_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    router: str
    leg: Leg
    submit: bytes
    decode: _types_pb2.WorkerRef
    predicted_cached_tokens: int
    priority: int
    queued_s: float
    others_wait: bool
    def __init__(self, epoch: _Optional[int] = ..., router: _Optional[str] = ..., leg: _Optional[_Union[Leg, str]] = ..., submit: _Optional[bytes] = ..., decode: _Optional[_Union[_types_pb2.WorkerRef, _Mapping]] = ..., predicted_cached_tokens: _Optional[int] = ..., priority: _Optional[int] = ..., queued_s: _Optional[float] = ..., others_wait: _Optional[bool] = ...) -> None: ...

class KvHandoff(_message.Message):
    __slots__ = ("handoff_id", "engine_id", "num_tokens", "params")
    HANDOFF_ID_FIELD_NUMBER: _ClassVar[int]
    ENGINE_ID_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PARAMS_FIELD_NUMBER: _ClassVar[int]
    handoff_id: str
    engine_id: str
    num_tokens: int
    params: bytes
    def __init__(self, handoff_id: _Optional[str] = ..., engine_id: _Optional[str] = ..., num_tokens: _Optional[int] = ..., params: _Optional[bytes] = ...) -> None: ...

class Handoff(_message.Message):
    __slots__ = ("assignment", "prefill", "kv", "timings")
    ASSIGNMENT_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    KV_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    assignment: Assignment
    prefill: _types_pb2.WorkerRef
    kv: KvHandoff
    timings: Timings
    def __init__(self, assignment: _Optional[_Union[Assignment, _Mapping]] = ..., prefill: _Optional[_Union[_types_pb2.WorkerRef, _Mapping]] = ..., kv: _Optional[_Union[KvHandoff, _Mapping]] = ..., timings: _Optional[_Union[Timings, _Mapping]] = ...) -> None: ...

class Repair(_message.Message):
    __slots__ = ("key", "frontend", "rid", "from_seq")
    KEY_FIELD_NUMBER: _ClassVar[int]
    FRONTEND_FIELD_NUMBER: _ClassVar[int]
    RID_FIELD_NUMBER: _ClassVar[int]
    FROM_SEQ_FIELD_NUMBER: _ClassVar[int]
    key: _types_pb2.RequestKey
    frontend: str
    rid: int
    from_seq: int
    def __init__(self, key: _Optional[_Union[_types_pb2.RequestKey, _Mapping]] = ..., frontend: _Optional[str] = ..., rid: _Optional[int] = ..., from_seq: _Optional[int] = ...) -> None: ...

class Taint(_message.Message):
    __slots__ = ("prefill",)
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    prefill: _types_pb2.WorkerRef
    def __init__(self, prefill: _Optional[_Union[_types_pb2.WorkerRef, _Mapping]] = ...) -> None: ...

class TellAgain(_message.Message):
    __slots__ = ("keys",)
    KEYS_FIELD_NUMBER: _ClassVar[int]
    keys: _containers.RepeatedCompositeFieldContainer[_types_pb2.RequestKey]
    def __init__(self, keys: _Optional[_Iterable[_Union[_types_pb2.RequestKey, _Mapping]]] = ...) -> None: ...

class WorkerMessage(_message.Message):
    __slots__ = ("handoff", "repair", "taint", "tell_again", "assignments")
    HANDOFF_FIELD_NUMBER: _ClassVar[int]
    REPAIR_FIELD_NUMBER: _ClassVar[int]
    TAINT_FIELD_NUMBER: _ClassVar[int]
    TELL_AGAIN_FIELD_NUMBER: _ClassVar[int]
    ASSIGNMENTS_FIELD_NUMBER: _ClassVar[int]
    handoff: Handoff
    repair: Repair
    taint: Taint
    tell_again: TellAgain
    assignments: _containers.RepeatedCompositeFieldContainer[Assignment]
    def __init__(self, handoff: _Optional[_Union[Handoff, _Mapping]] = ..., repair: _Optional[_Union[Repair, _Mapping]] = ..., taint: _Optional[_Union[Taint, _Mapping]] = ..., tell_again: _Optional[_Union[TellAgain, _Mapping]] = ..., assignments: _Optional[_Iterable[_Union[Assignment, _Mapping]]] = ...) -> None: ...

class Timings(_message.Message):
    __slots__ = ("queue_s", "prefill_s", "kv_transfer_s", "decode_s", "kv_transfer_bytes", "cached_tokens", "computed_tokens", "prefill_worker", "decode_worker", "itl_p50_s", "itl_p99_s")
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_S_FIELD_NUMBER: _ClassVar[int]
    KV_TRANSFER_S_FIELD_NUMBER: _ClassVar[int]
    DECODE_S_FIELD_NUMBER: _ClassVar[int]
    KV_TRANSFER_BYTES_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_WORKER_FIELD_NUMBER: _ClassVar[int]
    DECODE_WORKER_FIELD_NUMBER: _ClassVar[int]
    ITL_P50_S_FIELD_NUMBER: _ClassVar[int]
    ITL_P99_S_FIELD_NUMBER: _ClassVar[int]
    queue_s: float
    prefill_s: float
    kv_transfer_s: float
    decode_s: float
    kv_transfer_bytes: int
    cached_tokens: int
    computed_tokens: int
    prefill_worker: str
    decode_worker: str
    itl_p50_s: float
    itl_p99_s: float
    def __init__(self, queue_s: _Optional[float] = ..., prefill_s: _Optional[float] = ..., kv_transfer_s: _Optional[float] = ..., decode_s: _Optional[float] = ..., kv_transfer_bytes: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., computed_tokens: _Optional[int] = ..., prefill_worker: _Optional[str] = ..., decode_worker: _Optional[str] = ..., itl_p50_s: _Optional[float] = ..., itl_p99_s: _Optional[float] = ...) -> None: ...

class Placed(_message.Message):
    __slots__ = ("rid", "leg")
    RID_FIELD_NUMBER: _ClassVar[int]
    LEG_FIELD_NUMBER: _ClassVar[int]
    rid: int
    leg: Leg
    def __init__(self, rid: _Optional[int] = ..., leg: _Optional[_Union[Leg, str]] = ...) -> None: ...

class Finish(_message.Message):
    __slots__ = ("rid", "reason", "stop_token_id", "output_tokens", "cached_tokens", "error", "timings", "embedding")
    RID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    EMBEDDING_FIELD_NUMBER: _ClassVar[int]
    rid: int
    reason: _types_pb2.FinishReason
    stop_token_id: int
    output_tokens: int
    cached_tokens: int
    error: _types_pb2.ErrorDetail
    timings: Timings
    embedding: bytes
    def __init__(self, rid: _Optional[int] = ..., reason: _Optional[_Union[_types_pb2.FinishReason, str]] = ..., stop_token_id: _Optional[int] = ..., output_tokens: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., error: _Optional[_Union[_types_pb2.ErrorDetail, _Mapping]] = ..., timings: _Optional[_Union[Timings, _Mapping]] = ..., embedding: _Optional[bytes] = ...) -> None: ...

class LogprobsUpdate(_message.Message):
    __slots__ = ("rid", "seq", "positions", "prompt_positions")
    RID_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_POSITIONS_FIELD_NUMBER: _ClassVar[int]
    rid: int
    seq: int
    positions: _containers.RepeatedCompositeFieldContainer[_types_pb2.PositionLogprobs]
    prompt_positions: _containers.RepeatedCompositeFieldContainer[_types_pb2.PositionLogprobs]
    def __init__(self, rid: _Optional[int] = ..., seq: _Optional[int] = ..., positions: _Optional[_Iterable[_Union[_types_pb2.PositionLogprobs, _Mapping]]] = ..., prompt_positions: _Optional[_Iterable[_Union[_types_pb2.PositionLogprobs, _Mapping]]] = ...) -> None: ...

class TokenFrame(_message.Message):
    __slots__ = ("worker", "rids", "seqs", "counts", "tokens", "placed", "finishes", "rejects", "logprobs")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    RIDS_FIELD_NUMBER: _ClassVar[int]
    SEQS_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    PLACED_FIELD_NUMBER: _ClassVar[int]
    FINISHES_FIELD_NUMBER: _ClassVar[int]
    REJECTS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    worker: _types_pb2.WorkerRef
    rids: _containers.RepeatedScalarFieldContainer[int]
    seqs: _containers.RepeatedScalarFieldContainer[int]
    counts: _containers.RepeatedScalarFieldContainer[int]
    tokens: bytes
    placed: _containers.RepeatedCompositeFieldContainer[Placed]
    finishes: _containers.RepeatedCompositeFieldContainer[Finish]
    rejects: _containers.RepeatedCompositeFieldContainer[Reject]
    logprobs: _containers.RepeatedCompositeFieldContainer[LogprobsUpdate]
    def __init__(self, worker: _Optional[_Union[_types_pb2.WorkerRef, _Mapping]] = ..., rids: _Optional[_Iterable[int]] = ..., seqs: _Optional[_Iterable[int]] = ..., counts: _Optional[_Iterable[int]] = ..., tokens: _Optional[bytes] = ..., placed: _Optional[_Iterable[_Union[Placed, _Mapping]]] = ..., finishes: _Optional[_Iterable[_Union[Finish, _Mapping]]] = ..., rejects: _Optional[_Iterable[_Union[Reject, _Mapping]]] = ..., logprobs: _Optional[_Iterable[_Union[LogprobsUpdate, _Mapping]]] = ...) -> None: ...

class Abort(_message.Message):
    __slots__ = ("id", "max_attempt", "choice")
    ID_FIELD_NUMBER: _ClassVar[int]
    MAX_ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    id: str
    max_attempt: int
    choice: int
    def __init__(self, id: _Optional[str] = ..., max_attempt: _Optional[int] = ..., choice: _Optional[int] = ...) -> None: ...

class LeaderAnnouncement(_message.Message):
    __slots__ = ("model", "router", "epoch")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ROUTER_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    model: str
    router: str
    epoch: int
    def __init__(self, model: _Optional[str] = ..., router: _Optional[str] = ..., epoch: _Optional[int] = ...) -> None: ...

class WorkerLost(_message.Message):
    __slots__ = ("model", "worker", "incarnation", "gone")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    GONE_FIELD_NUMBER: _ClassVar[int]
    model: str
    worker: str
    incarnation: int
    gone: bool
    def __init__(self, model: _Optional[str] = ..., worker: _Optional[str] = ..., incarnation: _Optional[int] = ..., gone: _Optional[bool] = ...) -> None: ...

class LifecycleEvent(_message.Message):
    __slots__ = ("key", "phase", "output_tokens", "cached_tokens", "error_code")
    KEY_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ERROR_CODE_FIELD_NUMBER: _ClassVar[int]
    key: _types_pb2.RequestKey
    phase: Phase
    output_tokens: int
    cached_tokens: int
    error_code: str
    def __init__(self, key: _Optional[_Union[_types_pb2.RequestKey, _Mapping]] = ..., phase: _Optional[_Union[Phase, str]] = ..., output_tokens: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., error_code: _Optional[str] = ...) -> None: ...

class LifecycleEvents(_message.Message):
    __slots__ = ("worker", "events")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    worker: _types_pb2.WorkerRef
    events: _containers.RepeatedCompositeFieldContainer[LifecycleEvent]
    def __init__(self, worker: _Optional[_Union[_types_pb2.WorkerRef, _Mapping]] = ..., events: _Optional[_Iterable[_Union[LifecycleEvent, _Mapping]]] = ...) -> None: ...

class StepTiming(_message.Message):
    __slots__ = ("duration_s", "prefill_tokens", "prefill_context_tokens", "decode_sequences", "kv_tokens")
    DURATION_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DECODE_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    KV_TOKENS_FIELD_NUMBER: _ClassVar[int]
    duration_s: float
    prefill_tokens: int
    prefill_context_tokens: int
    decode_sequences: int
    kv_tokens: int
    def __init__(self, duration_s: _Optional[float] = ..., prefill_tokens: _Optional[int] = ..., prefill_context_tokens: _Optional[int] = ..., decode_sequences: _Optional[int] = ..., kv_tokens: _Optional[int] = ...) -> None: ...

class LoadReport(_message.Message):
    __slots__ = ("worker", "model", "role", "draining", "waiting_requests", "running_requests", "pending_prefill_tokens", "pending_prefill_context_tokens", "kv_blocks_used", "kv_blocks_total", "kv_tokens", "steps", "last_step_age_s", "step_timings", "open_handoffs", "epoch", "report_seq", "index_complete")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    WAITING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    PENDING_PREFILL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PENDING_PREFILL_CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_USED_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    KV_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    LAST_STEP_AGE_S_FIELD_NUMBER: _ClassVar[int]
    STEP_TIMINGS_FIELD_NUMBER: _ClassVar[int]
    OPEN_HANDOFFS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    REPORT_SEQ_FIELD_NUMBER: _ClassVar[int]
    INDEX_COMPLETE_FIELD_NUMBER: _ClassVar[int]
    worker: _types_pb2.WorkerRef
    model: str
    role: _types_pb2.Role
    draining: bool
    waiting_requests: int
    running_requests: int
    pending_prefill_tokens: int
    pending_prefill_context_tokens: int
    kv_blocks_used: int
    kv_blocks_total: int
    kv_tokens: int
    steps: int
    last_step_age_s: float
    step_timings: _containers.RepeatedCompositeFieldContainer[StepTiming]
    open_handoffs: int
    epoch: int
    report_seq: int
    index_complete: bool
    def __init__(self, worker: _Optional[_Union[_types_pb2.WorkerRef, _Mapping]] = ..., model: _Optional[str] = ..., role: _Optional[_Union[_types_pb2.Role, str]] = ..., draining: _Optional[bool] = ..., waiting_requests: _Optional[int] = ..., running_requests: _Optional[int] = ..., pending_prefill_tokens: _Optional[int] = ..., pending_prefill_context_tokens: _Optional[int] = ..., kv_blocks_used: _Optional[int] = ..., kv_blocks_total: _Optional[int] = ..., kv_tokens: _Optional[int] = ..., steps: _Optional[int] = ..., last_step_age_s: _Optional[float] = ..., step_timings: _Optional[_Iterable[_Union[StepTiming, _Mapping]]] = ..., open_handoffs: _Optional[int] = ..., epoch: _Optional[int] = ..., report_seq: _Optional[int] = ..., index_complete: _Optional[bool] = ...) -> None: ...

class WorkerInfo(_message.Message):
    __slots__ = ("ref", "model", "role", "slot", "block_size", "dtype", "kv_layout", "engine", "engine_version", "wire_version", "max_model_len", "kv_blocks_total", "kv_bytes_per_token", "max_batched_tokens", "max_num_seqs", "perf_profile", "kv_endpoint", "link_bytes_per_s", "loras", "pool", "draining")
    REF_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    KV_LAYOUT_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    ENGINE_VERSION_FIELD_NUMBER: _ClassVar[int]
    WIRE_VERSION_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_PER_TOKEN_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_SEQS_FIELD_NUMBER: _ClassVar[int]
    PERF_PROFILE_FIELD_NUMBER: _ClassVar[int]
    KV_ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    LINK_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    LORAS_FIELD_NUMBER: _ClassVar[int]
    POOL_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    ref: _types_pb2.WorkerRef
    model: str
    role: _types_pb2.Role
    slot: int
    block_size: int
    dtype: str
    kv_layout: str
    engine: str
    engine_version: str
    wire_version: int
    max_model_len: int
    kv_blocks_total: int
    kv_bytes_per_token: int
    max_batched_tokens: int
    max_num_seqs: int
    perf_profile: str
    kv_endpoint: str
    link_bytes_per_s: float
    loras: _containers.RepeatedScalarFieldContainer[str]
    pool: str
    draining: bool
    def __init__(self, ref: _Optional[_Union[_types_pb2.WorkerRef, _Mapping]] = ..., model: _Optional[str] = ..., role: _Optional[_Union[_types_pb2.Role, str]] = ..., slot: _Optional[int] = ..., block_size: _Optional[int] = ..., dtype: _Optional[str] = ..., kv_layout: _Optional[str] = ..., engine: _Optional[str] = ..., engine_version: _Optional[str] = ..., wire_version: _Optional[int] = ..., max_model_len: _Optional[int] = ..., kv_blocks_total: _Optional[int] = ..., kv_bytes_per_token: _Optional[int] = ..., max_batched_tokens: _Optional[int] = ..., max_num_seqs: _Optional[int] = ..., perf_profile: _Optional[str] = ..., kv_endpoint: _Optional[str] = ..., link_bytes_per_s: _Optional[float] = ..., loras: _Optional[_Iterable[str]] = ..., pool: _Optional[str] = ..., draining: _Optional[bool] = ...) -> None: ...

from tandem.v1 import bus_pb2 as _bus_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ExplainRequest(_message.Message):
    __slots__ = ("model", "isl_tokens", "block_hashes", "tenant", "request_class", "max_tokens")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ISL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_HASHES_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    REQUEST_CLASS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    model: str
    isl_tokens: int
    block_hashes: bytes
    tenant: str
    request_class: str
    max_tokens: int
    def __init__(self, model: _Optional[str] = ..., isl_tokens: _Optional[int] = ..., block_hashes: _Optional[bytes] = ..., tenant: _Optional[str] = ..., request_class: _Optional[str] = ..., max_tokens: _Optional[int] = ...) -> None: ...

class Term(_message.Message):
    __slots__ = ("name", "value")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    name: str
    value: float
    def __init__(self, name: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...

class Candidate(_message.Message):
    __slots__ = ("decode_worker", "prefill_worker", "score", "terms", "chosen", "excluded")
    DECODE_WORKER_FIELD_NUMBER: _ClassVar[int]
    PREFILL_WORKER_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    TERMS_FIELD_NUMBER: _ClassVar[int]
    CHOSEN_FIELD_NUMBER: _ClassVar[int]
    EXCLUDED_FIELD_NUMBER: _ClassVar[int]
    decode_worker: str
    prefill_worker: str
    score: float
    terms: _containers.RepeatedCompositeFieldContainer[Term]
    chosen: bool
    excluded: str
    def __init__(self, decode_worker: _Optional[str] = ..., prefill_worker: _Optional[str] = ..., score: _Optional[float] = ..., terms: _Optional[_Iterable[_Union[Term, _Mapping]]] = ..., chosen: _Optional[bool] = ..., excluded: _Optional[str] = ...) -> None: ...

class ExplainResponse(_message.Message):
    __slots__ = ("candidates", "summary")
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    candidates: _containers.RepeatedCompositeFieldContainer[Candidate]
    summary: str
    def __init__(self, candidates: _Optional[_Iterable[_Union[Candidate, _Mapping]]] = ..., summary: _Optional[str] = ...) -> None: ...

class ListWorkersRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class WorkerState(_message.Message):
    __slots__ = ("info", "load", "liveness", "silent_s")
    INFO_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    LIVENESS_FIELD_NUMBER: _ClassVar[int]
    SILENT_S_FIELD_NUMBER: _ClassVar[int]
    info: _bus_pb2.WorkerInfo
    load: _bus_pb2.LoadReport
    liveness: str
    silent_s: float
    def __init__(self, info: _Optional[_Union[_bus_pb2.WorkerInfo, _Mapping]] = ..., load: _Optional[_Union[_bus_pb2.LoadReport, _Mapping]] = ..., liveness: _Optional[str] = ..., silent_s: _Optional[float] = ...) -> None: ...

class ListWorkersResponse(_message.Message):
    __slots__ = ("workers",)
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    workers: _containers.RepeatedCompositeFieldContainer[WorkerState]
    def __init__(self, workers: _Optional[_Iterable[_Union[WorkerState, _Mapping]]] = ...) -> None: ...

class GetPolicyRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class GetPolicyResponse(_message.Message):
    __slots__ = ("policy_json", "classes_json", "tenants_json")
    POLICY_JSON_FIELD_NUMBER: _ClassVar[int]
    CLASSES_JSON_FIELD_NUMBER: _ClassVar[int]
    TENANTS_JSON_FIELD_NUMBER: _ClassVar[int]
    policy_json: str
    classes_json: str
    tenants_json: str
    def __init__(self, policy_json: _Optional[str] = ..., classes_json: _Optional[str] = ..., tenants_json: _Optional[str] = ...) -> None: ...

class GetLeadersRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Leader(_message.Message):
    __slots__ = ("model", "router", "epoch", "self")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ROUTER_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SELF_FIELD_NUMBER: _ClassVar[int]
    model: str
    router: str
    epoch: int
    self: bool
    def __init__(self_, model: _Optional[str] = ..., router: _Optional[str] = ..., epoch: _Optional[int] = ..., self: _Optional[bool] = ...) -> None: ...

class GetLeadersResponse(_message.Message):
    __slots__ = ("leaders",)
    LEADERS_FIELD_NUMBER: _ClassVar[int]
    leaders: _containers.RepeatedCompositeFieldContainer[Leader]
    def __init__(self, leaders: _Optional[_Iterable[_Union[Leader, _Mapping]]] = ...) -> None: ...

class GetAccountingRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class Booked(_message.Message):
    __slots__ = ("worker", "in_flight", "pending_prefill_s", "kv_blocks_in_use", "kv_blocks_total", "sequences", "model_error")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    PENDING_PREFILL_S_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_IN_USE_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    MODEL_ERROR_FIELD_NUMBER: _ClassVar[int]
    worker: str
    in_flight: int
    pending_prefill_s: float
    kv_blocks_in_use: int
    kv_blocks_total: int
    sequences: int
    model_error: float
    def __init__(self, worker: _Optional[str] = ..., in_flight: _Optional[int] = ..., pending_prefill_s: _Optional[float] = ..., kv_blocks_in_use: _Optional[int] = ..., kv_blocks_total: _Optional[int] = ..., sequences: _Optional[int] = ..., model_error: _Optional[float] = ...) -> None: ...

class QueueDepth(_message.Message):
    __slots__ = ("name", "requests", "tokens")
    NAME_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    name: str
    requests: int
    tokens: int
    def __init__(self, name: _Optional[str] = ..., requests: _Optional[int] = ..., tokens: _Optional[int] = ...) -> None: ...

class GetAccountingResponse(_message.Message):
    __slots__ = ("queued", "queued_tokens", "oldest_wait_s", "in_flight", "kept", "workers", "queue_by_class", "queue_by_tenant", "service")
    class ServiceEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    QUEUED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OLDEST_WAIT_S_FIELD_NUMBER: _ClassVar[int]
    IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    KEPT_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_BY_CLASS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_BY_TENANT_FIELD_NUMBER: _ClassVar[int]
    SERVICE_FIELD_NUMBER: _ClassVar[int]
    queued: int
    queued_tokens: int
    oldest_wait_s: float
    in_flight: int
    kept: int
    workers: _containers.RepeatedCompositeFieldContainer[Booked]
    queue_by_class: _containers.RepeatedCompositeFieldContainer[QueueDepth]
    queue_by_tenant: _containers.RepeatedCompositeFieldContainer[QueueDepth]
    service: _containers.ScalarMap[str, float]
    def __init__(self, queued: _Optional[int] = ..., queued_tokens: _Optional[int] = ..., oldest_wait_s: _Optional[float] = ..., in_flight: _Optional[int] = ..., kept: _Optional[int] = ..., workers: _Optional[_Iterable[_Union[Booked, _Mapping]]] = ..., queue_by_class: _Optional[_Iterable[_Union[QueueDepth, _Mapping]]] = ..., queue_by_tenant: _Optional[_Iterable[_Union[QueueDepth, _Mapping]]] = ..., service: _Optional[_Mapping[str, float]] = ...) -> None: ...

from tandem.v1 import bus_pb2 as _bus_pb2
from tandem.v1 import types_pb2 as _types_pb2
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DescribeResponse(_message.Message):
    __slots__ = ("info", "load")
    INFO_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    info: _bus_pb2.WorkerInfo
    load: _bus_pb2.LoadReport
    def __init__(self, info: _Optional[_Union[_bus_pb2.WorkerInfo, _Mapping]] = ..., load: _Optional[_Union[_bus_pb2.LoadReport, _Mapping]] = ...) -> None: ...

class FenceRequest(_message.Message):
    __slots__ = ("router", "epoch")
    ROUTER_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    router: str
    epoch: int
    def __init__(self, router: _Optional[str] = ..., epoch: _Optional[int] = ...) -> None: ...

class FenceResponse(_message.Message):
    __slots__ = ("highest_epoch",)
    HIGHEST_EPOCH_FIELD_NUMBER: _ClassVar[int]
    highest_epoch: int
    def __init__(self, highest_epoch: _Optional[int] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SetRoleRequest(_message.Message):
    __slots__ = ("role",)
    ROLE_FIELD_NUMBER: _ClassVar[int]
    role: _types_pb2.Role
    def __init__(self, role: _Optional[_Union[_types_pb2.Role, str]] = ...) -> None: ...

class SetRoleResponse(_message.Message):
    __slots__ = ("previous",)
    PREVIOUS_FIELD_NUMBER: _ClassVar[int]
    previous: _types_pb2.Role
    def __init__(self, previous: _Optional[_Union[_types_pb2.Role, str]] = ...) -> None: ...

class AbortRequest(_message.Message):
    __slots__ = ("id", "max_attempt")
    ID_FIELD_NUMBER: _ClassVar[int]
    MAX_ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    id: str
    max_attempt: int
    def __init__(self, id: _Optional[str] = ..., max_attempt: _Optional[int] = ...) -> None: ...

class AbortResponse(_message.Message):
    __slots__ = ("aborted",)
    ABORTED_FIELD_NUMBER: _ClassVar[int]
    aborted: int
    def __init__(self, aborted: _Optional[int] = ...) -> None: ...

class FlushRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class FlushResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ClaimHandoffRequest(_message.Message):
    __slots__ = ("handoff_id", "engine_id", "decode_worker")
    HANDOFF_ID_FIELD_NUMBER: _ClassVar[int]
    ENGINE_ID_FIELD_NUMBER: _ClassVar[int]
    DECODE_WORKER_FIELD_NUMBER: _ClassVar[int]
    handoff_id: str
    engine_id: str
    decode_worker: str
    def __init__(self, handoff_id: _Optional[str] = ..., engine_id: _Optional[str] = ..., decode_worker: _Optional[str] = ...) -> None: ...

class ClaimHandoffResponse(_message.Message):
    __slots__ = ("granted", "lease_left_s")
    GRANTED_FIELD_NUMBER: _ClassVar[int]
    LEASE_LEFT_S_FIELD_NUMBER: _ClassVar[int]
    granted: bool
    lease_left_s: float
    def __init__(self, granted: _Optional[bool] = ..., lease_left_s: _Optional[float] = ...) -> None: ...

class ReleaseHandoffRequest(_message.Message):
    __slots__ = ("handoff_id", "engine_id", "pulled")
    HANDOFF_ID_FIELD_NUMBER: _ClassVar[int]
    ENGINE_ID_FIELD_NUMBER: _ClassVar[int]
    PULLED_FIELD_NUMBER: _ClassVar[int]
    handoff_id: str
    engine_id: str
    pulled: bool
    def __init__(self, handoff_id: _Optional[str] = ..., engine_id: _Optional[str] = ..., pulled: _Optional[bool] = ...) -> None: ...

class ReleaseHandoffResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

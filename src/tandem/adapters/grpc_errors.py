"""TandemError <-> gRPC status, in one table.

The status code is for any client; the whole error (code, message, retryable, retry-after) travels as an ErrorDetail in
the trailing metadata ``tandem-error-bin``, from which ``error_of`` makes the same class again.
"""

from __future__ import annotations

from typing import Any, NoReturn, Protocol

import grpc
from google.protobuf.message import DecodeError

from tandem import errors
from tandem.v1 import types_pb2
from tandem.wire.codec import error_from_wire, error_to_wire

METADATA_KEY = "tandem-error-bin"

STATUS: dict[type[errors.TandemError], grpc.StatusCode] = {
    errors.InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    errors.ContextLengthExceeded: grpc.StatusCode.INVALID_ARGUMENT,
    errors.UnknownModel: grpc.StatusCode.NOT_FOUND,
    errors.PayloadTooLarge: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    errors.PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
    errors.Refused: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.DeadlineInfeasible: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.NoWorkers: grpc.StatusCode.UNAVAILABLE,
    errors.Leaving: grpc.StatusCode.UNAVAILABLE,
    errors.TimedOut: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.QueueTimeout: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.RequestTimeout: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.Cancelled: grpc.StatusCode.CANCELLED,
    errors.Lost: grpc.StatusCode.UNAVAILABLE,
    errors.NoLeader: grpc.StatusCode.UNAVAILABLE,
    errors.WorkerLostError: grpc.StatusCode.UNAVAILABLE,
    errors.HandoffFailed: grpc.StatusCode.UNAVAILABLE,
    errors.EngineFailed: grpc.StatusCode.UNAVAILABLE,
    errors.StaleEpoch: grpc.StatusCode.ABORTED,
    errors.UnknownRequest: grpc.StatusCode.NOT_FOUND,
    errors.BusUnavailable: grpc.StatusCode.UNAVAILABLE,
    errors.StoreUnavailable: grpc.StatusCode.UNAVAILABLE,
    errors.IncompatibleWorker: grpc.StatusCode.FAILED_PRECONDITION,
    errors.ConfigError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.StartFailed: grpc.StatusCode.UNAVAILABLE,
    errors.InternalError: grpc.StatusCode.INTERNAL,
}

#: What a status without an ErrorDetail means: it came from gRPC itself, or from somebody else's server.
_WITHOUT_DETAIL: dict[grpc.StatusCode, type[errors.TandemError]] = {
    grpc.StatusCode.CANCELLED: errors.Cancelled,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.RequestTimeout,
    grpc.StatusCode.UNAVAILABLE: errors.Lost,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.PayloadTooLarge,  # a message over the channel's limit
    grpc.StatusCode.UNAUTHENTICATED: errors.Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: errors.PermissionDenied,
}


class Abortable(Protocol):
    """The part of a servicer context that is used here."""

    async def abort(
        self, code: grpc.StatusCode, details: str = ..., trailing_metadata: tuple[tuple[str, bytes], ...] = ...
    ) -> NoReturn: ...


async def abort_with(context: Abortable, error: errors.TandemError) -> NoReturn:
    """Ends the call with the error's status and its whole content."""
    detail = error_to_wire(error).SerializeToString()
    await context.abort(STATUS[type(error)], error.message, ((METADATA_KEY, detail),))


def error_of(failed: grpc.RpcError) -> errors.TandemError:
    """The error that a call ended with, at the caller."""
    if not isinstance(failed, grpc.aio.AioRpcError):
        return errors.InternalError(f"call failed: {failed}")
    metadata: Any = failed.trailing_metadata() or ()  # pairs; the stubs say otherwise
    for key, value in metadata:
        if key == METADATA_KEY and isinstance(value, bytes):
            try:
                return error_from_wire(types_pb2.ErrorDetail.FromString(value))
            except DecodeError:
                break
    cls = _WITHOUT_DETAIL.get(failed.code(), errors.InternalError)
    return cls(f"{failed.code().name}: {failed.details() or 'no details'}")

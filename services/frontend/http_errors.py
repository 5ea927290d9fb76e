"""How each error looks over HTTP: status and OpenAI's error type. One table; a test sees that no error is missing."""

from __future__ import annotations

import math
from typing import Any

import msgspec

from tandem import errors

#: error class -> (status, OpenAI's ``type``)
HTTP_STATUS: dict[type[errors.TandemError], tuple[int, str]] = {
    errors.InvalidRequest: (400, "invalid_request_error"),
    errors.ContextLengthExceeded: (400, "invalid_request_error"),
    errors.UnknownModel: (404, "invalid_request_error"),
    errors.PayloadTooLarge: (413, "invalid_request_error"),
    errors.Unauthenticated: (401, "authentication_error"),
    errors.PermissionDenied: (403, "permission_error"),
    errors.Refused: (429, "rate_limit_error"),
    errors.Overloaded: (429, "rate_limit_error"),
    errors.DeadlineInfeasible: (429, "rate_limit_error"),
    errors.NoWorkers: (503, "service_unavailable_error"),
    errors.Leaving: (503, "service_unavailable_error"),
    errors.TimedOut: (504, "timeout_error"),
    errors.QueueTimeout: (504, "timeout_error"),
    errors.RequestTimeout: (504, "timeout_error"),
    errors.Cancelled: (499, "cancelled_error"),
    errors.Lost: (502, "upstream_error"),
    errors.NoLeader: (503, "service_unavailable_error"),
    errors.WorkerLostError: (502, "upstream_error"),
    errors.HandoffFailed: (502, "upstream_error"),
    errors.EngineFailed: (502, "upstream_error"),
    errors.StaleEpoch: (502, "upstream_error"),
    errors.UnknownRequest: (502, "upstream_error"),
    errors.BusUnavailable: (503, "service_unavailable_error"),
    errors.StoreUnavailable: (503, "service_unavailable_error"),
    errors.IncompatibleWorker: (500, "server_error"),
    errors.ConfigError: (500, "server_error"),
    errors.StartFailed: (503, "service_unavailable_error"),
    errors.InternalError: (500, "server_error"),
}


#: With these a client is told when to come back, also where nothing better than "in a moment" is known.
_LATER = frozenset({429, 503})


def http_status(error: errors.TandemError) -> int:
    return HTTP_STATUS[type(error)][0]


def error_fields(error: errors.TandemError) -> dict[str, Any]:
    """``code`` is the class's own; ``retryable`` says whether the same request may succeed later."""
    return {
        "message": error.message,
        "type": HTTP_STATUS[type(error)][1],
        "param": error.param,
        "code": error.code,
        "retryable": error.retryable,
        "hint": error.hint,
    }


def error_body(error: errors.TandemError) -> bytes:
    return msgspec.json.encode({"error": error_fields(error)})


def error_headers(error: errors.TandemError) -> list[tuple[bytes, bytes]]:
    if error.retry_after_s > 0 or http_status(error) in _LATER:
        return [(b"retry-after", str(max(1, math.ceil(error.retry_after_s))).encode())]
    if isinstance(error, errors.Unauthenticated):
        return [(b"www-authenticate", b"Bearer")]
    return []

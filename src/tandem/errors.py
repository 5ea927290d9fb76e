"""Every error that crosses a process border or reaches a user, in one tree.

    TandemError
    ├── InvalidRequest            the client's mistake; never retryable as it is
    │   ├── ContextLengthExceeded
    │   ├── UnknownModel
    │   ├── PayloadTooLarge
    │   ├── Unauthenticated
    │   └── PermissionDenied
    ├── Refused                   the cluster will not take it now
    │   ├── Overloaded
    │   ├── DeadlineInfeasible
    │   └── NoWorkers
    ├── TimedOut
    │   ├── QueueTimeout
    │   └── RequestTimeout
    ├── Cancelled
    ├── Lost                      a part of the cluster went away under the request
    │   ├── NoLeader
    │   ├── WorkerLostError
    │   ├── HandoffFailed
    │   ├── EngineFailed
    │   ├── StaleEpoch
    │   ├── UnknownRequest
    │   └── BusUnavailable
    ├── StoreUnavailable          Redis
    ├── IncompatibleWorker        registration refused
    ├── ConfigError               a user's mistake in settings or the deployment file
    ├── StartFailed               a process of the local cluster does not start
    └── InternalError             a defect of ours

Each class declares, once, its stable ``code`` (on the wire, in logs and metrics), whether the same request may
succeed if sent again (``retryable``), a one-line ``meaning``, and a ``hint`` at what can be done about it. The mapping
to HTTP and gRPC status is one table per edge; a test asserts that every class is in every table.
"""

from __future__ import annotations

from typing import ClassVar


class TandemError(Exception):
    """Base. ``message`` is for people; ``code`` is for programs."""

    code: ClassVar[str] = "internal_error"
    retryable: ClassVar[bool] = False
    meaning: ClassVar[str] = "Base of all errors."
    hint: ClassVar[str] = ""

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.message = message
        #: Name of the offending request field or setting, where there is one.
        self.param = param
        #: Seconds after which a retry has a chance; 0 = not known.
        self.retry_after_s = retry_after_s


class InvalidRequest(TandemError):
    code = "invalid_request"
    meaning = "A field of the request is missing, malformed or out of range."
    hint = "Correct the field that `param` names; /docs has every field with its range."


class ContextLengthExceeded(InvalidRequest):
    code = "context_length_exceeded"
    meaning = "Prompt plus requested output is longer than the model's context."
    hint = "Shorten the prompt or lower max_tokens; /tokenize counts a prompt's tokens."


class UnknownModel(InvalidRequest):
    code = "model_not_found"
    meaning = "No model of that name is served."
    hint = "GET /v1/models lists what is served."


class PayloadTooLarge(InvalidRequest):
    code = "payload_too_large"
    meaning = "The request is larger than the configured limit."
    hint = "Send less, or raise `limits.max_body_bytes` in the deployment file."


class Unauthenticated(InvalidRequest):
    code = "invalid_api_key"
    meaning = "The API key is missing or unknown."
    hint = "Send the header `Authorization: Bearer KEY` with a key of a tenant of the deployment file."


class PermissionDenied(InvalidRequest):
    code = "permission_denied"
    meaning = "The tenant may not do this."
    hint = "Ask for a class in the tenant's `allowed_classes`, or for none."


class Refused(TandemError):
    code = "refused"
    retryable = True
    meaning = "The cluster does not take the request now."
    hint = "Send it again after a moment."


class Overloaded(Refused):
    code = "overloaded"
    meaning = "The queue of this model is full."
    hint = "Send it again after `retry-after`; more workers take more."


class DeadlineInfeasible(Refused):
    code = "deadline_infeasible"
    meaning = "The SLO that the request asks for cannot be met now."
    hint = "Send it again after `retry-after`, or ask for a longer ttft_slo_ms."


class NoWorkers(Refused):
    code = "no_workers"
    meaning = "No worker that could run this request is alive."
    hint = "Send it again; `tandem status` shows which workers live."


class Leaving(Refused):
    code = "leaving"
    meaning = "The server that was asked is shutting down."
    hint = "Send it again: another server takes it, or this one when it is back."


class TimedOut(TandemError):
    code = "timed_out"
    retryable = True
    meaning = "A wait reached its deadline."
    hint = "Send it again after a moment."


class QueueTimeout(TimedOut):
    code = "queue_timeout"
    meaning = "The request waited in the queue for its whole time limit."
    hint = "Send it again when the load is lower, or give the class a longer `timeout_s`."


class RequestTimeout(TimedOut):
    code = "request_timeout"
    meaning = "The request did not end within its time limit."
    hint = "Ask for fewer tokens, or give the class a longer `timeout_s`."


class Cancelled(TandemError):
    code = "cancelled"
    meaning = "The client cancelled the request."
    hint = "Nothing is to be done: the client ended it, or read too slowly."


class Lost(TandemError):
    code = "lost"
    retryable = True
    meaning = "A part of the cluster went away under the request."
    hint = "Send it again."


class NoLeader(Lost):
    code = "no_leader"
    meaning = "No router leads this model at the moment."
    hint = "Send it again; if it stays, `tandem status` shows whether a router runs."


class WorkerLostError(Lost):
    code = "worker_lost"
    meaning = "The worker that held the request died."
    hint = "Send it again: another worker takes it."


class HandoffFailed(Lost):
    code = "handoff_failed"
    meaning = "The KV blocks could not be handed from the prefill to the decode worker."
    hint = "Send it again; if it stays, look at the workers' logs for the transfer."


class EngineFailed(Lost):
    code = "engine_failed"
    meaning = "The engine reported an error for this request."
    hint = "Send it again; if it stays, the worker's log says what the engine stumbled over."


class StaleEpoch(Lost):
    code = "stale_epoch"
    meaning = "The router that sent this is no longer the leader."
    hint = "Send it again: another router leads now."


class UnknownRequest(Lost):
    code = "unknown_request"
    meaning = "The worker does not know this request (any more)."
    hint = "Send it again."


class BusUnavailable(Lost):
    code = "bus_unavailable"
    meaning = "The message bus is not reachable."
    hint = "Send it again; if it stays, look whether nats-server runs."


class StoreUnavailable(TandemError):
    code = "store_unavailable"
    retryable = True
    meaning = "Redis is not reachable."
    hint = "Send it again; if it stays, look whether Redis runs."


class IncompatibleWorker(TandemError):
    code = "incompatible_worker"
    meaning = "A worker differs from the others of its model in something that they must share."
    hint = "Start all workers of a model with the same version, dtype and block size; dtype auto goes by the CPU."


class ConfigError(TandemError):
    code = "config_error"
    meaning = "A setting or the deployment file is wrong."
    hint = "Correct the setting that the message names; docs/settings.md and docs/deployment-file.md have all."


class StartFailed(TandemError):
    code = "start_failed"
    meaning = "A process of the local cluster does not start."
    hint = "The message or the process's log says why; start it again when that is mended."


class InternalError(TandemError):
    code = "internal_error"
    meaning = "A defect in Tandem."
    hint = "Report it, with the request's id and the log."


def all_errors() -> dict[str, type[TandemError]]:
    """Every class below TandemError by its code."""
    found: dict[str, type[TandemError]] = {}
    todo: list[type[TandemError]] = [TandemError]
    while todo:
        for sub in todo.pop().__subclasses__():
            found[sub.code] = sub
            todo.append(sub)
    return found


def from_code(code: str, message: str, *, retry_after_s: float = 0.0) -> TandemError:
    """The error a peer reported by ``code``; an unknown code (a newer peer's) becomes InternalError."""
    cls = all_errors().get(code, InternalError)
    return cls(message, retry_after_s=retry_after_s)

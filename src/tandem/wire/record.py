"""What a router records of its decision core: one JSON line for each call of the scheduler, with what came of it.

A recording holds all that decisions depend on (policy, classes, tenants, timing profiles, the seed, and every input
with its time) and so can be decided again, elsewhere. Of requests it holds identities, lengths and who asked; no
prompt, no output, no block hash.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec

from tandem.core.effects import Effect, Place, Recall, Refuse
from tandem.core.policy import Policy, RequestClass, Tenant
from tandem.core.profiles import Profile
from tandem.core.types import Plan, Request, RequestKey, WorkerLoad, WorkerSpec
from tandem.errors import ConfigError

VERSION = 1


class Call(msgspec.Struct, tag=True, frozen=True, omit_defaults=True):
    """Base of all lines. ``at``: the router's clock."""

    at: float


class Begin(Call, frozen=True, omit_defaults=True):
    """The scheduler as it was made."""

    version: int
    model: str
    router: str
    seed: int
    policy: Policy
    classes: dict[str, RequestClass]
    tenants: dict[str, Tenant]
    profiles: dict[str, Profile]


class Reconfigured(Call, frozen=True, omit_defaults=True):
    policy: Policy
    classes: dict[str, RequestClass]
    tenants: dict[str, Tenant]


class WorkerUp(Call, frozen=True, omit_defaults=True):
    spec: WorkerSpec
    lost: tuple[RequestKey, ...] = ()


class WorkerReport(Call, frozen=True, omit_defaults=True):
    load: WorkerLoad


class WorkerSuspect(Call, frozen=True, omit_defaults=True):
    worker: str
    suspect: bool


class WorkerDown(Call, frozen=True, omit_defaults=True):
    worker: str
    incarnation: int
    lost: tuple[RequestKey, ...] = ()


class Submitted(Call, frozen=True, omit_defaults=True):
    request: Request
    cached: dict[str, int]
    refused: str = ""  # error code


class PrefillDone(Call, frozen=True, omit_defaults=True):
    key: RequestKey


class DecodeStarted(Call, frozen=True, omit_defaults=True):
    key: RequestKey


class Finished(Call, frozen=True, omit_defaults=True):
    key: RequestKey
    output_tokens: int
    cached_tokens: int


class Failed(Call, frozen=True, omit_defaults=True):
    key: RequestKey


class Aborted(Call, frozen=True, omit_defaults=True):
    request_id: str
    max_attempt: int
    choice: int | None = None
    ended: tuple[RequestKey, ...] = ()


class Restored(Call, frozen=True, omit_defaults=True):
    """Tenants' counters of a former leader."""

    counters: dict[str, float]


class Decision(msgspec.Struct, frozen=True, omit_defaults=True):
    """One effect of a poll. ``kind``: place, refuse or recall."""

    kind: str
    key: RequestKey
    plan: Plan | None = None
    cached_tokens: int = 0
    priority: int = 0
    code: str = ""


class Polled(Call, frozen=True, omit_defaults=True):
    decisions: tuple[Decision, ...] = ()


Line = (
    Begin
    | Reconfigured
    | WorkerUp
    | WorkerReport
    | WorkerSuspect
    | WorkerDown
    | Submitted
    | PrefillDone
    | DecodeStarted
    | Finished
    | Failed
    | Aborted
    | Restored
    | Polled
)


def decision(effect: Effect) -> Decision:
    match effect:
        case Place():
            return Decision("place", effect.request.key, effect.plan, effect.cached_tokens, effect.priority)
        case Refuse():
            return Decision("refuse", effect.request.key, code=effect.error.code)
        case Recall():
            return Decision("recall", effect.request.key, effect.plan)


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Line)


def encode(line: Call) -> bytes:
    return _encoder.encode(line) + b"\n"


def read(path: Path) -> Iterator[Line]:
    """Its lines; the first is ``Begin``. A last line that was cut off is left out. ConfigError for anything else."""
    try:
        with path.open("rb") as file:
            for number, text in enumerate(file, 1):
                if not text.endswith(b"\n"):
                    return  # the router ended while it wrote
                yield _line(path, number, text)
    except OSError as error:
        raise ConfigError(f"recording {path}: {error.strerror or error}", param="record") from None


def _line(path: Path, number: int, text: bytes) -> Line:
    try:
        line: Line = _decoder.decode(text)
    except msgspec.MsgspecError as error:
        raise ConfigError(f"recording {path}, line {number}: {error}", param="record") from None
    if (number == 1) != isinstance(line, Begin):
        raise ConfigError(f"recording {path}, line {number}: a recording has one beginning", param="record")
    if isinstance(line, Begin) and line.version != VERSION:
        raise ConfigError(f"recording {path} is of version {line.version}, not {VERSION}", param="record")
    return line


def empty(path: Path) -> ConfigError:
    return ConfigError(f"recording {path} is empty", param="record")

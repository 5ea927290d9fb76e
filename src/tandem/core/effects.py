"""What the scheduler tells its caller: effects to carry out, and a picture of its state. Plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tandem.core.placement import Candidate, Decision
from tandem.core.types import Explanation, Plan, Request, Role
from tandem.errors import TandemError


@dataclass(frozen=True, slots=True)
class Place:
    """Send the request to ``plan.first_worker``."""

    request: Request
    plan: Plan
    cached_tokens: int  # of the prompt, believed to be cached on the first worker
    priority: int  # for the engine's own queue: lower runs first
    decision: Decision
    candidate: Candidate

    @property
    def explanation(self) -> Explanation:
        """Built when asked for: most placements are never looked at."""
        return self.decision.explanation(self.candidate)


@dataclass(frozen=True, slots=True)
class Refuse:
    """Tell the frontend. The scheduler has forgotten the request."""

    request: Request
    error: TandemError


@dataclass(frozen=True, slots=True)
class Recall:
    """A background request whose first token is not out yet makes way: stop it on ``plan``'s workers and have its
    owner submit it again. The scheduler has forgotten it. Only with ``Policy.recalls`` above 0."""

    request: Request
    plan: Plan


Effect = Place | Refuse | Recall


@dataclass(frozen=True, slots=True)
class Depth:
    """What waits."""

    requests: int = 0
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class WorkerSnapshot:
    id: str
    incarnation: int
    role: Role
    draining: bool
    suspect: bool
    in_flight: int
    pending_prefill_s: float  # predicted; what credit is counted in
    kv_blocks_in_use: int  # reserved by us, and by requests that we do not know
    kv_blocks_total: int
    sequences: int
    model_error: float  # mean relative error of recent step predictions


@dataclass(frozen=True, slots=True)
class Snapshot:
    """For status pages, metrics and the planner."""

    workers: tuple[WorkerSnapshot, ...]
    queue_by_class: Mapping[str, Depth]
    queue_by_tenant: Mapping[str, Depth]
    oldest_wait_s: float
    in_flight: int

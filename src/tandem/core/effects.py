"""What the scheduler wants its caller to do. Plain values."""

from __future__ import annotations

from dataclasses import dataclass

from tandem.core.placement import Candidate, Decision
from tandem.core.queueing import Wait
from tandem.core.types import Explanation, Plan, Request
from tandem.errors import TandemError


class Place:
    """Send the request to ``plan.first_worker``."""

    __slots__ = ("cached_tokens", "candidate", "decision", "plan", "priority", "request", "waited_for")

    def __init__(
        self,
        request: Request,
        plan: Plan,
        cached_tokens: int,
        priority: int,
        decision: Decision,
        candidate: Candidate,
        waited_for: Wait,
    ) -> None:
        self.request = request
        self.plan = plan
        self.cached_tokens = cached_tokens  # of the prompt, believed to be cached on the first worker
        self.priority = priority  # for the engine's own queue: lower runs first
        self.decision = decision
        self.candidate = candidate
        self.waited_for = waited_for

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

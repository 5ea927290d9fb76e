"""What a journey wants done. Whoever holds the request table takes these and does them, in order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from services.frontend.order import Outcome, Positions
from tandem.core.types import WorkerAddress

if TYPE_CHECKING:
    from services.frontend.journey import Journey


@dataclass(slots=True)
class Submit:
    """Publish the journey's current attempt to ``journey.leader``."""

    journey: Journey


@dataclass(slots=True)
class AskAgain:
    """Ask the holder for the tokens from ``from_seq`` on: Repair."""

    journey: Journey
    worker: WorkerAddress
    from_seq: int


@dataclass(slots=True)
class Abandon:
    """Every attempt up to this one ends: Abort."""

    journey: Journey
    max_attempt: int


@dataclass(slots=True)
class Opened:
    journey: Journey


@dataclass(slots=True)
class Deliver:
    journey: Journey
    tokens: Sequence[int]
    positions: Positions | None = None
    prompt_positions: Positions | None = None


@dataclass(slots=True)
class Restarted:
    journey: Journey


@dataclass(slots=True)
class Ended:
    journey: Journey
    outcome: Outcome


Effect = Submit | AskAgain | Abandon | Opened | Deliver | Restarted | Ended

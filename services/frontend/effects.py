"""What a journey wants done. Whoever holds the request table takes these and does them, in order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from msgspec import Struct

from services.frontend.order import Outcome, Positions
from tandem.core.types import WorkerAddress

if TYPE_CHECKING:
    from services.frontend.journey import Journey


class Submit(Struct):
    """Publish the journey's current attempt to ``journey.leader``."""

    journey: Journey


class AskAgain(Struct):
    """Ask the holder for the tokens from ``from_seq`` on: Repair."""

    journey: Journey
    worker: WorkerAddress
    from_seq: int


class Abandon(Struct):
    """Every attempt up to this one ends: Abort."""

    journey: Journey
    max_attempt: int


class Opened(Struct):
    journey: Journey


class Deliver(Struct):
    journey: Journey
    tokens: Sequence[int]
    positions: Positions | None = None
    prompt_positions: Positions | None = None


class Restarted(Struct):
    journey: Journey


class Ended(Struct):
    journey: Journey
    outcome: Outcome


Effect = Submit | AskAgain | Abandon | Opened | Deliver | Restarted | Ended

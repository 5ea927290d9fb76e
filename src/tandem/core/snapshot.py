"""A picture of the scheduler's state, for status pages, metrics and the planner. Plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tandem.core.accounting import WorkerView
from tandem.core.types import Role


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
    oldest_wait_by_class: Mapping[str, float]
    in_flight: int


def worker_snapshot(view: WorkerView, now: float, inflation: float) -> WorkerSnapshot:
    return WorkerSnapshot(
        id=view.id,
        incarnation=view.spec.address.incarnation,
        role=view.role,
        draining=view.draining,
        suspect=view.suspect,
        in_flight=len(view.bookings),
        pending_prefill_s=inflation * view.reading(now).pending_s,
        kv_blocks_in_use=view.blocks_in_use,
        kv_blocks_total=view.spec.kv_blocks_total,
        sequences=view.sequences,
        model_error=view.perf.relative_error,
    )

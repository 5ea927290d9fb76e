"""Seconds of prefill that wait, by class, tenant and deadline: what is ahead of a newcomer."""

from __future__ import annotations

from collections.abc import Iterable

from tandem.core.policy import RequestClass
from tandem.core.queueing import Entry

#: Deadlines are told apart to this many seconds.
_BUCKET_S = 0.25


class _Due:
    """Seconds of prefill by deadline."""

    __slots__ = ("_latest", "_seconds")

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}
        self._latest: dict[int, float] = {}  # deadline that was ever put into the bucket while it was not empty

    def change(self, deadline: float, seconds: float) -> None:
        bucket = int(deadline / _BUCKET_S)
        left = self._seconds.get(bucket, 0.0) + seconds
        if left > 1e-9:
            self._seconds[bucket] = left
            self._latest[bucket] = max(deadline, self._latest.get(bucket, deadline))
        else:
            self._seconds.pop(bucket, None)
            self._latest.pop(bucket, None)

    def total(self) -> float:
        return sum(self._seconds.values())

    def surely_before(self, deadline: float) -> float:
        """Of earlier buckets, and of the same one if all of it is due no later."""
        due = int(deadline / _BUCKET_S)
        before = sum(seconds for bucket, seconds in self._seconds.items() if bucket < due)
        if self._latest.get(due, deadline + 1.0) <= deadline:
            before += self._seconds[due]
        return before

    def __bool__(self) -> bool:
        return bool(self._seconds)


class Backlog:
    """Seconds of prefill that wait, by class, tenant and deadline: what is ahead of a newcomer."""

    def __init__(self, classes: Iterable[RequestClass]) -> None:
        self._ranks = {c.name: c.rank for c in classes}
        self._by_class = {name: _Due() for name in self._ranks}
        self._by_tenant: dict[tuple[str, str], _Due] = {}

    def add(self, entry: Entry) -> None:
        self._change(entry, entry.prefill_s)

    def remove(self, entry: Entry) -> None:
        self._change(entry, -entry.prefill_s)

    def _change(self, entry: Entry, seconds: float) -> None:
        lane = (entry.request_class.name, entry.request.tenant)
        of_tenant = self._by_tenant.setdefault(lane, _Due())
        for due in (self._by_class[entry.request_class.name], of_tenant):
            due.change(entry.deadline, seconds)
        if not of_tenant:
            del self._by_tenant[lane]

    def total_s(self, rank: int) -> float:
        """Of classes of this rank or better."""
        return sum(due.total() for name, due in self._by_class.items() if self._ranks[name] <= rank)

    def surely_ahead_s(self, entry: Entry, tenant_share: float) -> float:
        """At least this much is served before the entry: what is due earlier in its class, but no more than its own
        tenant's fair share lets others have. ``tenant_share``: of the service, as long as all wait."""
        everyone = self._by_class[entry.request_class.name].surely_before(entry.deadline)
        own = self._by_tenant.get((entry.request_class.name, entry.request.tenant))
        ours = own.surely_before(entry.deadline) if own is not None else 0.0
        return min(everyone, ours / max(tenant_share, 1e-6))

"""The workers of one role in the order of what they have to do, so that a placement in a large fleet looks at the first
few only. Between two looks only those are moved that have changed: finding a place takes the logarithm of their number.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable

from tandem.core.accounting import WorkerView

#: Prompt length at which prefill workers are compared, tokens.
_TYPICAL_ISL = 1024


def next_step_s(view: WorkerView) -> float:
    """Of a decode worker, roughly: its next step with one sequence more."""
    perf = view.perf
    return perf.d0 + perf.d1 * (view.own_sequences + 1) + perf.d2 * view.own_kv_tokens + perf.p1 * view.own_tokens


def backlog_s(view: WorkerView) -> float:
    """Of a worker that may prefill, roughly: until a typical prompt would be done, and what its streams wait."""
    return view.perf.p1 * (view.own_tokens + view.foreign_tokens + _TYPICAL_ISL) + streams_step_s(view)


def streams_step_s(view: WorkerView) -> float:
    """A decode step of the streams that a worker has; 0 = it has none. What lending it costs grows with that."""
    batch = view.own_sequences + view.foreign_sequences
    if not batch:
        return 0.0
    perf = view.perf
    return perf.d0 + perf.d1 * batch + perf.d2 * (view.own_kv_tokens + view.foreign_kv_tokens)


class Standing:
    """``key``: lowest first; equal ones in the order of ids. Who changes a worker says so by ``touch``."""

    def __init__(self, key: Callable[[WorkerView], float]) -> None:
        self._key = key
        self._views: dict[str, WorkerView] = {}
        self._keys: dict[str, float] = {}
        self._order: list[tuple[float, str]] = []
        self._ranked: list[WorkerView] = []  # in that order
        self._stale: set[str] = set()

    def __len__(self) -> int:
        return len(self._views)

    def reset(self, views: Iterable[WorkerView]) -> None:
        self._views = {view.id: view for view in views}
        self._keys = {view.id: self._key(view) for view in self._views.values()}
        self._order = sorted((key, worker) for worker, key in self._keys.items())
        self._ranked = [self._views[worker] for _, worker in self._order]
        self._stale.clear()

    def touch(self, worker: str) -> None:
        if worker in self._views:
            self._stale.add(worker)

    def find(self, worker: str) -> WorkerView | None:
        return self._views.get(worker)

    def ranked(self) -> list[WorkerView]:
        """Good until the next ``touch``."""
        for worker in self._stale:
            view, old = self._views[worker], self._keys[worker]
            new = self._key(view)
            if new != old:
                place = bisect_left(self._order, (old, worker))
                del self._order[place], self._ranked[place]
                place = bisect_left(self._order, (new, worker))
                self._order.insert(place, (new, worker))
                self._ranked.insert(place, view)
                self._keys[worker] = new
        self._stale.clear()
        return self._ranked

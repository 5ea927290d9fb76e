"""What the router counts for one model, and what is read from it at each scrape."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from tandem.core.effects import Place
from tandem.core.reasons import Reason, reason_of
from tandem.core.snapshot import Depth, Snapshot, WorkerSnapshot
from tandem.core.types import Leg
from tandem.errors import TandemError
from tandem.telemetry import metric_table as table
from tandem.telemetry.instruments import Counter, Histogram, Instruments, Reading

if TYPE_CHECKING:
    from services.router.model_router import ModelRouter

#: The snapshot of one scrape serves all of its gauges.
_SNAPSHOT_S = 0.2


class RouterMetrics:
    """One for each model; they share the process's instruments."""

    def __init__(self, instruments: Instruments, model: str, classes: Iterable[str]) -> None:
        self._instruments = instruments
        self._model = model
        self._classes = list(classes)
        count = instruments.counter
        self._placements = {
            (leg, reason): count(table.PLACEMENTS, model, leg.value, reason.value) for leg in Leg for reason in Reason
        }
        self._placed_tokens = count(table.PLACED_TOKENS, model)
        self._cached_tokens = count(table.PREDICTED_CACHED, model)
        self._lost = count(table.WORKERS_LOST, model)
        self.lookups = instruments.histogram(table.INDEX_LOOKUP, model)
        self.decisions = instruments.histogram(table.DECISION, model)
        self._refusals: dict[str, Counter] = {}
        self._waits: dict[str, Histogram] = {}
        self._snapshot: Snapshot | None = None
        self._snapshot_at = 0.0

    # -- events ----------------------------------------------------------------------------------------------------

    def placed(self, effect: Place, leg: Leg, now: float) -> None:
        request = effect.request
        self._placements[leg, reason_of(effect)].value += 1
        self._placed_tokens.value += request.isl_tokens
        self._cached_tokens.value += effect.cached_tokens
        wait = self._waits.get(request.request_class)
        if wait is None:
            wait = self._waits[request.request_class] = self._instruments.histogram(
                table.QUEUE_WAIT, self._model, request.request_class
            )
        wait.observe(max(0.0, now - request.arrival_s))

    def refused(self, error: TandemError) -> None:
        cell = self._refusals.get(error.code)
        if cell is None:
            cell = self._refusals[error.code] = self._instruments.counter(table.REFUSALS, self._model, error.code)
        cell.value += 1

    def worker_lost(self) -> None:
        self._lost.value += 1

    # -- readings --------------------------------------------------------------------------------------------------

    def watch(self, router: ModelRouter, now: Callable[[], float]) -> None:
        """Reads ``router`` at each scrape from now on."""

        def snapshot() -> Snapshot:
            at = now()
            if self._snapshot is None or at - self._snapshot_at > _SNAPSHOT_S:
                self._snapshot, self._snapshot_at = router.scheduler.snapshot(at), at
            return self._snapshot

        one, several, model = self._instruments.watch_one, self._instruments.watch, self._model
        one(table.LEADS, lambda: float(router.leadership.epoch > 0), model)
        one(table.EPOCH, lambda: float(router.leadership.heard_epoch), model)
        one(table.INDEX_AWAY, lambda: float(router.index_away), model)
        one(table.IN_FLIGHT, lambda: snapshot().in_flight, model)
        several(
            table.QUEUE_REQUESTS, lambda: self._by_class({n: d.requests for n, d in snapshot().queue_by_class.items()})
        )
        several(table.QUEUE_TOKENS, lambda: self._by_class({n: d.tokens for n, d in snapshot().queue_by_class.items()}))
        several(table.QUEUE_OLDEST, lambda: self._by_class(dict(snapshot().oldest_wait_by_class)))
        several(table.TENANT_QUEUE_REQUESTS, lambda: self._by_tenant(snapshot(), lambda depth: depth.requests))
        several(table.TENANT_QUEUE_TOKENS, lambda: self._by_tenant(snapshot(), lambda depth: depth.tokens))
        several(table.WORKERS_SEEN, lambda: self._workers(snapshot()))
        several(table.PENDING_PREFILL, lambda: self._by_role(snapshot(), lambda w: w.pending_prefill_s))
        several(table.KV_BOOKED, lambda: self._by_role(snapshot(), lambda w: w.kv_blocks_in_use))
        several(table.KV_CAPACITY, lambda: self._by_role(snapshot(), lambda w: w.kv_blocks_total))
        several(table.PREDICTION_ERROR, lambda: self._mean_by_role(snapshot(), lambda w: w.model_error))

    def _by_class(self, values: dict[str, float]) -> Reading:
        return [((self._model, name), values.get(name, 0.0)) for name in dict.fromkeys([*self._classes, *values])]

    def _by_tenant(self, snapshot: Snapshot, value: Callable[[Depth], float]) -> Reading:
        return [((self._model, name), value(depth)) for name, depth in snapshot.queue_by_tenant.items()]

    def _workers(self, snapshot: Snapshot) -> Reading:
        """Every role and state, also those that nobody has: an alert can rely on the zero."""
        found: dict[tuple[str, ...], float] = {
            (self._model, role, state): 0.0 for role in table.ROLE.values for state in table.STATE.values
        }
        for worker in snapshot.workers:
            state = "draining" if worker.draining else "suspect" if worker.suspect else "alive"
            found[self._model, worker.role.value, state] += 1
        return found.items()

    def _by_role(self, snapshot: Snapshot, value: Callable[[WorkerSnapshot], float]) -> Reading:
        found: defaultdict[tuple[str, ...], float] = defaultdict(float)
        for worker in snapshot.workers:
            found[self._model, worker.role.value] += value(worker)
        return found.items()

    def _mean_by_role(self, snapshot: Snapshot, value: Callable[[WorkerSnapshot], float]) -> Reading:
        counts = dict(self._by_role(snapshot, lambda worker: 1.0))
        return [(labels, total / counts[labels]) for labels, total in self._by_role(snapshot, value)]

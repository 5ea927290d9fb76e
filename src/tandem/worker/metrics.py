"""What a worker counts: each request once, at its end; the rest is read at each scrape."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tandem.core.types import Role
from tandem.telemetry import metric_table as table
from tandem.telemetry.instruments import Counter, Histogram, Instruments, Reading
from tandem.telemetry.metric_table import Metric
from tandem.v1 import bus_pb2
from tandem.worker.answers import end_phase
from tandem.worker.request_table import Running

if TYPE_CHECKING:
    from tandem.worker.shell import Worker

_OUTCOMES = {
    bus_pb2.PHASE_FINISHED: "finished",
    bus_pb2.PHASE_PREFILL_DONE: "handed_over",
    bus_pb2.PHASE_ABORTED: "aborted",
    bus_pb2.PHASE_FAILED: "failed",
}


@dataclass(slots=True)
class _Cells:
    """Of one role: a worker may change its."""

    outcomes: dict[str, Counter]
    prompt_tokens: Counter
    predicted_tokens: Counter
    cached_tokens: Counter
    kv_bytes: Counter
    kv_seconds: Histogram
    kv_failures: dict[str, Counter]


class WorkerMetrics:
    """Made around a worker; hears its execution, and reads it."""

    def __init__(
        self, instruments: Instruments, worker: Worker, classes: Iterable[str], now: Callable[[], float]
    ) -> None:
        self._instruments = instruments
        self._worker = worker
        self._now = now
        self._model = worker.announcer.spec.model
        self._classes = list(classes)
        self._cells = {role: self._new_cells(role) for role in Role}
        worker.execution.on_end = self.ended
        worker.execution.on_refusal = self.refused
        worker.execution.on_kv_failure = self.kv_failed
        self._watch()

    # -- events ----------------------------------------------------------------------------------------------------

    def ended(self, running: Running) -> None:
        """``running`` has its finish."""
        cells = self._cells[self._worker.announcer.spec.role]
        outcome = _OUTCOMES[end_phase(running)]
        cells.outcomes[outcome].add()
        if running.finish is not None and running.finish.HasField("error"):
            self.refused(running.finish.error.code)
        computed = running.tokens or outcome == "finished"  # an embedding has no tokens
        if running.handed_over or (computed and running.leg == bus_pb2.LEG_LOCAL):
            cells.prompt_tokens.add(running.isl_tokens)
            cells.predicted_tokens.add(running.predicted_cached_tokens)
            cells.cached_tokens.add(running.cached_tokens)
        elif running.tokens and running.timings.kv_transfer_s:
            cells.kv_bytes.add(running.timings.kv_transfer_bytes)
            cells.kv_seconds.observe(running.timings.kv_transfer_s)

    def refused(self, code: str) -> None:
        role = self._worker.announcer.spec.role.value
        self._instruments.counter(table.WORKER_ERRORS, self._model, role, code).add()

    def kv_failed(self, reason: str) -> None:
        self._cells[self._worker.announcer.spec.role].kv_failures[reason].add()

    def _new_cells(self, role: Role) -> _Cells:
        count, place = self._instruments.counter, (self._model, role.value)
        return _Cells(
            outcomes={name: count(table.WORKER_REQUESTS, *place, name) for name in table.OUTCOME.values},
            prompt_tokens=count(table.PREFIX_PROMPT, *place),
            predicted_tokens=count(table.PREFIX_PREDICTED, *place),
            cached_tokens=count(table.PREFIX_CACHED, *place),
            kv_bytes=count(table.KV_BYTES, *place),
            kv_seconds=self._instruments.histogram(table.KV_SECONDS, *place),
            kv_failures={name: count(table.KV_FAILURES, *place, name) for name in table.FAILURE.values},
        )

    # -- readings --------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        worker = self._worker
        announcer, engine = worker.announcer, worker.engine
        self._read(table.WORKER_RUNNING, lambda: engine.stats().running_requests)
        self._read(table.WORKER_WAITING, lambda: engine.stats().waiting_requests)
        self._read(table.WORKER_PENDING, lambda: engine.stats().pending_prefill_tokens)
        self._read(table.WORKER_KV_USED, lambda: engine.stats().kv_blocks_used)
        self._read(table.WORKER_KV_CAPACITY, lambda: announcer.spec.kv_blocks_total)
        self._read(table.WORKER_STEPS, lambda: engine.stats().steps)
        self._read(table.WORKER_STEP_AGE, worker.reporter.hung_for)
        self._read(table.WORKER_HANDOFFS, lambda: len(worker.handoffs))
        self._read(table.WORKER_DRAINING, lambda: float(announcer.spec.draining))
        self._read(table.INDEX_COMPLETE, lambda: float(announcer.complete))
        self._read(table.INDEX_GAPS, lambda: announcer.gaps)
        self._read(table.INDEX_AGAIN, lambda: announcer.announcements)
        self._instruments.watch_one(table.WORKER_EPOCH, lambda: float(worker.execution.epoch), self._model)
        self._instruments.watch_one(table.FRAMES_DROPPED, lambda: worker.outbox.dropped, self._model)
        self._instruments.watch(table.WORKER_QUEUE_REQUESTS, lambda: self._queue(lambda r: 1.0, sum))
        self._instruments.watch(table.WORKER_QUEUE_TOKENS, lambda: self._queue(lambda r: r.isl_tokens, sum))
        self._instruments.watch(table.WORKER_QUEUE_OLDEST, self._oldest)

    def _read(self, metric: Metric, read: Callable[[], float]) -> None:
        self._instruments.watch(metric, lambda: [((self._model, self._worker.announcer.spec.role.value), read())])

    def _oldest(self) -> Reading:
        now = self._now()
        return self._queue(lambda running: now - running.accepted_at, max)

    def _queue(self, value: Callable[[Running], float], total: Callable[[Iterable[float]], float]) -> Reading:
        """Of requests whose first token is not out, by class."""
        values: dict[str, list[float]] = {name: [0.0] for name in self._classes}
        for running in self._worker.table.unfinished():
            if not running.tokens:
                values.setdefault(running.submit.request_class, [0.0]).append(value(running))
        role = self._worker.announcer.spec.role.value
        return [((self._model, role, name), total(found)) for name, found in values.items()]

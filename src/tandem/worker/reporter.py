"""Load reports: what this worker does now, said every interval and whenever someone asks."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from tandem.adapters.bus import Bus
from tandem.engine.protocol import Engine, EngineStats
from tandem.errors import BusUnavailable
from tandem.v1 import bus_pb2
from tandem.wire import codec, subjects
from tandem.worker.announcer import Announcer
from tandem.worker.execution import Execution
from tandem.worker.handoffs import OpenHandoffs
from tandem.worker.outbox import Outbox
from tandem.worker.request_table import RequestTable

log = logging.getLogger(__name__)

#: After a reconnect of ours the others may take this long to be back.
OTHERS_BACK_S = 2.0
#: Between two reports of an engine that has nothing to do and has done nothing, so many intervals ...
IDLE_INTERVALS = 2.5
#: ... or so many within the time after which its silence would be one, whichever is sooner.
IDLE_REPORTS = 5


class Reporter:
    def __init__(
        self,
        *,
        bus: Bus,
        cluster: str,
        engine: Engine,
        announcer: Announcer,
        execution: Execution,
        handoffs: OpenHandoffs,
        table: RequestTable,
        outbox: Outbox,
        suspect_s: float,
        now: Callable[[], float],
    ) -> None:
        self._bus = bus
        self._subject = subjects.load(cluster, announcer.spec.id)
        self._engine = engine
        self._announcer = announcer
        self._execution = execution
        self._handoffs = handoffs
        self._table = table
        self._outbox = outbox
        self._suspect_s = suspect_s
        self._now = now
        self._seq = 0
        self._hung_since: float | None = None
        self._late_reads = 0
        self._told_after = bus.reconnected_at

    def report(self, stats: EngineStats | None = None, *, with_steps: bool = False) -> bus_pb2.LoadReport:
        """``stats``: the engine's of now, where they are at hand. ``with_steps`` hands the step timings out; they are
        given once."""
        stats = stats or self._engine.stats()
        spec = self._announcer.spec
        report = bus_pb2.LoadReport(
            worker=self._outbox.ref,
            model=spec.model,
            role=codec.role_to_wire(spec.role),
            draining=spec.draining,
            waiting_requests=stats.waiting_requests,
            running_requests=stats.running_requests,
            pending_prefill_tokens=stats.pending_prefill_tokens,
            pending_prefill_context_tokens=stats.pending_prefill_context_tokens,
            kv_blocks_used=stats.kv_blocks_used,
            kv_blocks_total=spec.kv_blocks_total,
            kv_tokens=stats.kv_tokens,
            steps=stats.steps,
            last_step_age_s=stats.last_step_age_s,
            open_handoffs=len(self._handoffs),
            epoch=self._execution.epoch,
            report_seq=self._seq,
            index_complete=self._announcer.complete,
        )
        if with_steps:
            for step in self._engine.take_step_timings():
                report.step_timings.add(  # in place: a message given to another is copied
                    duration_s=step.duration_s,
                    prefill_tokens=step.prefill_tokens,
                    prefill_context_tokens=step.prefill_context_tokens,
                    decode_sequences=step.decode_sequences,
                    kv_tokens=step.kv_tokens,
                )
        return report

    async def report_forever(self, interval_s: float) -> None:
        idle_s = max(interval_s, min(IDLE_INTERVALS * interval_s, self._suspect_s / IDLE_REPORTS))
        steps = -1
        idles = False
        while True:
            await asyncio.sleep(idle_s if idles else interval_s)
            now = self._now()
            self._table.sweep(now)
            self._handoffs.sweep(now)
            stats = self._engine.stats()
            idles = stats.steps == steps and not (stats.running_requests or stats.waiting_requests)
            steps = stats.steps
            self._look_for_late_reads(stats)
            self._tell_again_after_reconnect(now)
            self._seq += 1
            self._outbox.tell_now()
            try:
                self._bus.publish(self._subject, self.report(stats, with_steps=True).SerializeToString())
            except BusUnavailable as error:
                log.warning("load report not sent: %s", error)

    def _look_for_late_reads(self, stats: EngineStats) -> None:
        late = stats.reads_after_expiry
        if late > self._late_reads:
            self._execution.warn_peers()
        self._late_reads = late

    def _tell_again_after_reconnect(self, now: float) -> None:
        back = self._bus.reconnected_at
        if back != self._told_after and now - back >= OTHERS_BACK_S:
            self._told_after = back
            self._execution.tell_again()

    def hung_for(self) -> float:
        """Seconds for which the engine has had work and made no step; 0.0 = it is well."""
        stats = self._engine.stats()
        now = self._now()
        busy = stats.running_requests + stats.waiting_requests > 0
        if not busy:
            self._hung_since = None
            return 0.0
        if self._hung_since is None:
            self._hung_since = now
        return min(stats.last_step_age_s, now - self._hung_since)

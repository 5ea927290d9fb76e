"""What the EngineCore says of itself after a step, gathered in the parent process. Needs no vLLM.

The report comes in vLLM's SchedulerStats (see ``vllm_core``) and is as old as the last step; requests that the core
has not yet taken from its socket are added from what was submitted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from tandem.core.types import StepTiming
from tandem.engine.protocol import EngineStats

_TIMINGS_KEPT = 2000


class Load(NamedTuple):
    steps: int = 0
    running: int = 0
    waiting: int = 0
    pending_prefill_tokens: int = 0
    pending_prefill_context_tokens: int = 0
    kv_blocks_used: int = 0
    kv_tokens: int = 0
    open_handoffs: int = 0


class CoreReports:
    def __init__(self, now: Callable[[], float], reports_key: str) -> None:
        self._now = now
        self._key = reports_key
        self._load = Load()
        self._steps: deque[StepTiming] = deque(maxlen=_TIMINGS_KEPT)
        self._submitted: dict[str, int] = {}  # not yet taken by the core -> prompt tokens
        self._live = 0
        self._heard_at = 0.0
        self._reads_after_expiry = 0
        self._preemptions = 0
        self._transfers: dict[str, tuple[int, float, float]] = {}

    # what the adapter tells

    def submitted(self, request_id: str, prompt_tokens: int) -> None:
        if not self._live:
            self._heard_at = self._now()  # an idle engine's silence does not count
        self._live += 1
        self._submitted[request_id] = prompt_tokens

    def finished(self, request_id: str) -> None:
        self._live -= 1
        self._submitted.pop(request_id, None)
        self._transfers.pop(request_id, None)

    def record(self, connector_stats: dict[str, Any] | None, preemptions: int) -> None:
        """``connector_stats`` is SchedulerStats.kv_connector_stats; our part of it is taken out."""
        self._preemptions += preemptions
        if connector_stats is None:
            return
        self._reads_after_expiry += sum(connector_stats.get("num_notifications_after_expiry") or ())
        report: Mapping[str, Any] | None = connector_stats.pop(self._key, None)
        if report is None:
            return
        self._heard_at = self._now()
        self._load = Load(*report["load"])
        for request_id in report["accepted"]:
            self._submitted.pop(request_id, None)
        for request_id, tokens, seconds in report["transfers"]:
            self._transfers[request_id] = (tokens, seconds, self._heard_at)
        if report["step"] is not None:
            self._steps.append(_timing(report["step"]))

    # what it asks

    def take_transfer(self, request_id: str) -> tuple[int, float, float] | None:
        """(tokens pulled, seconds, when we heard of its end) of a request's KV transfer, once, if there was one."""
        return self._transfers.pop(request_id, None)

    def take_step_timings(self) -> list[StepTiming]:
        taken = list(self._steps)
        self._steps.clear()
        return taken

    def stats(self) -> EngineStats:
        load = self._load
        tokens = self._submitted.values()
        return EngineStats(
            waiting_requests=load.waiting + len(self._submitted),
            running_requests=load.running,
            pending_prefill_tokens=load.pending_prefill_tokens + sum(tokens),
            pending_prefill_context_tokens=load.pending_prefill_context_tokens + sum(n * (n - 1) // 2 for n in tokens),
            kv_blocks_used=load.kv_blocks_used,
            kv_tokens=load.kv_tokens,
            steps=load.steps,
            last_step_age_s=self._now() - self._heard_at if self._live else 0.0,
            open_handoffs=load.open_handoffs,
            reads_after_expiry=self._reads_after_expiry,
            preemptions=self._preemptions,
        )


def _timing(step: Sequence[float]) -> StepTiming:
    seconds, prefill, context, decodes, kv = step
    return StepTiming(
        duration_s=seconds,
        prefill_tokens=int(prefill),
        prefill_context_tokens=int(context),
        decode_sequences=int(decodes),
        kv_tokens=int(kv),
    )

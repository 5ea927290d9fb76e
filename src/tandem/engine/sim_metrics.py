"""The simulated engine's metrics, under vLLM's names and with vLLM's labels: what scalers and dashboards look at."""

from __future__ import annotations

from collections.abc import Callable

from tandem.core.types import FinishReason
from tandem.engine.protocol import EngineStats
from tandem.telemetry import metric_table as table
from tandem.telemetry.instruments import Instruments
from tandem.telemetry.metric_table import Metric

_ENGINE = table.ENGINE.values[0]


class SimCounts:
    """Sums since the engine's start."""

    __slots__ = ("ended", "generated_tokens", "prefix_hits", "prompt_tokens")

    def __init__(self) -> None:
        self.prompt_tokens = 0
        self.prefix_hits = 0
        self.generated_tokens = 0
        self.ended = dict.fromkeys(FinishReason, 0)

    def started(self, prompt_tokens: int, cached_tokens: int) -> None:
        self.prompt_tokens += prompt_tokens
        self.prefix_hits += cached_tokens

    def expose(self, instruments: Instruments, model: str, kv_blocks: int, stats: Callable[[], EngineStats]) -> None:
        def watch(metric: Metric, read: Callable[[], float], *labels: str) -> None:
            instruments.watch_one(metric, read, model, _ENGINE, *labels)

        watch(table.VLLM_RUNNING, lambda: stats().running_requests)
        watch(table.VLLM_WAITING, lambda: stats().waiting_requests)
        watch(table.VLLM_KV_USAGE, lambda: stats().kv_blocks_used / kv_blocks)
        watch(table.VLLM_PREEMPTIONS, lambda: stats().preemptions)
        watch(table.VLLM_QUERIES, lambda: self.prompt_tokens)
        watch(table.VLLM_HITS, lambda: self.prefix_hits)
        watch(table.VLLM_PROMPT, lambda: self.prompt_tokens)
        watch(table.VLLM_GENERATION, lambda: self.generated_tokens)
        instruments.watch(
            table.VLLM_SUCCESS,
            lambda: [((model, _ENGINE, reason.value), count) for reason, count in self.ended.items()],
        )

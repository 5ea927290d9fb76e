"""vLLM's own metrics, all of them and unchanged: it keeps them in the library's global registry."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import REGISTRY
from prometheus_client.core import Metric as Family
from prometheus_client.registry import Collector

_PREFIX = "vllm:"


class VllmMetrics(Collector):
    """What of the global registry is vLLM's. Its instruments lock for themselves: any thread may read."""

    def collect(self) -> Iterator[Family]:
        return (family for family in REGISTRY.collect() if family.name.startswith(_PREFIX))

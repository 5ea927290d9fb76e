"""How many requests ended, and how: from the frontends' own counters, which count every request, traced or not."""

from __future__ import annotations

import asyncio
import http.client
import logging
import urllib.request
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, fields

from prometheus_client.parser import text_string_to_metric_families

from services.console.watch import ASK_S
from tandem.telemetry import metric_table

log = logging.getLogger(__name__)

_TIMEOUT_S = 2.0
_MAX_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Counts:
    """Since a process began, or since the last look at it."""

    offered: float = 0.0
    good: float = 0.0
    failed: float = 0.0
    input_tokens: float = 0.0
    output_tokens: float = 0.0

    def since(self, before: Counts) -> Counts:
        """A counter that has become smaller belongs to a new process: all of it is new."""
        pairs = [(getattr(self, f.name), getattr(before, f.name)) for f in fields(Counts)]
        restarted = any(now < then for now, then in pairs)
        return self if restarted else Counts(*(now - then for now, then in pairs))


_COUNTERS = {
    metric_table.OFFERED_REQUESTS.name: "offered",
    metric_table.GOOD_REQUESTS.name: "good",
    metric_table.FRONTEND_ERRORS.name: "failed",
}
_USAGE_SUM = f"{metric_table.TOKEN_USAGE.name}_sum"
_WANTED = (*_COUNTERS, _USAGE_SUM)
#: Looks at a frontend that has never answered, before it is said: when a cluster starts, it is not there yet.
_PATIENCE = 30


def counts_of(exposition: str) -> Counts:
    """Of one frontend, over its models, tenants and classes. ValueError for what is no Prometheus text.

    Of thousands of series a few are wanted, and no others are parsed: this runs as often as once a second."""
    sums = {f.name: 0.0 for f in fields(Counts)}
    wanted = "\n".join(line for line in exposition.split("\n") if line.startswith(_WANTED))
    for family in text_string_to_metric_families(wanted):
        for sample in family.samples:
            if sample.name in _COUNTERS:
                sums[_COUNTERS[sample.name]] += sample.value
            elif sample.name == _USAGE_SUM:
                kind = sample.labels.get(metric_table.TOKEN_TYPE.name)
                sums["input_tokens" if kind == "input" else "output_tokens"] += sample.value
    return Counts(**sums)


class FrontendCounts:
    """Asks every frontend, with a ``pause`` between; ``on_counts`` hears what came since the last look, so many
    seconds ago. ``now``: in seconds."""

    def __init__(
        self,
        urls: Sequence[str],
        on_counts: Callable[[Counts, float], None],
        now: Callable[[], float],
        pause: Callable[[], Awaitable[None]],
    ) -> None:
        self._urls = tuple(dict.fromkeys(urls))
        self._on_counts = on_counts
        self._now = now
        self._pause = pause
        #: What each said last, and when.
        self._last: dict[str, tuple[Counts, float]] = {}
        self._misses: Counter[str] = Counter()

    async def run(self) -> None:
        while self._urls:
            await asyncio.gather(*(self._look(url) for url in self._urls))
            if any(0 < missed < _PATIENCE for missed in self._misses.values()):
                await asyncio.sleep(ASK_S)  # what a frontend counts before its first answer is lost
            else:
                await self._pause()

    async def _look(self, url: str) -> None:
        try:
            counts = counts_of(await asyncio.to_thread(_fetch, url))
        except (OSError, ValueError, http.client.HTTPException) as error:
            self._misses[url] += 1
            if self._misses[url] == (1 if url in self._last else _PATIENCE):
                log.warning("no metrics from %s: %s", url, error)
            return
        del self._misses[url]
        now = self._now()
        before, self._last[url] = self._last.get(url), (counts, now)
        if before is not None:  # what was before we came is nobody's second
            self._on_counts(counts.since(before[0]), now - before[1])


def _fetch(url: str) -> str:
    # Metrics are in the cluster: no proxy.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=_TIMEOUT_S) as response:
        return str(response.read(_MAX_BYTES).decode())

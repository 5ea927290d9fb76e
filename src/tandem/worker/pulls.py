"""The decode side of KV handoffs, from claim to release.

A handoff is claimed, its KV pulled by the engine, and given back to its producer, once, however it ends. Two ways out:
a first token has come, or ``fall_back``: this worker computes the prompt by itself. A request that ends on the way
(cancelled, tainted) needs neither.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from tandem.core.types import RequestKey
from tandem.engine.protocol import KvHandoff
from tandem.v1 import types_pb2
from tandem.worker.handoffs import Peers
from tandem.worker.request_table import Running

#: A pull that starts in the last third of its lease might outlive it.
LEASE_RESERVE = 3


@dataclass(slots=True)
class _Pull:
    news: asyncio.Event = field(default_factory=asyncio.Event)
    in_engine: bool = False


class Pulls:
    def __init__(
        self,
        peers: Peers,
        worker: str,
        *,
        hop_timeout_s: float,
        lease_s: float,
        spawn: Callable[[Coroutine[Any, Any, None]], object],
        now: Callable[[], float],
        start: Callable[[Running, KvHandoff, float], None],
        fall_back: Callable[[Running, str], None],
        failed: Callable[[str], None],
    ) -> None:
        """``start`` gives the request to the engine, with the seconds for which its handoff is valid; ``fall_back``
        gives it anew, without one, and why. ``failed`` hears "claim" or "pull" for each that came to nothing."""
        self._peers = peers
        self._worker = worker
        self._hop_timeout_s = hop_timeout_s
        self._lease_s = lease_s
        self._spawn = spawn
        self._now = now
        self._start = start
        self._fall_back = fall_back
        self._failed = failed
        self._pulls: dict[RequestKey, _Pull] = {}

    def take(self, running: Running, peer: types_pb2.WorkerRef, kv: KvHandoff) -> None:
        pull = self._pulls[running.key] = _Pull()
        self._spawn(self._run(running, peer, kv, pull))

    def is_claiming(self, running: Running) -> bool:
        """Its handoff is in hand, and the engine does not know of it yet."""
        pull = self._pulls.get(running.key)
        return pull is not None and not pull.in_engine

    def news(self, running: Running) -> bool:
        """A first token, a failed pull, or the end. False if no pull is under way."""
        pull = self._pulls.get(running.key)
        if pull is not None:
            pull.news.set()
        return pull is not None

    async def _run(self, running: Running, peer: types_pb2.WorkerRef, kv: KvHandoff, pull: _Pull) -> None:
        began = self._now()
        left = await self._peers.claim(peer, kv, self._worker) or 0.0
        pulled = False
        why = f"claim not granted ({left:.1f} s of the lease left)"
        if running.finish is None and left >= self._lease_s / LEASE_RESERVE:
            pull.in_engine = True
            self._start(running, kv, left)
            pulled = await self._has_come(running, peer, kv, pull.news)
            why = "the KV could not be pulled"
        del self._pulls[running.key]
        self._spawn(self._peers.release(peer, kv, pulled=pulled))
        if pulled:
            running.timings.kv_transfer_s = running.timings.kv_transfer_s or self._now() - began
        elif running.finish is None:
            self._failed("pull" if pull.in_engine else "claim")
            self._fall_back(running, why)

    async def _has_come(self, running: Running, peer: types_pb2.WorkerRef, kv: KvHandoff, news: asyncio.Event) -> bool:
        """True with a first token. Half a hop timeout without news: the producer must show that it lives. One that
        lives and does not know the handoff any more has been read already, or its lease is over: the engine, which
        knows how long the handoff is valid, sees to the rest."""
        half = self._hop_timeout_s / 2
        asking = True
        while True:
            try:
                await asyncio.wait_for(news.wait(), half)
                return bool(running.tokens)
            except TimeoutError:
                pass
            if asking:
                left = await self._peers.claim(peer, kv, self._worker, timeout_s=half)
                if left is None:
                    return bool(running.tokens)
                asking = left > 0.0

"""Both ends of a KV handoff between workers, except the bytes: those move between the engines.

Producer: every handoff is open from the end of its prefill until the decode worker says that it has pulled it or will
not, the request is cancelled before anyone claimed it, or the lease ends in the engine. A drain waits for open ones.
Consumer: claims before it pulls, counts the lease from the moment it *sent* the claim (one clock, the safe direction)
and does not start a pull in the lease's last third. A pull past the lease would read other requests' KV, silently.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import grpc

from tandem.adapters.grpc_server import open_channel
from tandem.core.types import RequestKey
from tandem.engine.protocol import Engine, KvHandoff
from tandem.v1 import bus_pb2, types_pb2, worker_pb2, worker_pb2_grpc

log = logging.getLogger(__name__)

RELEASE_ATTEMPTS = 4


@dataclass(slots=True)
class OpenHandoff:
    key: RequestKey
    message: bus_pb2.Handoff
    opened_at: float
    claimed: bool = False

    @property
    def decode(self) -> types_pb2.WorkerRef:
        return self.message.assignment.decode


class OpenHandoffs:
    """The producer's side."""

    def __init__(self, engine: Engine, *, lease_s: float) -> None:
        self._engine = engine
        self._lease_s = lease_s
        self._open: dict[str, OpenHandoff] = {}
        #: decode worker -> when it last got a handoff.
        self._handed: dict[str, float] = {}

    def opened(self, entry: OpenHandoff) -> None:
        self._open[entry.message.kv.handoff_id] = entry
        self._handed[entry.decode.id] = entry.opened_at

    def recent_peers(self) -> list[str]:
        """Decode workers that may have pulled from us within two leases."""
        return list(self._handed)

    def get(self, handoff_id: str) -> OpenHandoff | None:
        return self._open.get(handoff_id)

    def claim(self, handoff_id: str, engine_id: str, decode_worker: str) -> float | None:
        """Seconds left on the lease; None = not ours, not open, or promised to another worker."""
        entry = self._open.get(handoff_id)
        if entry is None or entry.decode.id != decode_worker:
            return None
        left = self._engine.claim_handoff(handoff_id, engine_id)
        if left is not None:
            entry.claimed = True
        return left

    def unclaimed(self, key: RequestKey | None = None) -> list[tuple[str, OpenHandoff]]:
        """(id, handoff) of those that nobody has claimed; of one request, or (None) of all."""
        return [(i, e) for i, e in self._open.items() if not e.claimed and key in (None, e.key)]

    def release(self, handoff_id: str, *, pulled: bool) -> None:
        if self._open.pop(handoff_id, None) is not None:
            self._engine.release_handoff(handoff_id, pulled=pulled)

    def cancel(self, request_id: str, max_attempt: int, choice: int | None) -> None:
        """Frees what nobody has claimed; who has claimed releases it himself, and the lease ends all others."""
        for handoff_id, entry in list(self._open.items()):
            key = entry.key
            meant = key.id == request_id and key.attempt <= max_attempt and choice in (None, key.choice)
            if meant and not entry.claimed:
                self.release(handoff_id, pulled=False)

    def peer_lost(self, worker: str, incarnation: int, *, gone: bool) -> None:
        """A decode worker was declared dead. What it has claimed it may still be reading, unless its process is
        known to be ``gone``: then only the lease may end it."""
        for handoff_id, entry in list(self._open.items()):
            decode = entry.decode
            if decode.id == worker and decode.incarnation == incarnation and (gone or not entry.claimed):
                self.release(handoff_id, pulled=False)

    def sweep(self, now: float) -> None:
        """Forgets handoffs whose lease the engine has ended by itself; twice the lease covers its extensions."""
        for worker, at in list(self._handed.items()):
            if now - at > 2 * self._lease_s:
                del self._handed[worker]
        for handoff_id, entry in list(self._open.items()):
            if now - entry.opened_at > 2 * self._lease_s:
                log.warning("handoff %s to %s was never pulled", handoff_id, entry.decode.id)
                self.release(handoff_id, pulled=False)

    def __len__(self) -> int:
        return len(self._open)


class Peers:
    """The consumer's side: calls to prefill workers, over channels that are kept."""

    def __init__(self, *, timeout_s: float, now: Callable[[], float], limit: int = 256) -> None:
        self._timeout_s = timeout_s
        self._now = now
        self._limit = limit
        self._channels: dict[tuple[str, int], grpc.aio.Channel] = {}

    async def claim(
        self, peer: types_pb2.WorkerRef, handoff: KvHandoff, me: str, *, timeout_s: float = 0.0
    ) -> float | None:
        """Seconds of the lease that are surely left now; 0.0 = refused: do not pull; None = no answer in time."""
        sent = self._now()
        request = worker_pb2.ClaimHandoffRequest(
            handoff_id=handoff.handoff_id, engine_id=handoff.engine_id, decode_worker=me
        )
        try:
            answer = await self._stub(peer).ClaimHandoff(request, timeout=timeout_s or self._timeout_s)
        except grpc.aio.AioRpcError as error:
            log.warning("claim at %s failed: %s", peer.id, error.code().name)
            return None
        return max(0.0, answer.lease_left_s - (self._now() - sent)) if answer.granted else 0.0

    async def release(self, peer: types_pb2.WorkerRef, handoff: KvHandoff, *, pulled: bool) -> None:
        """Tells the producer, again if it hangs for a while; if it cannot be told, its lease ends the handoff."""
        request = worker_pb2.ReleaseHandoffRequest(
            handoff_id=handoff.handoff_id, engine_id=handoff.engine_id, pulled=pulled
        )
        for _ in range(RELEASE_ATTEMPTS):
            try:
                await self._stub(peer).ReleaseHandoff(request, timeout=self._timeout_s)
                return
            except grpc.aio.AioRpcError as error:
                log.warning("release at %s failed: %s", peer.id, error.code().name)
                if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
                    return

    def _stub(self, peer: types_pb2.WorkerRef) -> worker_pb2_grpc.WorkerServiceStub:
        name = (peer.grpc_address, peer.incarnation)
        channel = self._channels.pop(name, None)
        if channel is None:
            channel = open_channel(peer.grpc_address)
            if len(self._channels) >= self._limit:
                self._channels.pop(next(iter(self._channels)))
        self._channels[name] = channel  # the last in order is the one used last
        return worker_pb2_grpc.WorkerServiceStub(channel)

    async def close(self) -> None:
        for channel in self._channels.values():
            await channel.close(None)
        self._channels.clear()

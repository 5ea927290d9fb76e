"""vLLM's KV cache events, from its ZMQ publisher to KvEvent values. Needs no vLLM.

The publisher numbers its messages from 0 and keeps the last ones for replay. A gap is replayed; what cannot be had
again becomes EventsMissed. Only one group of the cache counts, the first that attends to everything: what a
sliding-window group holds says nothing about a prefix.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from tandem.engine.protocol import AllBlocksCleared, BlocksRemoved, BlocksStored, EventsMissed, KvEvent

log = logging.getLogger(__name__)

_REPLAY_TIMEOUT_S = 2.0
_HIGH_WATER = 100_000
_BATCH = 256
_END = -1


class KvEventStream:
    def __init__(
        self, endpoint: str, replay_endpoint: str, group: int, on_events: Callable[[Sequence[KvEvent]], None]
    ) -> None:
        self._replay_endpoint = replay_endpoint
        self._group = group
        self._on_events = on_events
        self._expected = 0
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.SUB)
        self._socket.set(zmq.RCVHWM, _HIGH_WATER)
        self._socket.subscribe(b"")
        self._socket.connect(endpoint)

    async def run(self) -> None:
        """Until cancelled."""
        try:
            while True:
                events: list[KvEvent] = []
                await self._receive(await self._socket.recv_multipart(), events)
                for _ in range(_BATCH):
                    try:
                        message = await self._socket.recv_multipart(zmq.NOBLOCK)
                    except zmq.Again:
                        break
                    await self._receive(message, events)
                if events:
                    self._on_events(events)
        finally:
            self._socket.close(linger=0)
            self._context.destroy(linger=0)

    async def _receive(self, message: list[bytes], events: list[KvEvent]) -> None:
        _, number, payload = message
        sequence = int.from_bytes(number, "big", signed=True)
        if sequence < self._expected:
            return  # a replay was faster
        if sequence > self._expected:
            await self._replay(sequence, events)
        self._expected = sequence + 1
        events.extend(decode_events(payload, self._group))

    async def _replay(self, until: int, events: list[KvEvent]) -> None:
        """Messages from the expected one up to ``until`` (exclusive), or EventsMissed."""
        first, missed = self._expected, True
        socket = self._context.socket(zmq.DEALER)
        try:
            socket.connect(self._replay_endpoint)
            await socket.send_multipart([b"", first.to_bytes(8, "big")])
            async with asyncio.timeout(_REPLAY_TIMEOUT_S):
                while True:
                    *_, number, payload = await socket.recv_multipart()
                    sequence = int.from_bytes(number, "big", signed=True)
                    if sequence == _END:
                        break
                    if self._expected <= sequence < until:
                        if sequence > self._expected:
                            events.append(EventsMissed())
                        self._expected = sequence + 1
                        events.extend(decode_events(payload, self._group))
            missed = self._expected < until
        except TimeoutError:
            log.warning("KV events from %d to %d were not replayed in time", self._expected, until - 1)
        finally:
            socket.close(linger=0)
        if missed:
            events.append(EventsMissed())


def decode_events(payload: bytes, group: int) -> list[KvEvent]:
    """One message of the publisher: [timestamp, [event, ...], rank], events as maps with their kind in ``type``."""
    _, events, *_ = msgspec.msgpack.decode(payload)
    decoded = (_decode(event, group) for event in events)
    return [event for event in decoded if event is not None]


def _decode(event: Mapping[str, Any], group: int) -> KvEvent | None:
    kind = event["type"]
    if kind == "AllBlocksCleared":
        return AllBlocksCleared()
    if (event.get("group_idx") or 0) != group or event.get("medium") not in (None, "GPU"):
        return None
    if kind == "BlockRemoved":
        return BlocksRemoved(event["block_hashes"])
    if kind == "BlockStored":
        lora = event.get("lora_name") or ""
        return BlocksStored(
            block_hashes=event["block_hashes"],
            parent_hash=event["parent_block_hash"],
            token_ids=event["token_ids"],
            lora=lora,
            cache_salt=_cache_salt(event, lora) if event["parent_block_hash"] is None else "",
        )
    return None


def _cache_salt(event: Mapping[str, Any], lora: str) -> str:
    """The salt is hashed into block 0, and listed after the LoRA's name among that block's extra keys."""
    keys = list((event.get("extra_keys") or [None])[0] or ())
    if lora and keys and keys[0] == lora:
        del keys[0]
    return next((key for key in keys if isinstance(key, str)), "")
